// SPDX-License-Identifier: Apache-2.0
// Tests of csrc/cpu's products with 16-bit-class activations, without any framework; with --bench
// their speed.
//
//     test_qlinear_cpu [--seed N] [--isa NAME] [--bench [--megabytes N] [--shape KxN]
//                      [--format NAME] [--rows M]]
//
// A product is compared with fp64 on the weights that quant_format.h's addresses describe. Two
// measures of its error: relative to |y|, where there are enough outputs for a norm; else relative
// to the norm of sqrt(sum (w x)^2), the size that a sum of that many terms has unless they cancel.
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
#include "qlinear_cpu_bench.h"

namespace {

using namespace kvopt;
using namespace kvopt::test;

void check_product(const Problem& problem, Isa isa) {
  const std::vector<uint8_t> y = problem.run(isa);
  check(y == problem.run(isa, true), "split ranges: " + problem.name(isa));
  const Problem::Errors e = problem.errors(y);
  const bool many = problem.m * problem.outputs >= 200 && problem.w.k >= 16;
  // Both factors of swiglu carry the error of a product.
  const double limit = problem.parts.swiglu ? 2e-4 : 1e-4;
  if (many) {
    const double allowed = limit + (problem.type == DType::kFloat32 ? 0.0 : 1.02 * e.rounding);
    check(e.finite && e.of_result <= allowed,
          "error " + std::to_string(e.of_result * 1e6) + "e-6: " + problem.name(isa));
    return;
  }
  // A few elements: the limit is one of norms, a single element strays four times as far; the
  // result is rounded once; where every weight is 0, what zero points cancel to remains.
  const double unit = problem.type == DType::kFloat32   ? 0.0
                      : problem.type == DType::kFloat16 ? 0x1p-11
                                                        : 0x1p-8;
  const double allowed = 4 * limit * e.terms + 1.02 * unit * e.result + 1e-6;
  check(e.finite && e.absolute <= allowed,
        "error " + std::to_string(e.absolute) + " of few: " + problem.name(isa));
}

constexpr int64_t kSomeM[] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,
                              10, 11, 12, 13, 14, 15, 16, 17, 33, 100};

