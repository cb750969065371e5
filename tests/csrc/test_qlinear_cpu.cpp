// SPDX-License-Identifier: Apache-2.0
// Tests of csrc/cpu (instruction sets, wquant, qlinear) without any framework, and with --bench
// their speed.
//
//     test_qlinear_cpu [--seed N] [--isa NAME] [--bench [--megabytes N] [--shape KxN]]
//
// A product is compared with fp64 on the weights that quant_format.h's addresses describe. Two
// measures of its error: relative to |y|, where there are enough outputs for a norm; else relative
// to the norm of sqrt(sum (w x)^2), the size that a sum of that many terms has unless they cancel.
// Buffers have exactly the promised size, for AddressSanitizer.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/params.h"
#include "cpu/float16.h"
#include "cpu/isa.h"
#include "cpu/qlinear.h"
#include "cpu/wquant.h"
#include "qlinear_cpu_bench.h"

namespace {

using namespace kvopt;
using namespace kvopt::cpu;

int passed = 0;
int failed = 0;

void check(bool ok, const std::string& what) {
  ++(ok ? passed : failed);
  if (!ok && failed <= 40) std::printf("FAILED: %s\n", what.c_str());
}

using Random = std::mt19937_64;

float normal(Random& random) { return std::normal_distribution<float>(0.0f, 1.0f)(random); }
int64_t below(Random& random, int64_t n) {
  return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

const char* dtype_name(DType t) {
  return t == DType::kFloat32 ? "fp32" : t == DType::kFloat16 ? "fp16" : "bf16";
}

// Memory of exactly `size` bytes, 64-byte aligned, filled with a pattern that is a NaN in every
// type.
struct Buffer {
  explicit Buffer(int64_t size) : bytes(static_cast<size_t>(size)) {
    data = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(64)));
    std::memset(data, 0xFF, bytes);
  }
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  size_t bytes;
  uint8_t* data;
};

float value_at(DType type, const void* data, int64_t i) {
  float value;
  load_floats(type, data, i, 1, &value);
  return value;
}

void set_value(DType type, void* data, int64_t i, float value) {
  store_floats(type, &value, 1, data, i);
}

std::string name_of(const QuantFormat& f) {
  return "int" + std::to_string(f.bits) + (f.symmetric ? " sym g" : " asym g") +
         std::to_string(f.group_size);
}

// A quantised weight, made through the addresses of quant_format.h, and its exact values.
struct Weight {
  Weight(Random& random, QuantFormat format, int64_t rows, int64_t columns)
      : f(format),
        n(rows),
        k(columns),
        packed(tile32::packed_bytes(f, n, k)),
        meta(tile32::meta_count(f, n, k) * 2),
        dense(static_cast<size_t>(n * k)) {
    std::memset(packed.data, 0, packed.bytes);
    std::memset(meta.data, 0, meta.bytes);
    uint16_t* m = reinterpret_cast<uint16_t*>(meta.data);
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t group = 0; group < group_count(f, k); ++group) {
        const float scale = 0.01f + 0.0001f * static_cast<float>(below(random, 100));
        m[tile32::scale_index(f, k, row, group)] = float_to_half(scale);
        if (!f.symmetric) {  // not always whole numbers, as some methods learn them
          const float zero = static_cast<float>(below(random, (1 << f.bits) * 16)) / 16.0f;
          m[tile32::zero_index(f, k, row, group)] = float_to_half(zero);
        }
      }
      for (int64_t column = 0; column < k; ++column) {
        const CodeAddress at = tile32::code_address(f, k, row, column);
        const int code = static_cast<int>(below(random, 1 << f.bits));
        packed.data[at.byte] = static_cast<uint8_t>(packed.data[at.byte] | (code << at.shift));
        const int64_t group = column / f.group_size;
        const double zero = f.symmetric ? symmetric_zero(f)
                                        : half_to_float(m[tile32::zero_index(f, k, row, group)]);
        dense[static_cast<size_t>(row * k + column)] =
            half_to_float(m[tile32::scale_index(f, k, row, group)]) * (code - zero);
      }
    }
  }
  QuantFormat f;
  int64_t n, k;
  Buffer packed, meta;
  std::vector<double> dense;
};

