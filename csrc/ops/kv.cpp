// SPDX-License-Identifier: Apache-2.0
#include "cpu/kv.h"

#include <algorithm>
#include <memory>

#include "ops/kv_common.h"

namespace kvopt::ops {
namespace {

static_assert(kKvLargestDim <= cpu::kKvMostDim && kKvLargestGroup <= cpu::kKvMostGroup);

// Work that pays for waking a thread, in numbers read.
constexpr int64_t kGrain = 1 << 14;

int64_t grain(int64_t numbers_per_unit) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, numbers_per_unit));
}

// Here the numbers on the device can be read, so what would leave the store's memory is refused.
void check_segments(const KvStore& s, const char* op) {
  for (int64_t i = 0; i < s.rows * s.heads; ++i) {
    const int32_t* const n = s.segments + 4 * i;
    const int64_t packed_end = int64_t{n[0]} + n[1], plain_end = int64_t{n[2]} + n[3];
    STD_TORCH_CHECK(n[0] >= 0 && n[1] >= 0 && packed_end <= s.packed_slots && n[2] >= 0 &&
                        n[3] >= 0 && plain_end <= s.plain_slots,
                    op, ": segments: segment ", i % s.heads, " of row ", i / s.heads, " (", n[0],
                    ", ", n[1], ", ", n[2], ", ", n[3], ") must lie in ", s.packed_slots,
                    " packed and ", s.plain_slots, " plain slots");
    STD_TORCH_CHECK(n[0] % s.group == 0 && n[1] % s.group == 0, op,
                    ": segments: packed numbers must be multiples of the group, ", s.group,
                    ", got ", n[0], " and ", n[1]);
    STD_TORCH_CHECK(n[1] == 0 || s.group == 1 || n[3] >= s.group, op,
                    ": segments: beside packed slots there must be a group of ", s.group,
                    " plain ones, got ", n[3]);
  }
}

// Of an operator that reads what is filled.
void check_lengths(const KvStore& s, const char* op) {
  for (int64_t i = 0; i < s.rows * s.heads; ++i) {
    const int32_t packed = s.lengths[2 * i], plain = s.lengths[2 * i + 1];
    STD_TORCH_CHECK(packed >= 0 && packed <= s.segments[4 * i + 1] && packed % s.group == 0 &&
                        plain >= 0 && plain <= s.segments[4 * i + 3],
                    op, ": lengths: segment ", i % s.heads, " of row ", i / s.heads,
                    " cannot hold ", packed, " packed and ", plain, " plain tokens");
  }
}

// Of two layers that share what they pack.
void check_pair(const KvStore& lower, const KvStore& upper, const char* op) {
  const int64_t heads = lower.heads;
  for (int64_t i = 0; i < lower.rows * heads; ++i) {
    const int32_t* const n = lower.segments + 4 * i;
    STD_TORCH_CHECK(n[1] == 0 || n[3] >= lower.group, op, ": segments: beside packed slots there ",
                    "must be ", lower.group, " plain ones, got ", n[3]);
    STD_TORCH_CHECK(lower.lengths[2 * i] == upper.lengths[2 * i] &&
                        lower.lengths[2 * i + 1] == upper.lengths[2 * i + 1],
                    op, ": upper: lengths: segment ", i % heads, " of row ", i / heads,
                    " holds other tokens than the lower store's");
  }
}

std::unique_ptr<float[]> floats(int64_t count) {
  return std::unique_ptr<float[]>(count > 0 ? new float[static_cast<size_t>(count)] : nullptr);
}

template <typename Real>
Tensor run_attention(const AttentionCall& c, const Tensor& like) {
  const KvAttentionParams& p = c.params;
  const KvStore& s = p.store;
  const int64_t segments = s.rows * s.heads, width = p.query_group * s.dim;
  std::vector<cpu::KvAttentionUnit> units;
  std::vector<int64_t> first_unit(static_cast<size_t>(segments) + 1, 0);
  int64_t logits = 0, filled_slots = 0;
  for (int64_t i = 0; i < segments; ++i) {
    const int64_t filled = s.lengths[2 * i] + s.lengths[2 * i + 1];
    for (int64_t begin = 0; begin < filled; begin += cpu::kKvUnit) {
      units.push_back({i, begin, std::min(filled, begin + cpu::kKvUnit), logits});
    }
    logits += filled * p.query_group;
    filled_slots += filled;
    first_unit[static_cast<size_t>(i) + 1] = static_cast<int64_t>(units.size());
    if (filled == 0) {
      std::fill_n(static_cast<char*>(p.out) + i * width * kv_type_bytes(s.type),
                  width * kv_type_bytes(s.type), 0);
    }
  }
  const int64_t partial = cpu::kv_attention_partial(p), scratch = cpu::kv_attention_scratch(p);
  const int64_t count = static_cast<int64_t>(units.size()) * partial;
  if (p.update == KvUpdate::kNone) logits = 0;
  Tensor workspace = torch::stable::new_empty(
      like, {count + logits},
      std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float);
  Real* const partials = data<Real>(workspace);
  Real* const at = logits > 0 ? partials + count : nullptr;
  const int64_t units_total = static_cast<int64_t>(units.size());
  const int64_t slots_per_unit = units_total > 0 ? filled_slots / units_total : 0;
  torch::stable::parallel_for(
      0, units_total, grain(2 * slots_per_unit * s.dim), [&](int64_t begin, int64_t end) {
        const auto own = floats(scratch);
        cpu::kv_attention_units(p, units.data(), partials, at, own.get(), begin, end);
      });
  const int64_t join_work = logits > 0 ? 4 * filled_slots * p.query_group / segments : width;
  torch::stable::parallel_for(0, segments, grain(join_work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = first_unit[static_cast<size_t>(i)];
      const int64_t number = first_unit[static_cast<size_t>(i) + 1] - first;
      if (number == 0) continue;
      cpu::kv_attention_join(p, units.data() + first, number, partials + first * partial, at);
    }
  });
  return c.out;
}

}  // namespace

