// SPDX-License-Identifier: Apache-2.0
// Room for one token in two layers that share what they pack: KvMergeEvictParams of
// common/kv_store.h. Most of the time goes into the distances of the plain keys, read once per
// group of tokens; the nearest ones are chosen without sorting the rest.
#include <algorithm>

#include "cpu/kv.h"
#include "cpu/kv_numbers.h"
#include "cpu/kv_slots.h"
#include "cpu/kv_victim.h"

namespace kvopt::cpu {
namespace {

// The parts of a thread's scratch.
struct Scratch {
  Scratch(const KvMergeEvictParams& p, void* memory) {
    const KvStore& s = p.lower;
    const int64_t bytes = s.group * s.dim * kv_type_bytes(s.type);
    keys = memory;
    values = static_cast<uint8_t*>(memory) + bytes;
    pack = reinterpret_cast<float*>(static_cast<uint8_t*>(memory) + 2 * bytes);
    distances = pack + kv_pack_scratch(s);
    order = reinterpret_cast<int32_t*>(distances + s.plain_slots);
  }
  void* keys;        // (G, D) directions, in the store's type
  void* values;      // likewise
  float* pack;       // kv_pack_scratch
  float* distances;  // of the plain tokens of a segment, by slot
  int32_t* order;    // plain slots
};

struct MergeEvict {
  const KvMergeEvictParams& p;
  Scratch scratch;

  // Vector `first` of the lower layer's vectors and those behind it, and the upper layer's.
  KvMergeParams merge(const void* lower, const void* upper, int64_t first, int64_t count) const {
    const KvStore& s = p.lower;
    KvMergeParams m{};
    m.vectors = count;
    m.dim = s.dim;
    m.type = s.type;
    m.a = kv_at(s.type, lower, first * s.dim);
    m.b = kv_at(s.type, upper, first * s.dim);
    m.t = p.t;
    m.t_double = p.t_double;
    return m;
  }

  // The `count` nearest plain tokens, in the order of positions.
  void nearest(const KvSegment& segment, int64_t count, int64_t* slots) const {
    const KvStore& s = p.lower;
    const int32_t* const positions = s.positions + segment.plain_state;
    const auto older = [=](int32_t a, int32_t b) {
      return positions[a] != positions[b] ? positions[a] < positions[b] : a < b;
    };
    int32_t* const order = scratch.order;
    const int64_t n = segment.plain();
    for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
    const int64_t open = n - std::max<int64_t>(0, std::min(p.residual, n) - s.group);
    if (open < n) std::nth_element(order, order + open, order + n, older);
    KvMergeParams m = merge(s.plain_keys, p.upper.plain_keys, segment.plain_begin, n);
    float* const distances = scratch.distances;
    m.distance = distances;
    for (int64_t i = 0; i < open; ++i) {
      kv_merge_pair(m, order[i], order[i] + 1);
      float& distance = distances[order[i]];
      if (distance != distance) distance = INFINITY;
    }
    const auto nearer = [=](int32_t a, int32_t b) {
      return distances[a] != distances[b] ? distances[a] < distances[b] : older(a, b);
    };
    std::nth_element(order, order + count - 1, order + open, nearer);
    std::sort(order, order + count, older);
    std::copy(order, order + count, slots);
  }

  // Merges plain tokens into packed slots, by index in the packed part of the segments.
  void merge_into(const KvSegment& lower, const KvSegment& upper, int64_t packed_index,
                  bool into_group, const int64_t* plain, int64_t count) const {
    KvStore directions = p.lower;  // packed as they are
    directions.factors = nullptr;
    const KvStore& s = directions;
    const int64_t slot = lower.packed_begin + packed_index;
    int64_t vectors[kKvMostGroup];
    for (int64_t i = 0; i < count; ++i) {
      vectors[i] = i;
      const auto one = [&](const void* a, const void* b, void* direction, int64_t which) {
        float distance;
        KvMergeParams m = merge(a, b, lower.plain_begin + plain[i], 1);
        m.direction = kv_at(s.type, direction, i * s.dim);
        m.norm_a = p.lower.factors + (slot + i) * 2 + which;
        m.norm_b = p.upper.factors + (slot + i) * 2 + which;
        m.distance = &distance;
        kv_merge_pair(m, 0, 1);
      };
      one(s.plain_keys, p.upper.plain_keys, scratch.keys, 0);
      one(s.plain_values, p.upper.plain_values, scratch.values, 1);
      const int64_t to = packed_index + i;
      kv_copy_note(p.lower, lower.packed_state + to, lower.plain_state + plain[i]);
      kv_copy_note(p.upper, upper.packed_state + to, upper.plain_state + plain[i]);
    }
    kv_pack_vectors(s, slot, count, into_group, scratch.keys, scratch.values, vectors,
                    scratch.pack);
  }

  void segment(int64_t row, int64_t head, int64_t common) const {
    const KvStore& s = p.lower;
    const int32_t position = p.position[row * p.position_heads + (p.position_heads > 1 ? head : 0)];
    const KvSegment lower(s, row, head), upper(p.upper, row, head);
    if (position < 0 || lower.capacity() == 0 || lower.plain() < lower.plain_capacity) return;
    int64_t leaving[kKvMostGroup], count = 1, packed = lower.packed();
    if (packed + s.group <= lower.packed_capacity) {
      count = s.group;
      nearest(lower, count, leaving);
      merge_into(lower, upper, packed, false, leaving, count);
      packed += count;
      std::sort(leaving, leaving + count);
    } else {
      const int64_t victim = kv_find_victim(p, s, p.upper.scores, row, head, position, common);
      if (victim >= packed) {
        leaving[0] = victim - packed;
      } else {
        nearest(lower, 1, leaving);
        merge_into(lower, upper, victim, true, leaving, 1);
      }
    }
    kv_close_gaps(p.lower, lower, leaving, count);
    kv_close_gaps(p.upper, upper, leaving, count);
    lower.lengths[0] = upper.lengths[0] = static_cast<int32_t>(packed);
  }
};

}  // namespace

int64_t kv_merge_evict_scratch(const KvMergeEvictParams& p) {
  const KvStore& s = p.lower;
  return 2 * s.group * s.dim * kv_type_bytes(s.type) + 4 * kv_pack_scratch(s) + 8 * s.plain_slots;
}

void kv_merge_evict_common(const KvMergeEvictParams& p, int64_t* common, int64_t begin,
                           int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    common[row] = p.shared ? kv_common_victim(p, p.lower, p.upper.scores, row) : -1;
  }
}

void kv_merge_evict(const KvMergeEvictParams& p, const int64_t* common, void* scratch,
                    int64_t begin, int64_t end) {
  const MergeEvict work{p, Scratch(p, scratch)};
  for (int64_t unit = begin; unit < end; ++unit) {
    work.segment(unit / p.lower.heads, unit % p.lower.heads, common[unit / p.lower.heads]);
  }
}

}  // namespace kvopt::cpu
