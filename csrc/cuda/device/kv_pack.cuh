// SPDX-License-Identifier: Apache-2.0
// A block packs vectors into neighbouring packed slots of one row: the rules of common/kv_store.h
// in fp32, operation by operation, so that codes and scales agree with the CPU's bit for bit. No
// product is fused with a sum before a rounding.
#pragma once

#include <cuda_fp8.h>

#include "cuda/device/kv_store.cuh"

namespace kvopt::cuda {

// Where the vectors lie: vector i begins at element at[i] of keys and of values.
struct KvVectors {
  const void* keys;
  const void* values;
  KvType type;
  const int64_t* at;  // shared memory
};

constexpr int kKvPackThreads =
    256;  // that take part in a range over a group; a block has as many at least

struct KvPackScratch {
  float4 low[kKvPackThreads], high[kKvPackThreads];
  float norms[2 * kKvMaxGroup];
};

__device__ __forceinline__ float& channel(float4& v, int i) {
  return reinterpret_cast<float*>(&v)[i];
}

__device__ __forceinline__ float4 min_four(float4 a, float4 b) {
  return make_float4(fminf(a.x, b.x), fminf(a.y, b.y), fminf(a.z, b.z), fminf(a.w, b.w));
}
__device__ __forceinline__ float4 max_four(float4 a, float4 b) {
  return make_float4(fmaxf(a.x, b.x), fmaxf(a.y, b.y), fmaxf(a.z, b.z), fmaxf(a.w, b.w));
}

__device__ __forceinline__ uint16_t finite_half(float v) {
  return __half_as_ushort(__float2half_rn(fminf(fmaxf(v, -65504.0f), 65504.0f)));
}

__device__ __forceinline__ float direction_part(float x, float norm) {
  return norm == 0.0f ? 0.0f : __fdiv_rn(x, norm);
}

// Channels 4 * chunk .. + 3 of vector i, as they are packed.
__device__ __forceinline__ float4 load_source(const void* data, const KvVectors& v, int i,
                                              int chunk, const float* norm) {
  const float4 x = load_four(data, v.at[i] + 4 * chunk, v.type);
  if (norm == nullptr) return x;
  return make_float4(direction_part(x.x, *norm), direction_part(x.y, *norm),
                     direction_part(x.z, *norm), direction_part(x.w, *norm));
}

__device__ __forceinline__ uint32_t integer_code(float x, float scale, float lowest, float top) {
  if (scale == 0.0f) return 0;
  const float code = rintf(__fdiv_rn(__fsub_rn(x, lowest), scale));
  return static_cast<uint32_t>(fminf(fmaxf(code, 0.0f), top));
}

__device__ __forceinline__ void store_codes(uint8_t* vector, int chunk, KvCodec codec, uint32_t a,
                                            uint32_t b, uint32_t c, uint32_t d) {
  if (codec == KvCodec::kInt2) {
    vector[chunk] = static_cast<uint8_t>(a | b << 2 | c << 4 | d << 6);
  } else if (codec == KvCodec::kInt4) {
    reinterpret_cast<uint16_t*>(vector)[chunk] =
        static_cast<uint16_t>(a | b << 4 | c << 8 | d << 12);
  } else {
    reinterpret_cast<uint32_t*>(vector)[chunk] = a | b << 8 | c << 16 | d << 24;
  }
}

__device__ __forceinline__ uint32_t fp8_code(float x, float scale) {
  const float scaled = fminf(fmaxf(__fdiv_rn(x, scale), -448.0f), 448.0f);
  return __nv_cvt_float_to_fp8(scaled, __NV_SATFINITE, __NV_E4M3);
}

// Keys of a group: one range per channel over its vectors. The block's threads split the vectors of
// a chunk of four channels between them.
__device__ inline void pack_key_group(const KvStore& s, int64_t row, int64_t slot, int count,
                                      bool into_group, const KvVectors& v, KvPackScratch& scratch) {
  const int chunks = static_cast<int>(s.dim / 4);
  const int parts = min(count, kKvPackThreads / chunks);
  const int chunk = static_cast<int>(threadIdx.x) % chunks;
  const int part = static_cast<int>(threadIdx.x) / chunks;
  const bool norms = s.factors != nullptr;
  const float top = static_cast<float>((1 << kv_code_bits(s.codec)) - 1);
  const int64_t group = row * (s.packed_slots / s.group) + slot / s.group;
  uint16_t* scales = s.key_scale + group * 2 * s.dim;
  if (!into_group) {
    if (part < parts) {
      float4 low = make_float4(INFINITY, INFINITY, INFINITY, INFINITY);
      float4 high = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
#pragma unroll 4
      for (int i = part; i < count; i += parts) {
        const float4 x = load_source(v.keys, v, i, chunk, norms ? &scratch.norms[2 * i] : nullptr);
        low = min_four(low, x);
        high = max_four(high, x);
      }
      scratch.low[threadIdx.x] = low;
      scratch.high[threadIdx.x] = high;
    }
    __syncthreads();
    if (part == 0) {
      float4 low = scratch.low[chunk], high = scratch.high[chunk];
      for (int i = 1; i < parts; ++i) {
        low = min_four(low, scratch.low[i * chunks + chunk]);
        high = max_four(high, scratch.high[i * chunks + chunk]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float range = __fsub_rn(channel(high, i), channel(low, i));
        scales[4 * chunk + i] = finite_half(__fdiv_rn(range, top));
        scales[s.dim + 4 * chunk + i] = finite_half(channel(low, i));
      }
    }
    __syncthreads();
  }
  if (part >= parts) return;
  float4 scale = load_four(scales, 4 * chunk, KvType::kFloat16);
  float4 low = load_four(scales, s.dim + 4 * chunk, KvType::kFloat16);
  const int64_t bytes = kv_packed_bytes(s.codec, s.type, s.dim);
#pragma unroll 4
  for (int i = part; i < count; i += parts) {
    const float4 x = load_source(v.keys, v, i, chunk, norms ? &scratch.norms[2 * i] : nullptr);
    store_codes(s.packed_keys + (row * s.packed_slots + slot + i) * bytes, chunk, s.codec,
                integer_code(x.x, scale.x, low.x, top), integer_code(x.y, scale.y, low.y, top),
                integer_code(x.z, scale.z, low.z, top), integer_code(x.w, scale.w, low.w, top));
  }
}

// A warp packs the values of one vector: one range per group of channels, which neighbouring lanes
// hold (group / 4 of them, a power of two).
__device__ __forceinline__ void pack_integer_value(const KvStore& s, int64_t vector,
                                                   const KvVectors& v, int i, const float* norm) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int chunks = static_cast<int>(s.dim / 4), lanes = static_cast<int>(s.group / 4);
  const float top = static_cast<float>((1 << kv_code_bits(s.codec)) - 1);
  const int64_t groups = kv_value_groups(s.dim, s.group);
  uint8_t* codes = s.packed_values + vector * kv_packed_bytes(s.codec, s.type, s.dim);
  for (int first = 0; first < chunks; first += 32) {
    const int chunk = first + lane;
    const bool inside = chunk < chunks;
    float4 x = make_float4(0, 0, 0, 0);
    float low = INFINITY, high = -INFINITY;
    if (inside) {
      x = load_source(v.values, v, i, chunk, norm);
      low = fminf(fminf(x.x, x.y), fminf(x.z, x.w));
      high = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      low = fminf(low, __shfl_xor_sync(0xFFFFFFFF, low, offset));
      high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFF, high, offset));
    }
    if (!inside) continue;
    const uint16_t scale_bits = finite_half(__fdiv_rn(__fsub_rn(high, low), top));
    const uint16_t low_bits = finite_half(low);
    const float scale = half_value(scale_bits);
    low = half_value(low_bits);
    if (chunk % lanes == 0) {
      reinterpret_cast<uint32_t*>(s.value_scale)[vector * groups + chunk / lanes] =
          scale_bits | uint32_t{low_bits} << 16;
    }
    store_codes(codes, chunk, s.codec, integer_code(x.x, scale, low, top),
                integer_code(x.y, scale, low, top), integer_code(x.z, scale, low, top),
                integer_code(x.w, scale, low, top));
  }
}

