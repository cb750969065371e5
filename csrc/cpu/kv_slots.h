// SPDX-License-Identifier: Apache-2.0
// Tokens that move between the slots of a segment, with their positions and scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/kv_numbers.h"

namespace kvopt::cpu {

inline void kv_note(const KvStore& s, int64_t state, int32_t position, float score) {
  s.positions[state] = position;
  if (s.scores != nullptr) s.scores[state] = score;
}

inline void kv_copy_note(const KvStore& s, int64_t to, int64_t from) {
  kv_note(s, to, s.positions[from], s.scores != nullptr ? s.scores[from] : 0.0f);
}

// Plain slots, by index in the plain part of the segment.
inline void kv_move_plain(const KvStore& s, const KvSegment& segment, int64_t to, int64_t from) {
  const size_t bytes = static_cast<size_t>(s.dim * kv_type_bytes(s.type));
  for (void* x : {s.plain_keys, s.plain_values}) {
    std::memcpy(kv_at(s.type, x, (segment.plain_begin + to) * s.dim),
                kv_at(s.type, x, (segment.plain_begin + from) * s.dim), bytes);
  }
  kv_copy_note(s, segment.plain_state + to, segment.plain_state + from);
}

// Shortens the plain part by the tokens in slots leaving[0 .. count), ascending: the slots they
// leave below its new end are filled, lowest first, by the tokens that stay behind it, lowest
// first.
inline void kv_close_gaps(const KvStore& s, const KvSegment& segment, const int64_t* leaving,
                          int64_t count) {
  const int64_t rest = segment.plain() - count;
  const int64_t* const end = leaving + count;
  const int64_t* const holes_end = std::lower_bound(leaving, end, rest);
  const int64_t* skip = holes_end;
  int64_t mover = rest;
  for (const int64_t* hole = leaving; hole != holes_end; ++hole, ++mover) {
    while (skip != end && *skip == mover) ++skip, ++mover;
    kv_move_plain(s, segment, *hole, mover);
  }
  segment.lengths[1] = static_cast<int32_t>(rest);
}

}  // namespace kvopt::cpu
