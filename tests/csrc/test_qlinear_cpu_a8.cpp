// SPDX-License-Identifier: Apache-2.0
// Tests of the CPU products with int8 activations (`+a8` and W8A8) on every instruction set, of the
// AMX kernels at 16-bit activations, and of the rule that chooses between them.
//
//     test_qlinear_cpu_a8 [--seed N] [--isa NAME]
//
// With int8 activations the rule of qlinear_a8.h leaves fp32 rounding of sums as the only freedom:
// every element must lie within a few fp32 steps of the sum of its terms' magnitudes from the value
// that fp64 gives for the same codes. With 16-bit activations the limit is a relative error of 1e-4
// from the exact product. Buffers have exactly the promised size, for AddressSanitizer.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "common/params.h"
#include "cpu/float16.h"
#include "cpu/isa.h"
#include "cpu/qlinear.h"

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

double type_step(DType t) {  // half a step of the last place, relative
  return t == DType::kFloat32 ? 0x1p-24 : t == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
}

// Exactly `size` bytes, 64-byte aligned, filled with a pattern that is a NaN in every type.
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

// A packed weight, written through the addresses of quant_format.h, its codes and its metadata.
struct Weight {
  Weight(Random& random, QuantFormat format, int64_t rows, int64_t columns)
      : f(format),
        n(rows),
        k(columns),
        packed(tile32::packed_bytes(f, n, k)),
        meta(tile32::meta_count(f, n, k) * 2),
        codes(static_cast<size_t>(n * k)) {
    std::memset(packed.data, 0, packed.bytes);
    std::memset(meta.data, 0, meta.bytes);
    uint16_t* m = reinterpret_cast<uint16_t*>(meta.data);
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t group = 0; group < group_count(f, k); ++group) {
        const float scale = 0.01f + 0.0001f * static_cast<float>(below(random, 100));
        m[tile32::scale_index(f, k, row, group)] = float_to_half(scale);
        if (f.has_zeros()) {  // not always whole numbers, as some methods learn them
          const float zero = static_cast<float>(below(random, (1 << f.bits) * 16)) / 16.0f;
          m[tile32::zero_index(f, k, row, group)] = float_to_half(zero);
        }
      }
      for (int64_t column = 0; column < k; ++column) {
        const uint32_t code = static_cast<uint32_t>(below(random, 1 << f.bits));
        codes[static_cast<size_t>(row * k + column)] = static_cast<uint8_t>(code);
        const CodePieces pieces = tile32::code_pieces(f, k, row, column);
        for (int32_t i = 0; i < pieces.count; ++i) {
          const CodePiece& piece = pieces.piece[i];
          uint32_t word;
          std::memcpy(&word, packed.data + piece.word * 4, 4);
          word |= ((code >> piece.from) & ((1u << piece.bits) - 1u)) << piece.shift;
          std::memcpy(packed.data + piece.word * 4, &word, 4);
        }
      }
    }
  }
  double scale(int64_t row, int64_t group) const {
    return half_to_float(
        reinterpret_cast<const uint16_t*>(meta.data)[tile32::scale_index(f, k, row, group)]);
  }
  double zero(int64_t row, int64_t group) const {
    if (!f.has_zeros()) return symmetric_zero(f);
    return half_to_float(
        reinterpret_cast<const uint16_t*>(meta.data)[tile32::zero_index(f, k, row, group)]);
  }
  // What multiplies the scale.
  double factor(int64_t row, int64_t column) const {
    const int code = codes[static_cast<size_t>(row * k + column)];
    if (f.has_book()) return book_value(f.scheme, code);
    return code - zero(row, column / f.group_size);
  }
  QuantFormat f;
  int64_t n, k;
  Buffer packed, meta;
  std::vector<uint8_t> codes;
};

struct Options {
  bool bias = false, swiglu = false, input_scale = false, residual = false;
  int64_t rank = 0;
};