void test_products(Random& random, Isa isa) {
  size_t turn = 0;
  for (const QuantFormat& format : kFormats) {
    for (int group : {16, 32, 48, 64, 128, 1024, 0}) {
      for (int64_t k : {1, 16, 17, 100, 128, 704, 1000, 1040}) {
        if (group > k) continue;
        for (int64_t n : {1, 7, 31, 33, 65}) {
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
        Problem problem(weight, m, type, {.bias = m % 2 == 0});
        problem.fill_normal(random);
        check_product(problem, isa);
      }
    }
  }
}

// Every subset of the parts, with every type; formats and M take turns.
void test_epilogue(Random& random, Isa isa) {
  size_t turn = 0;
  constexpr int64_t kRanks[] = {1, 16, 40, 64, 5};
  for (int64_t n : {16, 48, 65, 96}) {
    for (int subset = 0; subset < 64; ++subset) {
      if ((subset & 16) != 0 && n % 16 != 0) continue;
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

// One value of every activation block dominates the others; and what the error is then, and without
// it.
void test_precision(Random& random, Isa isa) {
  for (const QuantFormat& format : kFormats) {
    for (int group : {16, 48, 128, 1024}) {
      const char* kinds[4] = {"normal", "an outlier in each group", "an outlier in each 16 columns",
                              "equal magnitudes"};
      double worst[4] = {};
      for (int kind = 0; kind < 4; ++kind) {
        for (int64_t m : {1, 3, 13}) {  // enough outputs for a steady norm
          const Weight weight(random, with_group(format, group), 288, 1024);
          Problem problem(weight, m, DType::kFloat32);
          problem.fill_normal(random);
          const int64_t every = kind == 1 ? group : 16;
          for (int64_t i = 0; i < m * weight.k; i += every) {
            const int64_t at = std::min(i + below(random, every), m * weight.k - 1);
            if (kind == 1 || kind == 2) {
              set_value(problem.type, problem.x.data, at, 3000.0f * normal(random));
            }
          }
          for (int64_t i = 0; kind == 3 && i < m * weight.k; ++i) {
            const float size = 1.0f - 1e-3f * static_cast<float>(below(random, 100));
            set_value(problem.type, problem.x.data, i, random() % 2 == 0 ? size : -size);
          }
          worst[kind] = std::max(worst[kind], problem.errors(problem.run(isa)).of_result);
        }
        // Under one dominating value rounding adds up to sqrt(64) / 2 / 32639 = 1.23e-4 at worst.
        check(worst[kind] <= (kind == 1 || kind == 2 ? 1.25e-4 : 1e-4),
              std::string("precision, ") + kinds[kind] + ", " + name_of(with_group(format, group)));
      }
      std::printf("  %-6s %-14s error: normal %.1e, %s %.1e, each 16 %.1e, %s %.1e\n",
                  isa_name(isa), name_of(with_group(format, group)).c_str(), worst[0], kinds[1],
                  worst[1], worst[2], kinds[3], worst[3]);
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
        write_code(weight.f, weight.k, weight.packed.data, row, c, code);
        const float scale = half_to_float(
            weight.meta.halves()[tile32::scale_index(weight.f, weight.k, row, c / 64)]);
        weight.dense[static_cast<size_t>(row * weight.k + c)] = negative ? -scale : scale;
      }
    }
    for (int64_t m : {1, 4, 9, 30}) {
      Problem problem(weight, m, DType::kFloat32);
      for (int64_t i = 0; i < m * weight.k; ++i) {
        set_value(problem.type, problem.x.data, i, i / weight.k % 2 == 0 ? 1.0f : 0.9999f);
      }
      const Problem::Errors e = problem.errors(problem.run(isa));
      check(e.finite && e.of_result <= 1e-4, "no overflow: " + problem.name(isa));
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

// What a plain linear over the dequantised weights would show, with IEEE rules term by term.
void test_not_finite(Random& random, Isa isa) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const QuantFormat& format : kFormats) {
    {
      for (DType type : kDTypes) {
        for (int64_t m : {1, 2, 5, 29}) {
          const Weight weight(random, with_group(format, 32), 41, 100);
          Problem problem(weight, m, type, {.bias = true});
          problem.fill_normal(random);
          const std::vector<uint8_t> before = problem.run(isa);
          const int64_t row = below(random, m);
          for (int kind = 0; kind < 5; ++kind) {
            const std::vector<uint8_t> saved(problem.x.data, problem.x.data + problem.x.bytes);
            const int64_t at = row * weight.k + below(random, weight.k);
            const int64_t other = row * weight.k + below(random, weight.k);
            if (kind == 0) set_value(type, problem.x.data, at, nan);
            if (kind == 1) set_value(type, problem.x.data, at, infinity);
            if (kind == 2) set_value(type, problem.x.data, at, -infinity);
            if (kind == 3) {
              set_value(type, problem.x.data, at, infinity);
              set_value(type, problem.x.data, other, -infinity);
            }
            if (kind == 4) {
              for (int64_t c = 0; c < weight.k; ++c) {
                const float x = value_at(type, problem.x.data, row * weight.k + c);
                set_value(type, problem.x.data, row * weight.k + c,
                          x * (type == DType::kFloat16 ? 0x1p-20f : 1e-36f));
              }
            }
            const std::vector<uint8_t> y = problem.run(isa);
            bool ok = true;
            for (int64_t i = 0; i < m * weight.n; ++i) {
              const float got = value_at(type, y.data(), i);
              if (i / weight.n != row) {
                ok = ok && std::memcmp(&y[i * dtype_bytes(type)], &before[i * dtype_bytes(type)],
                                       dtype_bytes(type)) == 0;
                continue;
              }
              double want = value_at(type, problem.bias.data, i % weight.n);
              for (int64_t c = 0; c < weight.k; ++c) {
                want += static_cast<double>(value_at(type, problem.x.data, row * weight.k + c)) *
                        weight.dense[(i % weight.n) * weight.k + c];
              }
              if (std::isnan(want)) {
                ok = ok && std::isnan(got);
              } else if (std::isinf(want)) {
                ok = ok && got == want;
              } else {
                ok = ok && std::abs(got - want) <= 0.01 * std::abs(want);
              }
            }
            check(ok, "not finite or vanishing, kind " + std::to_string(kind) + ": " +
                          problem.name(isa));
            std::memcpy(problem.x.data, saved.data(), saved.size());
          }
        }
      }
    }
  }
  // Magnitudes near both ends of fp32, whose products are still representable.
  for (const QuantFormat& format : kFormats) {
    const Weight weight(random, with_group(format, 64), 33, 256);
    for (float factor : {1e-38f, 1e-30f, 1e-20f, 1e17f, 1e25f, 1e36f}) {
      Problem problem(weight, 3, DType::kFloat32);
      for (int64_t i = 0; i < 3 * weight.k; ++i) {
        set_value(DType::kFloat32, problem.x.data, i, factor * normal(random));
      }
      const Problem::Errors e = problem.errors(problem.run(isa));
      check(e.finite && (e.of_result < 1e-4 || factor < 1e-37f), "magnitude " + problem.name(isa));
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
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kVnni}) {
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
    if (isa != Isa::kScalar) test_rows_are_independent(random, isa);
  }
  std::printf("test_qlinear_cpu: %d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
