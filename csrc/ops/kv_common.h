// SPDX-License-Identifier: Apache-2.0
// What the operators on a KV cache check on every device, and the parameters they hand to kernels.
#pragma once

#include <climits>

#include "common/kv_store.h"
#include "ops/checks.h"
#include "ops/ops.h"

// What KVOPT_STORE_PARAMETERS declares, as arguments.
#define KVOPT_STORE_ARGUMENTS                                                                 \
  segments, lengths, positions, scores, plain_keys, plain_values, packed_keys, packed_values, \
      key_scale, value_scale, factors, codec, group
// And of KVOPT_UPPER_PARAMETERS.
#define KVOPT_UPPER_ARGUMENTS \
  upper_lengths, upper_positions, upper_scores, upper_plain_keys, upper_plain_values, upper_factors

namespace kvopt::ops {

// D and G of what kernels keep in registers or on their stack.
constexpr int64_t kKvLargestDim = 1024;
constexpr int64_t kKvLargestGroup = 1024;

inline KvType kv_type(const Tensor& t, const char* op, const char* argument) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return KvType::kFloat32;
    case ScalarType::Half:
      return KvType::kFloat16;
    case ScalarType::BFloat16:
      return KvType::kBFloat16;
    case ScalarType::Double:
      STD_TORCH_CHECK(t.is_cpu(), op, ": ", argument,
                      " must be float32, float16 or bfloat16 on this device, got float64");
      return KvType::kFloat64;
    default:
      STD_TORCH_CHECK(false, op, ": ", argument,
                      " must be float32, float16, bfloat16 or float64, got dtype number ",
                      static_cast<int>(t.scalar_type()));
  }
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline void check_int32(const Tensor& t, std::vector<int64_t> shape, const Tensor& as,
                        const char* op, const char* argument) {
  check_type(t, ScalarType::Int, "int32", op, argument);
  check_shape(t, std::move(shape), op, argument);
  check_same_device(t, as, op, argument);
}

inline void check_vectors(const Tensor& t, std::vector<int64_t> shape, const Tensor& as,
                          const char* op, const char* argument) {
  check_same_type(t, as, op, argument);
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", argument, " must be contiguous");
  check_shape(t, std::move(shape), op, argument);
}

inline void check_dim(int64_t dim, const char* op) {
  STD_TORCH_CHECK(dim >= 1 && dim <= kKvLargestDim, op, ": D must be 1 to ", kKvLargestDim,
                  ", got ", dim);
}

// The second dimension of a tensor that has one entry for all heads, or one each.
inline int64_t heads_of(const Tensor& t, int64_t dims, int64_t heads, const char* op,
                        const char* argument) {
  STD_TORCH_CHECK(t.dim() == dims && (t.size(1) == 1 || t.size(1) == heads), op, ": ", argument,
                  " must have ", dims, " dimensions, the second of size 1 or ", heads, ", got ",
                  t.dim(), " dimensions", t.dim() > 1 ? ", the second of size " : "",
                  t.dim() > 1 ? std::to_string(t.size(1)) : "");
  return t.size(1);
}

inline int32_t to_int32(int64_t value, const char* op, const char* argument) {
  STD_TORCH_CHECK(value >= 0 && value <= INT32_MAX, op, ": ", argument,
                  " must be 0 or more and fit in 32 bits, got ", value);
  return static_cast<int32_t>(value);
}

