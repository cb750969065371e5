// SPDX-License-Identifier: Apache-2.0
// Searches over scales and zero points in portable C++: candidates of a group, the choice among
// them, the codes, and HQQ. The loop that takes the time is in wsearch_errors.h.
#include "cpu/wsearch.h"

#include <algorithm>
#include <cmath>

#include "cpu/float16.h"
#include "cpu/wsearch_errors.h"

namespace kvopt::cpu {
namespace {

template <typename T>
struct Range {
  T low = 0;   // min(0, min w)
  T high = 0;  // max(0, max w)
};

template <typename T>
Range<T> range_of(const T* values, int64_t count) {
  Range<T> range;
  for (int64_t i = 0; i < count; ++i) {
    range.low = values[i] < range.low ? values[i] : range.low;
    range.high = values[i] > range.high ? values[i] : range.high;
  }
  return range;
}

template <typename T>
T stored_scale(T scale) {
  constexpr float kSmallestHalf = 5.9604644775390625e-8f;  // 2^-24
  const float rounded = half_to_float(float_to_half(static_cast<float>(scale)));
  return static_cast<T>(clamp_value(rounded, kSmallestHalf, 65504.0f));
}

template <typename T>
T largest_code_of(const QuantFormat& format) {
  return static_cast<T>((1 << format.bits) - 1);
}

// What rounding to nearest takes: p = 1 in the first reading, the zero point rounded.
template <typename T>
GroupChoice<T> nearest_choice(const QuantFormat& format, Range<T> range) {
  const T top = largest_code_of<T>(format);
  const T magnitude = std::max(range.high, -range.low);
  if (format.has_zeros()) {
    const T scale = stored_scale((range.high - range.low) / top);
    const T zero = round_value(clamp_value(-range.low / scale, T(0), T(1024)));
    return {scale, clamp_value(zero, T(0), top)};
  }
  const T scale = format.bits == 8 ? magnitude / T(127) : T(2) * magnitude / top;
  return {stored_scale(scale), static_cast<T>(symmetric_zero(format))};
}

template <typename T>
void list_candidates(const QuantFormat& format, const SearchGrid& grid, Range<T> range, T* scales,
                     T* zeros) {
  const T top = largest_code_of<T>(format);
  const T magnitude = std::max(range.high, -range.low);
  const int32_t readings = search_readings(format);
  for (int32_t i = 0; i <= grid.steps; ++i) {
    const T p = T(1) - (T(1) - static_cast<T>(grid.smallest)) * static_cast<T>(i) /
                           static_cast<T>(grid.steps);
    for (int32_t v = 0; v < readings; ++v) {
      T scale, zero;
      if (format.has_zeros()) {
        scale = stored_scale(p * ((range.high - range.low) / top));
        const T below = std::floor(clamp_value(-range.low * p / scale, T(0), T(1024)));
        zero = clamp_value(below + static_cast<T>(v - 1), T(0), top);
      } else {
        const bool to_the_top = format.bits == 8 ? v == 0 : v == 1;
        const T divisor = format.bits == 8 && to_the_top ? T(127) : to_the_top ? top - T(1) : top;
        const T range_size = format.bits == 8 && to_the_top ? magnitude : T(2) * magnitude;
        scale = stored_scale(p * (range_size / divisor));
        zero = static_cast<T>(symmetric_zero(format));
      }
      scales[i * readings + v] = scale;
      zeros[i * readings + v] = zero;
    }
  }
}

void add_errors_float(const float* values, const float* importance, int64_t count,
                      const float* scales, const float* zeros, int64_t candidates,
                      float largest_code, float* errors) {
  add_candidate_errors(values, importance, count, scales, zeros, candidates, largest_code, errors);
}

void add_errors_double(const double* values, const double* importance, int64_t count,
                       const double* scales, const double* zeros, int64_t candidates,
                       double largest_code, double* errors) {
  add_candidate_errors(values, importance, count, scales, zeros, candidates, largest_code, errors);
}

}  // namespace

template <>
CandidateErrors<double> candidate_errors(Isa) {
  return add_errors_double;
}

template <>
CandidateErrors<float> candidate_errors(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return candidate_errors_avx512;
  if (isa >= Isa::kAvx2) return candidate_errors_avx2;
#endif
  (void)isa;
  return add_errors_float;
}

template <typename T>
GroupChoice<T> search_group(const QuantFormat& format, const SearchGrid& grid, const T* values,
                            const T* importance, int64_t count, CandidateErrors<T> errors) {
  const Range<T> range = range_of(values, count);
  if (grid.steps == 0) return nearest_choice(format, range);
  T scales[kMaxCandidates], zeros[kMaxCandidates];
  T sums[kMaxCandidates] = {};
  const int32_t candidates = candidate_count(format, grid);
  list_candidates(format, grid, range, scales, zeros);
  errors(values, importance, count, scales, zeros, candidates, largest_code_of<T>(format), sums);
  const auto best = std::min_element(sums, sums + candidates) - sums;
  return {scales[best], zeros[best]};
}

template <typename T>
T code_of(T value, const GroupChoice<T>& choice, T largest_code) {
  return code_value(value, choice.scale, choice.zero, largest_code);
}

template <typename T>
void wsearch(const SearchParams<T>& p, CandidateErrors<T> errors, int64_t row_begin,
             int64_t row_end) {
  const int64_t groups = group_count(p.format, p.k);
  const T top = largest_code_of<T>(p.format);
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * p.format.group_size;
      const int64_t count = std::min<int64_t>(p.format.group_size, p.k - begin);
      const T* const values = p.weight + row * p.k + begin;
      const T* const importance = p.importance == nullptr ? nullptr : p.importance + begin;
      const GroupChoice<T> choice =
          search_group(p.format, p.grid, values, importance, count, errors);
      p.scale[row * groups + group] = float_to_half(static_cast<float>(choice.scale));
      p.zero[row * groups + group] = float_to_half(static_cast<float>(choice.zero));
      uint8_t* const codes = p.codes + row * p.k + begin;
      for (int64_t i = 0; i < count; ++i) {
        codes[i] = static_cast<uint8_t>(code_value(values[i], choice.scale, choice.zero, top));
      }
    }
  }
}

