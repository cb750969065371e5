// SPDX-License-Identifier: Apache-2.0
// `prepare` of the vector kernels: rows of x become 16-bit integers with a scale for every 64
// columns, in the panels that qlinear_layout.h draws. The including file names its instruction set
// by a macro; everything has internal linkage.
//
//     m = max |x| over the block       s = m / 32639       X = round(x * (32639 / m))
//
// The sum for zero points is that of x, not of s X: what rounding adds up to would otherwise meet
// the mean weight of a row, not just its deviations.
//
// The maximum is taken over the bits of |x| as integers, which order finite values, then infinity,
// then NaN: one comparison finds every value that integers cannot carry. A block whose m is so
// small that s would be subnormal is taken as zero; where the rest of its row is not larger by far,
// the row is flagged and computed plainly.
#pragma once

#include "cpu/qlinear_layout.h"

#if defined(KVOPT_QLINEAR_AVX2)
#include "cpu/simd_avx2.h"
#elif defined(KVOPT_QLINEAR_AVX512) || defined(KVOPT_QLINEAR_VNNI)
#include "cpu/simd_avx512.h"
#endif

namespace kvopt::cpu {
namespace {

constexpr int32_t kHugeBits = (127 + 60) << 23;   // 2^60: no product can overflow below it
constexpr int32_t kTinyBits = (127 - 110) << 23;  // 2^-110: s is still a normal number
constexpr int32_t kSmallBits = (127 - 70) << 23;  // 2^-70: beside it, 2^-110 is nothing

// One panel of the workspace.
struct Panel {
  int64_t row;    // its first row of x
  int64_t width;  // its rows
  uint8_t* x;
  float* scale;
  int32_t* start;
  float* sum;
};

KVOPT_INLINE Panel panel_at(const QLinearParams& p, const QLinearLayout& layout, int64_t index) {
  Panel panel;
  const int64_t extra = index < layout.panel_extra ? index : layout.panel_extra;
  panel.row = index * layout.panel_base + extra;
  panel.width = layout.panel_base + (index < layout.panel_extra ? 1 : 0);
  panel.x = static_cast<uint8_t*>(p.workspace) + layout.flag_bytes + panel.row * layout.row_bytes;
  panel.scale = reinterpret_cast<float*>(panel.x + panel.width * layout.padded_columns * 2);
  panel.start = reinterpret_cast<int32_t*>(panel.scale + panel.width * layout.blocks);
  panel.sum = reinterpret_cast<float*>(panel.start + panel.width * layout.blocks);
  return panel;
}

KVOPT_INLINE int64_t panel_of_row(const QLinearLayout& layout, int64_t row) {
  const int64_t tall = layout.panel_extra * (layout.panel_base + 1);
  if (row < tall) return row / (layout.panel_base + 1);
  return layout.panel_extra + (row - tall) / layout.panel_base;
}

// The block's X, interleaved with the other rows of the panel. `codes` holds whole vectors, zero
// past the columns.
template <bool kPlanes>
KVOPT_INLINE void store_codes(const Ints* codes, int64_t columns, int64_t column, int64_t slot,
                              const Panel& panel) {
  constexpr int64_t kUnitColumns = kPlanes ? 4 : 2;
  constexpr size_t kUnitBytes = kUnitColumns * 2;
  alignas(64) uint8_t packed[kBlockColumns * 2];
  for (int v = 0; v < kBlockColumns / kLanes; ++v) {
#if defined(KVOPT_QLINEAR_VNNI)
    if constexpr (kPlanes) {
      store_planes(packed + v * kLanes * 2, codes[v]);
      continue;
    }
#endif
    store_pairs(packed + v * kLanes * 2, codes[v]);
  }
  const int64_t padded = (columns + 7) / 8 * 8;
  uint8_t* target = panel.x + column * 2 * panel.width + slot * static_cast<int64_t>(kUnitBytes);
  if (panel.width == 1) {
    memcpy(target, packed, static_cast<size_t>(padded * 2));
    return;
  }
  const int64_t stride = static_cast<int64_t>(kUnitBytes) * panel.width;
  for (int64_t unit = 0; unit < padded / kUnitColumns; ++unit) {
    memcpy(target + unit * stride, packed + unit * static_cast<int64_t>(kUnitBytes), kUnitBytes);
  }
}

// Returns the bits of the block's largest magnitude.
template <DType kType, bool kPlanes>
KVOPT_INLINE int32_t prepare_block(const void* source, int64_t columns, int64_t column,
                                   int64_t block, int64_t slot, int32_t middle,
                                   const Panel& panel) {
  constexpr int kVectors = kBlockColumns / kLanes;
  constexpr size_t kBytes = kType == DType::kFloat32 ? 4 : 2;
  alignas(64) uint8_t padded[kBlockColumns * kBytes];
  if (columns < kBlockColumns) {  // never read past the row
    memset(padded, 0, sizeof(padded));
    memcpy(padded, source, static_cast<size_t>(columns) * kBytes);
    source = padded;
  }
  Floats x[kVectors];
  Ints largest = zero_ints();
  for (int v = 0; v < kVectors; ++v) {
    x[v] = load_as_floats<kType>(static_cast<const uint8_t*>(source) + v * kLanes * kBytes);
    largest = max_ints(largest, magnitude_bits(x[v]));
  }
  alignas(64) int32_t lanes[kLanes];
  store_ints(lanes, largest);
  int32_t bits = lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) bits = lanes[lane] > bits ? lanes[lane] : bits;

