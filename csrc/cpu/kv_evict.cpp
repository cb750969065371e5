// SPDX-License-Identifier: Apache-2.0
// One token into each segment: common/kv_store.h says where.
#include <algorithm>
#include <climits>

#include "cpu/kv.h"
#include "cpu/kv_numbers.h"
#include "cpu/kv_slots.h"
#include "cpu/kv_victim.h"

namespace kvopt::cpu {
namespace {

int64_t oldest_plain(const KvStore& s, const KvSegment& segment) {
  const int32_t* positions = s.positions + segment.plain_state;
  return std::min_element(positions, positions + segment.plain()) - positions;
}

struct Append {
  const KvAppendParams& p;
  float* scratch;

  // Plain slots, by index in the plain part of the segment.
  void pack(const KvSegment& segment, int64_t packed_index, bool into_group, const int64_t* plain,
            int64_t count) const {
    const KvStore& s = p.store;
    int64_t vectors[kKvMostGroup];
    for (int64_t i = 0; i < count; ++i) {
      vectors[i] = segment.plain_begin + plain[i];
      kv_copy_note(s, segment.packed_state + packed_index + i, segment.plain_state + plain[i]);
    }
    kv_pack_vectors(s, segment.packed_begin + packed_index, count, into_group, s.plain_keys,
                    s.plain_values, vectors, scratch);
  }

  void pack_new(const KvSegment& segment, int64_t packed_index, bool into_group, int64_t unit,
                int32_t position, float score) const {
    kv_pack_vectors(p.store, segment.packed_begin + packed_index, 1, into_group, p.key, p.value,
                    &unit, scratch);
    kv_note(p.store, segment.packed_state + packed_index, position, score);
  }

  void write_plain(const KvSegment& segment, int64_t plain, int64_t unit, int32_t position,
                   float score) const {
    const KvStore& s = p.store;
    const size_t bytes = static_cast<size_t>(s.dim * kv_type_bytes(s.type));
    const int64_t to = (segment.plain_begin + plain) * s.dim, from = unit * s.dim;
    std::memcpy(kv_at(s.type, s.plain_keys, to), kv_at(s.type, p.key, from), bytes);
    std::memcpy(kv_at(s.type, s.plain_values, to), kv_at(s.type, p.value, from), bytes);
    kv_note(s, segment.plain_state + plain, position, score);
  }

  // (ii): returns the plain slot that became free first.
  int64_t flush(const KvSegment& segment) const {
    const KvStore& s = p.store;
    const int64_t count = segment.plain(), group = s.group;
    const int32_t* positions = s.positions + segment.plain_state;
    // The G oldest in order. G passes are few beside the packing of G vectors.
    int64_t leaving[kKvMostGroup];
    int32_t low = INT_MIN;
    int64_t low_slot = -1;
    for (int64_t i = 0; i < group; ++i) {
      int64_t next = -1;
      for (int64_t j = 0; j < count; ++j) {
        if (positions[j] < low || (positions[j] == low && j <= low_slot)) continue;
        if (next < 0 || positions[j] < positions[next]) next = j;
      }
      leaving[i] = next;
      low = positions[next];
      low_slot = next;
    }
    pack(segment, segment.packed(), false, leaving, group);
    std::sort(leaving, leaving + group);
    kv_close_gaps(s, segment, leaving, group);
    segment.lengths[0] += static_cast<int32_t>(group);
    return segment.plain();
  }

  void segment(int64_t row, int64_t head, int64_t common_victim) const {
    const KvStore& s = p.store;
    const int64_t unit = row * s.heads + head;
    const int32_t position = p.position[row * p.position_heads + (p.position_heads > 1 ? head : 0)];
    const KvSegment segment(s, row, head);
    if (position < 0 || segment.packed_capacity + segment.plain_capacity == 0) return;
    const float score = p.token_score != nullptr ? p.token_score[unit] : p.new_score;

    if (segment.plain() < segment.plain_capacity) {
      write_plain(segment, segment.plain(), unit, position, score);
      segment.lengths[1] += 1;
      return;
    }
    if (segment.packed() + s.group <= segment.packed_capacity) {
      if (segment.plain_capacity == 0) {
        pack_new(segment, segment.packed(), false, unit, position, score);
        segment.lengths[0] += 1;
        return;
      }
      const int64_t plain = flush(segment);
      write_plain(segment, plain, unit, position, score);
      segment.lengths[1] += 1;
      return;
    }
    const int64_t victim = kv_find_victim(p, s, nullptr, row, head, position, common_victim);
    if (victim >= segment.packed()) {
      write_plain(segment, victim - segment.packed(), unit, position, score);
    } else if (segment.plain_capacity == 0) {
      pack_new(segment, victim, true, unit, position, score);
    } else {
      const int64_t oldest = oldest_plain(s, segment);
      pack(segment, victim, true, &oldest, 1);
      write_plain(segment, oldest, unit, position, score);
    }
  }
};

}  // namespace

void kv_evict_append(const KvAppendParams& p, float* scratch, int64_t begin, int64_t end) {
  const Append append{p, scratch};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t victim = p.shared ? kv_common_victim(p, p.store, nullptr, row) : -1;
    for (int64_t head = 0; head < p.store.heads; ++head) append.segment(row, head, victim);
  }
}

}  // namespace kvopt::cpu
