// SPDX-License-Identifier: Apache-2.0
// What the tests of the CPU products share: products with every part of the epilogue, what fp64
// makes of them, and how far a kernel may be from that.
//
// Every element. With activations of 16 bits, X = round(x / s) is off by a number that is uniform
// over a step of s, one scale for each block of columns (cpu/qlinear_layout.h), so a sum is off by
// a standard deviation of
//
//     sqrt(sum over k of (w'[k] s[k])^2 / 12)        w' = scale (q - 2^(bits-1)), or scale book[q]
//
// and six of those are allowed. Two bf16 terms of x on AMX are off by 2^-17 of a product, and a
// code book's values are in steps of 1 / book_steps. With activations of 8 bits the rule of
// cpu/qlinear_a8.h leaves no freedom. On top of that, fp32 sums may be off by 16 units of the sum
// of the terms' magnitudes, codes, zero points and planes of a book apart, and y is rounded once.
//
// Every row of 16-bit activations with enough outputs for a norm: |y - exact| <= 1e-4 |size|, where
// an output's size is the root of the sum of its terms' squares: |exact| over many outputs, without
// the chance that terms cancel in the few of a test.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check_cpu.h"
#include "common/params.h"
#include "cpu/qlinear.h"
#include "cpu/qlinear_a8.h"
#include "cpu/qlinear_layout.h"

namespace kvopt::test {

constexpr double kNormLimit = 1e-4;

struct Parts {
  bool bias = false;
  bool input_scale = false;
  int64_t rank = 0;
  bool addend = false;
  bool swiglu = false;
  bool residual = false;
};

struct Problem {
  Problem(const Weight& weight, int64_t rows, DType dtype, Parts with = {},
          int32_t activation_bits = 16)
      : w(weight),
        m(rows),
        type(dtype),
        parts(with),
        bits(w.f.scheme == Scheme::kInt8Dynamic ? 8 : activation_bits),
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
    p.activation_bits = bits;
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

  float input(int64_t row, int64_t column) const {
    const float v = value_at(type, x.data, row * w.k + column);
    return parts.input_scale ? v * value_at(type, input_scale.data, column) : v;
  }

  // What a row's columns are multiplied as, and the step they are rounded to: 8 bits: exactly so.
  struct Activation {
    double value, step;
  };

  std::vector<Activation> activations(int64_t row) const {
    std::vector<Activation> result(static_cast<size_t>(w.k));
    const int64_t columns = bits == 8 ? w.f.group_size : block_columns(w.f.scheme);
    for (int64_t group = 0; group < w.k; group += w.f.group_size) {
      const int64_t group_end = std::min<int64_t>(group + w.f.group_size, w.k);
      for (int64_t begin = group; begin < group_end; begin += columns) {
        const int64_t end = std::min(begin + columns, group_end);
        float largest = 0.0f;
        double sum = 0.0;
        for (int64_t c = begin; c < end; ++c) {
          largest = std::max(largest, std::fabs(input(row, c)));
          sum += std::fabs(input(row, c));
        }
        const float s8 = largest / 127.0f;
        double s16 = largest / kMaxCode;
        if (w.f.has_book()) s16 = std::max(s16, sum / book_limit(w.f.scheme));
        for (int64_t c = begin; c < end; ++c) {
          Activation& a = result[static_cast<size_t>(c)];
          a = {input(row, c), s16};
          if (bits == 8) a = {s8 == 0 ? 0.0 : s8 * double{std::nearbyint(input(row, c) / s8)}, 0.0};
        }
      }
    }
    return result;
  }

  // An exact number, how far a kernel may be from it, and the root of its terms' squares.
  struct Expected {
    double value, tolerance, size;
  };

