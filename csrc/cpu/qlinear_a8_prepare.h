// SPDX-License-Identifier: Apache-2.0
// `prepare` of the int8 kernels on vectors: rows of x become panels of int8 with a scale for each
// weight group, as qlinear_a8.h draws them; `finish_rows` ends a tile. The including file names its
// instruction set by a macro (simd.h); everything has internal linkage.
#pragma once

#include "cpu/qlinear_a8.h"
#include "cpu/qlinear_epilogue.h"
#include "cpu/qlinear_layout.h"

namespace kvopt::cpu {
namespace {

#if defined(KVOPT_QLINEAR_VNNI)
constexpr bool kFullBytes = true;  // bytes beyond 127 multiply without saturation
#else
constexpr bool kFullBytes = false;
#endif
constexpr int kPanelRows = kLanes == 16 ? 12 : 4;
constexpr int64_t kQuadBytes = 128;  // four columns of a tile
constexpr int64_t kStretchColumns = kChunkColumns;
constexpr int64_t kStretchChunks = 16;  // a group has at least 16 columns
constexpr int64_t kPlaneBytes = kStretchColumns / 4 * kQuadBytes;
constexpr int64_t kBatchRows = 96;               // rows of x that share an unpacked stretch
constexpr int64_t kBatchBytes = 512 * 1024;      // of X that they may occupy
constexpr int32_t kHugeBits = (127 + 60) << 23;  // of qlinear_prepare.h: see there
constexpr int32_t kTinyBits = (127 - 110) << 23;
constexpr int32_t kSmallBits = (127 - 70) << 23;
constexpr int kVectors16 = 16 / kLanes;  // vectors of 16 columns of x

struct Panel {
  int64_t row;    // its first row of x
  int64_t width;  // its rows
  uint8_t* x;
  float* scale;
  int32_t* start;
  float* sum;
};

KVOPT_INLINE Panel panel_at(const QLinearParams& p, const A8Layout& layout, int64_t index) {
  Panel panel;
  const int64_t extra = index < layout.panel_extra ? index : layout.panel_extra;
  panel.row = index * layout.panel_base + extra;
  panel.width = layout.panel_base + (index < layout.panel_extra ? 1 : 0);
  panel.x = static_cast<uint8_t*>(p.workspace) + layout.flag_bytes + panel.row * layout.row_bytes;
  panel.scale = reinterpret_cast<float*>(panel.x + panel.width * layout.padded_columns);
  panel.start = reinterpret_cast<int32_t*>(panel.scale + panel.width * layout.chunks);
  panel.sum = reinterpret_cast<float*>(panel.start + panel.width * layout.chunks);
  return panel;
}

KVOPT_INLINE int64_t panel_of_row(const A8Layout& layout, int64_t row) {
  const int64_t tall = layout.panel_extra * (layout.panel_base + 1);
  if (row < tall) return row / (layout.panel_base + 1);
  return layout.panel_extra + (row - tall) / layout.panel_base;
}

// 16 values of `from`, zeros past `count`.
template <DType kType>
KVOPT_INLINE void load_16(const void* source, int64_t first, int64_t count, Floats* v) {
  constexpr int64_t kBytes = kType == DType::kFloat32 ? 4 : 2;
  const uint8_t* from = static_cast<const uint8_t*>(source) + first * kBytes;
  alignas(64) uint8_t edge[16 * kBytes];
  if (count < 16) {  // never read past the row
    memset(edge, 0, sizeof(edge));
    memcpy(edge, from, static_cast<size_t>(count * kBytes));
    from = edge;
  }
  for (int i = 0; i < kVectors16; ++i) v[i] = load_as_floats<kType>(from + i * kLanes * kBytes);
}

template <DType kType>
struct Row {
  const QLinearParams& p;
  int64_t row;

  KVOPT_INLINE void load(int64_t column, int64_t count, Floats* v) const {
    load_16<kType>(p.x, row * p.k + column, count, v);
    if (p.input_scale == nullptr) return;
    Floats scale[kVectors16];
    load_16<kType>(p.input_scale, column, count, scale);
    for (int i = 0; i < kVectors16; ++i) v[i] = multiply(v[i], scale[i]);
  }
};

KVOPT_INLINE bool any_at_least(Floats v, float limit) {
#if defined(KVOPT_QLINEAR_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps(v, set_floats(limit), _CMP_GE_OQ)) != 0;
#else
  return _mm512_cmp_ps_mask(v, set_floats(limit), _CMP_GE_OQ) != 0;
#endif
}

// round(v / s). The product with the inverse decides unless it comes near a tie.
KVOPT_INLINE Ints quantize(Floats v, float scale, float inverse) {
  const Floats quotient = multiply(v, set_floats(inverse));
  const Ints integer = round_to_ints(quotient);
  if (any_at_least(absolute(subtract(quotient, to_floats(integer))), 0.5f - 0x1p-13f)) {
    return round_to_ints(divide(v, set_floats(scale)));
  }
  return integer;
}

KVOPT_INLINE void store_bytes(uint8_t* target, const Ints* codes) {
#if defined(KVOPT_QLINEAR_AVX2)
  const __m256i words =
      _mm256_permute4x64_epi64(_mm256_packs_epi32(codes[0], codes[1]), _MM_SHUFFLE(3, 1, 2, 0));
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
  const __m128i bytes = _mm512_cvtepi32_epi8(codes[0]);
#endif
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), bytes);
}

