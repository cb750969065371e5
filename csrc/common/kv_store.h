// SPDX-License-Identifier: Apache-2.0
// The KV cache of one layer as kernels see it, and the parameters of every operator on it. The
// rules are one for all devices: positions, lengths, slots and codes agree bit for bit.
//
// B rows (sequences), H KV heads, D numbers per vector, Q packed and P plain slots per row, G =
// group. A segment (b, h) owns the packed slots [packed_begin, packed_begin + packed_capacity) and
// the plain slots [plain_begin, plain_begin + plain_capacity) of its row, exactly its capacity; the
// first `lengths` slots of each part are filled. What lies in the others is meaningless, NaN
// included. Slots are not ordered in time: `positions` says which token lies where. The index of a
// slot *in its segment* counts the filled packed slots first, then the plain ones.
//
// packed_capacity and the filled packed length are multiples of G. A segment with packed slots has
// plain_capacity >= G, or G = 1. A segment may have no slot at all: every token is dropped.
//
// Packed values, all in fp32 (a float64 model's numbers are rounded to fp32 first):
//   int b bits   over the group: lo = min x, s = (max x - lo) / (2^b - 1), both then rounded to
//                fp16 and clamped to +-65504; code = clamp(round_half_even((x - lo) / s), 0, 2^b -
//                1), 0 where s = 0; value = s * code + lo. A group of keys is one channel of the G
//                slots [G * i, G * i + G); one of values, the channels [G * j, G * j + G) of one
//                slot, the last group perhaps shorter. True division, no fused multiply-add before
//                the rounding to a code. D is a multiple of 4.
//   fp8          over the vector: s = max |x| / 448 rounded to fp16, clamped to [2^-24, 65504];
//                code = x / s clamped to +-448 and rounded to e4m3fn, half to even; value = s *
//                code.
//   model type   the bytes of the number itself.
// With `factors`, a vector x is packed as its direction: f = fp32(sqrt(sum x^2)), summed in fp64 in
// the order of channels; x / f (0 where f = 0) is packed as above, factors holds f for the key and
// for the value, and the vector that the slot stands for is f * value.
#pragma once

#include <cstdint>

namespace kvopt {

enum class KvType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };
enum class KvCodec : int32_t { kModel = 0, kFp8 = 1, kInt8 = 2, kInt4 = 3, kInt2 = 4 };

constexpr int64_t kv_type_bytes(KvType t) {
  return t == KvType::kFloat64 ? 8 : t == KvType::kFloat32 ? 4 : 2;
}
// Bits of an integer codec's code; 0 for the others.
constexpr int kv_code_bits(KvCodec c) {
  return c == KvCodec::kInt8 ? 8 : c == KvCodec::kInt4 ? 4 : c == KvCodec::kInt2 ? 2 : 0;
}
// Bytes of a packed vector of `dim` numbers.
constexpr int64_t kv_packed_bytes(KvCodec c, KvType t, int64_t dim) {
  if (c == KvCodec::kModel) return dim * kv_type_bytes(t);
  if (c == KvCodec::kFp8) return dim;
  return dim * kv_code_bits(c) / 8;
}
// Value groups of a packed vector: fp16 pairs of an integer codec.
constexpr int64_t kv_value_groups(int64_t dim, int64_t group) { return (dim + group - 1) / group; }

struct KvStore {
  int64_t rows, heads, dim;           // B, H, D
  int64_t packed_slots, plain_slots;  // Q, P
  KvType type;                        // of the plain part
  KvCodec codec;
  int64_t group;            // G >= 1
  const int32_t* segments;  // (B, H, 4): packed_begin, packed_capacity, plain_begin,
                            // plain_capacity
  int32_t* lengths;         // (B, H, 2): filled packed, filled plain
  int32_t* positions;       // (B, Q + P): plain slot j of a row is at Q + j
  float* scores;            // (B, Q + P), or null: none are kept
  void* plain_keys;         // (B, P, D)
  void* plain_values;       // (B, P, D)
  uint8_t* packed_keys;     // (B, Q, bytes): codes of a vector side by side, lowest bits first
  uint8_t* packed_values;   // (B, Q, bytes)
  uint16_t* key_scale;      // int: (B, Q / G, 2, D) fp16, s then lo; fp8: (B, Q); else null
  uint16_t* value_scale;    // int: (B, Q, ceil(D / G), 2) fp16, s and lo; fp8: (B, Q); else null
  float* factors;           // (B, Q, 2): of key and value; or null: all are 1
};

