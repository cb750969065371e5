// SPDX-License-Identifier: Apache-2.0
// `prepare` of the vector kernels: rows of x become 16-bit integers with a scale for every 64
// columns, in the panels that qlinear_layout.h draws. The including file names its instruction set
// by a macro; everything has internal linkage.
//
//     m = max |x| over the block       s = m / 32639       X = round(x / s)
//
// With a code book, s is at least sum |x| / book_limit (qlinear_layout.h), and what is stored is
// s / book_steps, the size of a unit of the products. x is multiplied by the input scale first.
//
// The sum for zero points is that of x, not of s X, and the roundings of a block are balanced:
// those nearest to a tie turn round until sum X is within 1 of sum x / s. What rounding adds up to
// would otherwise meet the mean weight of a row, which for a few bits is half of its norm, and not
// just its deviations.
//
// The maximum is taken over the bits of |x| as integers, which order finite values, then infinity,
// then NaN: one comparison finds every value that integers cannot carry. A block whose m is so
// small that s would be subnormal is taken as zero; where the rest of its row is not larger by far,
// the row is flagged and computed plainly.
#pragma once

#include "cpu/qlinear_layout.h"
#include "cpu/simd.h"

namespace kvopt::cpu {
namespace {

constexpr int32_t kHugeBits = (127 + 60) << 23;   // 2^60: no product can overflow below it
constexpr int32_t kTinyBits = (127 - 96) << 23;   // 2^-96: s and s / book_steps are normal numbers
constexpr int32_t kSmallBits = (127 - 60) << 23;  // 2^-60: beside it, 2^-96 is nothing

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
KVOPT_INLINE void store_codes(const Ints* codes, int64_t columns, int64_t column,
                              int64_t padded_columns, int64_t slot, const Panel& panel) {
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
  int64_t padded = (columns + 31) / 32 * 32;  // zeros as far as the last block of codes reaches
  if (padded > padded_columns - column) padded = padded_columns - column;
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

// A block of `columns` values as vectors, zeros behind them.
template <DType kType>
KVOPT_INLINE void load_block(const void* source, int64_t columns, Floats* values) {
  constexpr int kVectors = kBlockColumns / kLanes;
  constexpr size_t kBytes = kType == DType::kFloat32 ? 4 : 2;
  alignas(64) uint8_t padded[kBlockColumns * kBytes];
  if (columns < kBlockColumns) {  // never read past the row
    memset(padded, 0, sizeof(padded));
    memcpy(padded, source, static_cast<size_t>(columns) * kBytes);
    source = padded;
  }
  for (int v = 0; v < kVectors; ++v) {
    values[v] = load_as_floats<kType>(static_cast<const uint8_t*>(source) + v * kLanes * kBytes);
  }
}

// Adds 64 values in an order that every instruction set keeps: sixteen running sums, then halves.
template <typename Value>
KVOPT_INLINE float sum_block(const Value& value_of) {
  Floats partial[16 / kLanes];
  for (Floats& sum : partial) sum = zero_floats();
  for (int v = 0; v < kBlockColumns / kLanes; ++v) {
    partial[v % (16 / kLanes)] = add(partial[v % (16 / kLanes)], value_of(v));
  }
  alignas(64) float sums[16];
  for (int v = 0; v < 16 / kLanes; ++v) store_floats(sums + v * kLanes, partial[v]);
  for (int half = 8; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

// The first of the largest of a block's values.
KVOPT_INLINE int find_largest(const float* values) {
  constexpr int kVectors = kBlockColumns / kLanes;
  Floats most = load_floats(values);
  for (int v = 1; v < kVectors; ++v) most = max_floats(most, load_floats(values + v * kLanes));
  const float largest = largest_of(most);
  for (int v = 0; v < kVectors; ++v) {
    const uint32_t lanes = lanes_equal(load_floats(values + v * kLanes), largest);
    if (lanes != 0) return v * kLanes + __builtin_ctz(lanes);
  }
  return 0;
}

// Rounds x / s to `codes`, balanced, and returns their sum. `sum`: of x. A code that turns round
// has a residual of about 1 / 64 at least, so it is neither a zero past the columns nor the largest
// of the block, whose residual is that of fp32: no code leaves its range.
KVOPT_INLINE int32_t round_block(const Floats* x, float sum, float inverse, Ints* codes) {
  constexpr int kVectors = kBlockColumns / kLanes;
  alignas(64) float residual[kBlockColumns];
  Ints totals = zero_ints();
  const Floats factor = set_floats(inverse);
  for (int v = 0; v < kVectors; ++v) {
    codes[v] = round_to_ints(multiply(x[v], factor));
    totals = add_ints(totals, codes[v]);
  }
  int32_t total = sum_of(totals);
  // Fused here and below, so that every instruction set sees the same bits.
  float rest = __builtin_fmaf(sum, inverse, -static_cast<float>(total));
  if (rest > -1.0f && rest < 1.0f) return total;
  const float step = rest > 0.0f ? 1.0f : -1.0f;
  rest *= step;
  alignas(64) int32_t rounded[kBlockColumns];
  const Floats direction = set_floats(step);
  for (int v = 0; v < kVectors; ++v) {
    const Floats down = subtract(zero_floats(), to_floats(codes[v]));
    store_floats(residual + v * kLanes, multiply(multiply_add(x[v], factor, down), direction));
    store_ints(rounded + v * kLanes, codes[v]);
  }
  for (; rest >= 1.0f; rest -= 1.0f) {
    const int column = find_largest(residual);
    rounded[column] += static_cast<int32_t>(step);
    total += static_cast<int32_t>(step);
    residual[column] -= 1.0f;
  }
  for (int v = 0; v < kVectors; ++v) codes[v] = load_ints(rounded + v * kLanes);
  return total;
}

// Where a block stands and what its numbers mean.
struct Block {
  int64_t columns;
  int64_t column;  // its first
  int64_t index;   // of the row
  int64_t slot;    // row of the panel
  int64_t padded_columns;
  int32_t middle;  // 0 for code books
  int32_t steps;   // of the book, else 0
  float limit;     // of the book
};

// Returns the bits of the block's largest magnitude.
template <DType kType, bool kPlanes>
KVOPT_INLINE int32_t prepare_block(const void* source, const void* input_scale, const Block& block,
                                   const Panel& panel) {
  constexpr int kVectors = kBlockColumns / kLanes;
  Floats x[kVectors];
  load_block<kType>(source, block.columns, x);
  if (input_scale != nullptr) {
    Floats factor[kVectors];
    load_block<kType>(input_scale, block.columns, factor);
    for (int v = 0; v < kVectors; ++v) x[v] = multiply(x[v], factor[v]);
  }
  Ints largest = zero_ints();
  for (int v = 0; v < kVectors; ++v) largest = max_ints(largest, magnitude_bits(x[v]));
  const int32_t bits = largest_of(largest);

  float scale = 0.0f;
  float inverse = 0.0f;
  if (bits >= kTinyBits && bits < kHugeBits) {
    float magnitude;
    memcpy(&magnitude, &bits, sizeof(magnitude));
    scale = magnitude / static_cast<float>(kMaxCode);
    inverse = static_cast<float>(kMaxCode) / magnitude;
    if (block.steps != 0) {
      const float sum = sum_block([&](int v) { return absolute(x[v]); });
      if (sum > block.limit * scale) {
        scale = sum / block.limit;
        inverse = block.limit / sum;
      }
      scale /= static_cast<float>(block.steps);
    }
  } else {
    for (int v = 0; v < kVectors; ++v) x[v] = zero_floats();
  }
  const float sum = sum_block([&](int v) { return x[v]; });
  Ints codes[kVectors];
  const int32_t total = round_block(x, sum, inverse, codes);
  store_codes<kPlanes>(codes, block.columns, block.column, block.padded_columns, block.slot, panel);
  const int64_t at = block.index * panel.width + block.slot;
  panel.scale[at] = scale;
  panel.start[at] = -block.middle * total;
  panel.sum[at] = sum;
  return bits;
}

template <DType kType, bool kPlanes>
void prepare_row(const QLinearParams& p, const QLinearLayout& layout, int64_t row) {
  constexpr int64_t kBytes = kType == DType::kFloat32 ? 4 : 2;
  const Panel panel = panel_at(p, layout, panel_of_row(layout, row));
  const uint8_t* x = static_cast<const uint8_t*>(p.x) + row * p.k * kBytes;
  const uint8_t* input_scale = static_cast<const uint8_t*>(p.input_scale);
  const bool book = p.format.has_book();
  Block at = {};
  at.slot = row - panel.row;
  at.padded_columns = layout.padded_columns;
  at.middle = book ? 0 : 1 << (p.format.bits - 1);
  at.steps = book ? book_steps(p.format.scheme) : 0;
  at.limit = book ? static_cast<float>(book_limit(p.format.scheme)) : 0.0f;
  int32_t largest = 0;
  bool vanishing = false;
  for (int64_t group = 0; group < layout.groups; ++group) {
    const int64_t begin = group * layout.group_columns;
    const int64_t end = begin + layout.group_columns < p.k ? begin + layout.group_columns : p.k;
    at.index = group * layout.blocks_per_group;
    for (int64_t column = begin; column < end; column += layout.block_columns, ++at.index) {
      at.columns = end - column < layout.block_columns ? end - column : layout.block_columns;
      at.column = column;
      const int32_t bits = prepare_block<kType, kPlanes>(
          x + column * kBytes, input_scale == nullptr ? nullptr : input_scale + column * kBytes, at,
          panel);
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