  // Before act.
  Expected expected_sum(int64_t row, int64_t n, const std::vector<Activation>& a) const {
    double value = 0, variance = 0, terms = 0, magnitude = 0, scale = 0, squares = 0;
    for (int64_t c = 0; c < w.k; ++c) {
      if (c % w.f.group_size == 0) scale = w.scale(n, c / w.f.group_size);
      const auto [v, step] = a[static_cast<size_t>(c)];
      const size_t at = static_cast<size_t>(n * w.k + c);
      double weight = w.dense[at];
      double integer = weight;  // what rounding meets
      if (w.f.has_book()) {
        const double steps = book_steps(w.f.scheme);
        const double rounded = scale * book_integer(w.f.scheme, w.codes[at]) / steps;
        if (bits == 8) {
          weight = rounded;
          magnitude += std::fabs(scale * (1 << kPlaneBits) / steps * v);
        } else {
          terms += std::fabs((rounded - weight) * v);
        }
      } else {
        integer = scale * (w.codes[at] - symmetric_zero(w.f));
      }
      if (bits == 16) terms += 0x1p-17 * std::fabs(weight * v);
      value += weight * v;
      squares += weight * v * weight * v;
      variance += integer * step * integer * step / 12;
      magnitude += std::fabs(integer * v) + std::fabs((weight - integer) * v);
    }
    const auto term = [&](double t) {
      value += t;
      squares += t * t;
      magnitude += std::fabs(t);
    };
    if (parts.bias) term(value_at(type, bias.data, n));
    for (int64_t c = 0; c < parts.rank; ++c) {
      term(static_cast<double>(value_at(type, low_rank_x.data, row * parts.rank + c)) *
           value_at(type, low_rank_w.data, n * parts.rank + c));
    }
    if (parts.addend) term(value_at(type, addend.data, row * w.n + n));
    return {value, 6 * std::sqrt(variance) + terms + 0x1p-20 * magnitude, std::sqrt(squares)};
  }

  std::vector<Expected> expected(int64_t row) const {
    std::vector<Expected> sums, result;
    const std::vector<Activation> a = activations(row);
    for (int64_t n = 0; n < w.n; ++n) sums.push_back(expected_sum(row, n, a));
    for (int64_t i = 0; i < outputs; ++i) {
      Expected e = sums[static_cast<size_t>(i)];
      if (parts.swiglu) {
        const Expected gate = sums[static_cast<size_t>(i / 8 * 16 + i % 8)];
        const Expected up = sums[static_cast<size_t>(i / 8 * 16 + i % 8 + 8)];
        const double silu = gate.value / (1.0 + std::exp(-gate.value));
        e.value = silu * up.value;  // the slope of silu is at most 1.1
        e.tolerance = 1.1 * gate.tolerance * std::fabs(up.value) + up.tolerance * std::fabs(silu) +
                      1.1 * gate.tolerance * up.tolerance + 4e-6 * std::fabs(e.value);
        e.size = std::hypot(1.1 * gate.size * up.value, silu * up.size);
      }
      if (parts.residual) e.value += value_at(type, residual.data, row * outputs + i);
      e.tolerance += 1.01 * half_step(e.value);
      result.push_back(e);
    }
    return result;
  }

  // Half a unit of the last place of y.
  double half_step(double value) const {
    if (type == DType::kFloat16) return std::max(std::fabs(value) * 0x1p-11, 0x1p-25);
    return std::fabs(value) * (type == DType::kFloat32 ? 0x1p-24 : 0x1p-8);
  }

  std::string name(Isa isa) const {
    return std::string(isa_name(isa)) + " " + name_of(w.f) + " a" + std::to_string(bits) +
           " M=" + std::to_string(m) + " N=" + std::to_string(w.n) + " K=" + std::to_string(w.k) +
           " " + dtype_name(type) + (parts.bias ? " bias" : "") +
           (parts.input_scale ? " input_scale" : "") +
           (parts.rank > 0 ? " rank" + std::to_string(parts.rank) : "") +
           (parts.addend ? " addend" : "") + (parts.swiglu ? " swiglu" : "") +
           (parts.residual ? " residual" : "");
  }

