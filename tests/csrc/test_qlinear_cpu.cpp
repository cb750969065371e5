// SPDX-License-Identifier: Apache-2.0
// Tests of csrc/cpu's products with 16-bit-class activations on every instruction set, without any
// framework; with --bench their speed.
//
//     test_qlinear_cpu [--seed N] [--isa NAME] [--share N] [--bench [--megabytes N] [--shape KxN]
//                      [--format NAME] [--rows M]]
//
// --share N runs a random one in N of the cases, for builds that are slow (sanitizers).
// cpu_product.h says what a result is compared with and how far it may be off.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check_cpu.h"
#include "cpu_product.h"
#include "qlinear_cpu_bench.h"

namespace {

using namespace kvopt;
using namespace kvopt::test;

constexpr int64_t kSomeM[] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,
                              10, 11, 12, 13, 14, 15, 16, 17, 33, 100};
int share = 1;

bool drawn(Random& random) { return share == 1 || below(random, share) == 0; }

void test_products(Random& random, Isa isa) {
  size_t turn = 0;
  for (const QuantFormat& format : kFormats) {
    for (int group : {16, 32, 48, 64, 128, 1024, 0}) {
      for (int64_t k : {1, 16, 17, 100, 128, 704, 1000, 1040}) {
        if (group > k) continue;
        for (int64_t n : {1, 7, 31, 33, 65}) {
          if (!drawn(random)) continue;
          const Weight weight(random, with_group(format, group == 0 ? k : group), n, k);
          ++turn;
          const int64_t m = kSomeM[turn % (std::size(kSomeM) - 1)];  // M = 100 comes below
          Problem problem(weight, m, kDTypes[turn % 3],
                          {.bias = turn % 2 == 0, .input_scale = turn % 5 == 0});
          problem.fill_normal(random);
          check_product(problem, isa);
        }
      }
    }
    const Weight weight(random, with_group(format, 128), 65, 704);
    for (int64_t m : kSomeM) {
      for (DType type : kDTypes) {
        if (!drawn(random)) continue;
        Problem problem(weight, m, type, {.bias = m % 2 == 0});
        problem.fill_normal(random);
        check_product(problem, isa);
      }
    }
  }
  const Weight weight(random, {4, 64, Scheme::kAsymmetric}, 33, 320);
  Problem problem(weight, 300, DType::kFloat32);  // more rows than a batch of any kernel
  problem.fill_normal(random);
  check_product(problem, isa);
}

// Every subset of the parts, with every type; formats and M take turns.
void test_epilogue(Random& random, Isa isa) {
  size_t turn = 0;
  constexpr int64_t kRanks[] = {1, 16, 40, 64, 5};
  for (int64_t n : {16, 48, 65, 96}) {
    for (int subset = 0; subset < 64; ++subset) {
      if ((subset & 16) != 0 && n % 16 != 0) continue;
      if (!drawn(random)) continue;
      for (DType type : kDTypes) {
        ++turn;
        const QuantFormat& format = kFormats[turn % std::size(kFormats)];
        const Weight weight(random, with_group(format, 32), n, 160);
        const Parts parts = {.bias = (subset & 1) != 0,
                             .input_scale = (subset & 2) != 0,
                             .rank = (subset & 4) != 0 ? kRanks[turn % std::size(kRanks)] : 0,
                             .addend = (subset & 8) != 0,
                             .swiglu = (subset & 16) != 0,
                             .residual = (subset & 32) != 0};
        Problem problem(weight, 1 + below(random, 18), type, parts);
        problem.fill_normal(random);
        check_product(problem, isa);
      }
    }
  }
}

// swiglu at the ends of its range: what IEEE arithmetic makes of gate / (1 + exp(-gate)) * up.
void test_swiglu_ends(Random& random, Isa isa) {
  const Weight weight(random, {8, 32, Scheme::kSymmetric}, 32, 32);
  Problem problem(weight, 1, DType::kFloat32, {.bias = true, .swiglu = true});
  std::memset(problem.x.data, 0, problem.x.bytes);
  const float infinity = std::numeric_limits<float>::infinity();
  const float gates[16] = {0.0f,   1e-30f, -1e-30f, 1.0f,   -1.0f,   20.0f,    -20.0f, 87.0f,
                           -87.0f, 88.5f,  -88.5f,  300.0f, -300.0f, infinity, 1e30f,  -1e30f};
  for (int i = 0; i < 16; ++i) {
    set_value(DType::kFloat32, problem.bias.data, i / 8 * 16 + i % 8, gates[i]);
    set_value(DType::kFloat32, problem.bias.data, i / 8 * 16 + 8 + i % 8, 0.75f);
  }
  const std::vector<uint8_t> y = problem.run(isa);
  for (int i = 0; i < 16; ++i) {
    const double gate = gates[i];
    const double want = gate / (1.0 + std::exp(-gate)) * 0.75;
    const double got = value_at(DType::kFloat32, y.data(), i);
    const bool close =
        std::isinf(want) ? got == want : std::abs(got - want) <= 1e-6 * std::abs(want) + 1e-36;
    check(close, "swiglu of " + std::to_string(gate) + " is " + std::to_string(got) + " by " +
                     isa_name(isa));
  }
}