struct Problem {
  Problem(Random& random, const Weight& weight, int64_t rows, DType dtype, int activation_bits,
          Options what)
      : w(weight),
        m(rows),
        type(dtype),
        bits(activation_bits),
        o(what),
        x(m * w.k * dtype_bytes(type)),
        bias(w.n * dtype_bytes(type)),
        input_scale(w.k * dtype_bytes(type)),
        low_x(m * o.rank * dtype_bytes(type)),
        low_w(w.n * o.rank * dtype_bytes(type)),
        residual(m * columns() * dtype_bytes(type)) {
    fill(random, &x, m * w.k);
    fill(random, &bias, w.n);
    for (int64_t i = 0; i < w.k; ++i) {
      set_value(type, input_scale.data, i, 0.5f + 0.01f * static_cast<float>(below(random, 100)));
    }
    fill(random, &low_x, m * o.rank);
    fill(random, &low_w, w.n * o.rank);
    fill(random, &residual, m * columns());
  }

  void fill(Random& random, Buffer* buffer, int64_t count) {
    for (int64_t i = 0; i < count; ++i) set_value(type, buffer->data, i, normal(random));
  }

  int64_t columns() const { return o.swiglu ? w.n / 2 : w.n; }

  QLinearParams params() const {
    QLinearParams p = {};
    p.m = m;
    p.n = w.n;
    p.k = w.k;
    p.dtype = type;
    p.format = w.f;
    p.x = x.data;
    p.packed = w.packed.data;
    p.meta = reinterpret_cast<const uint16_t*>(w.meta.data);
    p.bias = o.bias ? bias.data : nullptr;
    p.activation_bits = bits;
    p.swiglu = o.swiglu;
    p.input_scale = o.input_scale ? input_scale.data : nullptr;
    p.low_rank_x = o.rank > 0 ? low_x.data : nullptr;
    p.low_rank_w = o.rank > 0 ? low_w.data : nullptr;
    p.rank = o.rank;
    p.residual = o.residual ? residual.data : nullptr;
    return p;
  }

