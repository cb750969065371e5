// SPDX-License-Identifier: Apache-2.0
// The lowest priority among a segment's slots. Two passes over blocks: the smallest key of a block,
// which compilers vectorise, and only where it beats the best so far, the slot that has it.
#include "cpu/kv_victim.h"

#include <algorithm>
#include <climits>

#include "cpu/isa.h"
#include "cpu/kv_evict_keys.h"
#include "cpu/kv_numbers.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kBlock = kKvKeyBlock;

// A stretch of slots whose positions and scores lie side by side. More scores are added to them.
struct Stretch {
  const int32_t* positions;
  const float* scores;
  const float* more_scores;
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
KvKeyRule key_rule(const KvVictimRule& rule, int64_t capacity, int32_t newest, int choice) {
  const int64_t high = newest - kv_recent(rule.recent, capacity);
  return {rule.order, rule.age, newest, choice < 2 ? rule.first : INT_MIN,
          choice == 0 ? static_cast<int32_t>(std::max<int64_t>(high, INT_MIN)) : INT_MAX};
}

void find_lowest(KvKeys keys_of, const KvKeyRule& rule, const Stretch& s, int64_t first_index,
                 Lowest* best) {
  int32_t keys[kBlock];
  float sums[kBlock];
  for (int64_t begin = 0; begin < s.count; begin += kBlock) {
    const int64_t count = std::min(kBlock, s.count - begin);
    const int32_t* const positions = s.positions + begin;
    const float* scores = s.scores == nullptr ? nullptr : s.scores + begin;
    if (scores != nullptr && s.more_scores != nullptr) {
      for (int64_t i = 0; i < count; ++i) sums[i] = scores[i] + s.more_scores[begin + i];
      scores = sums;
    }
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

}  // namespace

int64_t kv_find_victim(const KvVictimRule& rule, const KvStore& s, const float* more_scores,
                       int64_t row, int64_t head, int32_t position, int64_t common) {
  const KvSegment segment(s, row, head);
  if (rule.victim != nullptr) {
    const int32_t given = rule.victim[row * rule.victim_heads + (rule.victim_heads > 1 ? head : 0)];
    if (given >= 0 && given < segment.filled()) return given;
  }
  if (common >= 0) return common;
  const auto from = [](const float* scores, int64_t state) {
    return scores == nullptr ? nullptr : scores + state;
  };
  const auto stretch = [&](int64_t state, int64_t count) {
    return Stretch{s.positions + state, from(s.scores, state), from(more_scores, state), count};
  };
  const Stretch stretches[] = {stretch(segment.packed_state, segment.packed()),
                               stretch(segment.plain_state, segment.plain())};
  const KvKeys keys_of = keys_function();
  for (int choice = 0; choice < kChoices; ++choice) {
    const KvKeyRule open = key_rule(rule, segment.capacity(), position, choice);
    Lowest best;
    find_lowest(keys_of, open, stretches[0], 0, &best);
    find_lowest(keys_of, open, stretches[1], segment.packed(), &best);
    if (best.index >= 0) return best.index;
  }
  return 0;  // all of them at the last position there is
}

// Sums in blocks, in the order of heads.
int64_t kv_common_victim(const KvVictimRule& rule, const KvStore& s, const float* more_scores,
                         int64_t row) {
  const int32_t newest = rule.position[row * rule.position_heads];
  const KvSegment of_first(s, row, 0);
  int64_t count = of_first.filled();
  for (int64_t head = 1; head < s.heads; ++head) {
    count = std::min(count, KvSegment(s, row, head).filled());
  }
  const KvKeys keys_of = keys_function();
  for (int choice = 0; choice < kChoices; ++choice) {
    const KvKeyRule open = key_rule(rule, of_first.capacity(), newest, choice);
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
        for (int64_t i = 0; i < block; ++i) {
          const int64_t state = segment.state(begin + i);
          const float more = more_scores == nullptr ? 0.0f : more_scores[state];
          sums[i] += s.scores[state] + more;
        }
      }
      find_lowest(keys_of, open, {positions, sums, nullptr, block}, begin, &best);
    }
    if (best.index >= 0) return best.index;
  }
  return count > 0 ? 0 : -1;
}

}  // namespace kvopt::cpu