// scores (B, H, n) = over the queries i and the query heads of the KV head's group, the sum (or the
// maximum) of softmax_j(scale * q_i . k_j), taken over the keys with 0 <= key position <= query
// position; a query without such a key contributes nothing, a key that no query sees gets 0. Query
// head `h * query_group + g` belongs to KV head h.
struct KvSelectParams {
  int64_t rows, heads, query_group, queries, keys, dim;
  KvType type;                     // of query and key
  const void* query;               // (B, H * query_group, q, D)
  const void* key;                 // (B, H, n, D)
  const int32_t* query_positions;  // (B, q)
  const int32_t* key_positions;    // (B, position_heads, n)
  int64_t position_heads;          // 1 or H
  float scale;
  double scale_double;  // the same, for float64
  bool maximum;
  float* scores;  // out (B, H, n)
};

// Fills a fresh store. Segment (b, h) takes the candidates chosen[0 .. count), in the order of
// their positions, count = min(counts[b][h], m, capacity). Up to plain_capacity of them: all into
// the plain part. More: the first G * ceil((count - plain_capacity) / G) into the packed part, the
// rest into the plain one. Writes lengths, and of the filled slots positions and scores (0 without
// token_scores).
struct KvPackParams {
  KvStore store;
  int64_t candidates;            // n
  const void* keys;              // (B, H, n, D), in the store's type
  const void* values;            // (B, H, n, D)
  const int32_t* key_positions;  // (B, position_heads, n)
  int64_t position_heads;        // 1 or H
  const float* token_scores;     // (B, H, n) or null
  const int32_t* chosen;         // (B, chosen_heads, m), each in [0, n)
  int64_t chosen_heads;          // 1 or H
  int64_t chosen_count;          // m
  const int32_t* counts;         // (B, H)
};

// What the segments stand for, by index in the segment: rounded once to the store's type; positions
// -1 and zeros beyond the filled slots, and slots beyond `slots` are left out.
struct KvUnpackParams {
  KvStore store;
  int64_t slots;
  void* keys;          // out (B, H, slots, D)
  void* values;        // out (B, H, slots, D)
  int32_t* positions;  // out (B, H, slots)
};

// Who leaves a full segment for a token. `victim` is its index in the segment; where it is none
// (-1, or no index of the segment): among the slots with first <= position <= token's position -
// recent (if there are none: with first <= position; if none either: all), the one with the lowest
// priority, ties: the lowest position, then the lowest index. recent = kKvHalf stands for the newer
// half of the segment's capacity c, c - c / 2. Priority: the position (kOldest) or the score
// (kLowestScore), divided with `age` by max(1, token's position - position) in fp32; a NaN counts
// as +infinity. `shared` (one position and one victim for all heads, whose segments hold the same
// tokens in the same slots): the priority of an index is the sum of scores over the heads in their
// order, in fp32 (then divided), its position and its capacity those of head 0; all heads evict
// that index.
enum class KvOrder : int32_t { kOldest = 0, kLowestScore = 1 };
constexpr int32_t kKvHalf = -1;

struct KvVictimRule {
  const int32_t* position;  // (B, position_heads) of the token; -1: nothing happens
  int64_t position_heads;   // 1 or H; 1 if shared
  const int32_t* victim;    // (B, victim_heads) or null
  int64_t victim_heads;     // 1 or H; 1 if shared
  KvOrder order;
  int32_t first, recent;
  bool shared, age;
};
constexpr int64_t kv_recent(int32_t recent, int64_t capacity) {
  return recent == kKvHalf ? capacity - capacity / 2 : recent;
}

// One token into each segment whose `position` is not -1:
//   (i)   the plain part has room: the next plain slot.
//   (ii)  the plain part is full (or has no slot) and the packed part has room for G:
//         plain_capacity = 0: the token is packed into the next packed slot (G = 1). Otherwise the
//         G plain tokens with the lowest positions (equal ones: lower slot first) are packed, in
//         that order, into the next G packed slots as a new group; the slots they leave below
//         plain_capacity - G are filled, lowest slot first, by the tokens that stay and lie at or
//         above it, lowest slot first; the token goes to plain slot plain_capacity - G, and the
//         plain length becomes plain_capacity - G + 1.
//   (iii) both are full: a victim leaves (KvVictimRule). If it was plain, the token takes its slot.
//         If it was packed, the plain token with the lowest position (ties: lowest slot) is packed
//         into its slot and the token takes that one's plain slot; with plain_capacity = 0 the
//         token itself is packed there. An integer codec packs the key into an existing group with
//         the group's scale and minimum as they are, the value with its own.
// A token that moves keeps its position and score; the new one gets token_score, or new_score.
struct KvAppendParams : KvVictimRule {
  KvStore store;
  const void* key;           // (B, H, D), in the store's type
  const void* value;         // (B, H, D)
  const float* token_score;  // (B, H) or null
  float new_score;
};

