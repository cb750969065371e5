// SPDX-License-Identifier: Apache-2.0
// The hot loop of the search, included by one file per instruction set. Candidates are the inner
// loop and the vector: each has its own scale and zero point, and its errors add up in the order of
// the columns, so every width gives the same bits. Division bounds it: a column and 8 candidates
// are about 10 cycles with AVX2. In an anonymous namespace, so that no two files share its code.
#pragma once

#include <cstdint>

namespace kvopt::cpu {
namespace {

template <typename T>
constexpr T kRoundingMagic =
    sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^23, 2^52

template <typename T>
inline T clamp_value(T value, T low, T high) {
  value = value > low ? value : low;  // NaN becomes low
  return value < high ? value : high;
}

// Rounds to nearest even; |value| must be well below 2^22. The sum leaves no fraction bits.
template <typename T>
inline T round_value(T value) {
  return (value + kRoundingMagic<T>)-kRoundingMagic<T>;
}

// clamp(round(value / scale) + zero, 0, largest_code). The first clamp changes no result: the
// second is tighter.
template <typename T>
inline T code_value(T value, T scale, T zero, T largest_code) {
  const T steps = round_value(clamp_value(value / scale, T(-1024), T(1024)));
  return clamp_value(steps + zero, T(0), largest_code);
}

template <typename T>
inline void add_candidate_errors(const T* values, const T* importance, int64_t count,
                                 const T* scales, const T* zeros, int64_t candidates,
                                 T largest_code, T* errors) {
  constexpr int64_t kStep = 32;  // candidates whose sums stay in registers
  for (int64_t first = 0; first < candidates; first += kStep) {
    const int64_t size = candidates - first < kStep ? candidates - first : kStep;
    T scale[kStep], zero[kStep], sum[kStep];
    for (int64_t c = 0; c < kStep; ++c) {
      const int64_t from = first + (c < size ? c : 0);
      scale[c] = scales[from];
      zero[c] = zeros[from];
      sum[c] = errors[from];
    }
    for (int64_t i = 0; i < count; ++i) {
      const T value = values[i];
      const T weight = importance == nullptr ? T(1) : importance[i];
      for (int64_t c = 0; c < kStep; ++c) {
        const T code = code_value(value, scale[c], zero[c], largest_code);
        const T d = scale[c] * (code - zero[c]) - value;
        sum[c] += weight * (d * d);
      }
    }
    for (int64_t c = 0; c < size; ++c) errors[first + c] = sum[c];
  }
}

}  // namespace
}  // namespace kvopt::cpu
