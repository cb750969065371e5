// SPDX-License-Identifier: Apache-2.0
// The fp64 reference of a quantised product on CUDA, and how far a kernel may be from it.
//
// Notation: A = sum |w||x|, the element's condition; R = sum |scale| (q + |zero|) |x|, the same
// before zero points cancel; u: unit roundoff of y's type. What may go wrong, added up:
//
//   weights    2^-11 A for each rounding to fp16: one of scale * (q - zero), another of q - zero
//              where the zero point is a fraction (integers up to 2^11 are exact), or of a code
//              book's values. Subnormal weights round by up to 2^-25 instead.
//              Tolerance::rounded_weights false: codes enter the sums as they are, code books
//              keep theirs.
//   x          2^-11 A where input_scale or int8 rounding takes x off the fp16 grid. bf16 rows
//              become fp16 with the largest element at 2^14 or more: 2^-25 / 2^14 of it, per |w|.
//              Tolerance::x_step times the row's largest |x|, per |w|, for a grid of the kernel's.
//              int8: x / s within 1e-4 of a tie may round either way, s |w| each.
//   sums       tensor cores add 16 products and the sum before at once and cut bits below 2^-23 of
//              the largest, twice at most: 2^-22 (4 + K / 16) A; of R where zero points are
//              subtracted afterwards. fp32: 2^-19 A, a random walk of K / 4 roundings of 2^-24.
//              int8 sums are exact, their scales are not: 2^-21 A.
//   epilogue   2^-24 for each addition, of all that is added; see swiglu_of.
//   y          u of the largest |y| that all this allows (half a unit of a subnormal: 2^-25).
//
// These are worst cases, K times what independent roundings add up to, so the elements together
// must pass two more tests, for 16-bit types:
//   rms        errors in units of A: at most 1.15 x those of the fp64 product of weights and
//              activations rounded as above ("typed"). The same roundings in most kernels, so the
//              ratio is 1 but for sums and chance, some percent for 1000 results.
//   gain       the slope of errors over results: at most 2^-13 and six standard deviations of the
//              typed product's. A factor of 1.001 shows in it even where u is 2^-8.
// NaN fails all of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "check_cuda.h"
#include "common/params.h"
#include "qlinear_cuda_weight.h"

namespace kvopt::test {

struct Tolerance {
  bool rounded_weights = true;
  double x_step = 0;
};

// One element of the product before the epilogue.
struct Reference {
  double exact;
  double condition;  // A
  double raw;        // R
  double typed;      // with weights and activations rounded to fp16
  double ties;       // sum of |w| times the step of activations that may round either way
  double weights;    // sum |w|
  double subnormal;  // sum |x| of weights below 2^-14
};

struct ReferenceInput {
  const double *x, *typed_x, *tie;  // (M, K)
  const uint8_t* codes;
  const uint16_t *scale, *zero;
  int64_t m, n, k;
  QuantFormat format;
};

__device__ inline double rounded_to_half(double v) {
  return __half2float(__float2half_rn(static_cast<float>(v)));
}

// One thread per element, fp64.
__global__ void reference_kernel(const ReferenceInput p, Reference* out) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= p.m * p.n) return;
  const int64_t row = i % p.n, groups = group_count(p.format, p.k), first = i / p.n * p.k;
  Reference r{};
  for (int64_t c = 0; c < p.k; ++c) {
    const int64_t at = row * groups + c / p.format.group_size;
    const int code = p.codes[row * p.k + c];
    const double scale = __half2float(__ushort_as_half(p.scale[at]));
    const double zero = __half2float(__ushort_as_half(p.zero[at]));
    const double level = p.format.has_book() ? book_value(p.format.scheme, code) : code - zero;
    const double w = scale * level, x = p.x[first + c];
    r.exact += x * w;
    r.condition += fabs(x * w);
    r.raw += p.format.has_book() ? fabs(x * w) : fabs(x * scale) * (code + fabs(zero));
    r.typed += p.typed_x[first + c] * rounded_to_half(scale * rounded_to_half(level));
    r.ties += p.tie[first + c] * fabs(w);
    r.weights += fabs(w);
    if (fabs(w) < 0x1p-14) r.subnormal += fabs(x);
  }
  out[i] = r;
}

// One element of y: exact value, bound of the error before y is rounded, condition, the typed
// product's value; whether an activation may round either way.
struct Element {
  double exact, bound, condition, typed;
  bool ties;
};

