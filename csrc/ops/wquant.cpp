// SPDX-License-Identifier: Apache-2.0
#include "cpu/wquant.h"

#include "cpu/weight_memory.h"
#include "cpu/wquant_scales.h"
#include "ops/wquant_common.h"

namespace kvopt::ops {
namespace {

// Runs `work(row_begin, row_end)` over tiles of rows on torch's threads; ranges start at a multiple
// of a tile.
template <typename Work>
void over_row_tiles(int64_t n, int64_t k, const Work& work) {
  constexpr int64_t kGrainElements = 1 << 16;
  const int64_t tiles = ceil_div(n, tile32::kRows);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (tile32::kRows * k));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    work(begin * tile32::kRows, std::min(n, end * tile32::kRows));
  });
}

// A tensor of the weight's own memory; small ones lie where any tensor does.
Tensor empty_weight(const Tensor& like, int64_t count, ScalarType dtype) {
  constexpr int64_t kSmallBytes = 64 << 10;
  const int64_t bytes = count * (dtype == ScalarType::Byte ? 1 : 2);
  void* data = bytes < kSmallBytes
                   ? nullptr
                   : cpu::WeightMemory::instance().allocate(static_cast<size_t>(bytes));
  if (data == nullptr) return torch::stable::new_empty(like, {count}, dtype);
  return torch::stable::from_blob(data, {count}, {1}, like.device(), dtype, [bytes](void* piece) {
    cpu::WeightMemory::instance().release(piece, static_cast<size_t>(bytes));
  });
}

}  // namespace

Triple wquant_rtn_cpu(Tensor weight, int64_t bits, int64_t group_size, int64_t scheme) {
  RtnCall c = make_rtn(weight, bits, group_size, scheme);
  over_row_tiles(c.params.n, c.params.k,
                 [&](int64_t begin, int64_t end) { cpu::wquant_rtn(c.params, begin, end); });
  return {c.codes, c.scale, c.zero};
}

Pair wquant_pack_cpu(Tensor codes, Tensor scale, Tensor zero, int64_t bits, int64_t group_size,
                     int64_t scheme) {
  PackCall c = make_pack(codes, scale, zero, bits, group_size, scheme, kTile32, empty_weight);
  over_row_tiles(c.params.n, c.params.k,
                 [&](int64_t begin, int64_t end) { cpu::wquant_pack(c.params, begin, end); });
  return {c.packed, c.meta};
}

Triple wquant_unpack_cpu(Tensor packed, Tensor meta, int64_t n, int64_t k, int64_t bits,
                         int64_t group_size, int64_t scheme) {
  PackCall c = make_unpack(packed, meta, n, k, bits, group_size, scheme, kTile32);
  over_row_tiles(n, k,
                 [&](int64_t begin, int64_t end) { cpu::wquant_unpack(c.params, begin, end); });
  return {c.codes, c.scale, c.zero};
}

Tensor wquant_dequantize_cpu(Tensor packed, Tensor meta, int64_t n, int64_t k, int64_t bits,
                             int64_t group_size, int64_t scheme, ScalarType dtype) {
  DequantizeCall c = make_dequantize(packed, meta, n, k, bits, group_size, scheme, dtype, kTile32);
  over_row_tiles(n, k,
                 [&](int64_t begin, int64_t end) { cpu::wquant_dequantize(c.params, begin, end); });
  return c.weight;
}

Tensor wquant_expand_scales_cpu(Tensor absmax_codes, Tensor absmax_scale, Tensor offset, int64_t n,
                                int64_t k, int64_t bits, int64_t group_size, int64_t scheme) {
  ExpandScalesCall c = make_expand_scales(absmax_codes, absmax_scale, offset, n, k, bits,
                                          group_size, scheme, kTile32);
  const cpu::ExpandScales expand = cpu::wquant_expand_scales(cpu::selected_isa());
  over_row_tiles(n, group_count(c.params.format, k),
                 [&](int64_t begin, int64_t end) { expand(c.params, begin, end); });
  return c.meta;
}

}  // namespace kvopt::ops
