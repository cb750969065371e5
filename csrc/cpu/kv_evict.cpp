// SPDX-License-Identifier: Apache-2.0
// One token into each segment: common/kv_store.h says where. The only long loops look for the
// lowest position or score among a segment's slots. They run in two passes over blocks: the
// smallest key of a block, which compilers vectorise, and only where it beats the best so far, the
// slot that has it.
#include <algorithm>
#include <climits>

#include "cpu/kv.h"
#include "cpu/kv_evict_keys.h"
#include "cpu/kv_numbers.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kBlock = kKvKeyBlock;

struct Rule {
  KvOrder order;
  int32_t first, recent;
  bool age;
};

// A stretch of slots whose positions and scores lie side by side, or sums of scores.
struct Stretch {
  const int32_t* positions;
  const float* scores;
  int64_t count;
};

// The smallest pair (key, position), and where it was seen first.
struct Lowest {
  int32_t key = kKvNoKey;
  int32_t position = INT_MAX;
  int64_t index = -1;
};

KvKeys keys_function() {
#if defined(__x86_64__)
  const Isa isa = selected_isa();
  if (isa >= Isa::kAvx512) return kv_keys_avx512;
  if (isa >= Isa::kAvx2) return kv_keys_avx2;
#endif
  return all_keys;
}

// What is open to eviction: the strictest of three choices that leaves anything.
constexpr int kChoices = 3;
KvKeyRule key_rule(const Rule& rule, int32_t newest, int choice) {
  return {rule.order, rule.age, newest, choice < 2 ? rule.first : INT_MIN,
          choice == 0 ? newest - rule.recent : INT_MAX};
}

void find_lowest(KvKeys keys_of, const KvKeyRule& rule, const Stretch& s, int64_t first_index,
                 Lowest* best) {
  int32_t keys[kBlock];
  for (int64_t begin = 0; begin < s.count; begin += kBlock) {
    const int64_t count = std::min(kBlock, s.count - begin);
    const int32_t* const positions = s.positions + begin;
    const float* const scores = s.scores == nullptr ? nullptr : s.scores + begin;
    const int32_t smallest = keys_of(rule, positions, scores, count, keys);
    if (smallest == kKvNoKey || smallest > best->key) continue;
    for (int64_t i = 0; i < count; ++i) {
      if (keys[i] != smallest) continue;
      if (smallest < best->key || positions[i] < best->position) {
        *best = {smallest, positions[i], first_index + begin + i};
      }
    }
  }
}

// The index that leaves, of stretches that lie behind each other in the segment.
int64_t choose_victim(const Rule& rule, int32_t newest, const Stretch* stretches, int count) {
  const KvKeys keys_of = keys_function();
  for (int choice = 0; choice < kChoices; ++choice) {
    Lowest best;
    int64_t index = 0;
    for (int i = 0; i < count; ++i) {
      find_lowest(keys_of, key_rule(rule, newest, choice), stretches[i], index, &best);
      index += stretches[i].count;
    }
    if (best.index >= 0) return best.index;
  }
  return -1;
}

int64_t oldest_plain(const KvStore& s, const KvSegment& segment) {
  const int32_t* positions = s.positions + segment.plain_state;
  return std::min_element(positions, positions + segment.plain()) - positions;
}

struct Append {
  const KvAppendParams& p;
  float* scratch;

  void note(int64_t state, int32_t position, float score) const {
    p.store.positions[state] = position;
    if (p.store.scores != nullptr) p.store.scores[state] = score;
  }

  void copy_note(int64_t to, int64_t from) const {
    note(to, p.store.positions[from], p.store.scores != nullptr ? p.store.scores[from] : 0.0f);
  }

  // Plain slots, by index in the plain part of the segment.
  void pack(const KvSegment& segment, int64_t packed_index, bool into_group, const int64_t* plain,
            int64_t count) const {
    const KvStore& s = p.store;
    int64_t vectors[kKvMostGroup];
    for (int64_t i = 0; i < count; ++i) {
      vectors[i] = segment.plain_begin + plain[i];
      copy_note(segment.packed_state + packed_index + i, segment.plain_state + plain[i]);
    }
    kv_pack_vectors(s, segment.packed_begin + packed_index, count, into_group, s.plain_keys,
                    s.plain_values, vectors, scratch);
  }