template <DType kType>
void prepare_row(const QLinearParams& p, const A8Layout& layout, int64_t index) {
  const Panel panel = panel_at(p, layout, panel_of_row(layout, index));
  const int64_t slot = index - panel.row;
  const Row<kType> row = {p, index};
  Floats v[kVectors16];
  int32_t largest = 0;
  bool vanishing = false;
  for (int64_t group = 0; group < layout.groups; ++group) {
    const int64_t begin = group * layout.group_columns;
    const int64_t end = begin + layout.group_columns < p.k ? begin + layout.group_columns : p.k;
    Ints magnitudes = zero_ints();
    for (int64_t column = begin; column < end; column += 16) {
      row.load(column, end - column, v);
      for (int i = 0; i < kVectors16; ++i) magnitudes = max_ints(magnitudes, magnitude_bits(v[i]));
    }
    const int32_t bits = largest_of(magnitudes);
    largest = bits > largest ? bits : largest;
    vanishing |= bits > 0 && bits < kTinyBits;
    float magnitude;
    memcpy(&magnitude, &bits, sizeof(magnitude));
    const bool zero = bits < kTinyBits || bits >= kHugeBits;
    const float scale = zero ? 0.0f : magnitude / 127.0f;
    const float inverse = zero ? 0.0f : 127.0f / magnitude;
    int64_t chunk = group * layout.group_chunks;
    for (int64_t first = begin; first < end; first += kChunkColumns, ++chunk) {
      const int64_t last = first + kChunkColumns < end ? first + kChunkColumns : end;
      Ints totals = zero_ints();
      for (int64_t column = first; column < last; column += 16) {
        Ints codes[kVectors16];
        row.load(column, last - column, v);
        for (int i = 0; i < kVectors16; ++i) {
          codes[i] = zero ? zero_ints() : quantize(v[i], scale, inverse);
          totals = add_ints(totals, codes[i]);
        }
        alignas(16) uint8_t bytes[16];
        store_bytes(bytes, codes);
        uint8_t* target = panel.x + column * panel.width + slot * 4;
        for (int64_t quad = 0; quad < 4; ++quad) {
          memcpy(target + quad * 4 * panel.width, bytes + quad * 4, 4);
        }
      }
      const int32_t total = sum_of(totals);
      const int64_t at = chunk * panel.width + slot;
      panel.scale[at] = scale;
      panel.start[at] = -layout.middle * total;
      panel.sum[at] = scale * static_cast<float>(total);
    }
  }
  const bool plain = largest >= kHugeBits || (vanishing && largest < kSmallBits);
  static_cast<uint8_t*>(p.workspace)[index] = plain ? 1 : 0;
}

void prepare(const QLinearParams& p, int64_t row_begin, int64_t row_end) {
  const A8Layout layout = a8_layout(p, kPanelRows);
  for (int64_t row = row_begin; row < row_end; ++row) {
    if (p.dtype == DType::kFloat32) prepare_row<DType::kFloat32>(p, layout, row);
    if (p.dtype == DType::kFloat16) prepare_row<DType::kFloat16>(p, layout, row);
    if (p.dtype == DType::kBFloat16) prepare_row<DType::kBFloat16>(p, layout, row);
  }
}

int64_t workspace_bytes(const QLinearParams& p) { return a8_workspace_bytes(p, kPanelRows); }

// Writes rows [row, row + count) of y from sums (count, 32); flagged rows are computed anew.
void finish_rows(const QLinearParams& p, int64_t row, int64_t count, int64_t tile, float* sums) {
  const uint8_t* flags = static_cast<const uint8_t*>(p.workspace) + row;
  for (int64_t i = 0; i < count; ++i) {
    int64_t end = i;
    while (end < count && flags[end] == 0) ++end;
    if (end > i) finish_sums(p, row + i, end - i, tile, sums + i * kTileRows);
    if (end < count) qlinear_plain(p, row + end, row + end + 1, tile, tile + 1);
    i = end;
  }
}

}  // namespace
}  // namespace kvopt::cpu