inline KvStore make_store(KVOPT_STORE_PARAMETERS, const char* op) {
  STD_TORCH_CHECK(codec >= 0 && codec <= static_cast<int64_t>(KvCodec::kInt2), op,
                  ": codec must be 0 (the model's type), 1 (fp8), 2 (int8), 3 (int4) or 4 (int2), "
                  "got ",
                  codec);
  STD_TORCH_CHECK(group >= 1 && group <= kKvLargestGroup, op, ": group must be 1 to ",
                  kKvLargestGroup, ", got ", group);
  STD_TORCH_CHECK(segments.dim() == 3, op, ": segments must have shape (B, H, 4), got ",
                  segments.dim(), " dimensions");
  STD_TORCH_CHECK(plain_keys.dim() == 3, op, ": plain_keys must have shape (B, P, D), got ",
                  plain_keys.dim(), " dimensions");
  STD_TORCH_CHECK(packed_keys.dim() == 3, op, ": packed_keys must have shape (B, Q, bytes), got ",
                  packed_keys.dim(), " dimensions");
  KvStore s{};
  s.rows = segments.size(0);
  s.heads = segments.size(1);
  s.dim = plain_keys.size(2);
  s.plain_slots = plain_keys.size(1);
  s.packed_slots = packed_keys.size(1);
  s.type = kv_type(plain_keys, op, "plain_keys");
  s.codec = static_cast<KvCodec>(codec);
  s.group = group;
  check_dim(s.dim, op);
  const bool integer = kv_code_bits(s.codec) > 0;
  STD_TORCH_CHECK(!integer || s.dim % 4 == 0, op,
                  ": D must be a multiple of 4 for an integer codec, got ", s.dim);
  STD_TORCH_CHECK(s.packed_slots % group == 0, op, ": packed_keys must have a multiple of group (",
                  group, ") slots per row, got ", s.packed_slots);
  const int64_t slots = s.packed_slots + s.plain_slots;
  STD_TORCH_CHECK(slots <= INT32_MAX, op, ": a row has too many slots: ", slots);

  check_int32(segments, {s.rows, s.heads, 4}, plain_keys, op, "segments");
  check_int32(lengths, {s.rows, s.heads, 2}, plain_keys, op, "lengths");
  check_int32(positions, {s.rows, slots}, plain_keys, op, "positions");
  check_vectors(plain_keys, {s.rows, s.plain_slots, s.dim}, plain_keys, op, "plain_keys");
  check_vectors(plain_values, {s.rows, s.plain_slots, s.dim}, plain_keys, op, "plain_values");
  const int64_t bytes = kv_packed_bytes(s.codec, s.type, s.dim);
  const auto check = [&](const Tensor& t, ScalarType type, const char* type_name,
                         std::vector<int64_t> shape, const char* argument) {
    check_type(t, type, type_name, op, argument);
    check_shape(t, std::move(shape), op, argument);
    check_same_device(t, plain_keys, op, argument);
  };
  check(packed_keys, ScalarType::Byte, "uint8", {s.rows, s.packed_slots, bytes}, "packed_keys");
  check(packed_values, ScalarType::Byte, "uint8", {s.rows, s.packed_slots, bytes}, "packed_values");
  std::vector<int64_t> of_keys{0}, of_values{0};
  if (integer) {
    of_keys = {s.rows, s.packed_slots / group, 2, s.dim};
    of_values = {s.rows, s.packed_slots, kv_value_groups(s.dim, group), 2};
  } else if (s.codec == KvCodec::kFp8) {
    of_keys = of_values = {s.rows, s.packed_slots};
  }
  check(key_scale, ScalarType::Half, "float16", of_keys, "key_scale");
  check(value_scale, ScalarType::Half, "float16", of_values, "value_scale");
  const auto is_left_out = [](const Tensor& t) { return t.dim() == 1 && t.size(0) == 0; };
  if (!is_left_out(scores)) check(scores, ScalarType::Float, "float32", {s.rows, slots}, "scores");
  if (!is_left_out(factors)) {
    check(factors, ScalarType::Float, "float32", {s.rows, s.packed_slots, 2}, "factors");
  }

  s.segments = data<const int32_t>(segments);
  s.lengths = data<int32_t>(lengths);
  s.positions = data<int32_t>(positions);
  s.scores = is_left_out(scores) ? nullptr : data<float>(scores);
  s.plain_keys = data<void>(plain_keys);
  s.plain_values = data<void>(plain_values);
  s.packed_keys = data<uint8_t>(packed_keys);
  s.packed_values = data<uint8_t>(packed_values);
  s.key_scale = codec == 0 ? nullptr : data<uint16_t>(key_scale);
  s.value_scale = codec == 0 ? nullptr : data<uint16_t>(value_scale);
  s.factors = is_left_out(factors) ? nullptr : data<float>(factors);
  return s;
}

// A store without any slot has none, but none are missing.
inline bool keeps_scores(const KvStore& s) {
  return s.scores != nullptr || s.rows * (s.packed_slots + s.plain_slots) == 0;
}