// The relative error of the worst row, where values of an activation block are alike and where one
// dominates the others. Rounding is then all that the others have: sqrt(64 / 12) / 32639 = 7e-5 if
// it is random. The worst that activations can be is 1/2 in every column ("ties"): 1.23e-4, and
// more where the outliers meet weights below the average.
void test_precision(Random& random, Isa isa) {
  constexpr const char* kKinds[] = {"normal", "an outlier in each group", "an outlier in each 16",
                                    "equal magnitudes", "ties beside an outlier"};
  for (const QuantFormat& format : kFormats) {
    for (int group : {16, 48, 128, 1024}) {
      if (!drawn(random)) continue;
      const Weight weight(random, with_group(format, group), 288, 1024);
      std::string line;
      for (int kind = 0; kind < 5; ++kind) {
        double worst = 0;
        for (int64_t m : {1, 3, 13}) {  // enough outputs for a steady norm
          Problem problem(weight, m, DType::kFloat32);
          problem.fill_normal(random);
          const auto set = [&](int64_t at, float value) {
            set_value(problem.type, problem.x.data, at, value);
          };
          for (int64_t i = 0; kind >= 3 && i < m * weight.k; ++i) {
            float size = 1.0f - 1e-3f * static_cast<float>(below(random, 100));
            if (kind == 4) size = static_cast<float>(below(random, 100)) + 0.499f;
            set(i, random() % 2 == 0 ? size : -size);
          }
          const int64_t every = kind == 2 ? 16 : kind == 4 ? std::min(group, 64) : group;
          for (int64_t i = 0; i < m * weight.k; i += every) {
            const int64_t at = std::min(i + below(random, every), m * weight.k - 1);
            if (kind == 1 || kind == 2) set(at, 3000.0f * normal(random));
            if (kind == 4) set(at, 32639.0f);
          }
          worst = std::max(worst, errors_of(problem, problem.run(isa)).of_row);
        }
        check(worst <= (kind == 4 ? 2e-4 : kNormLimit),
              std::string("precision, ") + isa_name(isa) + ", " + kKinds[kind] + ", " +
                  name_of(with_group(format, group)) + ": " + std::to_string(worst * 1e6) + "e-6");
        char text[64];
        std::snprintf(text, sizeof(text), " %s %.1e", kKinds[kind], worst);
        line += text;
      }
      std::printf("  %-6s %-14s error:%s\n", isa_name(isa),
                  name_of(with_group(format, group)).c_str(), line.c_str());
    }
  }
}

// The largest sums that a block of a code book can reach must not wrap: all weights +-1, all x
// alike.
void test_book_does_not_overflow(Random& random, Isa isa) {
  for (Scheme scheme : {Scheme::kNf4, Scheme::kFp4}) {
    Weight weight(random, {4, 64, scheme}, 64, 256);
    std::memset(weight.packed.data, 0, weight.packed.bytes);
    for (int64_t row = 0; row < weight.n; ++row) {
      for (int64_t c = 0; c < weight.k; ++c) {
        const bool negative = row % 2 == 0;
        const int code = scheme == Scheme::kNf4 ? (negative ? 0 : 15) : (negative ? 11 : 3);
        weight.set_code(row, c, code);
      }
    }
    for (int64_t m : {1, 4, 9, 30}) {
      Problem problem(weight, m, DType::kFloat32);
      for (int64_t i = 0; i < m * weight.k; ++i) {
        set_value(problem.type, problem.x.data, i, i / weight.k % 2 == 0 ? 1.0f : 0.9999f);
      }
      check(errors_of(problem, problem.run(isa)).of_row <= kNormLimit,
            "no overflow: " + problem.name(isa));
    }
  }
}