// out (B, H * query_group, D) = softmax(scale * q . k) v over the filled slots of the KV head; 0
// where it has none. Logits, softmax and sums in fp32 (fp64 for a float64 store).
//   update    what the probabilities p of a KV head's group do to the scores of the filled slots:
//             see KvUpdate.
//   first     > 0, with gap and frequencies: slots with position < first see the query turned back,
//             pair (i, i + rotary / 2) of its first `rotary` numbers by the angle -gap *
//             frequencies[i] (fp32): (x cos + y sin, y cos - x sin) with cos and sin of +gap *
//             frequencies[i].
enum class KvUpdate : int32_t { kNone = 0, kAdd = 1, kReplace = 2, kMaximum = 3 };

struct KvAttentionParams {
  KvStore store;
  int64_t query_group;
  const void* query;  // (B, H * query_group, D), in the store's type
  float scale;
  double scale_double;  // the same, for float64
  KvUpdate update;  // scores: += sum over the group, = the sum, = max(itself, largest of the group)
  int32_t first;
  const int32_t* gap;        // (B) or null
  const float* frequencies;  // (rotary / 2) or null
  int64_t rotary;            // even, <= D; 0 without frequencies
  void* out;
};

// MiniCache (arXiv:2405.14366, section 3). With u = a / |a|, v = b / |b|, W = arccos(u . v), taken
// as 2 atan2(|u - v|, |u + v|), which loses no digits near 0 and pi: direction = (sin((1 - t) W) u
// + sin(t W) v) / sin W; where sin W < 1e-4 ((1 - t) u + t v) normalised, or u where even that
// vanishes (norm < 1e-4). A zero vector leaves the other's direction, two zero vectors 0. distance
// = W / pi, 0 with a zero vector. In fp32 (fp64 for float64), direction rounded once.
struct KvMergeParams {
  int64_t vectors, dim;  // B * H * n, D
  KvType type;
  const void* a;
  const void* b;
  float t;
  double t_double;  // the same, for float64
  void* direction;  // out (vectors, D)
  float* norm_a;    // out (vectors)
  float* norm_b;    // out (vectors)
  float* distance;  // out (vectors)
};

// Room for one token in two layers, "lower" and "upper", that share what they pack. Both stores
// have the same segments, lengths and positions, and the same packed_keys, packed_values, key_scale
// and value_scale: one direction per token, by which each one's factors are multiplied. A segment
// with packed slots has plain_capacity >= G. Where `position` is not -1:
//   (i)   the plain part has room: nothing.
//   (ii)  the plain part is full and the packed part has room for G: G plain tokens are merged, in
//         the order of positions (equal ones: lower slot first), into the next G packed slots as a
//         new group. They are those whose keys are nearest, by the distance of KvMergeParams (a NaN
//         is the farthest; ties: lower position, then lower slot), among all plain tokens but the
//         newest `residual` - G (at least G are left; equal positions: the higher slot is newer).
//         The slots they leave are filled as in (ii) of KvAppendParams; the plain length becomes
//         plain_capacity - G.
//   (iii) both are full: a victim leaves both layers (KvVictimRule, the score of a token being the
//         lower layer's + the upper layer's, in fp32). Of the plain tokens, the victim leaves its
//         slot; for a packed victim the nearest one, chosen as in (ii), is merged into the victim's
//         slot, with an integer codec as a key into an existing group. The last plain token takes
//         the slot that was left; the plain length becomes plain_capacity - 1.
// Merging packs the directions of the two layers' keys and of their values, as KvMergeParams rounds
// them and without another normalisation, and writes both layers' norms into their factors. Tokens
// take positions and scores along, in both layers.
struct KvMergeEvictParams : KvVictimRule {
  KvStore lower, upper;
  int64_t residual;  // >= 0
  float t;
  double t_double;  // the same, for float64
};

}  // namespace kvopt
