// SPDX-License-Identifier: Apache-2.0
// Tests of the CPU products with int8 activations (`+a8` and W8A8) on every instruction set, and of
// the rule that chooses between all kernels.
//
//     test_qlinear_cpu_a8 [--seed N] [--isa NAME]
//
// cpu_product.h says what a result is compared with and how far it may be off.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check_cpu.h"
#include "cpu_product.h"

namespace {

using namespace kvopt;
using namespace kvopt::test;

std::vector<QuantFormat> formats() {
  std::vector<QuantFormat> all(std::begin(kFormats), std::end(kFormats));
  all.push_back({8, 0, Scheme::kInt8Dynamic});
  return all;
}

void test_products(Random& random, Isa isa) {
  std::vector<int64_t> row_counts = {33, 100, 300};
  for (int64_t m = 0; m <= 17; ++m) row_counts.push_back(m);
  constexpr int64_t kColumns[] = {1, 5, 16, 17, 31, 64, 100, 128, 130, 255, 333, 512, 700, 1040};
  for (const QuantFormat& format : formats()) {
    for (DType type : kDTypes) {
      for (int64_t m : row_counts) {
        const Parts parts = {.bias = below(random, 2) == 0,
                             .input_scale = below(random, 3) == 0,
                             .rank = below(random, 3) == 0 ? 1 + below(random, 40) : 0,
                             .addend = below(random, 3) == 0,
                             .swiglu = below(random, 3) == 0,
                             .residual = below(random, 3) == 0};
        const int64_t k = kColumns[below(random, m > 17 ? 11 : 14)];
        const int64_t n = 1 + below(random, 100);
        const Weight weight(random, with_random_group(random, format, k),
                            parts.swiglu ? ceil_div(n, 16) * 16 : n, k);
        Problem problem(weight, m, type, parts, 8);
        problem.fill_normal(random);
        check_product(problem, isa);
      }
    }
  }
}

// Each row of a product with many rows equals, beyond fp32 rounding, the row alone.
void test_rows_alone(Random& random, Isa isa) {
  for (const QuantFormat& format : formats()) {
    const int64_t group = format.scheme == Scheme::kInt8Dynamic ? 320 : 64;
    const Weight weight(random, with_group(format, group), 70, 320);
    for (int64_t m : {2, 7, 13, 40}) {
      Problem all(weight, m, DType::kFloat32, {}, 8);
      all.fill_normal(random);
      const std::vector<uint8_t> y = all.run(isa);
      Problem one(weight, 1, DType::kFloat32, {}, 8);
      double worst = 0;
      for (int64_t row = 0; row < m; ++row) {
        std::memcpy(one.x.data, all.x.data + row * weight.k * 4, one.x.bytes);
        const std::vector<uint8_t> alone = one.run(isa);
        const std::vector<Problem::Expected> expected = one.expected(0);
        for (int64_t n = 0; n < weight.n; ++n) {
          const double off = std::fabs(value_at(DType::kFloat32, alone.data(), n) -
                                       value_at(DType::kFloat32, y.data(), row * weight.n + n));
          worst = std::max(worst, off / expected[static_cast<size_t>(n)].tolerance);
        }
      }
      check(worst <= 1.0, "rows alone: " + all.name(isa));
    }
  }
}

// A row of zeros gives the bias, and bias only.
void test_zero_rows(Random& random, Isa isa) {
  for (const QuantFormat& format : formats()) {
    const Weight weight(random, with_random_group(random, format, 200), 45, 200);
    for (int64_t m : {1, 20}) {
      Problem problem(weight, m, DType::kFloat32, {.bias = true}, 8);
      problem.fill_normal(random);
      std::memset(problem.x.data, 0, problem.x.bytes);
      const std::vector<uint8_t> y = problem.run(isa);
      bool ok = true;
      for (int64_t row = 0; row < m; ++row) {
        ok = ok && std::memcmp(y.data() + row * 45 * 4, problem.bias.data, 45 * 4) == 0;
      }
      check(ok, "zero rows: " + problem.name(isa));
    }
  }
}

void test_explain(Random& random, Isa isa) {
  const Weight weight(random, {4, 64, Scheme::kAsymmetric}, 32, 128);
  const Problem problem(weight, 3, DType::kFloat32, {}, 8);
  const QLinearParams p = problem.params();
  char text[512];
  const int length = qlinear_explain(p, isa, text, sizeof(text));
  check(length == static_cast<int>(std::strlen(text)) &&
            std::strstr(text, isa_name(isa)) != nullptr && std::strstr(text, "M=3 ") != nullptr,
        std::string("explain: ") + text);
  char small[8];
  check(qlinear_explain(p, isa, small, sizeof(small)) == length && std::strlen(small) == 7 &&
            std::strncmp(small, text, 7) == 0,
        "explain into a small buffer");
}

}  // namespace

int main(int count, char** arguments) {
  uint64_t seed = std::random_device{}();
  std::string only;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string argument = arguments[i];
    if (argument == "--seed") seed = std::strtoull(arguments[i + 1], nullptr, 10);
    if (argument == "--isa") only = arguments[i + 1];
  }
  std::vector<Isa> isas;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kVnni, Isa::kAmx}) {
    if (isa <= best_isa() && (only.empty() || only == isa_name(isa))) isas.push_back(isa);
  }
  if (isas.empty()) {
    std::fprintf(stderr, "test_qlinear_cpu_a8: this processor has no instruction set \"%s\"\n",
                 only.c_str());
    return 2;
  }
  std::printf("test_qlinear_cpu_a8: seed %llu, best instruction set %s\n",
              static_cast<unsigned long long>(seed), isa_name(best_isa()));
  Random random(seed);
  for (Isa isa : isas) {
    test_products(random, isa);
    test_rows_alone(random, isa);
    test_zero_rows(random, isa);
    for (const QuantFormat& format : formats()) check_not_finite(random, isa, format, 8);
    test_explain(random, isa);
    std::printf("  %s: %d passed, %d failed so far\n", isa_name(isa), passed, failed);
  }
  std::printf("test_qlinear_cpu_a8: seed %llu, %d passed, %d failed\n",
              static_cast<unsigned long long>(seed), passed, failed);
  return failed == 0 ? 0 : 1;
}