struct Problem {
  Problem(const Weight& weight, int64_t rows, DType dtype, bool with_bias)
      : w(weight),
        m(rows),
        type(dtype),
        x(m * w.k * dtype_bytes(type)),
        bias(w.n * dtype_bytes(type)),
        has_bias(with_bias) {}

  void fill_normal(Random& random) {
    for (int64_t i = 0; i < m * w.k; ++i) set_value(type, x.data, i, normal(random));
    for (int64_t i = 0; i < w.n; ++i) set_value(type, bias.data, i, normal(random));
  }

  // The whole product by the given kernels; `pieces` splits rows and tiles one by one and runs them
  // backwards.
  std::vector<uint8_t> run(Isa isa, bool pieces = false) const {
    const int64_t y_bytes = m * w.n * dtype_bytes(type);
    Buffer y(y_bytes);
    QLinearParams p = {m,
                       w.n,
                       w.k,
                       type,
                       w.f,
                       x.data,
                       w.packed.data,
                       reinterpret_cast<const uint16_t*>(w.meta.data),
                       has_bias ? bias.data : nullptr,
                       y.data,
                       nullptr};
    Buffer workspace(qlinear_workspace_bytes(p, isa));
    if (workspace.bytes != 0) p.workspace = workspace.data;
    const QLinearKernels& kernels = qlinear_kernels(isa);
    const int64_t tiles = ceil_div(w.n, tile32::kRows);
    if (pieces) {
      for (int64_t row = m; row-- > 0;) kernels.prepare(p, row, row + 1);
      for (int64_t tile = tiles; tile-- > 0;) kernels.run(p, tile, tile + 1);
    } else {
      kernels.prepare(p, 0, m);
      kernels.run(p, 0, tiles);
    }
    return std::vector<uint8_t>(y.data, y.data + y_bytes);
  }

  struct Errors {
    double of_result = 0;  // |y - exact| / |exact|
    double of_terms = 0;   // |y - exact| / | sqrt(sum (w x)^2) |
    double rounding = 0;   // the first, of the exact result rounded to the type
    bool finite = true;
  };

  Errors errors(const std::vector<uint8_t>& y) const {
    double error = 0, rounding = 0, result = 0, terms = 0;
    Errors e;
    std::vector<double> row(static_cast<size_t>(w.k));
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t c = 0; c < w.k; ++c) row[c] = value_at(type, x.data, i * w.k + c);
      for (int64_t n = 0; n < w.n; ++n) {
        double exact = has_bias ? value_at(type, bias.data, n) : 0.0;
        double squares = exact * exact;
        const double* weights = w.dense.data() + n * w.k;
        for (int64_t c = 0; c < w.k; ++c) {
          const double term = weights[c] * row[c];
          exact += term;
          squares += term * term;
        }
        uint16_t rounded[2];
        set_value(type, rounded, 0, static_cast<float>(exact));
        const double got = value_at(type, y.data(), i * w.n + n);
        e.finite = e.finite && std::isfinite(got);
        error += (got - exact) * (got - exact);
        rounding += std::pow(value_at(type, rounded, 0) - exact, 2);
        result += exact * exact;
        terms += squares;
      }
    }
    const double tiny = 1e-300;
    e.of_result = std::sqrt(error / (result + tiny));
    e.of_terms = std::sqrt(error / (terms + tiny));
    e.rounding = std::sqrt(rounding / (result + tiny));
    return e;
  }

  std::string name(Isa isa) const {
    return std::string(isa_name(isa)) + " " + name_of(w.f) + " M=" + std::to_string(m) +
           " N=" + std::to_string(w.n) + " K=" + std::to_string(w.k) + " " + dtype_name(type) +
           (has_bias ? " bias" : "");
  }

  const Weight& w;
  int64_t m;
  DType type;
  Buffer x, bias;
  bool has_bias;
};

