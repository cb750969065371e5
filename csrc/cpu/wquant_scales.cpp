// SPDX-License-Identifier: Apache-2.0
// The portable version: one byte read and two written for each group, a table of 256 values in the
// first-level cache. Rows are the inner loop because a tile keeps the scales of its 32 rows side by
// side. The conversion to fp16 bounds it, about 2 ns a group.
#include "cpu/wquant_scales.h"

#include "cpu/float16.h"

namespace kvopt::cpu {

void wquant_expand_scales_scalar(const ExpandScalesParams& p, int64_t row_begin, int64_t row_end) {
  static constexpr DynamicMap kMap = dynamic_map();
  constexpr uint16_t kSmallestHalf = 1;  // 2^-24
  const int64_t groups = group_count(p.format, p.k);
  const float offset = *p.offset;
  for (int64_t tile = row_begin; tile < row_end; tile += tile32::kRows) {
    for (int64_t group = 0; group < groups; ++group) {
      uint16_t* const meta = p.meta + tile32::scale_index(p.format, p.k, tile, group);
      for (int64_t r = 0; r < tile32::kRows; ++r) {
        const int64_t index = (tile + r) * groups + group;
        if (tile + r >= row_end) {
          meta[r] = 0;
          continue;
        }
        const float product = kMap.value[p.codes[index]] * p.scale[index / kDoubleBlock];
        const uint16_t half = float_to_half(product + offset);
        meta[r] = half == 0 || half >= 0x8000 ? kSmallestHalf : half;
      }
    }
  }
}

ExpandScales wquant_expand_scales(Isa isa) {
#if defined(__x86_64__)
  if (isa != Isa::kScalar) return wquant_expand_scales_avx2;
#endif
  (void)isa;
  return wquant_expand_scales_scalar;
}

}  // namespace kvopt::cpu