inline KvPackParams make_pack(const KvStore& s, const Tensor& plain_keys, const Tensor& keys,
                              const Tensor& values, const Tensor& key_positions,
                              const std::optional<Tensor>& token_scores, const Tensor& chosen,
                              const Tensor& counts, const char* op) {
  STD_TORCH_CHECK(keys.dim() == 4, op, ": keys must have shape (B, H, n, D), got ", keys.dim(),
                  " dimensions");
  KvPackParams p{};
  p.store = s;
  p.candidates = keys.size(2);
  check_vectors(keys, {s.rows, s.heads, p.candidates, s.dim}, plain_keys, op, "keys");
  check_vectors(values, {s.rows, s.heads, p.candidates, s.dim}, plain_keys, op, "values");
  p.position_heads = heads_of(key_positions, 3, s.heads, op, "key_positions");
  check_int32(key_positions, {s.rows, p.position_heads, p.candidates}, plain_keys, op,
              "key_positions");
  if (token_scores.has_value()) {
    check_type(*token_scores, ScalarType::Float, "float32", op, "token_scores");
    check_shape(*token_scores, {s.rows, s.heads, p.candidates}, op, "token_scores");
    check_same_device(*token_scores, plain_keys, op, "token_scores");
    p.token_scores = data<const float>(*token_scores);
  }
  p.chosen_heads = heads_of(chosen, 3, s.heads, op, "chosen");
  p.chosen_count = chosen.size(2);
  check_int32(chosen, {s.rows, p.chosen_heads, p.chosen_count}, plain_keys, op, "chosen");
  check_int32(counts, {s.rows, s.heads}, plain_keys, op, "counts");
  p.keys = data<const void>(keys);
  p.values = data<const void>(values);
  p.key_positions = data<const int32_t>(key_positions);
  p.chosen = data<const int32_t>(chosen);
  p.counts = data<const int32_t>(counts);
  return p;
}

struct UnpackCall {
  KvUnpackParams params;
  Triple out;
};

inline UnpackCall make_unpack(const KvStore& s, const Tensor& plain_keys, const Tensor& positions,
                              int64_t slots, const char* op) {
  STD_TORCH_CHECK(slots >= 0 && slots <= INT32_MAX, op, ": slots must be 0 or more, got ", slots);
  const std::vector<int64_t> shape{s.rows, s.heads, slots, s.dim};
  Tensor keys = torch::stable::new_empty(plain_keys, shape, plain_keys.scalar_type());
  Tensor values = torch::stable::new_empty(plain_keys, shape, plain_keys.scalar_type());
  Tensor at =
      torch::stable::new_empty(positions, {s.rows, s.heads, slots}, positions.scalar_type());
  return {{s, slots, data<void>(keys), data<void>(values), data<int32_t>(at)}, {keys, values, at}};
}

// Who makes room for a token.
inline KvVictimRule make_victim_rule(const KvStore& s, const Tensor& plain_keys,
                                     const Tensor& position, const std::optional<Tensor>& victim,
                                     int64_t order, int64_t first, int64_t recent, bool shared,
                                     bool age, const char* op) {
  KvVictimRule r{};
  r.position_heads = heads_of(position, 2, s.heads, op, "position");
  check_int32(position, {s.rows, r.position_heads}, plain_keys, op, "position");
  STD_TORCH_CHECK(!shared || r.position_heads == 1, op,
                  ": position must have shape (B, 1) where heads evict together");
  r.position = data<const int32_t>(position);
  r.victim_heads = 1;
  if (victim.has_value()) {
    r.victim_heads = heads_of(*victim, 2, s.heads, op, "victim");
    check_int32(*victim, {s.rows, r.victim_heads}, plain_keys, op, "victim");
    STD_TORCH_CHECK(!shared || r.victim_heads == 1, op,
                    ": victim must have shape (B, 1) where heads evict together");
    r.victim = data<const int32_t>(*victim);
  }
  STD_TORCH_CHECK(order == 0 || order == 1, op,
                  ": order must be 0 (the oldest goes) or 1 (the lowest score), got ", order);
  r.order = static_cast<KvOrder>(order);
  STD_TORCH_CHECK(r.order != KvOrder::kLowestScore || keeps_scores(s), op,
                  ": scores must be kept where the lowest one goes");
  r.first = to_int32(first, op, "first");
  STD_TORCH_CHECK(recent >= kKvHalf && recent <= INT32_MAX, op,
                  ": recent must be -1 (the newer half), or 0 or more and fit in 32 bits, got ",
                  recent);
  r.recent = static_cast<int32_t>(recent);
  r.shared = shared;
  r.age = age;
  return r;
}

