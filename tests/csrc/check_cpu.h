// SPDX-License-Identifier: Apache-2.0
// What the tests of the CPU kernels share: weights made through the addresses of quant_format.h,
// products with every part of the epilogue, and their exact results in fp64. Buffers have exactly
// the promised size, for AddressSanitizer, and start as NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "common/params.h"
#include "cpu/float16.h"
#include "cpu/isa.h"
#include "cpu/qlinear.h"

namespace kvopt::test {

using namespace kvopt::cpu;

inline int passed = 0;
inline int failed = 0;

inline void check(bool ok, const std::string& what) {
  ++(ok ? passed : failed);
  if (!ok && failed <= 40) std::printf("FAILED: %s\n", what.c_str());
}

using Random = std::mt19937_64;

inline float normal(Random& random) { return std::normal_distribution<float>(0.0f, 1.0f)(random); }
inline int64_t below(Random& random, int64_t n) {
  return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

inline const char* dtype_name(DType t) {
  return t == DType::kFloat32 ? "fp32" : t == DType::kFloat16 ? "fp16" : "bf16";
}

// Every weight format with 16-bit activations; the group size is set by the test.
constexpr QuantFormat kFormats[] = {
    {8, 0, Scheme::kSymmetric},  {8, 0, Scheme::kAsymmetric}, {4, 0, Scheme::kSymmetric},
    {4, 0, Scheme::kAsymmetric}, {3, 0, Scheme::kSymmetric},  {3, 0, Scheme::kAsymmetric},
    {2, 0, Scheme::kSymmetric},  {2, 0, Scheme::kAsymmetric}, {4, 0, Scheme::kNf4},
    {4, 0, Scheme::kFp4},
};

inline QuantFormat with_group(QuantFormat f, int64_t group) {
  f.group_size = static_cast<int32_t>(group);
  return f;
}

inline std::string name_of(const QuantFormat& f) {
  const std::string kind = f.scheme == Scheme::kNf4   ? "nf4"
                           : f.scheme == Scheme::kFp4 ? "fp4"
                                                      : "int" + std::to_string(f.bits);
  return kind + (f.scheme == Scheme::kSymmetric ? " sym g" : " g") + std::to_string(f.group_size);
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
  uint16_t* halves() const { return reinterpret_cast<uint16_t*>(data); }
  size_t bytes;
  uint8_t* data;
};

inline float value_at(DType type, const void* data, int64_t i) {
  float value;
  load_floats(type, data, i, 1, &value);
  return value;
}

inline void set_value(DType type, void* data, int64_t i, float value) {
  store_floats(type, &value, 1, data, i);
}

inline int read_code(const QuantFormat& f, int64_t k, const uint8_t* packed, int64_t row,
                     int64_t column) {
  const CodePieces at = tile32::code_pieces(f, k, row, column);
  uint32_t code = 0;
  for (int i = 0; i < at.count; ++i) {
    uint32_t word;
    std::memcpy(&word, packed + at.piece[i].word * 4, 4);
    code |= (word >> at.piece[i].shift & ((1u << at.piece[i].bits) - 1u)) << at.piece[i].from;
  }
  return static_cast<int>(code);
}

// Into a field that still holds 0.
inline void write_code(const QuantFormat& f, int64_t k, uint8_t* packed, int64_t row,
                       int64_t column, int code) {
  const CodePieces at = tile32::code_pieces(f, k, row, column);
  for (int i = 0; i < at.count; ++i) {
    uint32_t word;
    std::memcpy(&word, packed + at.piece[i].word * 4, 4);
    const uint32_t field = static_cast<uint32_t>(code) >> at.piece[i].from;
    word |= (field & ((1u << at.piece[i].bits) - 1u)) << at.piece[i].shift;
    std::memcpy(packed + at.piece[i].word * 4, &word, 4);
  }
}

// A random quantised weight and its exact values.
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
    uint16_t* m = meta.halves();
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
        const int code = static_cast<int>(below(random, 1 << f.bits));
        write_code(f, k, packed.data, row, column, code);
        const int64_t group = column / f.group_size;
        const double zero = f.has_zeros() ? half_to_float(m[tile32::zero_index(f, k, row, group)])
                                          : symmetric_zero(f);
        const double value = f.has_book() ? book_value(f.scheme, code) : code - zero;
        dense[static_cast<size_t>(row * k + column)] =
            half_to_float(m[tile32::scale_index(f, k, row, group)]) * value;
      }
    }
  }
  QuantFormat f;
  int64_t n, k;
  Buffer packed, meta;
  std::vector<double> dense;
};

struct Parts {
  bool bias = false;
  bool input_scale = false;
  int64_t rank = 0;
  bool addend = false;
  bool swiglu = false;
  bool residual = false;
};

struct Problem {
  Problem(const Weight& weight, int64_t rows, DType dtype, Parts with = {})
      : w(weight),
        m(rows),
        type(dtype),
        parts(with),
        outputs(with.swiglu ? w.n / 2 : w.n),
        x(m * w.k * dtype_bytes(type)),
        bias(w.n * dtype_bytes(type)),
        input_scale(w.k * dtype_bytes(type)),
        low_rank_x(m * parts.rank * dtype_bytes(type)),
        low_rank_w(w.n * parts.rank * dtype_bytes(type)),
        addend(parts.addend ? m * w.n * dtype_bytes(type) : 0),
        residual(parts.residual ? m * outputs * dtype_bytes(type) : 0) {}