  // `pieces` splits rows and tiles one by one and runs them backwards.
  std::vector<uint8_t> run(Isa isa, bool pieces = false) const {
    QLinearParams p = params();
    const int64_t y_bytes = m * columns() * dtype_bytes(type);
    Buffer y(y_bytes);
    p.y = y.data;
    const QLinearKernels& kernels = qlinear_kernels(p, isa);
    Buffer workspace(kernels.workspace_bytes(p));
    if (workspace.bytes != 0) p.workspace = workspace.data;
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

  float input(int64_t row, int64_t column) const {
    const float v = value_at(type, x.data, row * w.k + column);
    return o.input_scale ? v * value_at(type, input_scale.data, column) : v;
  }

  // The product before the epilogue, exact for the activations the rule gives, and the sum of its
  // terms' magnitudes.
  struct Product {
    std::vector<double> value, magnitude;
  };

  Product product() const {
    const bool int8 = bits == 8 || w.f.scheme == Scheme::kInt8Dynamic;
    Product result;
    std::vector<double> v(static_cast<size_t>(w.k));
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t begin = 0; begin < w.k; begin += w.f.group_size) {
        const int64_t end = std::min<int64_t>(begin + w.f.group_size, w.k);
        float largest = 0;
        for (int64_t c = begin; c < end; ++c) largest = std::max(largest, std::fabs(input(row, c)));
        const float s = largest / 127.0f;
        for (int64_t c = begin; c < end; ++c) {
          v[c] = input(row, c);
          if (int8)
            v[c] = s == 0 ? 0.0 : static_cast<double>(s) * std::nearbyint(input(row, c) / s);
        }
      }
      for (int64_t n = 0; n < w.n; ++n) {
        double value = 0, magnitude = 0;
        for (int64_t c = 0; c < w.k; ++c) {
          double factor = w.factor(n, c);
          if (int8 && w.f.has_book()) {  // in steps of 1/7854 and 1/192
            const double steps = w.f.scheme == Scheme::kNf4 ? 7854 : 192;
            factor = std::round(factor * steps) / steps;
          }
          const double term = w.scale(n, c / w.f.group_size) * factor * v[c];
          value += term;
          // Codes and zero points are also summed apart.
          magnitude += std::fabs(term) + std::fabs(w.scale(n, c / w.f.group_size) * v[c]);
        }
        result.value.push_back(value);
        result.magnitude.push_back(magnitude);
      }
    }
    return result;
  }

  struct Expected {
    std::vector<double> value, tolerance;
  };

  // `step`: how far the product may be off, relative to the sum of magnitudes.
  Expected expected(double step) const {
    const Product p = product();
    Expected e;
    for (int64_t row = 0; row < m; ++row) {
      std::vector<double> sums(static_cast<size_t>(w.n)), errors(static_cast<size_t>(w.n));
      for (int64_t n = 0; n < w.n; ++n) {
        double value = p.value[row * w.n + n], magnitude = p.magnitude[row * w.n + n];
        errors[n] = step * magnitude;
        if (o.bias) value += value_at(type, bias.data, n);
        for (int64_t r = 0; r < o.rank; ++r) {
          const double term = static_cast<double>(value_at(type, low_x.data, row * o.rank + r)) *
                              value_at(type, low_w.data, n * o.rank + r);
          value += term;
          magnitude += std::fabs(term);
        }
        sums[n] = value;
        errors[n] += 4e-6 * (magnitude + std::fabs(value));
      }
      for (int64_t c = 0; c < columns(); ++c) {
        double value = sums[c], error = errors[c];
        if (o.swiglu) {
          const int64_t gate = c / 8 * 16 + c % 8, up = gate + 8;
          const double silu = sums[gate] / (1.0 + std::exp(-sums[gate]));
          value = silu * sums[up];
          error = 1.2 * errors[gate] * std::fabs(sums[up]) + errors[up] * std::fabs(silu) +
                  errors[gate] * errors[up] + 4e-6 * std::fabs(value);
        }
        if (o.residual) value += value_at(type, residual.data, row * columns() + c);
        e.value.push_back(value);
        e.tolerance.push_back(error + 1.01 * type_step(type) * std::fabs(value) + 1e-6);
      }
    }
    return e;
  }

  std::string name(Isa isa) const {
    std::string text = isa_name(isa);
    QLinearParams p = params();
    char line[400];
    qlinear_explain(p, isa, line, sizeof(line));
    text += std::string(" ") + dtype_name(type) + " bias=" + (o.bias ? "1" : "0") +
            " swiglu=" + (o.swiglu ? "1" : "0") + " input_scale=" + (o.input_scale ? "1" : "0") +
            " rank=" + std::to_string(o.rank) + " residual=" + (o.residual ? "1" : "0") + " " +
            line;
    return text;
  }

  const Weight& w;
  int64_t m;
  DType type;
  int bits;
  Options o;
  Buffer x, bias, input_scale, low_x, low_w, residual;
};

void check_problem(const Problem& problem, Isa isa) {
  const bool int8 = problem.bits == 8 || problem.w.f.scheme == Scheme::kInt8Dynamic;
  const std::vector<uint8_t> y = problem.run(isa);
  check(y == problem.run(isa), "same twice: " + problem.name(isa));
  check(y == problem.run(isa, true), "split ranges: " + problem.name(isa));
  const Problem::Expected e = problem.expected(int8 ? 1e-6 : 1e-4);
  double worst = 0;
  for (size_t i = 0; i < e.value.size(); ++i) {
    const double got = value_at(problem.type, y.data(), static_cast<int64_t>(i));
    const double off = std::fabs(got - e.value[i]) / e.tolerance[i];
    worst = off <= worst ? worst : off;  // a NaN becomes the worst
  }
  check(worst <= 1.0, "error " + std::to_string(worst) + " of the allowed: " + problem.name(isa));
}

std::vector<QuantFormat> formats() {
  std::vector<QuantFormat> all;
  for (int bits : {2, 3, 4, 8}) {
    all.push_back({bits, 0, Scheme::kAsymmetric});
    all.push_back({bits, 0, Scheme::kSymmetric});
  }
  all.push_back({4, 0, Scheme::kNf4});
  all.push_back({4, 0, Scheme::kFp4});
  all.push_back({8, 0, Scheme::kInt8Dynamic});
  return all;
}

