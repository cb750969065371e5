// SPDX-License-Identifier: Apache-2.0
// Exact software conversions between fp32, fp16 and bf16: round to nearest even, subnormals,
// infinities, NaN; and independent of the flush-to-zero mode, because no intermediate result is an
// fp32 subnormal. For portable files only. A file compiled for one instruction set must not include
// it: its inline functions could be kept by the linker in place of the portable ones. Those files
// have their own conversion instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/params.h"

namespace kvopt::cpu {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Selections instead of branches, so that loops over it vectorise.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = magnitude + (224u << 23);  // exponent 31 becomes 255
  // A subnormal is its mantissa in units of 2^-24: put it below 2^-14 and subtract 2^-14.
  const uint32_t subnormal =
      float_bits(float_from_bits(magnitude + (113u << 23)) - float_from_bits(113u << 23));
  const uint32_t finite = exponent == 0 ? subnormal : normal;
  return float_from_bits((exponent == 0x0f800000u ? special : finite) | sign);
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above rounds to infinity
    half = 0x7c00u;
  } else if (magnitude <
             0x38800000u) {  // below 2^-14: 0.5 has units of 2^-24, so the addition rounds
    half = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  }
  return static_cast<uint16_t>(half | sign);
}

inline float bfloat16_to_float(uint16_t value) {
  return float_from_bits(static_cast<uint32_t>(value) << 16);
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// `count` values from index `first` of an array of `dtype`, and back.
inline void load_floats(DType dtype, const void* source, int64_t first, int64_t count,
                        float* values) {
  if (dtype == DType::kFloat32) {
    std::memcpy(values, static_cast<const float*>(source) + first, sizeof(float) * count);
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(source) + first;
  if (dtype == DType::kFloat16) {
    for (int64_t i = 0; i < count; ++i) values[i] = half_to_float(bits[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = bfloat16_to_float(bits[i]);
  }
}

inline void store_floats(DType dtype, const float* values, int64_t count, void* target,
                         int64_t first) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(target) + first, values, sizeof(float) * count);
    return;
  }
  uint16_t* bits = static_cast<uint16_t*>(target) + first;
  if (dtype == DType::kFloat16) {
    for (int64_t i = 0; i < count; ++i) bits[i] = float_to_half(values[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) bits[i] = float_to_bfloat16(values[i]);
  }
}

}  // namespace kvopt::cpu