inline KvAppendParams make_append(const KvStore& s, const Tensor& plain_keys, const Tensor& key,
                                  const Tensor& value, const Tensor& position,
                                  const std::optional<Tensor>& token_score, double new_score,
                                  const std::optional<Tensor>& victim, int64_t order, int64_t first,
                                  int64_t recent, bool shared, bool age, const char* op) {
  KvAppendParams p{};
  p.store = s;
  check_vectors(key, {s.rows, s.heads, s.dim}, plain_keys, op, "key");
  check_vectors(value, {s.rows, s.heads, s.dim}, plain_keys, op, "value");
  if (token_score.has_value()) {
    check_type(*token_score, ScalarType::Float, "float32", op, "token_score");
    check_shape(*token_score, {s.rows, s.heads}, op, "token_score");
    check_same_device(*token_score, plain_keys, op, "token_score");
    p.token_score = data<const float>(*token_score);
  }
  p.new_score = static_cast<float>(new_score);
  static_cast<KvVictimRule&>(p) =
      make_victim_rule(s, plain_keys, position, victim, order, first, recent, shared, age, op);
  p.key = data<const void>(key);
  p.value = data<const void>(value);
  return p;
}

struct AttentionCall {
  KvAttentionParams params;
  Tensor out;
};

inline AttentionCall make_attention(const KvStore& s, const Tensor& plain_keys, const Tensor& query,
                                    double scale, int64_t update, int64_t first,
                                    const std::optional<Tensor>& gap,
                                    const std::optional<Tensor>& frequencies, const char* op) {
  KvAttentionParams p{};
  p.store = s;
  STD_TORCH_CHECK(query.dim() == 3 && s.heads > 0 && query.size(1) % s.heads == 0 &&
                      query.size(1) / s.heads <= kKvLargestGroup,
                  op, ": query must have shape (B, Hq, D), Hq a multiple of the ", s.heads,
                  " KV heads, got ", query.dim(), " dimensions");
  check_vectors(query, {s.rows, query.size(1), s.dim}, plain_keys, op, "query");
  p.query_group = query.size(1) / s.heads;
  STD_TORCH_CHECK(update >= 0 && update <= static_cast<int64_t>(KvUpdate::kMaximum), op,
                  ": update must be 0 (none), 1 (add), 2 (replace) or 3 (maximum), got ", update);
  p.update = static_cast<KvUpdate>(update);
  STD_TORCH_CHECK(p.update == KvUpdate::kNone || keeps_scores(s), op,
                  ": scores must be kept where they are updated");
  p.scale = static_cast<float>(scale);
  p.scale_double = scale;
  p.first = to_int32(first, op, "first");
  STD_TORCH_CHECK(gap.has_value() == frequencies.has_value(), op,
                  ": gap and frequencies must both be given or both be left out");
  if (gap.has_value()) {
    check_int32(*gap, {s.rows}, plain_keys, op, "gap");
    check_type(*frequencies, ScalarType::Float, "float32", op, "frequencies");
    check_same_device(*frequencies, plain_keys, op, "frequencies");
    STD_TORCH_CHECK(frequencies->dim() == 1 && 2 * frequencies->size(0) <= s.dim, op,
                    ": frequencies must have one dimension and at most D / 2 = ", s.dim / 2,
                    " numbers");
    p.gap = data<const int32_t>(*gap);
    p.frequencies = data<const float>(*frequencies);
    p.rotary = 2 * frequencies->size(0);
  }
  Tensor out = torch::stable::new_empty(query, {s.rows, query.size(1), s.dim}, query.scalar_type());
  p.query = data<const void>(query);
  p.out = data<void>(out);
  return {p, out};
}

struct SelectCall {
  KvSelectParams params;
  Tensor scores;
};

inline SelectCall make_select(const Tensor& query, const Tensor& key, const Tensor& query_positions,
                              const Tensor& key_positions, double scale, bool maximum,
                              const char* op) {
  KvSelectParams p{};
  STD_TORCH_CHECK(key.dim() == 4 && key.size(1) > 0, op,
                  ": key must have shape (B, H, n, D), H > 0, got ", key.dim(), " dimensions");
  p.rows = key.size(0);
  p.heads = key.size(1);
  p.keys = key.size(2);
  p.dim = key.size(3);
  check_dim(p.dim, op);
  STD_TORCH_CHECK(query.dim() == 4 && query.size(1) % p.heads == 0, op,
                  ": query must have shape (B, Hq, q, D), Hq a multiple of the ", p.heads,
                  " KV heads, got ", query.dim(), " dimensions");
  p.query_group = query.size(1) / p.heads;
  p.queries = query.size(2);
  p.type = kv_type(key, op, "key");
  check_vectors(key, {p.rows, p.heads, p.keys, p.dim}, key, op, "key");
  check_vectors(query, {p.rows, query.size(1), p.queries, p.dim}, key, op, "query");
  check_int32(query_positions, {p.rows, p.queries}, key, op, "query_positions");
  p.position_heads = heads_of(key_positions, 3, p.heads, op, "key_positions");
  check_int32(key_positions, {p.rows, p.position_heads, p.keys}, key, op, "key_positions");
  p.scale = static_cast<float>(scale);
  p.scale_double = scale;
  p.maximum = maximum;
  Tensor scores = torch::stable::new_empty(key, {p.rows, p.heads, p.keys}, ScalarType::Float);
  p.query = data<const void>(query);
  p.key = data<const void>(key);
  p.query_positions = data<const int32_t>(query_positions);
  p.key_positions = data<const int32_t>(key_positions);
  p.scores = data<float>(scores);
  return {p, scores};
}

