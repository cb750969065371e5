// SPDX-License-Identifier: Apache-2.0
// The search of a group's scale and zero point, one rule for every device. T is the type of the
// weights, float or double, and of all arithmetic.
//
// With lo = min(0, min w), hi = max(0, max w), a = max(hi, -lo) over the group and Q = 2^bits - 1,
// step i = 0 .. steps shrinks the range to p = 1 - (1 - smallest) * i / steps of it, and every p
// has a few readings v:
//   asymmetric (4):  scale = p * ((hi - lo) / Q), zero = clamp(floor(-lo * p / scale) + v - 1, 0,
//   Q) symmetric (2):   scale = p * (2 a / Q) and p * (2 a / (Q - 1)); zero = 2^(bits-1). The first
//   puts
//                    both ends half a step outside the codes, the second puts hi on the largest
// (8 bits: a / 127 first, 2 a / Q second). scale is rounded to float, then to fp16, lies in 2^-24
// .. 65504 and is used as rounded. Candidate i * readings + v has the error
//     sum over the group's columns in their order of  h * d * d,  d = scale * (q - zero) - w,
// q = clamp(round(w / scale) + zero, 0, Q), ties to even, h the column's importance (1 without
// one); the first of the smallest wins. Rounding to nearest is among the candidates, so no group
// gets worse by it. steps = 0 means that rule alone.
#pragma once

#include "common/params.h"

namespace kvopt {

constexpr int32_t kMaxSearchSteps = 100;
constexpr int32_t kMaxReadings = 4;
constexpr int32_t kMaxCandidates = (kMaxSearchSteps + 1) * kMaxReadings;

struct SearchGrid {
  int32_t steps;
  double smallest;  // in (0, 1]
};

KVOPT_HOST_DEVICE constexpr int32_t search_readings(const QuantFormat& f) {
  return f.has_zeros() ? 4 : 2;
}

KVOPT_HOST_DEVICE constexpr int32_t candidate_count(const QuantFormat& f, const SearchGrid& grid) {
  return grid.steps == 0 ? 1 : (grid.steps + 1) * search_readings(f);
}

// Codes (N, K), scale and zero (N, groups) for weight (N, K), each group by the search. Integer
// schemes only. importance (K) may be null.
template <typename T>
struct SearchParams {
  int64_t n, k;
  QuantFormat format;
  SearchGrid grid;
  const T* weight;
  const T* importance;
  uint8_t* codes;
  uint16_t* scale;
  uint16_t* zero;
};

// Half-quadratic quantisation (HQQ, Badri and Shaji 2023), asymmetric. scale as for rounding to
// nearest; the zero point starts at -lo / scale, a fraction, and is refined: with
//     q = clamp(round(w / scale + zero), 0, Q),   r = scale * (q - zero)
//     e = shrink(w - r),   shrink(x) = sign(x) * max(0, |x| - |x|^(norm - 1) / beta)
//     zero <- mean over the group of  q - (w - e) / scale,   beta <- beta * kappa
// it stops when the group's mean |w - r| no longer falls, after `iterations` at most, and keeps the
// zero point of the smallest. That one is rounded to fp16, and the codes follow from it as rounded.
struct HqqParams {
  int64_t n, k;
  QuantFormat format;
  int32_t iterations;
  float beta, kappa, norm;
  const float* weight;
  uint8_t* codes;
  uint16_t* scale;
  uint16_t* zero;
};

}  // namespace kvopt