  void fill_normal(Random& random) {
    const auto fill = [&](const Buffer& buffer, float size) {
      const int64_t count = static_cast<int64_t>(buffer.bytes) / dtype_bytes(type);
      for (int64_t i = 0; i < count; ++i) set_value(type, buffer.data, i, size * normal(random));
    };
    fill(x, 1.0f);
    fill(bias, 1.0f);
    fill(low_rank_x, 1.0f);
    fill(low_rank_w, 0.1f);
    fill(addend, 1.0f);
    fill(residual, 1.0f);
    for (int64_t i = 0; i < w.k; ++i) {
      set_value(type, input_scale.data, i, 0.5f + 0.01f * static_cast<float>(below(random, 100)));
    }
  }

  QLinearParams params() const {
    QLinearParams p = {};
    p.m = m, p.n = w.n, p.k = w.k;
    p.dtype = type;
    p.format = w.f;
    p.x = x.data;
    p.packed = w.packed.data;
    p.meta = w.meta.halves();
    p.activation_bits = 16;
    p.swiglu = parts.swiglu;
    p.bias = parts.bias ? bias.data : nullptr;
    p.input_scale = parts.input_scale ? input_scale.data : nullptr;
    p.rank = parts.rank;
    p.low_rank_x = parts.rank > 0 ? low_rank_x.data : nullptr;
    p.low_rank_w = parts.rank > 0 ? low_rank_w.data : nullptr;
    p.addend = parts.addend ? addend.data : nullptr;
    p.residual = parts.residual ? residual.data : nullptr;
    return p;
  }

  // The whole product by the given kernels; `pieces` splits rows and tiles one by one and runs them
  // backwards, and writes y over the residual.
  std::vector<uint8_t> run(Isa isa, bool pieces = false) const {
    const int64_t y_bytes = m * outputs * dtype_bytes(type);
    Buffer y(y_bytes);
    QLinearParams p = params();
    p.y = y.data;
    if (pieces && parts.residual) {
      std::memcpy(y.data, residual.data, residual.bytes);
      p.residual = y.data;
    }
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

  // One number before act, and the norm of the terms it is a sum of.
  struct Sum {
    double value;
    double terms;
  };

  Sum exact_sum(int64_t row, int64_t n) const {
    double value = 0, squares = 0;
    const auto term = [&](double t) {
      value += t;
      squares += t * t;
    };
    const double* weights = w.dense.data() + n * w.k;
    for (int64_t c = 0; c < w.k; ++c) {
      double a = value_at(type, x.data, row * w.k + c);
      if (parts.input_scale) a *= value_at(type, input_scale.data, c);
      term(weights[c] * a);
    }
    if (parts.bias) term(value_at(type, bias.data, n));
    for (int64_t c = 0; c < parts.rank; ++c) {
      term(static_cast<double>(value_at(type, low_rank_x.data, row * parts.rank + c)) *
           value_at(type, low_rank_w.data, n * parts.rank + c));
    }
    if (parts.addend) term(value_at(type, addend.data, row * w.n + n));
    return {value, std::sqrt(squares)};
  }

  Sum exact(int64_t row, int64_t out) const {
    Sum sum;
    if (parts.swiglu) {
      const int64_t gate_row = out / 8 * 16 + out % 8;
      const Sum gate = exact_sum(row, gate_row);
      const Sum up = exact_sum(row, gate_row + 8);
      const double act = gate.value / (1.0 + std::exp(-gate.value));
      sum = {act * up.value, std::hypot(1.1 * up.value * gate.terms, act * up.terms)};
    } else {
      sum = exact_sum(row, out);
    }
    if (parts.residual) {
      const double residual_value = value_at(type, residual.data, row * outputs + out);
      sum = {sum.value + residual_value, std::hypot(sum.terms, residual_value)};
    }
    return sum;
  }

  struct Errors {
    double of_result = 0;  // |y - exact| / |exact|
    double of_terms = 0;   // |y - exact| / | sqrt(sum (w x)^2) |
    double rounding = 0;   // the first, of the exact result rounded to the type
    double absolute = 0, result = 0, terms = 0;  // |y - exact|, |exact|, | sqrt(sum (w x)^2) |
    bool finite = true;
  };

  Errors errors(const std::vector<uint8_t>& y) const {
    double error = 0, rounding = 0, result = 0, terms = 0;
    Errors e;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t n = 0; n < outputs; ++n) {
        const Sum want = exact(i, n);
        uint32_t rounded;
        set_value(type, &rounded, 0, static_cast<float>(want.value));
        const double got = value_at(type, y.data(), i * outputs + n);
        e.finite = e.finite && std::isfinite(got);
        error += (got - want.value) * (got - want.value);
        rounding += std::pow(value_at(type, &rounded, 0) - want.value, 2);
        result += want.value * want.value;
        terms += want.terms * want.terms;
      }
    }
    const double tiny = 1e-300;
    e.of_result = std::sqrt(error / (result + tiny));
    e.of_terms = std::sqrt(error / (terms + tiny));
    e.rounding = std::sqrt(rounding / (result + tiny));
    e.absolute = std::sqrt(error);
    e.result = std::sqrt(result);
    e.terms = std::sqrt(terms);
    return e;
  }

  std::string name(Isa isa) const {
    return std::string(isa_name(isa)) + " " + name_of(w.f) + " M=" + std::to_string(m) +
           " N=" + std::to_string(w.n) + " K=" + std::to_string(w.k) + " " + dtype_name(type) +
           (parts.bias ? " bias" : "") + (parts.input_scale ? " input_scale" : "") +
           (parts.rank > 0 ? " rank" + std::to_string(parts.rank) : "") +
           (parts.addend ? " addend" : "") + (parts.swiglu ? " swiglu" : "") +
           (parts.residual ? " residual" : "");
  }

  const Weight& w;
  int64_t m;
  DType type;
  Parts parts;
  int64_t outputs;
  Buffer x, bias, input_scale, low_rank_x, low_rank_w, addend, residual;
};

}  // namespace kvopt::test