QuantFormat with_random_group(Random& random, QuantFormat f, int64_t k) {
  constexpr int32_t kGroups[] = {16, 32, 48, 64, 128, 256, 1024, 0};
  do {
    f.group_size = kGroups[below(random, 8)];
  } while (f.group_size > k);
  if (f.group_size == 0 || f.scheme == Scheme::kInt8Dynamic) f.group_size = static_cast<int32_t>(k);
  return f;
}

void test_products(Random& random, Isa isa) {
  std::vector<int64_t> row_counts;
  for (int64_t m = 1; m <= 17; ++m) row_counts.push_back(m);
  for (int64_t m : {33, 100, 300}) row_counts.push_back(m);
  constexpr int64_t kColumns[] = {1, 5, 16, 17, 31, 64, 100, 128, 130, 255, 333, 512, 700, 1040};
  for (const QuantFormat& base : formats()) {
    for (DType type : kDTypes) {
      for (int64_t m : row_counts) {
        for (int activation_bits : {8, 16}) {
          // The 16-bit kernels of other instruction sets are tested in test_qlinear_cpu.
          if (activation_bits == 16 && isa != Isa::kAmx) continue;
          if (activation_bits == 16 && base.scheme == Scheme::kInt8Dynamic) continue;
          Options o;
          o.bias = below(random, 2) == 0;
          o.input_scale = below(random, 3) == 0;
          o.swiglu = below(random, 3) == 0;
          o.rank = below(random, 3) == 0 ? 1 + below(random, 40) : 0;
          o.residual = below(random, 3) == 0;
          const int64_t k = kColumns[below(random, m > 17 ? 11 : 14)];
          int64_t n = 1 + below(random, 100);
          if (o.swiglu) n = (n + 15) / 16 * 16;
          const Weight weight(random, with_random_group(random, base, k), n, k);
          check_problem(Problem(random, weight, m, type, activation_bits, o), isa);
        }
      }
    }
  }
}

// Each row of a product with many rows equals, beyond fp32 rounding, the row alone.
void test_rows_alone(Random& random, Isa isa) {
  for (const QuantFormat& base : formats()) {
    QuantFormat f = base;
    f.group_size = f.scheme == Scheme::kInt8Dynamic ? 320 : 64;
    const Weight weight(random, f, 70, 320);
    for (int64_t m : {2, 7, 13, 40}) {
      const Problem all(random, weight, m, DType::kFloat32, 8, {});
      const std::vector<uint8_t> y = all.run(isa);
      const Problem::Product size = all.product();
      Problem one(random, weight, 1, DType::kFloat32, 8, {});
      double worst = 0;
      for (int64_t row = 0; row < m; ++row) {
        std::memcpy(one.x.data, all.x.data + row * weight.k * 4, one.x.bytes);
        const std::vector<uint8_t> alone = one.run(isa);
        for (int64_t n = 0; n < weight.n; ++n) {
          const double off = std::fabs(value_at(DType::kFloat32, alone.data(), n) -
                                       value_at(DType::kFloat32, y.data(), row * weight.n + n));
          worst = std::max(worst, off / size.magnitude[row * weight.n + n]);
        }
      }
      check(worst < 1e-6, "rows alone: " + all.name(isa));
    }
  }
}

// The 16-bit products of AMX: 1e-4 of the norm, outliers or not.
void test_precision(Random& random) {
  for (const QuantFormat& base : formats()) {
    if (base.scheme == Scheme::kInt8Dynamic) continue;
    for (DType type : kDTypes) {
      for (bool outliers : {false, true}) {
        QuantFormat f = base;
        f.group_size = 128;
        const Weight weight(random, f, 96, 1000);
        Problem problem(random, weight, 40, type, 16, {});
        if (outliers) {
          for (int64_t i = 0; i < 40 * weight.k; ++i) {
            if (i % 97 == 0) set_value(type, problem.x.data, i, 300.0f * normal(random));
          }
        }
        const std::vector<uint8_t> y = problem.run(Isa::kAmx);
        const Problem::Product exact = problem.product();
        double error = 0, rounding = 0, norm = 0;
        for (size_t i = 0; i < exact.value.size(); ++i) {
          uint16_t rounded[2];
          set_value(type, rounded, 0, static_cast<float>(exact.value[i]));
          error += std::pow(value_at(type, y.data(), static_cast<int64_t>(i)) - exact.value[i], 2);
          rounding += std::pow(value_at(type, rounded, 0) - exact.value[i], 2);
          norm += exact.value[i] * exact.value[i];
        }
        const double allowed =
            (type == DType::kFloat32 ? 0 : 1.02 * std::sqrt(rounding / norm)) + 1e-4;
        check(std::sqrt(error / norm) <= allowed, "precision: " + problem.name(Isa::kAmx));
      }
    }
  }
}