// A warp packs one vector as fp8 with its own scale, or copies it.
__device__ __forceinline__ void pack_whole_vector(const KvStore& s, int64_t vector, bool is_value,
                                                  const KvVectors& v, int i, const float* norm) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int chunks = static_cast<int>(s.dim / 4);
  const void* source = is_value ? v.values : v.keys;
  uint8_t* target = is_value ? s.packed_values : s.packed_keys;
  if (s.codec == KvCodec::kModel) {
    for (int chunk = lane; chunk < chunks; chunk += 32) {
      store_four(target, vector * s.dim + 4 * chunk, load_source(source, v, i, chunk, norm),
                 s.type);
    }
    return;
  }
  float largest = 0.0f;
  for (int chunk = lane; chunk < chunks; chunk += 32) {
    const float4 x = load_source(source, v, i, chunk, norm);
    largest = fmaxf(fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y))), fmaxf(fabsf(x.z), fabsf(x.w)));
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, offset));
  }
  const uint16_t bits = finite_half(fmaxf(__fdiv_rn(largest, 448.0f), 0x1p-24f));
  const float scale = half_value(bits);
  if (lane == 0) (is_value ? s.value_scale : s.key_scale)[vector] = bits;
  for (int chunk = lane; chunk < chunks; chunk += 32) {
    const float4 x = load_source(source, v, i, chunk, norm);
    store_codes(target + vector * s.dim, chunk, s.codec, fp8_code(x.x, scale), fp8_code(x.y, scale),
                fp8_code(x.z, scale), fp8_code(x.w, scale));
  }
}

