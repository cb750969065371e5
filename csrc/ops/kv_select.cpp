// SPDX-License-Identifier: Apache-2.0
// kv_select_scores on the CPU: logits by torch's matrix product, a tile of queries at a time, and
// everything else (mask, softmax, sums over queries) in one pass of our own while the tile is in
// cache. A unit is a KV head, or every few tiles of one where there are few heads; the split
// depends on the shape alone.
#include <algorithm>
#include <memory>

#include "cpu/kv.h"
#include "ops/aten.h"
#include "ops/kv_common.h"

namespace kvopt::ops {
namespace {

constexpr int64_t kTileRows = 64;    // query rows of a product, all heads of the group together
constexpr int64_t kFewestUnits = 4;  // worth splitting a head's queries for

template <typename Real>
Tensor matrix(Real* values, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t column_stride) {
  return torch::stable::from_blob(
      values, {rows, columns}, {row_stride, column_stride},
      torch::stable::Device(torch::headeronly::DeviceType::CPU),
      std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float);
}

template <typename Real>
struct Select {
  const KvSelectParams& p;
  int64_t parts;    // per KV head
  int64_t queries;  // of a tile

  // Adds the tiles part, part + parts, ... of a KV head to `scores` (n).
  void run(int64_t row, int64_t head, int64_t part, const Real* key, Real* scores) const {
    std::fill_n(scores, p.keys, Real{0});
    const int64_t rows = queries * p.query_group;
    const std::unique_ptr<Real[]> query(new Real[static_cast<size_t>(rows * p.dim)]);
    const std::unique_ptr<Real[]> logits(new Real[static_cast<size_t>(rows * p.keys)]);
    std::vector<int32_t> limits(static_cast<size_t>(rows));
    const int32_t* const at = p.query_positions + row * p.queries;
    const int32_t* const keys_at =
        p.key_positions + (row * p.position_heads + (p.position_heads > 1 ? head : 0)) * p.keys;
    for (int64_t tile = part; tile * queries < p.queries; tile += parts) {
      const int64_t first = tile * queries, count = std::min(queries, p.queries - first);
      const int32_t newest = *std::max_element(at + first, at + first + count);
      int64_t seen = p.keys;  // keys behind the last visible one take no part
      while (seen > 0 && (keys_at[seen - 1] < 0 || keys_at[seen - 1] > newest)) --seen;
      if (seen == 0) continue;
      const int64_t used = count * p.query_group;
      for (int64_t g = 0; g < p.query_group; ++g) {
        const int64_t from = ((row * p.heads + head) * p.query_group + g) * p.queries + first;
        cpu::kv_widen(p.type, p.query, from * p.dim, count * p.dim, p.scale_double,
                      query.get() + g * count * p.dim);
        std::copy_n(at + first, count, limits.begin() + g * count);
      }
      call_aten("aten::mm", "out", matrix(query.get(), used, p.dim, p.dim, 1),
                matrix(const_cast<Real*>(key), p.dim, seen, 1, p.dim),
                matrix(logits.get(), used, seen, seen, 1));
      cpu::kv_select_rows(logits.get(), used, seen, keys_at, limits.data(), p.maximum, scores);
    }
  }

  void run_all() const {
    const int64_t heads = p.rows * p.heads;
    // Keys in the type of the sums, once for all tiles of a head.
    const bool copies = p.type != KvType::kFloat32 && p.type != KvType::kFloat64;
    const size_t key_numbers = static_cast<size_t>(p.keys * p.dim);
    std::unique_ptr<Real[]> sums(new Real[static_cast<size_t>(heads * parts * p.keys)]);
    std::unique_ptr<Real[]> wide;
    if (copies) wide.reset(new Real[static_cast<size_t>(heads) * key_numbers]);
    if (copies) {
      torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
        const int64_t numbers = p.keys * p.dim;
        cpu::kv_widen(p.type, p.key, begin * numbers, (end - begin) * numbers, 1.0,
                      wide.get() + begin * numbers);
      });
    }
    torch::stable::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t head = unit / parts;
        const Real* const from = copies ? wide.get() : static_cast<const Real*>(p.key);
        run(head / p.heads, head % p.heads, unit % parts, from + head * p.keys * p.dim,
            sums.get() + unit * p.keys);
      }
    });
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t j = 0; j < p.keys; ++j) {
        Real total = sums[static_cast<size_t>(head * parts * p.keys + j)];
        for (int64_t part = 1; part < parts; ++part) {
          const Real more = sums[static_cast<size_t>((head * parts + part) * p.keys + j)];
          total = p.maximum ? std::max(total, more) : total + more;
        }
        p.scores[head * p.keys + j] = static_cast<float>(total);
      }
    }
  }
};

template <typename Real>
void select(const KvSelectParams& p) {
  const int64_t heads = p.rows * p.heads;
  if (heads * p.keys == 0) return;
  const int64_t queries = std::max<int64_t>(1, kTileRows / std::max<int64_t>(1, p.query_group));
  const int64_t tiles = ceil_div(p.queries, queries);
  const int64_t parts = std::max<int64_t>(1, std::min(ceil_div(kFewestUnits, heads), tiles));
  Select<Real>{p, parts, queries}.run_all();
}

}  // namespace

Tensor kv_select_scores_cpu(Tensor query, Tensor key, Tensor query_positions, Tensor key_positions,
                            double scale, bool maximum) {
  const SelectCall c =
      make_select(query, key, query_positions, key_positions, scale, maximum, "kv_select_scores");
  c.params.type == KvType::kFloat64 ? select<double>(c.params) : select<float>(c.params);
  return c.scores;
}

}  // namespace kvopt::ops