// A row with NaN, infinity or next to nothing shows what a plain linear would, and no other row
// notices.
void test_not_finite(Random& random, Isa isa) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const QuantFormat& base : formats()) {
    for (DType type : kDTypes) {
      for (int64_t m : {1, 3, 29}) {
        for (int activation_bits : {8, 16}) {
          if (activation_bits == 16 && (isa != Isa::kAmx || base.scheme == Scheme::kInt8Dynamic)) {
            continue;
          }
          QuantFormat f = base;
          f.group_size = f.scheme == Scheme::kInt8Dynamic ? 100 : 32;
          const Weight weight(random, f, 41, 100);
          Options o;
          o.bias = true;
          Problem problem(random, weight, m, type, activation_bits, o);
          const std::vector<uint8_t> before = problem.run(isa);
          const std::vector<uint8_t> saved(problem.x.data, problem.x.data + problem.x.bytes);
          const int64_t row = below(random, m);
          for (int kind = 0; kind < 4; ++kind) {
            std::memcpy(problem.x.data, saved.data(), saved.size());
            const int64_t at = row * weight.k + below(random, weight.k);
            if (kind == 0) set_value(type, problem.x.data, at, nan);
            if (kind == 1) set_value(type, problem.x.data, at, infinity);
            if (kind == 2) set_value(type, problem.x.data, at, -infinity);
            for (int64_t c = 0; c < weight.k && kind == 3; ++c) {
              const float x = value_at(type, problem.x.data, row * weight.k + c);
              set_value(type, problem.x.data, row * weight.k + c,
                        x * (type == DType::kFloat16 ? 0x1p-20f : 1e-36f));
            }
            const std::vector<uint8_t> y = problem.run(isa);
            bool ok = true;
            for (int64_t i = 0; i < m * weight.n; ++i) {
              if (i / weight.n != row) {
                ok = ok && std::memcmp(&y[i * dtype_bytes(type)], &before[i * dtype_bytes(type)],
                                       dtype_bytes(type)) == 0;
                continue;
              }
              const float got = value_at(type, y.data(), i);
              double want = value_at(type, problem.bias.data, i % weight.n);
              for (int64_t c = 0; c < weight.k; ++c) {
                want += static_cast<double>(problem.input(row, c)) *
                        weight.scale(i % weight.n, c / f.group_size) *
                        weight.factor(i % weight.n, c);
              }
              if (std::isnan(want)) {
                ok = ok && std::isnan(got);
              } else if (std::isinf(want)) {
                ok = ok && got == want;
              } else {
                ok = ok && std::fabs(got - want) <= 0.01 * std::fabs(want);
              }
            }
            check(ok, "not finite or vanishing, kind " + std::to_string(kind) + ": " +
                          problem.name(isa));
          }
        }
      }
    }
  }
  // A row of zeros gives the bias, and bias only.
  for (const QuantFormat& base : formats()) {
    const Weight weight(random, with_random_group(random, base, 200), 45, 200);
    for (int64_t m : {1, 20}) {
      Options o;
      o.bias = true;
      Problem problem(random, weight, m, DType::kFloat32, 8, o);
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
  const Problem problem(random, weight, 3, DType::kFloat32, 8, {});
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
    test_not_finite(random, isa);
    test_explain(random, isa);
    if (isa == Isa::kAmx) test_precision(random);
    std::printf("  %s: %d passed, %d failed so far\n", isa_name(isa), passed, failed);
  }
  std::printf("test_qlinear_cpu_a8: %d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
