// SPDX-License-Identifier: Apache-2.0
// Segments of a KV store on the device, and vectors read four channels at a time: in the model's
// type, or as the number that packed codes stand for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/kv_store.h"

namespace kvopt::cuda {

constexpr int kKvMaxDim = 256;
constexpr int kKvMaxGroup = 128;

struct KvSegment {
  int packed_begin, packed_capacity, plain_begin, plain_capacity;
  int packed, plain;  // filled

  __device__ int filled() const { return packed + plain; }
  __device__ int capacity() const { return packed_capacity + plain_capacity; }
};

__device__ __forceinline__ KvSegment load_segment(const KvStore& s, int64_t segment) {
  const int4 place = reinterpret_cast<const int4*>(s.segments)[segment];
  const int2 filled = reinterpret_cast<const int2*>(s.lengths)[segment];
  return {place.x, place.y, place.z, place.w, filled.x, filled.y};
}

// Where slot `index` of a segment (filled packed slots first) has its position and score.
__device__ __forceinline__ int64_t slot_place(const KvStore& s, int64_t row, const KvSegment& g,
                                              int index) {
  const int64_t in_row = index < g.packed ? g.packed_begin + index
                                          : s.packed_slots + g.plain_begin + (index - g.packed);
  return row * (s.packed_slots + s.plain_slots) + in_row;
}

__device__ __forceinline__ int64_t plain_vector(const KvStore& s, int64_t row, int64_t slot) {
  return (row * s.plain_slots + slot) * s.dim;
}

__device__ __forceinline__ float half_value(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ float4 unpack_halves(uint2 bits) {
  const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&bits.x));
  const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&bits.y));
  return make_float4(a.x, a.y, b.x, b.y);
}

__device__ __forceinline__ float4 unpack_bfloats(uint2 bits) {
  return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xFFFF0000),
                     __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xFFFF0000));
}

__device__ __forceinline__ float load_element(const void* data, int64_t i, KvType type) {
  if (type == KvType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == KvType::kFloat16 ? half_value(bits) : __uint_as_float(uint32_t{bits} << 16);
}

// Elements i .. i + 3; i is a multiple of 4, the array may begin anywhere.
__device__ __forceinline__ float4 load_four(const void* data, int64_t i, KvType type) {
  if (type == KvType::kFloat32) {
    const float* x = static_cast<const float*>(data) + i;
    if ((reinterpret_cast<uintptr_t>(x) & 15) == 0) return *reinterpret_cast<const float4*>(x);
    return make_float4(x[0], x[1], x[2], x[3]);
  }
  const uint16_t* x = static_cast<const uint16_t*>(data) + i;
  uint2 bits;
  if ((reinterpret_cast<uintptr_t>(x) & 7) == 0) {
    bits = *reinterpret_cast<const uint2*>(x);
  } else {
    bits = make_uint2(x[0] | uint32_t{x[1]} << 16, x[2] | uint32_t{x[3]} << 16);
  }
  return type == KvType::kFloat16 ? unpack_halves(bits) : unpack_bfloats(bits);
}

__device__ __forceinline__ uint32_t half_pair(float a, float b) {
  const __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}

__device__ __forceinline__ uint32_t bfloat_pair(float a, float b) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}

__device__ __forceinline__ void store_four(void* data, int64_t i, float4 v, KvType type) {
  if (type == KvType::kFloat32) {
    reinterpret_cast<float4*>(static_cast<float*>(data) + i)[0] = v;
    return;
  }
  const uint2 bits = type == KvType::kFloat16
                         ? make_uint2(half_pair(v.x, v.y), half_pair(v.z, v.w))
                         : make_uint2(bfloat_pair(v.x, v.y), bfloat_pair(v.z, v.w));
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + i) = bits;
}

// e4m3fn and fp16 share sign, exponent and mantissa fields but for two exponent bits, so a code
// shifted into place is its value times 2^-8, subnormals included.
__device__ __forceinline__ float fp8_value(uint32_t code) {
  const uint16_t bits = static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7F) << 7);
  return half_value(bits) * 256.0f;
}