  void pack_new(const KvSegment& segment, int64_t packed_index, bool into_group, int64_t unit,
                int32_t position, float score) const {
    kv_pack_vectors(p.store, segment.packed_begin + packed_index, 1, into_group, p.key, p.value,
                    &unit, scratch);
    note(segment.packed_state + packed_index, position, score);
  }

  void write_plain(const KvSegment& segment, int64_t plain, int64_t unit, int32_t position,
                   float score) const {
    const KvStore& s = p.store;
    const size_t bytes = static_cast<size_t>(s.dim * kv_type_bytes(s.type));
    const int64_t to = (segment.plain_begin + plain) * s.dim, from = unit * s.dim;
    std::memcpy(kv_at(s.type, s.plain_keys, to), kv_at(s.type, p.key, from), bytes);
    std::memcpy(kv_at(s.type, s.plain_values, to), kv_at(s.type, p.value, from), bytes);
    note(segment.plain_state + plain, position, score);
  }

  void move_plain(const KvSegment& segment, int64_t to, int64_t from) const {
    const KvStore& s = p.store;
    const size_t bytes = static_cast<size_t>(s.dim * kv_type_bytes(s.type));
    for (void* x : {s.plain_keys, s.plain_values}) {
      std::memcpy(kv_at(s.type, x, (segment.plain_begin + to) * s.dim),
                  kv_at(s.type, x, (segment.plain_begin + from) * s.dim), bytes);
    }
    copy_note(segment.plain_state + to, segment.plain_state + from);
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
    const int64_t rest = count - group;
    const int64_t* end = std::lower_bound(leaving, leaving + group, rest);
    int64_t mover = rest;
    const int64_t* skip = end;
    for (const int64_t* hole = leaving; hole != end; ++hole, ++mover) {
      while (skip != leaving + group && *skip == mover) ++skip, ++mover;
      move_plain(segment, *hole, mover);
    }
    segment.lengths[0] += static_cast<int32_t>(group);
    segment.lengths[1] = static_cast<int32_t>(rest);
    return rest;
  }

  void segment(int64_t row, int64_t head, int64_t shared_victim) const {
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
    int64_t victim = -1;
    if (p.victim != nullptr) {
      victim = p.victim[row * p.victim_heads + (p.victim_heads > 1 ? head : 0)];
    }
    if (victim < 0 || victim >= segment.filled()) victim = shared_victim;
    if (victim < 0) {
      const auto stretch = [&](int64_t state, int64_t count) {
        return Stretch{s.positions + state, s.scores == nullptr ? nullptr : s.scores + state,
                       count};
      };
      const Stretch stretches[] = {stretch(segment.packed_state, segment.packed()),
                                   stretch(segment.plain_state, segment.plain())};
      victim = choose_victim({p.order, p.first, p.recent, p.age}, position, stretches, 2);
    }
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

  // What all heads of a row evict where they are full: sums in blocks, in the order of heads.
  int64_t shared_victim(int64_t row) const {
    const KvStore& s = p.store;
    const int32_t newest = p.position[row * p.position_heads];
    const KvSegment of_first(s, row, 0);
    int64_t count = of_first.filled();
    for (int64_t head = 1; head < s.heads; ++head) {
      count = std::min(count, KvSegment(s, row, head).filled());
    }
    const Rule rule{p.order, p.first, p.recent, p.age};
    const KvKeys keys_of = keys_function();
    for (int choice = 0; choice < kChoices; ++choice) {
      Lowest best;
      int32_t positions[kBlock];
      float sums[kBlock];
      for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int64_t block = std::min(kBlock, count - begin);
        for (int64_t i = 0; i < block; ++i) {
          positions[i] = s.positions[of_first.state(begin + i)];
          sums[i] = 0.0f;
        }
        for (int64_t head = 0; s.scores != nullptr && head < s.heads; ++head) {
          const KvSegment segment(s, row, head);
          for (int64_t i = 0; i < block; ++i) sums[i] += s.scores[segment.state(begin + i)];
        }
        find_lowest(keys_of, key_rule(rule, newest, choice), {positions, sums, block}, begin,
                    &best);
      }
      if (best.index >= 0) return best.index;
    }
    return -1;
  }
};

}  // namespace

void kv_evict_append(const KvAppendParams& p, float* scratch, int64_t begin, int64_t end) {
  const Append append{p, scratch};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t victim = p.shared ? append.shared_victim(row) : -1;
    for (int64_t head = 0; head < p.store.heads; ++head) append.segment(row, head, victim);
  }
}

}  // namespace kvopt::cpu
