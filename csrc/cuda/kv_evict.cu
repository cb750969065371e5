// SPDX-License-Identifier: Apache-2.0
// One decoded token into every segment: into a free slot, by packing a group of old plain tokens,
// or in the place of a victim. The three cases stand in common/kv_store.h.
//
// One block per segment; which case it is, the block reads from the lengths on the device. Free
// slot: the token's two vectors are copied, 4 D bytes each way. Group: the G oldest plain tokens
// are ranked by counting (plain parts are short) and packed by the whole block. Victim: a search
// over the filled slots, 8 bytes each, then two vectors; the search is what bounds a step, and
// it takes no more than a pass of the block's threads over the segment:
//
//     key of a slot = (protected?, priority, position, index), the smallest key leaves
//
// `shared`: all heads of a row evict one index; a launch before this one finds it (kv_victim.cu).
#include "cuda/device/kv_pack.cuh"
#include "cuda/device/kv_slots.cuh"
#include "cuda/device/kv_victim.cuh"
#include "cuda/kv.h"

namespace kvopt::cuda {
namespace {

struct Scratch {
  KvPackScratch pack;
  int64_t at[kKvMaxGroup];
  KvGaps gaps;
};

// Packs the plain slots gaps.leaving[0 .. count) of the segment into the packed slots `into` .. of
// the row, with their positions and scores.
__device__ void move_to_packed(const KvStore& s, int64_t row, const KvSegment& g, int64_t into,
                               int count, bool into_group, Scratch& scratch) {
  for (int i = threadIdx.x; i < count; i += kKvEvictThreads) {
    const int64_t slot = g.plain_begin + scratch.gaps.leaving[i];
    scratch.at[i] = plain_vector(s, row, slot);
    copy_note(s, packed_place(s, row, into + i), plain_place(s, row, slot));
  }
  __syncthreads();
  pack_vectors(s, row, into, count, into_group, {s.plain_keys, s.plain_values, s.type, scratch.at},
               scratch.pack);
  __syncthreads();
}

// Case (ii): the G oldest plain tokens become a packed group, those behind plain_capacity - G take
// the slots they leave.
__device__ void pack_oldest_group(const KvStore& s, int64_t row, const KvSegment& g,
                                  Scratch& scratch) {
  const int n = g.plain, group = static_cast<int>(s.group);
  const int32_t* positions = s.positions + plain_place(s, row, g.plain_begin);
  for (int i = threadIdx.x; i < n; i += kKvEvictThreads) {
    const int32_t mine = positions[i];
    int rank = 0;
#pragma unroll 8
    for (int j = 0; j < n; ++j) {
      const int32_t other = positions[j];
      rank += other < mine || (other == mine && j < i);
    }
    if (rank < group) scratch.gaps.leaving[rank] = i;
  }
  find_movers(n, group, scratch.gaps);
  move_to_packed(s, row, g, g.packed_begin + g.packed, group, false, scratch);
  fill_gaps(s, row, g, scratch.gaps);
  __syncthreads();
}

__device__ int oldest_plain(const KvStore& s, int64_t row, const KvSegment& g) {
  Key best = kNoKey;
  for (int i = threadIdx.x; i < g.plain; i += kKvEvictThreads) {
    const Key key{0, age_key(s.positions[plain_place(s, row, g.plain_begin + i)], i)};
    if (before(key, best)) best = key;
  }
  return index_of(block_smallest(best));
}

__global__ void __launch_bounds__(kKvEvictThreads)
    append_kernel(KvAppendParams p, const int32_t* common) {
  __shared__ Scratch scratch;
  const KvStore& s = p.store;
  const int64_t head = blockIdx.x, row = blockIdx.y, segment = row * s.heads + head;
  const int32_t position = p.position[row * p.position_heads + head % p.position_heads];
  const KvSegment g = load_segment(s, segment);
  if (position < 0 || g.capacity() == 0) return;
  // The token is on its way while its place is sought.
  const int half = static_cast<int>(threadIdx.x) / 64, c = 4 * (threadIdx.x % 64);
  float4 part = make_float4(0, 0, 0, 0);
  if (half < 2 && c < s.dim) {
    part = load_four(half == 0 ? p.key : p.value, segment * s.dim + c, s.type);
  }
  __syncthreads();  // every thread has read the lengths that thread 0 will write
  const float score = p.token_score == nullptr ? p.new_score : p.token_score[segment];
  int2 lengths = make_int2(g.packed, g.plain);
  int slot = -1;  // in the plain part; -1: the token itself is packed
  int into = -1;  // packed slot of the row
  if (g.plain < g.plain_capacity) {
    slot = g.plain;
    ++lengths.y;
  } else if (g.packed + s.group <= g.packed_capacity) {
    lengths.x += static_cast<int>(s.group);
    if (g.plain_capacity == 0) {
      into = g.packed_begin + g.packed;
    } else {
      pack_oldest_group(s, row, g, scratch);
      slot = g.plain_capacity - static_cast<int>(s.group);
      lengths.y = slot + 1;
    }
  } else {
    const int of_row = common == nullptr ? -1 : common[row];
    const int index = find_victim(p, s, nullptr, row, head, g, position, of_row);
    if (index >= g.packed) {
      slot = index - g.packed;
    } else if (g.plain_capacity == 0) {
      into = g.packed_begin + index;
    } else {
      slot = oldest_plain(s, row, g);
      if (threadIdx.x == 0) scratch.gaps.leaving[0] = slot;
      __syncthreads();
      move_to_packed(s, row, g, g.packed_begin + index, 1, kv_code_bits(s.codec) != 0, scratch);
    }
  }
  if (threadIdx.x == 0) {
    reinterpret_cast<int2*>(s.lengths)[segment] = lengths;
    const int64_t in_row = slot < 0 ? into : s.packed_slots + g.plain_begin + slot;
    note(s, packed_place(s, row, in_row), position, score);
    scratch.at[0] = segment * s.dim;
  }
  if (slot < 0) {
    __syncthreads();
    pack_vectors(s, row, into, 1, kv_code_bits(s.codec) != 0, {p.key, p.value, s.type, scratch.at},
                 scratch.pack);
    return;
  }
  const int64_t target = plain_vector(s, row, g.plain_begin + slot);
  if (half < 2 && c < s.dim) {
    store_four(half == 0 ? s.plain_keys : s.plain_values, target + c, part, s.type);
  }
}

}  // namespace

int64_t kv_evict_append_workspace(const KvAppendParams& p) {
  return p.shared ? p.store.rows * static_cast<int64_t>(sizeof(int32_t)) : 0;
}

int kv_evict_append(const KvAppendParams& p, void* workspace, void* stream) {
  const KvStore& s = p.store;
  if (kv_refusal(s) != nullptr) return cudaErrorInvalidValue;
  if (s.rows == 0 || s.heads == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto rows = static_cast<unsigned>(s.rows);
  auto* common = p.shared ? static_cast<int32_t*>(workspace) : nullptr;
  if (p.shared) find_common_victims(p, s, nullptr, common, cuda_stream);
  append_kernel<<<dim3(static_cast<unsigned>(s.heads), rows), kKvEvictThreads, 0, cuda_stream>>>(
      p, common);
  return cudaGetLastError();
}

}  // namespace kvopt::cuda
