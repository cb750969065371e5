// SPDX-License-Identifier: Apache-2.0
// Room for one token in two layers that share what they pack (MiniCache, arXiv:2405.14366, section
// 3): KvMergeEvictParams of common/kv_store.h.
//
// One block per segment, which reads from the lengths on the device whether there is anything to
// do. A full plain part: every plain key of both layers is read once for its distance, a warp per
// token, 4 D bytes in 16-bit types; the G nearest are found one after another, each a pass of the
// block over the distances; they are merged, a warp per key or value, and packed:
//
//     plain keys, lower | . . x . . x x . |      distances      the nearest, by position
//     plain keys, upper | . . y . . y y . |  ->  8 bytes each  ->  directions  ->  packed group
//                                                                  norms       ->  factors, twice
//
// The directions pass through a workspace of 2 G D numbers per segment, so that packing reads them
// as it reads any vectors. A victim: the search of kv_victim.cuh over both layers' scores, and for
// a packed one the same with G = 1. The distances, 4 D bytes per plain token, bound a step that
// packs; with G tokens packed at a time, G - 1 of G steps find room and leave at once.
#include "cuda/device/kv_merge.cuh"
#include "cuda/device/kv_pack.cuh"
#include "cuda/device/kv_slots.cuh"
#include "cuda/device/kv_victim.cuh"
#include "cuda/kv.h"

namespace kvopt::cuda {
namespace {

struct Scratch {
  KvPackScratch pack;
  int64_t at[kKvMaxGroup];
  uint64_t nearest[kKvMaxGroup];  // age keys
  KvGaps gaps;
};

struct Workspace {
  int32_t* common;   // (B), with `shared`
  float* distances;  // (B, P)
  void* directions;  // (B, H, 2, G, D) in the store's type: keys, then values
};

// The n-th largest age key of the segment's plain tokens, n >= 1: bit by bit, from the highest.
__device__ uint64_t newest_key(const int32_t* positions, int plain, int n) {
  uint64_t key = 0;
  for (int bit = 63; bit >= 0; --bit) {
    const uint64_t larger = key | uint64_t{1} << bit;
    if (bit < 31 && 1 << bit > plain) continue;  // no slot has it
    int count = 0;
    for (int first = 0; first < plain; first += kKvEvictThreads) {
      const int i = first + static_cast<int>(threadIdx.x);
      count += __syncthreads_count(i < plain && age_key(positions[i], i) >= larger);
    }
    if (count >= n) key = larger;
  }
  return key;
}

// scratch.gaps.leaving[0 .. count): the nearest plain tokens, in the order of positions. The
// segment has as many.
__device__ void find_nearest(const KvMergeEvictParams& p, int64_t row, const KvSegment& g,
                             int count, float* distances, Scratch& scratch) {
  const KvStore& s = p.lower;
  const int32_t* positions = s.positions + plain_place(s, row, g.plain_begin);
  const int residual = static_cast<int>(min(p.residual, int64_t{g.plain}));
  const int protected_count = max(0, residual - static_cast<int>(s.group));
  const uint64_t end =
      protected_count == 0 ? ~uint64_t{0} : newest_key(positions, g.plain, protected_count);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = warp; i < g.plain; i += kKvEvictThreads / 32) {
    if (age_key(positions[i], i) >= end) continue;
    const int64_t at = plain_vector(s, row, g.plain_begin + i);
    const KvVectorPair x = load_pair(s.plain_keys, p.upper.plain_keys, at, at, s.dim, s.type);
    if (lane == 0) distances[i] = distance_of(x);
  }
  __syncthreads();
  Key last{0, 0};  // below every distance
  for (int found = 0; found < count; ++found) {
    Key best = kNoKey;
    for (int i = threadIdx.x; i < g.plain; i += kKvEvictThreads) {
      const uint64_t age = age_key(positions[i], i);
      if (age >= end) continue;
      const Key key{ordered(distances[i]), age};
      if (before(last, key) && before(key, best)) best = key;
    }
    last = block_smallest(best);
    if (threadIdx.x == 0) scratch.nearest[found] = last.low;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kKvEvictThreads) {
    const uint64_t mine = scratch.nearest[i];
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += scratch.nearest[j] < mine;
    scratch.gaps.leaving[rank] = index_of({0, mine});
  }
  __syncthreads();
}

// Merges the plain tokens scratch.gaps.leaving[0 .. count) into the packed slots `into` .. of the
// row. `directions` are the segment's.
__device__ void merge_into(const KvMergeEvictParams& p, int64_t row, const KvSegment& g,
                           int64_t into, int count, bool into_group, void* directions,
                           Scratch& scratch) {
  KvStore s = p.lower;
  s.factors = nullptr;  // directions are packed as they are
  void* values = static_cast<uint8_t*>(directions) + s.group * s.dim * kv_type_bytes(s.type);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = warp; i < 2 * count; i += kKvEvictThreads / 32) {
    const int token = i / 2;
    const bool value = i % 2 == 1;
    const int64_t at = plain_vector(s, row, g.plain_begin + scratch.gaps.leaving[token]);
    const void* a = value ? s.plain_values : s.plain_keys;
    const void* b = value ? p.upper.plain_values : p.upper.plain_keys;
    const KvVectorPair x = load_pair(a, b, at, at, s.dim, s.type);
    store_direction(x, p.t, value ? values : directions, token * s.dim, s.dim, s.type);
    if (lane == 0) {
      const int64_t factor = 2 * (row * s.packed_slots + into + token) + value;
      p.lower.factors[factor] = x.norm_a;
      p.upper.factors[factor] = x.norm_b;
    }
  }
  for (int i = threadIdx.x; i < count; i += kKvEvictThreads) {
    scratch.at[i] = i * s.dim;
    const int64_t from = plain_place(s, row, g.plain_begin + scratch.gaps.leaving[i]);
    copy_note(p.lower, packed_place(s, row, into + i), from);
    copy_note(p.upper, packed_place(s, row, into + i), from);
  }
  __syncthreads();
  pack_vectors(s, row, into, count, into_group, {directions, values, s.type, scratch.at},
               scratch.pack);
  __syncthreads();
}