// A row of y depends on its row of x alone, not on M; and the vector kernels agree with each other
// bit for bit.
void test_rows_are_independent(Random& random, Isa isa) {
  for (const QuantFormat& format : kFormats) {
    for (int group : {32, 48}) {
      const Weight weight(random, with_group(format, group), 80, 500);
      for (int64_t m : {2, 3, 4, 5, 7, 14, 30}) {
        if (!drawn(random)) continue;
        const Parts parts = {.bias = true, .rank = m % 3 * 20, .swiglu = m % 2 == 0};
        Problem all(weight, m, DType::kFloat32, parts);
        all.fill_normal(random);
        const std::vector<uint8_t> y = all.run(isa);
        Problem one(weight, 1, DType::kFloat32, parts);
        std::memcpy(one.bias.data, all.bias.data, all.bias.bytes);
        std::memcpy(one.low_rank_w.data, all.low_rank_w.data, all.low_rank_w.bytes);
        bool same = true;
        for (int64_t row = 0; row < m; ++row) {
          std::memcpy(one.x.data, all.x.data + row * weight.k * 4, one.x.bytes);
          std::memcpy(one.low_rank_x.data, all.low_rank_x.data + row * parts.rank * 4,
                      one.low_rank_x.bytes);
          const std::vector<uint8_t> alone = one.run(isa);
          same = same &&
                 std::memcmp(alone.data(), y.data() + row * all.outputs * 4, alone.size()) == 0;
        }
        check(same, "a row alone equals itself among others: " + all.name(isa));
        if (isa > Isa::kAvx2) check(y == all.run(Isa::kAvx2), "equal to avx2: " + all.name(isa));
      }
    }
  }
}

void test_not_finite(Random& random, Isa isa) {
  for (const QuantFormat& format : kFormats) check_not_finite(random, isa, format, 16);
  // Magnitudes near both ends of fp32, whose products are still representable.
  for (const QuantFormat& format : kFormats) {
    const Weight weight(random, with_group(format, 64), 33, 256);
    for (float factor : {1e-38f, 1e-30f, 1e-20f, 1e17f, 1e25f, 1e36f}) {
      Problem problem(weight, 3, DType::kFloat32);
      for (int64_t i = 0; i < 3 * weight.k; ++i) {
        set_value(DType::kFloat32, problem.x.data, i, factor * normal(random));
      }
      const double error = errors_of(problem, problem.run(isa)).of_row;
      check(error < kNormLimit || (factor < 1e-37f && std::isfinite(error)),
            "magnitude " + problem.name(isa));
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  uint64_t seed = std::random_device{}();
  std::string only;
  bool bench = false;
  kvopt::bench::Selection selection;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const char* value = i + 1 < count ? arguments[i + 1] : "";
    if (argument == "--bench") {
      bench = true;
    } else if (argument == "--seed") {
      seed = std::strtoull(value, nullptr, 10), ++i;
    } else if (argument == "--isa") {
      only = value, ++i;
    } else if (argument == "--share") {
      share = std::max(1, std::atoi(value)), ++i;
    } else if (long long k, n;
               argument == "--shape" && std::sscanf(value, "%lldx%lld", &k, &n) == 2) {
      selection.k = k, selection.n = n, ++i;
    } else if (argument == "--megabytes") {
      selection.megabytes = std::strtoll(value, nullptr, 10), ++i;
    } else if (argument == "--rows") {
      selection.rows = std::strtoll(value, nullptr, 10), ++i;
    } else if (argument == "--format") {
      selection.format = value, ++i;
    } else {
      std::fprintf(stderr, "test_qlinear_cpu: unknown argument %s\n", argument.c_str());
      return 2;
    }
  }
  std::vector<Isa> isas;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kVnni, Isa::kAmx}) {
    if (isa <= best_isa() && (only.empty() || only == isa_name(isa))) isas.push_back(isa);
  }
  if (isas.empty()) {
    std::fprintf(stderr, "test_qlinear_cpu: this processor has no instruction set \"%s\"\n",
                 only.c_str());
    return 2;
  }
  if (bench) {
    kvopt::bench::run(only.empty() ? std::vector<Isa>{best_isa()} : isas, selection);
    return 0;
  }
  std::printf("test_qlinear_cpu: seed %llu, best instruction set %s\n",
              static_cast<unsigned long long>(seed), isa_name(best_isa()));
  Random random(seed);
  for (Isa isa : isas) {
    test_products(random, isa);
    test_epilogue(random, isa);
    test_swiglu_ends(random, isa);
    test_book_does_not_overflow(random, isa);
    test_precision(random, isa);
    test_not_finite(random, isa);
    if (isa != Isa::kScalar && isa != Isa::kAmx) test_rows_are_independent(random, isa);
  }
  std::printf("test_qlinear_cpu: seed %llu, %d passed, %d failed\n",
              static_cast<unsigned long long>(seed), passed, failed);
  return failed == 0 ? 0 : 1;
}