// Vectors 0 .. count - 1 into the packed slots `slot` .. of the row: a whole group of an integer
// codec, with `into_group` one slot of a group that exists, or any number with another codec. All
// threads of the block call it; v.at is visible to them. Afterwards the caller synchronises.
__device__ inline void pack_vectors(const KvStore& s, int64_t row, int64_t slot, int count,
                                    bool into_group, const KvVectors& v, KvPackScratch& scratch) {
  const int64_t first = row * s.packed_slots + slot;
  const bool norms = s.factors != nullptr;
  if (norms) {
    // In the order of channels, as the contract says: one thread per vector.
    for (int i = threadIdx.x; i < 2 * count; i += static_cast<int>(blockDim.x)) {
      const void* data = i % 2 == 0 ? v.keys : v.values;
      double sum = 0;
      for (int chunk = 0; 4 * chunk < s.dim; ++chunk) {
        float4 x = load_four(data, v.at[i / 2] + 4 * chunk, v.type);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum += static_cast<double>(channel(x, j)) * static_cast<double>(channel(x, j));
        }
      }
      const float norm = static_cast<float>(sqrt(sum));
      scratch.norms[i] = norm;
      s.factors[2 * first + i] = norm;
    }
    __syncthreads();
  }
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  const bool integer = kv_code_bits(s.codec) != 0;
  if (integer) {
    for (int i = warp; i < count; i += warps) {
      pack_integer_value(s, first + i, v, i, norms ? &scratch.norms[2 * i + 1] : nullptr);
    }
    pack_key_group(s, row, slot, count, into_group, v, scratch);
    return;
  }
  for (int i = warp; i < 2 * count; i += warps) {
    pack_whole_vector(s, first + i / 2, i % 2 == 1, v, i / 2, norms ? &scratch.norms[i] : nullptr);
  }
}

}  // namespace kvopt::cuda