struct MergeCall {
  KvMergeParams params;
  Quadruple out;
};

inline MergeCall make_merge(const Tensor& a, const Tensor& b, double t, const char* op) {
  STD_TORCH_CHECK(a.dim() == 4, op, ": a must have shape (B, H, n, D), got ", a.dim(),
                  " dimensions");
  const int64_t rows = a.size(0), heads = a.size(1), n = a.size(2), dim = a.size(3);
  check_dim(dim, op);
  STD_TORCH_CHECK(t >= 0.0 && t <= 1.0, op, ": t must be in [0, 1], got ", t);
  KvMergeParams p{};
  p.type = kv_type(a, op, "a");
  check_vectors(a, {rows, heads, n, dim}, a, op, "a");
  check_vectors(b, {rows, heads, n, dim}, a, op, "b");
  p.vectors = rows * heads * n;
  p.dim = dim;
  p.t = static_cast<float>(t);
  p.t_double = t;
  Tensor direction = torch::stable::new_empty(a, {rows, heads, n, dim}, a.scalar_type());
  const auto number = [&] {
    return torch::stable::new_empty(a, {rows, heads, n}, ScalarType::Float);
  };
  Tensor norm_a = number(), norm_b = number(), distance = number();
  p.a = data<const void>(a);
  p.b = data<const void>(b);
  p.direction = data<void>(direction);
  p.norm_a = data<float>(norm_a);
  p.norm_b = data<float>(norm_b);
  p.distance = data<float>(distance);
  return {p, {direction, norm_a, norm_b, distance}};
}

inline KvMergeEvictParams make_merge_evict(KVOPT_STORE_PARAMETERS, KVOPT_UPPER_PARAMETERS,
                                           const Tensor& position,
                                           const std::optional<Tensor>& victim, int64_t order,
                                           int64_t first, int64_t recent, bool shared, bool age,
                                           int64_t residual, double t, const char* op) {
  const std::string upper = std::string(op) + ": upper";
  KvMergeEvictParams p{};
  p.lower = make_store(KVOPT_STORE_ARGUMENTS, op);
  const KvStore& s = p.lower;
  check_vectors(upper_plain_keys, {s.rows, s.plain_slots, s.dim}, plain_keys, upper.c_str(),
                "plain_keys");
  p.upper = make_store(segments, upper_lengths, upper_positions, upper_scores, upper_plain_keys,
                       upper_plain_values, packed_keys, packed_values, key_scale, value_scale,
                       upper_factors, codec, group, upper.c_str());
  STD_TORCH_CHECK(s.lengths != p.upper.lengths || s.rows * s.heads == 0, upper,
                  ": lengths must be another tensor than the lower store's");
  const bool scored = keeps_scores(s);
  STD_TORCH_CHECK(scored == keeps_scores(p.upper), upper, ": scores must ", scored ? "" : "not ",
                  "be kept, as the lower store's");
  const bool packs = s.rows * s.packed_slots > 0;
  STD_TORCH_CHECK(!packs || s.factors != nullptr, op, ": factors must be kept");
  STD_TORCH_CHECK(!packs || p.upper.factors != nullptr, upper, ": factors must be kept");
  static_cast<KvVictimRule&>(p) =
      make_victim_rule(s, plain_keys, position, victim, order, first, recent, shared, age, op);
  p.residual = to_int32(residual, op, "residual");
  STD_TORCH_CHECK(t >= 0.0 && t <= 1.0, op, ": t must be in [0, 1], got ", t);
  p.t = static_cast<float>(t);
  p.t_double = t;
  return p;
}

}  // namespace kvopt::ops