  const Weight& w;
  int64_t m;
  DType type;
  Parts parts;
  int32_t bits;
  int64_t outputs;
  Buffer x, bias, input_scale, low_rank_x, low_rank_w, addend, residual;
};

// How far a result is from the exact one.
struct Errors {
  double of_row = 0;        // |y - exact| / |size| of the worst row, less what rounding y takes
  double of_tolerance = 0;  // |y - exact| / tolerance of the worst element; in both NaN is infinite
};

inline Errors errors_of(const Problem& problem, const std::vector<uint8_t>& y) {
  Errors worst;
  for (int64_t row = 0; row < problem.m; ++row) {
    double error = 0, rounding = 0, norm = 1e-300;
    const std::vector<Problem::Expected> expected = problem.expected(row);
    for (int64_t i = 0; i < problem.outputs; ++i) {
      const auto [want, tolerance, size] = expected[static_cast<size_t>(i)];
      const double got = value_at(problem.type, y.data(), row * problem.outputs + i);
      const double off = std::fabs(got - want);
      const bool close = off <= worst.of_tolerance * tolerance;
      if (!close) worst.of_tolerance = std::isnan(off) ? HUGE_VAL : off / tolerance;
      uint32_t rounded;
      set_value(problem.type, &rounded, 0, static_cast<float>(want));
      error += off * off;
      rounding += std::pow(value_at(problem.type, &rounded, 0) - want, 2);
      norm += size * size;
    }
    if (problem.type == DType::kFloat32) rounding = 0;
    const double of_row = std::sqrt(error / norm) - 1.02 * std::sqrt(rounding / norm);
    if (!(of_row <= worst.of_row)) worst.of_row = std::isnan(of_row) ? HUGE_VAL : of_row;
  }
  return worst;
}

inline void check_product(const Problem& problem, Isa isa) {
  const std::vector<uint8_t> y = problem.run(isa);
  check(y == problem.run(isa), "same twice: " + problem.name(isa));
  check(y == problem.run(isa, true), "split ranges: " + problem.name(isa));
  const Errors e = errors_of(problem, y);
  check(e.of_tolerance <= 1.0,
        "error " + std::to_string(e.of_tolerance) + " of the allowed: " + problem.name(isa));
  if (problem.bits == 8 || problem.outputs < 31 || problem.w.k < 16) return;
  check(e.of_row <= kNormLimit,
        "error of a row " + std::to_string(e.of_row * 1e6) + "e-6: " + problem.name(isa));
}

// A row with NaN, infinity or next to nothing shows what a plain linear over the dequantised
// weights would, with IEEE rules term by term, and no other row notices.
inline void check_not_finite(Random& random, Isa isa, const QuantFormat& format, int32_t bits) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (DType type : kDTypes) {
    for (int64_t m : {1, 2, 5, 29}) {
      const int64_t group = format.scheme == Scheme::kInt8Dynamic ? 100 : 32;
      const Weight weight(random, with_group(format, group), 41, 100);
      Problem problem(weight, m, type, {.bias = true}, bits);
      problem.fill_normal(random);
      const std::vector<uint8_t> before = problem.run(isa);
      const std::vector<uint8_t> saved(problem.x.data, problem.x.data + problem.x.bytes);
      const int64_t row = below(random, m);
      for (int kind = 0; kind < 5; ++kind) {
        std::memcpy(problem.x.data, saved.data(), saved.size());
        const int64_t at = row * weight.k + below(random, weight.k);
        const int64_t other = row * weight.k + below(random, weight.k);
        if (kind == 0) set_value(type, problem.x.data, at, nan);
        if (kind == 1 || kind == 3) set_value(type, problem.x.data, at, infinity);
        if (kind == 2) set_value(type, problem.x.data, at, -infinity);
        if (kind == 3) set_value(type, problem.x.data, other, -infinity);
        for (int64_t c = 0; c < weight.k && kind == 4; ++c) {
          const float x = value_at(type, problem.x.data, row * weight.k + c);
          set_value(type, problem.x.data, row * weight.k + c,
                    x * (type == DType::kFloat16 ? 0x1p-20f : 1e-36f));
        }
        const std::vector<uint8_t> y = problem.run(isa);
        const std::vector<Problem::Expected> small =
            kind == 4 ? problem.expected(row) : std::vector<Problem::Expected>{};
        bool ok = true;
        const size_t bytes = static_cast<size_t>(dtype_bytes(type));
        for (int64_t i = 0; i < m * weight.n; ++i) {
          if (i / weight.n != row) {
            const size_t from = static_cast<size_t>(i) * bytes;
            ok = ok && std::memcmp(&y[from], &before[from], bytes) == 0;
            continue;
          }
          const float got = value_at(type, y.data(), i);
          if (kind == 4) {
            const auto [value, tolerance, size] = small[static_cast<size_t>(i % weight.n)];
            ok = ok && std::fabs(got - value) <= tolerance;
            continue;
          }
          double want = value_at(type, problem.bias.data, i % weight.n);
          for (int64_t c = 0; c < weight.k; ++c) {
            want += static_cast<double>(problem.input(row, c)) *
                    weight.dense[static_cast<size_t>(i % weight.n * weight.k + c)];
          }
          ok = ok && (std::isnan(want) ? std::isnan(got) : std::isinf(want) && got == want);
        }
        check(ok,
              "not finite or vanishing, kind " + std::to_string(kind) + ": " + problem.name(isa));
      }
    }
  }
}

}  // namespace kvopt::test