void check_product(const Problem& problem, Isa isa) {
  const std::vector<uint8_t> y = problem.run(isa);
  check(y == problem.run(isa, true), "split ranges: " + problem.name(isa));
  const Problem::Errors e = problem.errors(y);
  const bool many = problem.m * problem.w.n >= 200 && problem.w.k >= 16;
  const double error = many ? e.of_result : e.of_terms;
  const double allowed = 1e-4 + (problem.type == DType::kFloat32   ? 0.0
                                 : many                            ? 1.02 * e.rounding
                                 : problem.type == DType::kFloat16 ? 0x1p-10
                                                                   : 0x1p-7);
  check(e.finite && error <= allowed,
        "error " + std::to_string(error * 1e6) + "e-6: " + problem.name(isa));
}

constexpr int64_t kSomeM[] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,
                              10, 11, 12, 13, 14, 15, 16, 17, 31, 100};

void test_products(Random& random, Isa isa) {
  size_t turn = 0;
  for (int bits : {4, 8}) {
    for (bool symmetric : {true, false}) {
      for (int group : {16, 32, 48, 64, 128, 1024, 0}) {
        for (int64_t k : {1, 16, 17, 100, 128, 704, 1000, 1040}) {
          if (group > k) continue;
          for (int64_t n : {1, 7, 31, 33, 65}) {
            const QuantFormat f = {bits, group == 0 ? static_cast<int32_t>(k) : group, symmetric};
            const Weight weight(random, f, n, k);
            ++turn;
            const int64_t m = kSomeM[turn % (std::size(kSomeM) - 1)];  // M = 100 comes below
            Problem problem(weight, m, kDTypes[turn % 3], turn % 2 == 0);
            problem.fill_normal(random);
            check_product(problem, isa);
          }
        }
      }
      const Weight weight(random, {bits, 128, symmetric}, 65, 704);
      for (int64_t m : kSomeM) {
        for (DType type : kDTypes) {
          Problem problem(weight, m, type, m % 2 == 0);
          problem.fill_normal(random);
          check_product(problem, isa);
        }
      }
    }
  }
}

// One value of every activation block dominates the others; and what the error is then, and without
// it.
void test_precision(Random& random, Isa isa) {
  for (int bits : {4, 8}) {
    for (int group : {16, 32, 48, 128, 1024}) {
      double worst[3] = {};
      const char* kinds[3] = {"normal", "outlier in each group", "outlier in each 16 columns"};
      for (int kind = 0; kind < 3; ++kind) {
        for (bool symmetric : {true, false}) {
          for (int64_t m : {1, 3, 13}) {  // enough outputs for a steady norm
            const Weight weight(random, {bits, group, symmetric}, 288, 1024);
            Problem problem(weight, m, DType::kFloat32, false);
            problem.fill_normal(random);
            const int64_t every = kind == 1 ? group : 16;
            for (int64_t i = 0; i < m * weight.k; i += every) {
              const int64_t at = std::min(i + below(random, every), m * weight.k - 1);
              if (kind != 0) set_value(problem.type, problem.x.data, at, 3000.0f * normal(random));
            }
            worst[kind] = std::max(worst[kind], problem.errors(problem.run(isa)).of_result);
          }
        }
        check(worst[kind] <= 1e-4, std::string("precision, ") + kinds[kind]);
      }
      std::printf(
          "  %-6s int%d g%-4d error: normal %.1e, an outlier in each group %.1e, each 16 %.1e\n",
          isa_name(isa), bits, group, worst[0], worst[1], worst[2]);
    }
  }
}