// What the sums of one element may be wrong by. largest: of |x| in the row.
inline double product_bound(const Reference& r, const QuantFormat& format, Zeros zeros, DType dtype,
                            int64_t k, bool x_rounded, double largest, const Tolerance& tolerance) {
  if (format.scheme == Scheme::kInt8Dynamic) return 0x1p-21 * r.condition + r.ties;
  if (dtype == DType::kFloat32) return 0x1p-19 * r.condition + r.ties;
  const bool rounds_level = format.has_book() || zeros == Zeros::kFractional;
  double roundings = x_rounded;
  if (tolerance.rounded_weights) {
    roundings += 1 + rounds_level;
  } else {
    roundings += format.has_book();
  }
  const double sums = 0x1p-22 * (4 + static_cast<double>(k) / 16);
  return roundings * 0x1.01p-11 * r.condition +  // the second order with it
         sums * (tolerance.rounded_weights ? r.condition : r.raw) + r.ties +
         (tolerance.rounded_weights ? 0x1p-25 * r.subnormal : 0) +
         (tolerance.x_step + 0x1p-39) * largest * r.weights;
}

// y = silu(gate) * up. |silu'| < 1.1; the device's exponential is off by 2^-20 relative for each
// unit of its argument and 2^-21 more.
inline Element swiglu_of(const Element& gate, const Element& up) {
  const auto silu = [](double v) { return v / (1 + std::exp(-v)); };
  const double slack =
      1.1 * gate.bound + (0x1p-20 * std::fabs(gate.exact) + 0x1p-21) * std::fabs(silu(gate.exact));
  Element e;
  e.exact = silu(gate.exact) * up.exact;
  e.typed = silu(gate.typed) * up.typed;
  e.bound = std::fabs(silu(gate.exact)) * up.bound + slack * (std::fabs(up.exact) + up.bound) +
            0x1p-23 * std::fabs(e.exact);
  // d y = silu' up dgate + silu dup, each error a part of its own condition.
  e.condition =
      1.1 * gate.condition * std::fabs(up.exact) + std::fabs(silu(gate.exact)) * up.condition;
  e.ties = gate.ties || up.ties;
  return e;
}

// Takes the elements of a result one by one.
class Score {
 public:
  explicit Score(DType dtype) : dtype_(dtype) {}

  void add(const Element& e, double got) {
    const double u = unit_roundoff(dtype_), most = std::fabs(e.exact) + e.bound;
    const double bound = e.bound + u * most + (dtype_ == DType::kFloat16 ? 0x1p-25 : 1e-38);
    if (dtype_ == DType::kFloat16 && std::isinf(got) && most >= 65520) {
      if (got > 0 != e.exact > 0) worst_ = 1e30;  // overflows as it should
      return;
    }
    const double error = std::fabs(got - e.exact);
    if (!(error <= bound)) worst_ = std::fmax(worst_, std::isnan(error) ? 1e30 : error / bound);
    if (e.condition == 0 || e.ties || most >= 65504) return;
    const double a2 = e.condition * e.condition;
    const double typed = rounded(dtype_, e.typed) - e.exact;
    error2_ += error * error / a2;
    typed2_ += typed * typed / a2;
    gain_ += (got - e.exact) * e.exact / a2;
    chance_ += typed * typed / a2 * (e.exact * e.exact / a2);
    size_ += e.exact * e.exact / a2;
    ++counted_;
  }

  // weights: how many there are to round; x_step: as in Tolerance; shared: the standard deviation
  // of the relative error that all outputs have in common (x rounded once for all of them).
  void judge(const std::string& name, int64_t weights, double x_step, double shared) const {
    expect(worst_ == 0, name + ": element at " + std::to_string(worst_) + " x its bound");
    if (dtype_ == DType::kFloat32 || x_step > 0 || weights < 4096 || counted_ < 1000) return;
    const double n = static_cast<double>(counted_);
    const double rms = std::sqrt(error2_ / n), allowed = 1.15 * std::sqrt(typed2_ / n) + 0x1p-21;
    expect(rms <= allowed,
           name + ": rms error " + std::to_string(rms / allowed) + " x what roundings explain");
    const double gain = std::fabs(gain_) / size_, chance = std::sqrt(chance_) / size_;
    expect(gain <= 0x1p-13 + 6 * (chance + shared),
           name + ": results are off by a factor of 1 + " + std::to_string(gain_ / size_));
  }

 private:
  DType dtype_;
  double worst_ = 0, error2_ = 0, typed2_ = 0, gain_ = 0, chance_ = 0, size_ = 0;
  int64_t counted_ = 0;
};

}  // namespace kvopt::test
