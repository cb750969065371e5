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
// `shared`: all heads of a row evict one index, by the sum of their scores. A first launch finds it
// with a block per row before any head changes; it leaves at once unless a segment is full.
#include "cuda/device/kv_pack.cuh"
#include "cuda/kv.h"

namespace kvopt::cuda {
namespace {

constexpr int kSharedThreads = 1024;
constexpr int kAppendThreads = 512;

struct Key {
  uint64_t high, low;
};

__device__ __forceinline__ bool before(const Key& a, const Key& b) {
  return a.high < b.high || (a.high == b.high && a.low < b.low);
}

// Numbers whose order as unsigned integers is that of the arguments.
__device__ __forceinline__ uint32_t ordered(int32_t v) {
  return static_cast<uint32_t>(v) ^ 0x80000000u;
}
__device__ __forceinline__ uint32_t ordered(float v) {
  if (isnan(v)) v = INFINITY;
  const uint32_t bits = __float_as_uint(v + 0.0f);  // -0 becomes +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ Key key_of(const KvAppendParams& p, int32_t newest, int32_t position,
                                      float score, int index) {
  uint32_t priority;
  if (p.order == KvOrder::kOldest) {
    priority = ordered(position);
  } else {
    const int64_t age = int64_t{newest} - position;
    priority = ordered(p.age ? __fdiv_rn(score, static_cast<float>(age < 1 ? 1 : age)) : score);
  }
  const bool old = position >= p.first;
  const uint64_t level = !old ? 2 : position <= int64_t{newest} - p.recent ? 0 : 1;
  return {level << 32 | priority, uint64_t{ordered(position)} << 32 | static_cast<uint32_t>(index)};
}

// The smallest of the threads' keys, for every thread.
__device__ Key block_smallest(Key key) {
  __shared__ Key of_warp[32];
  __syncthreads();  // an earlier result may still be read
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Key other{__shfl_xor_sync(0xFFFFFFFF, key.high, offset),
                    __shfl_xor_sync(0xFFFFFFFF, key.low, offset)};
    if (before(other, key)) key = other;
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = key;
  __syncthreads();
  key = of_warp[0];
  for (unsigned i = 1; i < blockDim.x / 32; ++i) {
    if (before(of_warp[i], key)) key = of_warp[i];
  }
  return key;
}

constexpr Key kNone{~uint64_t{0}, ~uint64_t{0}};

__device__ __forceinline__ bool is_full(const KvStore& s, const KvSegment& g) {
  return g.plain >= g.plain_capacity && g.packed + s.group > g.packed_capacity;
}

// shared: workspace[row] = the index that all heads of the row evict, -1 where none of them does.
__global__ void __launch_bounds__(kSharedThreads)
    shared_victim_kernel(KvAppendParams p, int32_t* workspace) {
  const KvStore& s = p.store;
  const int64_t row = blockIdx.x;
  const int32_t newest = p.position[row];
  __shared__ KvSegment segments[32];
  __shared__ int count, full;
  if (threadIdx.x == 0) {
    count = INT32_MAX;
    full = 0;
  }
  __syncthreads();
  for (int head = threadIdx.x; head < s.heads; head += kSharedThreads) {
    const KvSegment g = load_segment(s, row * s.heads + head);
    if (head < 32) segments[head] = g;
    atomicMin(&count, g.filled());
    if (is_full(s, g)) atomicOr(&full, 1);
  }
  __syncthreads();
  const int n = count;
  const int given = p.victim == nullptr ? -1 : p.victim[row];
  if (newest < 0 || full == 0 || n == 0 || (given >= 0 && given < n)) {
    if (threadIdx.x == 0) workspace[row] = -1;
    return;
  }
  Key best = kNone;
  for (int index = threadIdx.x; index < n; index += kSharedThreads) {
    const int32_t position = s.positions[slot_place(s, row, segments[0], index)];
    float total = 0;
    if (p.order == KvOrder::kLowestScore && s.scores != nullptr) {
      for (int first = 0; first < s.heads; first += 8) {
        float score[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // all of them under way before the first is added
          const int head = first + i;
          score[i] = 0;
          if (head >= s.heads) continue;
          const KvSegment g = head < 32 ? segments[head] : load_segment(s, row * s.heads + head);
          score[i] = s.scores[slot_place(s, row, g, index)];
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (first + i < s.heads) total = __fadd_rn(total, score[i]);
        }
      }
    }
    const Key key = key_of(p, newest, position, total, index);
    if (before(key, best)) best = key;
  }
  best = block_smallest(best);
  if (threadIdx.x == 0) workspace[row] = static_cast<int32_t>(best.low & 0xFFFFFFFF);
}

struct Scratch {
  KvPackScratch pack;
  int64_t at[kKvMaxGroup];
  int leaving[kKvMaxGroup], holes[kKvMaxGroup], movers[kKvMaxGroup];
  float scores[kKvMaxGroup];
  int32_t positions[kKvMaxGroup];
  int hole_count;
};

__device__ __forceinline__ void note(const KvStore& s, int64_t place, int32_t position,
                                     float score) {
  s.positions[place] = position;
  if (s.scores != nullptr) s.scores[place] = score;
}

__device__ __forceinline__ int64_t plain_place(const KvStore& s, int64_t row, int64_t slot) {
  return row * (s.packed_slots + s.plain_slots) + s.packed_slots + slot;
}

// Packs the plain slots scratch.leaving[0 .. count) of the segment into the packed slots `into` ..
// of the row, with their positions and scores.
__device__ void move_to_packed(const KvStore& s, int64_t row, const KvSegment& g, int64_t into,
                               int count, bool into_group, Scratch& scratch) {
  for (int i = threadIdx.x; i < count; i += kAppendThreads) {
    const int64_t slot = g.plain_begin + scratch.leaving[i];
    scratch.at[i] = plain_vector(s, row, slot);
    const int64_t from = plain_place(s, row, slot);
    note(s, row * (s.packed_slots + s.plain_slots) + into + i, s.positions[from],
         s.scores == nullptr ? 0.0f : s.scores[from]);
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
  const int n = g.plain, group = static_cast<int>(s.group), rest = n - group;
  const int32_t* positions = s.positions + plain_place(s, row, g.plain_begin);
  for (int i = threadIdx.x; i < n; i += kAppendThreads) {
    const int32_t mine = positions[i];
    int rank = 0;
#pragma unroll 8
    for (int j = 0; j < n; ++j) {
      const int32_t other = positions[j];
      rank += other < mine || (other == mine && j < i);
    }
    if (rank < group) scratch.leaving[rank] = i;
  }
  if (threadIdx.x == 0) scratch.hole_count = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * group; i += kAppendThreads) {
    // Threads below `group`: the leaving slot of that rank, a hole if it lies below `rest`. The
    // others: slot rest + (i - group), a mover if it stays.
    const bool hole = i < group;
    const int slot = hole ? scratch.leaving[i] : rest + i - group;
    int below = 0;  // leaving slots before it on its side of `rest`
    bool leaves = false;
    for (int j = 0; j < group; ++j) {
      const int other = scratch.leaving[j];
      below += other < slot && (other < rest) == hole;
      leaves |= other == slot;
    }
    if (hole && slot < rest) {
      scratch.holes[below] = slot;
      atomicAdd(&scratch.hole_count, 1);
    } else if (!hole && !leaves) {
      scratch.movers[slot - rest - below] = slot;
    }
  }
  __syncthreads();
  move_to_packed(s, row, g, g.packed_begin + g.packed, group, false, scratch);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = warp; i < scratch.hole_count; i += kAppendThreads / 32) {
    const int64_t to = g.plain_begin + scratch.holes[i], from = g.plain_begin + scratch.movers[i];
    for (int c = 4 * lane; c < s.dim; c += 128) {
      const int64_t target = plain_vector(s, row, to) + c, source = plain_vector(s, row, from) + c;
      store_four(s.plain_keys, target, load_four(s.plain_keys, source, s.type), s.type);
      store_four(s.plain_values, target, load_four(s.plain_values, source, s.type), s.type);
    }
    if (lane == 0) {
      const int64_t at = plain_place(s, row, from);
      note(s, plain_place(s, row, to), s.positions[at], s.scores == nullptr ? 0.0f : s.scores[at]);
    }
  }
  __syncthreads();
}

// Case (iii): the index that leaves. `common` is that of the row, or -1.
__device__ int find_victim(const KvAppendParams& p, int64_t row, int64_t head, const KvSegment& g,
                           int32_t newest, int common) {
  const KvStore& s = p.store;
  if (p.victim != nullptr) {
    const int given = p.victim[row * p.victim_heads + head % p.victim_heads];
    if (given >= 0 && given < g.filled()) return given;
  }
  if (common >= 0) return common;
  Key best = kNone;
  const int n = g.filled();
  const bool by_score = p.order == KvOrder::kLowestScore && s.scores != nullptr;
  constexpr int kBatch = 4;  // loads under way before the first is looked at
  for (int first = threadIdx.x; first < n; first += kBatch * kAppendThreads) {
    int32_t position[kBatch];
    float score[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t place = slot_place(s, row, g, min(first + i * kAppendThreads, n - 1));
      position[i] = s.positions[place];
      score[i] = by_score ? s.scores[place] : static_cast<float>(position[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * kAppendThreads;
      const Key key = key_of(p, newest, position[i], score[i], index);
      if (index < n && before(key, best)) best = key;
    }
  }
  return static_cast<int>(block_smallest(best).low & 0xFFFFFFFF);
}

__device__ int oldest_plain(const KvStore& s, int64_t row, const KvSegment& g) {
  Key best = kNone;
  for (int i = threadIdx.x; i < g.plain; i += kAppendThreads) {
    const uint32_t position = ordered(s.positions[plain_place(s, row, g.plain_begin + i)]);
    const Key key{0, uint64_t{position} << 32 | static_cast<uint32_t>(i)};
    if (before(key, best)) best = key;
  }
  return static_cast<int>(block_smallest(best).low & 0xFFFFFFFF);
}

__global__ void __launch_bounds__(kAppendThreads)
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
    const int index = find_victim(p, row, head, g, position, common == nullptr ? -1 : common[row]);
    if (index >= g.packed) {
      slot = index - g.packed;
    } else if (g.plain_capacity == 0) {
      into = g.packed_begin + index;
    } else {
      slot = oldest_plain(s, row, g);
      if (threadIdx.x == 0) scratch.leaving[0] = slot;
      __syncthreads();
      move_to_packed(s, row, g, g.packed_begin + index, 1, kv_code_bits(s.codec) != 0, scratch);
    }
  }
  if (threadIdx.x == 0) {
    reinterpret_cast<int2*>(s.lengths)[segment] = lengths;
    const int64_t in_row = slot < 0 ? into : s.packed_slots + g.plain_begin + slot;
    note(s, row * (s.packed_slots + s.plain_slots) + in_row, position, score);
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
  if (p.shared) shared_victim_kernel<<<rows, kSharedThreads, 0, cuda_stream>>>(p, common);
  append_kernel<<<dim3(static_cast<unsigned>(s.heads), rows), kAppendThreads, 0, cuda_stream>>>(
      p, common);
  return cudaGetLastError();
}

}  // namespace kvopt::cuda