// A row of y depends on its row of x alone, not on M; and the vector kernels agree with each other
// bit for bit.
void test_rows_are_independent(Random& random, Isa isa) {
  for (int bits : {4, 8}) {
    for (bool symmetric : {true, false}) {
      const Weight weight(random, {bits, 48, symmetric}, 65, 500);
      for (int64_t m : {2, 3, 4, 5, 14, 30}) {
        Problem all(weight, m, DType::kFloat32, true);
        all.fill_normal(random);
        const std::vector<uint8_t> y = all.run(isa);
        Problem one(weight, 1, DType::kFloat32, true);
        std::memcpy(one.bias.data, all.bias.data, all.bias.bytes);
        bool same = true;
        for (int64_t row = 0; row < m; ++row) {
          std::memcpy(one.x.data, all.x.data + row * weight.k * 4, one.x.bytes);
          const std::vector<uint8_t> alone = one.run(isa);
          same =
              same && std::memcmp(alone.data(), y.data() + row * weight.n * 4, alone.size()) == 0;
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
  for (int bits : {4, 8}) {
    for (bool symmetric : {true, false}) {
      for (DType type : kDTypes) {
        for (int64_t m : {1, 2, 5, 29}) {
          const Weight weight(random, {bits, 32, symmetric}, 41, 100);
          Problem problem(weight, m, type, true);
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
  const Weight weight(random, {4, 64, false}, 33, 256);
  for (float factor : {1e-38f, 1e-30f, 1e-20f, 1e17f, 1e25f, 1e36f}) {
    Problem problem(weight, 3, DType::kFloat32, false);
    for (int64_t i = 0; i < 3 * weight.k; ++i) {
      set_value(DType::kFloat32, problem.x.data, i, factor * normal(random));
    }
    const Problem::Errors e = problem.errors(problem.run(isa));
    check(e.finite && (e.of_result < 1e-4 || factor < 1e-37f), "magnitude " + problem.name(isa));
  }
}

// ---- wquant
// ------------------------------------------------------------------------------------------------------

// The nearest fp16 value, ties to even, without bit arithmetic.
double nearest_half(double value) {
  if (value == 0.0 || std::isnan(value)) return value;
  if (std::abs(value) >= 65520.0) return std::copysign(HUGE_VAL, value);
  const int exponent = std::max(std::ilogb(value), -14) - 10;
  return std::ldexp(std::nearbyint(std::ldexp(value, -exponent)), exponent);
}

void test_conversions() {
  bool halves = true, ties = true, bfloats = true;
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t bits = static_cast<uint16_t>(h);
    const float value = half_to_float(bits);
    const int exponent = (h >> 10) & 31;
    const int mantissa = h & 1023;
    if (exponent == 31) {
      halves = halves && (mantissa != 0 ? std::isnan(value) : std::isinf(value)) &&
               std::signbit(value) == (h >= 32768);
      if (mantissa != 0) halves = halves && std::isnan(half_to_float(float_to_half(value)));
      if (mantissa == 0) halves = halves && float_to_half(value) == bits;
      continue;
    }
    const double want =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    halves = halves && value == (h >= 32768 ? -want : want) && float_to_half(value) == bits;
    if ((h & 0x7fff) == 0x7bff) continue;
    // Halfway to the next value away from zero, and one fp32 step to either side.
    const float middle = 0.5f * value + 0.5f * half_to_float(static_cast<uint16_t>(h + 1));
    for (float v : {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, 2.0f * middle)}) {
      ties = ties && half_to_float(float_to_half(v)) == nearest_half(v);
    }
  }
  for (float v : {65504.0f, 65519.0f, 65520.0f, 1e30f, 1e-30f, 1e-45f, -65519.99f}) {
    ties = ties && half_to_float(float_to_half(v)) == nearest_half(v);
  }
  for (uint32_t b = 0; b < 0x7f80; ++b) {
    const float low = bfloat16_to_float(static_cast<uint16_t>(b));
    const float middle = float_from_bits((b << 16) | 0x8000u);
    bfloats = bfloats && float_to_bfloat16(low) == b && float_to_bfloat16(middle) == b + (b & 1) &&
              float_to_bfloat16(-middle) == (0x8000 | (b + (b & 1))) &&
              float_to_bfloat16(float_from_bits(float_bits(middle) + 1)) == b + 1 &&
              float_to_bfloat16(float_from_bits(float_bits(middle) - 1)) == b;
  }
  bfloats =
      bfloats && std::isnan(bfloat16_to_float(float_to_bfloat16(float_from_bits(0x7f800001u))));
  check(halves, "fp16 round trip");
  check(ties, "fp32 to fp16 rounding");
  check(bfloats, "bf16 rounding");
}

// params.h, word by word.
void rtn_of_group(const QuantFormat& f, const std::vector<float>& w, std::vector<int>* codes,
                  double* scale_out, double* zero_out) {
  const float q = static_cast<float>((1 << f.bits) - 1);
  float low = 0, high = 0;
  for (float v : w) {
    low = std::min(low, v);
    high = std::max(high, v);
  }
  const float largest = std::max(-low, high);
  float scale = !f.symmetric ? (high - low) / q : f.bits == 8 ? largest / 127 : 2 * largest / q;
  scale = std::max(static_cast<float>(nearest_half(scale)), 0x1p-24f);
  const float zero = f.symmetric ? static_cast<float>(1 << (f.bits - 1))
                                 : std::clamp(std::nearbyint(-low / scale), 0.0f, q);
  codes->clear();
  for (float v : w) {
    codes->push_back(static_cast<int>(std::clamp(std::nearbyint(v / scale) + zero, 0.0f, q)));
  }
  *scale_out = scale;
  *zero_out = zero;
}

void test_wquant_case(Random& random, const QuantFormat& f, int64_t n, int64_t k, DType type) {
  const std::string name =
      name_of(f) + " N=" + std::to_string(n) + " K=" + std::to_string(k) + " " + dtype_name(type);
  const int64_t groups = group_count(f, k);
  Buffer weight(n * k * dtype_bytes(type)), codes(n * k), scale(n * groups * 2),
      zero(n * groups * 2);
  const float size = std::ldexp(1.0f, static_cast<int>(below(random, 30)) - 24);
  for (int64_t i = 0; i < n * k; ++i) {
    const float positive =
        i / k % 3 == 1 ? 3.0f : 0.0f;     // some rows have no zero inside their range
    const bool nothing = i / k % 7 == 6;  // some rows are all zero
    set_value(type, weight.data, i, nothing ? 0.0f : size * (normal(random) + positive));
  }
  uint16_t* scales = reinterpret_cast<uint16_t*>(scale.data);
  uint16_t* zeros = reinterpret_cast<uint16_t*>(zero.data);
  for (int64_t row = 0; row < n; row += 32) {
    wquant_rtn({n, k, type, f, weight.data, codes.data, scales, zeros}, row, std::min(row + 32, n));
  }
  bool rtn = true;
  for (int64_t i = 0; i < n * groups; ++i) {
    const int64_t begin = i % groups * f.group_size;
    const int64_t end = std::min<int64_t>(begin + f.group_size, k);
    std::vector<float> w;
    for (int64_t c = begin; c < end; ++c) {
      w.push_back(value_at(type, weight.data, i / groups * k + c));
    }
    std::vector<int> want;
    double want_scale, want_zero;
    rtn_of_group(f, w, &want, &want_scale, &want_zero);
    rtn = rtn && half_to_float(scales[i]) == want_scale && half_to_float(zeros[i]) == want_zero;
    for (int64_t c = begin; c < end; ++c) {
      rtn = rtn && codes.data[i / groups * k + c] == want[c - begin];
    }
  }
  check(rtn, "rtn " + name);

  Buffer packed(tile32::packed_bytes(f, n, k)), meta(tile32::meta_count(f, n, k) * 2);
  uint16_t* metas = reinterpret_cast<uint16_t*>(meta.data);
  if (!f.symmetric) {
    for (int64_t i = 0; i < n * groups; ++i) zeros[i] = float_to_half(normal(random) + 7.0f);
  }
  for (int64_t row = 0; row < n; row += 32) {
    wquant_pack({n, k, f, codes.data, scales, zeros, packed.data, metas}, row,
                std::min(row + 32, n));
  }
  Buffer wanted(static_cast<int64_t>(packed.bytes)), wanted_meta(static_cast<int64_t>(meta.bytes));
  std::memset(wanted.data, 0, wanted.bytes);
  std::memset(wanted_meta.data, 0, wanted_meta.bytes);
  uint16_t* wanted_metas = reinterpret_cast<uint16_t*>(wanted_meta.data);
  Buffer dense(n * k * dtype_bytes(type)), wanted_dense(n * k * dtype_bytes(type));
  for (int64_t i = 0; i < n * k; ++i) {
    const CodeAddress at = tile32::code_address(f, k, i / k, i % k);
    wanted.data[at.byte] = static_cast<uint8_t>(wanted.data[at.byte] | codes.data[i] << at.shift);
    const int64_t group = i / k * groups + i % k / f.group_size;
    set_value(type, wanted_dense.data, i,
              half_to_float(scales[group]) *
                  (static_cast<float>(codes.data[i]) - half_to_float(zeros[group])));
  }
  for (int64_t i = 0; i < n * groups; ++i) {
    wanted_metas[tile32::scale_index(f, k, i / groups, i % groups)] = scales[i];
    if (!f.symmetric) wanted_metas[tile32::zero_index(f, k, i / groups, i % groups)] = zeros[i];
  }
  check(std::memcmp(packed.data, wanted.data, packed.bytes) == 0 &&
            std::memcmp(meta.data, wanted_meta.data, meta.bytes) == 0,
        "pack " + name);

  Buffer codes2(n * k), scale2(n * groups * 2), zero2(n * groups * 2);
  wquant_unpack({n, k, f, codes2.data, reinterpret_cast<uint16_t*>(scale2.data),
                 reinterpret_cast<uint16_t*>(zero2.data), packed.data, metas},
                0, n);
  check(std::memcmp(codes.data, codes2.data, codes.bytes) == 0 &&
            std::memcmp(scale.data, scale2.data, scale.bytes) == 0 &&
            std::memcmp(zero.data, zero2.data, zero.bytes) == 0,
        "unpack " + name);
  wquant_dequantize({n, k, type, f, packed.data, metas, dense.data}, 0, n);
  check(std::memcmp(dense.data, wanted_dense.data, dense.bytes) == 0, "dequantize " + name);
}

void test_wquant(Random& random) {
  for (int bits : {4, 8}) {
    for (bool symmetric : {true, false}) {
      for (int group : {16, 32, 48, 64, 128, 1024, 0}) {
        for (int64_t k : {1, 5, 17, 100, 704, 1040}) {
          if (group > k) continue;
          for (int64_t n : {1, 31, 32, 65}) {
            const QuantFormat f = {bits, group == 0 ? static_cast<int32_t>(k) : group, symmetric};
            for (DType type : kDTypes) test_wquant_case(random, f, n, k, type);
          }
        }
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  uint64_t seed = std::random_device{}();
  std::string only;
  bool bench = false;
  int64_t megabytes = 1024;
  long long only_k = 0, only_n = 0;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const char* value = i + 1 < count ? arguments[i + 1] : "";
    if (argument == "--bench") {
      bench = true;
    } else if (argument == "--seed") {
      seed = std::strtoull(value, nullptr, 10), ++i;
    } else if (argument == "--isa") {
      only = value, ++i;
    } else if (argument == "--shape" && std::sscanf(value, "%lldx%lld", &only_k, &only_n) == 2) {
      ++i;
    } else if (argument == "--megabytes") {
      megabytes = std::strtoll(value, nullptr, 10), ++i;
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
    kvopt::bench::run(only.empty() ? std::vector<Isa>{best_isa()} : isas, megabytes, only_k,
                      only_n);
    return 0;
  }
  std::printf("test_qlinear_cpu: seed %llu, best instruction set %s\n",
              static_cast<unsigned long long>(seed), isa_name(best_isa()));
  Random random(seed);
  test_conversions();
  test_wquant(random);
  for (Isa isa : isas) {
    test_products(random, isa);
    test_precision(random, isa);
    test_not_finite(random, isa);
    if (isa != Isa::kScalar) test_rows_are_independent(random, isa);
  }
  std::printf("test_qlinear_cpu: %d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
