// SPDX-License-Identifier: Apache-2.0
// bitsandbytes' signed "dynamic" 8-bit values, in which double quantisation keeps absmax (Dettmers,
// 8-bit approximations for parallelism in deep learning, 2015): seven decades, decade 10^(i-6) with
// 2^i values in the middles of 2^i equal parts of [0.1, 1], their negatives, 0 and 1. The edges are
// those of a linspace that counts from the nearer end with fused multiply-adds, bit for bit.
#pragma once

#include <cstdint>

#include "common/quant_format.h"

namespace kvopt {

constexpr int64_t kDoubleBlock = 256;  // absmax values that share a scale

struct DynamicMap {
  float value[256];  // rising
};

constexpr DynamicMap dynamic_map() {
  constexpr float kDecades[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  DynamicMap map{};
  map.value[127] = 0.0f;
  map.value[255] = 1.0f;
  for (int i = 0; i < 7; ++i) {
    const int parts = 1 << i;
    const double step = (1.0f - 0.1f) / static_cast<float>(parts);
    const auto edge = [&](int j) {
      return static_cast<float>(2 * j < parts ? 0.1f + step * j : 1.0 - step * (parts - j));
    };
    for (int j = 0; j < parts; ++j) {
      const float middle = kDecades[i] * ((edge(j) + edge(j + 1)) / 2.0f);
      map.value[127 + parts + j] = middle;
      map.value[127 - parts - j] = -middle;
    }
  }
  return map;
}

// Absmax of a group from its code: dynamic_map()[code] * scale + offset, each step rounded to fp32,
// then to fp16, at least 2^-24. `meta` is that of the format, in the layout of the device; there
// are no zero points.
struct ExpandScalesParams {
  int64_t n, k;
  QuantFormat format;
  const uint8_t* codes;  // (N * groups), row-major
  const float* scale;    // (ceil(N * groups / kDoubleBlock))
  const float* offset;   // (1)
  uint16_t* meta;
};

}  // namespace kvopt