void kv_quant_pack_cpu(KVOPT_STORE_PARAMETERS, Tensor keys, Tensor values, Tensor key_positions,
                       std::optional<Tensor> token_scores, Tensor chosen, Tensor counts) {
  const char* op = "kv_quant_pack";
  const KvStore s = make_store(KVOPT_STORE_ARGUMENTS, op);
  check_segments(s, op);
  const KvPackParams p =
      make_pack(s, plain_keys, keys, values, key_positions, token_scores, chosen, counts, op);
  const int64_t fault = cpu::kv_quant_pack_fault(p);
  STD_TORCH_CHECK(fault < 0, op, ": chosen: head ", fault % s.heads, " of row ", fault / s.heads,
                  " takes an index beyond the ", p.candidates, " candidates");
  torch::stable::parallel_for(0, s.rows * s.heads, grain(2 * p.chosen_count * s.dim),
                              [&](int64_t begin, int64_t end) {
                                const auto scratch = floats(cpu::kv_pack_scratch(s));
                                cpu::kv_quant_pack(p, scratch.get(), begin, end);
                              });
}

Triple kv_quant_unpack_cpu(KVOPT_STORE_PARAMETERS, int64_t slots) {
  const char* op = "kv_quant_unpack";
  const KvStore s = make_store(KVOPT_STORE_ARGUMENTS, op);
  check_segments(s, op);
  check_lengths(s, op);
  const UnpackCall c = make_unpack(s, plain_keys, positions, slots, op);
  torch::stable::parallel_for(
      0, s.rows * s.heads, grain(2 * slots * s.dim),
      [&](int64_t begin, int64_t end) { cpu::kv_quant_unpack(c.params, begin, end); });
  return c.out;
}

void kv_evict_append_cpu(KVOPT_STORE_PARAMETERS, Tensor key, Tensor value, Tensor position,
                         std::optional<Tensor> token_score, double new_score,
                         std::optional<Tensor> victim, int64_t order, int64_t first, int64_t recent,
                         bool shared, bool age) {
  const char* op = "kv_evict_append";
  const KvStore s = make_store(KVOPT_STORE_ARGUMENTS, op);
  check_segments(s, op);
  check_lengths(s, op);
  const KvAppendParams p = make_append(s, plain_keys, key, value, position, token_score, new_score,
                                       victim, order, first, recent, shared, age, op);
  const int64_t slots = s.packed_slots + s.plain_slots;
  torch::stable::parallel_for(0, s.rows, grain(slots), [&](int64_t begin, int64_t end) {
    const auto scratch = floats(cpu::kv_pack_scratch(s));
    cpu::kv_evict_append(p, scratch.get(), begin, end);
  });
}

Tensor kv_attention_decode_cpu(Tensor query, KVOPT_STORE_PARAMETERS, double scale, int64_t update,
                               int64_t first, std::optional<Tensor> gap,
                               std::optional<Tensor> frequencies) {
  const char* op = "kv_attention_decode";
  const KvStore s = make_store(KVOPT_STORE_ARGUMENTS, op);
  check_segments(s, op);
  check_lengths(s, op);
  const AttentionCall c =
      make_attention(s, plain_keys, query, scale, update, first, gap, frequencies, op);
  return s.type == KvType::kFloat64 ? run_attention<double>(c, query)
                                    : run_attention<float>(c, query);
}

Quadruple kv_merge_pair_cpu(Tensor a, Tensor b, double t) {
  const MergeCall c = make_merge(a, b, t, "kv_merge_pair");
  torch::stable::parallel_for(
      0, c.params.vectors, grain(8 * c.params.dim),
      [&](int64_t begin, int64_t end) { cpu::kv_merge_pair(c.params, begin, end); });
  return c.out;
}

void kv_merge_evict_cpu(KVOPT_STORE_PARAMETERS, KVOPT_UPPER_PARAMETERS, Tensor position,
                        std::optional<Tensor> victim, int64_t order, int64_t first, int64_t recent,
                        bool shared, bool age, int64_t residual, double t) {
  const char* op = "kv_merge_evict";
  const KvMergeEvictParams p =
      make_merge_evict(KVOPT_STORE_ARGUMENTS, KVOPT_UPPER_ARGUMENTS, position, victim, order, first,
                       recent, shared, age, residual, t, op);
  const KvStore& s = p.lower;
  check_segments(s, op);
  check_lengths(s, op);
  check_pair(s, p.upper, op);
  std::vector<int64_t> common(static_cast<size_t>(s.rows));
  torch::stable::parallel_for(0, s.rows, grain(s.packed_slots + s.plain_slots),
                              [&](int64_t begin, int64_t end) {
                                cpu::kv_merge_evict_common(p, common.data(), begin, end);
                              });
  const int64_t numbers =
      (s.packed_slots + 2 * s.plain_slots * s.dim) / std::max<int64_t>(1, s.heads);
  torch::stable::parallel_for(0, s.rows * s.heads, grain(numbers), [&](int64_t begin, int64_t end) {
    const auto scratch = floats((cpu::kv_merge_evict_scratch(p) + 3) / 4);
    cpu::kv_merge_evict(p, common.data(), scratch.get(), begin, end);
  });
}

}  // namespace kvopt::ops
