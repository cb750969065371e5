// SPDX-License-Identifier: Apache-2.0
// A prompt's chosen tokens into a fresh store, and a store back into vectors.
//
//   pack     one block per tile of chosen tokens of a segment; a tile is a group of an integer
//            codec, so that a range over a group's slots is a block's own affair:
//
//                chosen (m)   |<- tile 0 ->|<- tile 1 ->| ... |<- tile k ->|
//                              packed group 0, group 1, ...     plain slots
//
//            Keys are read twice (range, then codes; the second time from L1), values once.
//   unpack   one warp per slot.
//
// Bytes: what is read and written once; both are bound by memory. Limits: cuda/kv.h.
#include <algorithm>

#include "cuda/device/kv_pack.cuh"
#include "cuda/kv.h"

namespace kvopt::cuda {
namespace {

constexpr int kTile = 32;  // slots of a tile where no group asks for another number

__host__ __device__ int tile_of(const KvStore& s) {
  return kv_code_bits(s.codec) != 0 ? static_cast<int>(s.group) : kTile;
}

__global__ void __launch_bounds__(kKvPackThreads) pack_kernel(KvPackParams p) {
  __shared__ KvPackScratch scratch;
  __shared__ int64_t at[kKvMaxGroup];
  const KvStore& s = p.store;
  const int64_t head = blockIdx.y, row = blockIdx.z, segment = row * s.heads + head;
  const int tile = tile_of(s), group = static_cast<int>(s.group);
  const KvSegment g = load_segment(s, segment);
  const int count =
      max(0, min(min(p.counts[segment], static_cast<int>(p.chosen_count)), g.capacity()));
  const int packed = (max(0, count - g.plain_capacity) + group - 1) / group * group;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    reinterpret_cast<int2*>(s.lengths)[segment] = make_int2(packed, count - packed);
  }
  const int first = static_cast<int>(blockIdx.x) * tile;
  const int here = min(tile, count - first);
  if (here <= 0) return;
  const int32_t* chosen =
      p.chosen + (row * p.chosen_heads + head % p.chosen_heads) * p.chosen_count + first;
  const int32_t* key_positions =
      p.key_positions + (row * p.position_heads + head % p.position_heads) * p.candidates;
  const int into_packed = min(max(packed - first, 0), here);
  for (int i = threadIdx.x; i < here; i += kKvPackThreads) {
    // No index from outside may lead a read astray.
    const int64_t token = min(max(int64_t{chosen[i]}, int64_t{0}), p.candidates - 1);
    at[i] = (segment * p.candidates + token) * s.dim;
    const int64_t in_row = i < into_packed ? g.packed_begin + first + i
                                           : s.packed_slots + g.plain_begin + (first + i - packed);
    const int64_t place = row * (s.packed_slots + s.plain_slots) + in_row;
    s.positions[place] = key_positions[token];
    if (s.scores != nullptr) {
      s.scores[place] =
          p.token_scores == nullptr ? 0.0f : p.token_scores[segment * p.candidates + token];
    }
  }
  __syncthreads();
  const KvVectors vectors{p.keys, p.values, s.type, at};
  if (into_packed > 0) {
    pack_vectors(s, row, g.packed_begin + first, into_packed, false, vectors, scratch);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = into_packed + warp; i < here; i += kKvPackThreads / 32) {
    const int64_t target = plain_vector(s, row, g.plain_begin + first + i - packed);
    for (int c = 4 * lane; c < s.dim; c += 128) {
      store_four(s.plain_keys, target + c, load_four(p.keys, at[i] + c, s.type), s.type);
      store_four(s.plain_values, target + c, load_four(p.values, at[i] + c, s.type), s.type);
    }
  }
}

__global__ void __launch_bounds__(128) unpack_kernel(KvUnpackParams p) {
  const KvStore& s = p.store;
  const int64_t head = blockIdx.y, row = blockIdx.z, segment = row * s.heads + head;
  const int index = static_cast<int>(blockIdx.x * 4 + threadIdx.x / 32);
  const int lane = threadIdx.x % 32;
  if (index >= p.slots) return;
  const KvSegment g = load_segment(s, segment);
  const int64_t target = segment * p.slots + index;
  if (lane == 0) {
    p.positions[target] = index < g.filled() ? s.positions[slot_place(s, row, g, index)] : -1;
  }
  for (int chunk = lane; 4 * chunk < s.dim; chunk += 32) {
    float4 key = make_float4(0, 0, 0, 0), value = key;
    if (index < g.packed) {
      key = load_packed_key(s, row, g.packed_begin + index, chunk);
      value = load_packed_value(s, row, g.packed_begin + index, chunk);
    } else if (index < g.filled()) {
      const int64_t source = plain_vector(s, row, g.plain_begin + index - g.packed) + 4 * chunk;
      key = load_four(s.plain_keys, source, s.type);
      value = load_four(s.plain_values, source, s.type);
    }
    store_four(p.keys, target * s.dim + 4 * chunk, key, s.type);
    store_four(p.values, target * s.dim + 4 * chunk, value, s.type);
  }
}

}  // namespace

const char* kv_refusal(KvType type, int64_t dim) {
  if (type == KvType::kFloat64) return "float64 (CUDA takes float32, float16 and bfloat16)";
  if (dim < 4 || dim > kKvMaxDim || dim % 4 != 0) {
    return "this number of channels (CUDA takes multiples of 4 up to 256)";
  }
  return nullptr;
}

const char* kv_refusal(const KvStore& s) {
  if (const char* why = kv_refusal(s.type, s.dim)) return why;
  const bool power = (s.group & (s.group - 1)) == 0;
  if (kv_code_bits(s.codec) != 0 && (!power || s.group < 4 || s.group > kKvMaxGroup)) {
    return "this group (CUDA takes powers of two from 4 to 128)";
  }
  if (s.group > kKvMaxGroup) return "this group (CUDA takes 1 to 128)";
  if (s.rows > 65535 || s.heads > 65535) return "more than 65535 rows or heads";
  if ((s.packed_slots + s.plain_slots) > INT32_MAX / 2) return "more than 2^30 slots in a row";
  return nullptr;
}

int kv_quant_pack(const KvPackParams& p, void* stream) {
  if (kv_refusal(p.store) != nullptr) return cudaErrorInvalidValue;
  if (p.store.rows == 0 || p.store.heads == 0) return cudaSuccess;
  const int tile = tile_of(p.store);
  const int64_t tokens = p.candidates == 0 ? 0 : p.chosen_count;
  KvPackParams q = p;
  q.chosen_count = tokens;
  const dim3 grid(static_cast<unsigned>(std::max<int64_t>(1, (tokens + tile - 1) / tile)),
                  static_cast<unsigned>(p.store.heads), static_cast<unsigned>(p.store.rows));
  pack_kernel<<<grid, kKvPackThreads, 0, static_cast<cudaStream_t>(stream)>>>(q);
  return cudaGetLastError();
}

int kv_quant_unpack(const KvUnpackParams& p, void* stream) {
  if (kv_refusal(p.store) != nullptr) return cudaErrorInvalidValue;
  if (p.store.rows == 0 || p.store.heads == 0 || p.slots == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((p.slots + 3) / 4), static_cast<unsigned>(p.store.heads),
                  static_cast<unsigned>(p.store.rows));
  unpack_kernel<<<grid, 128, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace kvopt::cuda