// Codes of channels 4 * chunk .. + 3 of a packed vector, as numbers.
__device__ __forceinline__ float4 load_codes(const uint8_t* vector, int chunk, KvCodec codec) {
  if (codec == KvCodec::kInt2) {
    const uint32_t w = vector[chunk];
    return make_float4(w & 3, w >> 2 & 3, w >> 4 & 3, w >> 6);
  }
  if (codec == KvCodec::kInt4) {
    const uint32_t w = reinterpret_cast<const uint16_t*>(vector)[chunk];
    return make_float4(w & 15, w >> 4 & 15, w >> 8 & 15, w >> 12);
  }
  const uint32_t w = reinterpret_cast<const uint32_t*>(vector)[chunk];
  if (codec == KvCodec::kInt8) {
    return make_float4(w & 255, w >> 8 & 255, w >> 16 & 255, w >> 24);
  }
  return make_float4(fp8_value(w & 255), fp8_value(w >> 8 & 255), fp8_value(w >> 16 & 255),
                     fp8_value(w >> 24));
}

__device__ __forceinline__ float4 scaled(float4 x, float4 scale, float4 lowest) {
  return make_float4(fmaf(scale.x, x.x, lowest.x), fmaf(scale.y, x.y, lowest.y),
                     fmaf(scale.z, x.z, lowest.z), fmaf(scale.w, x.w, lowest.w));
}

__device__ __forceinline__ float4 scaled(float4 x, float s) {
  return make_float4(x.x * s, x.y * s, x.z * s, x.w * s);
}

// Channels 4 * chunk .. + 3 of what packed slot `slot` (of the row) stands for.
__device__ __forceinline__ float4 load_packed_key(const KvStore& s, int64_t row, int64_t slot,
                                                  int chunk) {
  const int64_t vector = row * s.packed_slots + slot;
  float4 x;
  if (s.codec == KvCodec::kModel) {
    x = load_four(s.packed_keys, vector * s.dim + 4 * chunk, s.type);
  } else {
    const int64_t bytes = kv_packed_bytes(s.codec, s.type, s.dim);
    x = load_codes(s.packed_keys + vector * bytes, chunk, s.codec);
    if (s.codec == KvCodec::kFp8) {
      x = scaled(x, half_value(s.key_scale[vector]));
    } else {
      const int64_t group = row * (s.packed_slots / s.group) + slot / s.group;
      const uint16_t* scale = s.key_scale + group * 2 * s.dim;
      x = scaled(x, load_four(scale, 4 * chunk, KvType::kFloat16),
                 load_four(scale, s.dim + 4 * chunk, KvType::kFloat16));
    }
  }
  return s.factors == nullptr ? x : scaled(x, s.factors[2 * vector]);
}

__device__ __forceinline__ float4 load_packed_value(const KvStore& s, int64_t row, int64_t slot,
                                                    int chunk) {
  const int64_t vector = row * s.packed_slots + slot;
  float4 x;
  if (s.codec == KvCodec::kModel) {
    x = load_four(s.packed_values, vector * s.dim + 4 * chunk, s.type);
  } else {
    const int64_t bytes = kv_packed_bytes(s.codec, s.type, s.dim);
    x = load_codes(s.packed_values + vector * bytes, chunk, s.codec);
    if (s.codec == KvCodec::kFp8) {
      x = scaled(x, half_value(s.value_scale[vector]));
    } else {
      const int64_t groups = kv_value_groups(s.dim, s.group);
      const int64_t at = vector * groups + 4 * chunk / s.group;
      const uint32_t pair = reinterpret_cast<const uint32_t*>(s.value_scale)[at];
      const float scale = half_value(pair & 0xFFFF), lowest = half_value(pair >> 16);
      x = scaled(x, make_float4(scale, scale, scale, scale),
                 make_float4(lowest, lowest, lowest, lowest));
    }
  }
  return s.factors == nullptr ? x : scaled(x, s.factors[2 * vector + 1]);
}

}  // namespace kvopt::cuda