  float scale = 0.0f;
  float inverse = 0.0f;
  if (bits >= kTinyBits && bits < kHugeBits) {
    float magnitude;
    memcpy(&magnitude, &bits, sizeof(magnitude));
    scale = magnitude / static_cast<float>(kMaxCode);
    inverse = static_cast<float>(kMaxCode) / magnitude;
  } else {
    for (int v = 0; v < kVectors; ++v) x[v] = zero_floats();
  }
  Ints codes[kVectors];
  Ints total = zero_ints();
  Floats partial[16 / kLanes];  // sixteen running sums, so that every instruction set rounds alike
  for (Floats& value : partial) value = zero_floats();
  for (int v = 0; v < kVectors; ++v) {
    codes[v] = round_to_ints(multiply(x[v], set_floats(inverse)));
    total = add_ints(total, codes[v]);
    partial[v % (16 / kLanes)] = add(partial[v % (16 / kLanes)], x[v]);
  }
  store_ints(lanes, total);
  int32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  alignas(64) float sums[16];
  for (int v = 0; v < 16 / kLanes; ++v) store_floats(sums + v * kLanes, partial[v]);
  for (int half = 8; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }

  store_codes<kPlanes>(codes, columns, column, slot, panel);
  const int64_t at = block * panel.width + slot;
  panel.scale[at] = scale;
  panel.start[at] = -middle * sum;
  panel.sum[at] = sums[0];
  return bits;
}

template <DType kType, bool kPlanes>
void prepare_row(const QLinearParams& p, const QLinearLayout& layout, int64_t row) {
  constexpr int64_t kBytes = kType == DType::kFloat32 ? 4 : 2;
  const Panel panel = panel_at(p, layout, panel_of_row(layout, row));
  const uint8_t* x = static_cast<const uint8_t*>(p.x) + row * p.k * kBytes;
  const int32_t middle = 1 << (p.format.bits - 1);
  int32_t largest = 0;
  bool vanishing = false;
  for (int64_t group = 0; group < layout.groups; ++group) {
    const int64_t begin = group * layout.group_columns;
    const int64_t end = begin + layout.group_columns < p.k ? begin + layout.group_columns : p.k;
    int64_t block = group * layout.blocks_per_group;
    for (int64_t column = begin; column < end; column += kBlockColumns, ++block) {
      const int64_t columns = end - column < kBlockColumns ? end - column : kBlockColumns;
      const int32_t bits = prepare_block<kType, kPlanes>(x + column * kBytes, columns, column,
                                                         block, row - panel.row, middle, panel);
      largest = bits > largest ? bits : largest;
      vanishing |= bits > 0 && bits < kTinyBits;
    }
  }
  const bool plain = largest >= kHugeBits || (vanishing && largest < kSmallBits);
  static_cast<uint8_t*>(p.workspace)[row] = plain ? 1 : 0;
}

template <DType kType>
void prepare_rows(const QLinearParams& p, const QLinearLayout& layout, int64_t row_begin,
                  int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
#if defined(KVOPT_QLINEAR_VNNI)
    if (layout.planes) {
      prepare_row<kType, true>(p, layout, row);
      continue;
    }
#endif
    prepare_row<kType, false>(p, layout, row);
  }
}

void prepare(const QLinearParams& p, int64_t row_begin, int64_t row_end) {
  const QLinearLayout layout = qlinear_layout(p, kIsa);
  switch (p.dtype) {
    case DType::kFloat32:
      return prepare_rows<DType::kFloat32>(p, layout, row_begin, row_end);
    case DType::kFloat16:
      return prepare_rows<DType::kFloat16>(p, layout, row_begin, row_end);
    case DType::kBFloat16:
      return prepare_rows<DType::kBFloat16>(p, layout, row_begin, row_end);
  }
}

}  // namespace
}  // namespace kvopt::cpu