__global__ void __launch_bounds__(kKvEvictThreads)
    merge_evict_kernel(KvMergeEvictParams p, Workspace workspace) {
  __shared__ Scratch scratch;
  const KvStore& s = p.lower;
  const int64_t head = blockIdx.x, row = blockIdx.y, segment = row * s.heads + head;
  const int32_t position = p.position[row * p.position_heads + head % p.position_heads];
  const KvSegment g = load_segment(s, segment);
  const int group = static_cast<int>(s.group);
  // What a segment with packed slots must have can't be refused from here.
  if (position < 0 || g.plain < g.plain_capacity || g.plain == 0) return;
  if (g.packed_capacity > 0 && g.plain < group) return;
  float* distances = workspace.distances + row * s.plain_slots + g.plain_begin;
  void* directions = static_cast<uint8_t*>(workspace.directions) +
                     segment * 2 * s.group * s.dim * kv_type_bytes(s.type);
  int count = 1, packed = g.packed;
  if (packed + group <= g.packed_capacity) {
    count = group;
    find_nearest(p, row, g, count, distances, scratch);
    merge_into(p, row, g, g.packed_begin + packed, count, false, directions, scratch);
    packed += group;
  } else {
    const int of_row = p.shared ? workspace.common[row] : -1;
    const int index = find_victim(p, s, p.upper.scores, row, head, g, position, of_row);
    if (index >= packed) {
      if (threadIdx.x == 0) scratch.gaps.leaving[0] = index - packed;
    } else {
      const bool into_group = kv_code_bits(s.codec) != 0;
      find_nearest(p, row, g, 1, distances, scratch);
      merge_into(p, row, g, g.packed_begin + index, 1, into_group, directions, scratch);
    }
  }
  find_movers(g.plain, count, scratch.gaps);
  fill_gaps(p.lower, row, g, scratch.gaps);
  fill_gaps(p.upper, row, g, scratch.gaps);
  if (threadIdx.x == 0) {
    const int2 lengths = make_int2(packed, g.plain - count);
    reinterpret_cast<int2*>(p.lower.lengths)[segment] = lengths;
    reinterpret_cast<int2*>(p.upper.lengths)[segment] = lengths;
  }
}

// The parts of a workspace at `base`, each aligned to 256 bytes, and how long they are together.
int64_t divide(const KvMergeEvictParams& p, void* base, Workspace* parts) {
  const KvStore& s = p.lower;
  int64_t bytes = 0;
  const auto part = [&](int64_t size) {
    const int64_t begin = bytes;
    bytes += (size + 255) / 256 * 256;
    return static_cast<uint8_t*>(base) + begin;
  };
  const int64_t vectors = s.packed_slots > 0 ? s.rows * s.heads * 2 * s.group : 0;
  parts->common = reinterpret_cast<int32_t*>(part(p.shared ? 4 * s.rows : 0));
  parts->distances =
      reinterpret_cast<float*>(part(s.packed_slots > 0 ? 4 * s.rows * s.plain_slots : 0));
  parts->directions = part(vectors * s.dim * kv_type_bytes(s.type));
  return bytes;
}

}  // namespace

int64_t kv_merge_evict_workspace(const KvMergeEvictParams& p) {
  Workspace parts;
  return divide(p, nullptr, &parts);
}

int kv_merge_evict(const KvMergeEvictParams& p, void* workspace, void* stream) {
  const KvStore& s = p.lower;
  if (kv_refusal(s) != nullptr) return cudaErrorInvalidValue;
  if (s.rows == 0 || s.heads == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Workspace parts;
  divide(p, workspace, &parts);
  if (p.shared) find_common_victims(p, s, p.upper.scores, parts.common, cuda_stream);
  const dim3 grid(static_cast<unsigned>(s.heads), static_cast<unsigned>(s.rows));
  merge_evict_kernel<<<grid, kKvEvictThreads, 0, cuda_stream>>>(p, parts);
  return cudaGetLastError();
}

}  // namespace kvopt::cuda
