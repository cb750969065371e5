// SPDX-License-Identifier: Apache-2.0
// Double-quantised scales to fp16, a register at a time: 8 groups of a row are one gather from the
// table (1 KiB, first-level cache), a multiplication, an addition, a conversion; 8 rows of them are
// transposed, because a tile keeps the scales of its 32 rows side by side.
//
//     row r:    codes g .. g+7  ->  8 fp16        8 rows  ->  8x8 transpose  ->  group g: 8 rows
//
// Compiled without fused multiply-add, which would round once where the rule rounds twice. Gathers
// bound it, a third of a nanosecond a group; a product reads 32 bytes of codes or more a group.
#include <immintrin.h>

#include "cpu/wquant_scales.h"

namespace kvopt::cpu {
namespace {

constexpr int kWidth = 8;  // groups of a step
alignas(64) constexpr DynamicMap kMap = dynamic_map();

// The fp16 scales of up to 8 groups from flat index `index` on; `count` of them exist.
__m128i expand(const ExpandScalesParams& p, int64_t index, int64_t count, __m256 offset) {
  uint64_t bytes = 0;
  if (count == kWidth) {
    __builtin_memcpy(&bytes, p.codes + index, kWidth);
  } else {
    __builtin_memcpy(&bytes, p.codes + index, static_cast<size_t>(count));
  }
  const __m256i codes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
  const __m256 value = _mm256_i32gather_ps(kMap.value, codes, 4);
  const int64_t first = index / kDoubleBlock;
  __m256 scale = _mm256_set1_ps(p.scale[first]);
  const int64_t same = (first + 1) * kDoubleBlock - index;  // groups before the next block of 256
  if (same < count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i next = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(static_cast<int>(same) - 1));
    scale = _mm256_blendv_ps(scale, _mm256_set1_ps(p.scale[first + 1]), _mm256_castsi256_ps(next));
  }
  const __m256 absmax = _mm256_add_ps(_mm256_mul_ps(value, scale), offset);
  // At least 2^-24, whose pattern is 1: zero and negative numbers are smaller as signed integers.
  return _mm_max_epi16(_mm256_cvtps_ph(absmax, _MM_FROUND_TO_NEAREST_INT), _mm_set1_epi16(1));
}

void transpose(__m128i (&rows)[8]) {
  __m128i a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm_unpacklo_epi16(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm_unpackhi_epi16(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm_unpacklo_epi32(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm_unpackhi_epi32(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm_unpacklo_epi32(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm_unpackhi_epi32(a[4 * i + 1], a[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    rows[2 * i] = _mm_unpacklo_epi64(b[i], b[i + 4]);
    rows[2 * i + 1] = _mm_unpackhi_epi64(b[i], b[i + 4]);
  }
}

}  // namespace

void wquant_expand_scales_avx2(const ExpandScalesParams& p, int64_t row_begin, int64_t row_end) {
  const int64_t groups = group_count(p.format, p.k);
  const __m256 offset = _mm256_set1_ps(*p.offset);
  for (int64_t tile = row_begin; tile < row_end; tile += tile32::kRows) {
    uint16_t* const meta = p.meta + tile * groups;  // 32 values a group, no zero points
    for (int64_t group = 0; group < groups; group += kWidth) {
      const int64_t count = groups - group < kWidth ? groups - group : kWidth;
      for (int64_t eight = 0; eight < tile32::kRows; eight += 8) {
        __m128i rows[8];
        for (int64_t r = 0; r < 8; ++r) {
          const int64_t row = tile + eight + r;
          rows[r] =
              row < row_end ? expand(p, row * groups + group, count, offset) : _mm_setzero_si128();
        }
        transpose(rows);
        for (int64_t g = 0; g < count; ++g) {
          uint16_t* const target = meta + (group + g) * tile32::kRows + eight;
          _mm_storeu_si128(reinterpret_cast<__m128i*>(target), rows[g]);
        }
      }
    }
  }
}

}  // namespace kvopt::cpu