template GroupChoice<float> search_group(const QuantFormat&, const SearchGrid&, const float*,
                                         const float*, int64_t, CandidateErrors<float>);
template GroupChoice<double> search_group(const QuantFormat&, const SearchGrid&, const double*,
                                          const double*, int64_t, CandidateErrors<double>);
template float code_of(float, const GroupChoice<float>&, float);
template double code_of(double, const GroupChoice<double>&, double);
template void wsearch(const SearchParams<float>&, CandidateErrors<float>, int64_t, int64_t);
template void wsearch(const SearchParams<double>&, CandidateErrors<double>, int64_t, int64_t);

namespace {

float fractional_code(float value, float scale, float zero, float top) {
  const float position = clamp_value(value / scale + zero, 0.0f, top);
  return round_value(position);
}

// One pass of HQQ over a group: the mean |w - r| of `zero`, and the zero point after it.
struct HqqStep {
  float error;
  float next_zero;
};

HqqStep hqq_step(const float* values, int64_t count, float scale, float zero, float top, float beta,
                 float norm) {
  // |x| > |x|^(norm - 1) / beta only beyond this: below it the shrinkage gives 0 and needs no
  // power.
  const float threshold = std::pow(beta, -1.0f / (2.0f - norm));
  double error = 0, next = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float code = fractional_code(values[i], scale, zero, top);
    const float residual = values[i] - scale * (code - zero);
    const float size = std::fabs(residual);
    float shrunk = 0;
    if (size > threshold) {
      shrunk = std::copysign(std::max(0.0f, size - std::pow(size, norm - 1.0f) / beta), residual);
    }
    error += size;
    next += code - (values[i] - shrunk) / scale;
  }
  return {static_cast<float>(error / static_cast<double>(count)),
          static_cast<float>(next / static_cast<double>(count))};
}

}  // namespace

void wsearch_hqq(const HqqParams& p, int64_t row_begin, int64_t row_end) {
  const int64_t groups = group_count(p.format, p.k);
  const float top = largest_code_of<float>(p.format);
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * p.format.group_size;
      const int64_t count = std::min<int64_t>(p.format.group_size, p.k - begin);
      const float* const values = p.weight + row * p.k + begin;
      const Range<float> range = range_of(values, count);
      const float scale = stored_scale((range.high - range.low) / top);
      float zero = -range.low / scale, best_zero = zero, beta = p.beta;
      float best_error = INFINITY;
      for (int32_t i = 0; i < p.iterations; ++i, beta *= p.kappa) {
        const HqqStep step = hqq_step(values, count, scale, zero, top, beta, p.norm);
        if (!(step.error < best_error)) break;
        best_error = step.error;
        best_zero = zero;
        zero = step.next_zero;
      }
      const uint16_t stored = float_to_half(best_zero);
      p.scale[row * groups + group] = float_to_half(scale);
      p.zero[row * groups + group] = stored;
      uint8_t* const codes = p.codes + row * p.k + begin;
      for (int64_t i = 0; i < count; ++i) {
        codes[i] =
            static_cast<uint8_t>(fractional_code(values[i], scale, half_to_float(stored), top));
      }
    }
  }
}

}  // namespace kvopt::cpu
