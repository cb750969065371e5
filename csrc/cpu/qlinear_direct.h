// SPDX-License-Identifier: Apache-2.0
// A few rows of x: codes become int16 pairs as they come, 32 rows of w at a time, and meet every
// row of x before the next ones. The mathematics are those of qlinear_codes.h.
//
// The bound is the bytes of w, one contiguous stream, prefetched on two levels. For a 64-byte
// register of 4-bit codes and one row of x there are 4 multiply-adds (8 instructions without VNNI)
// beside 6 to find the pairs; of a code book 3 shifts and 4 permutations.
#pragma once

#include "cpu/qlinear_codes.h"

namespace kvopt::cpu {
namespace {

// Sums of a row and vector. A fused multiply-add waits some five cycles for the one before it in
// its sum, so few rows take turns between two.
#if defined(KVOPT_QLINEAR_VNNI)
template <int kRows>
constexpr int kChains = kRows <= 2 ? 2 : 1;
#else
template <int kRows>
constexpr int kChains = 1;
#endif

// integers (kChains * kRows, kVectors) += a unit's codes times its columns of x.
template <Codes kCodes, int kRows, int kVectors>
KVOPT_INLINE void multiply_direct(const uint8_t* w, bool odd, const uint8_t* x, const Table& table,
                                  Ints (*integers)[kVectors]) {
  constexpr int kPairs = static_cast<int>(unit_columns(kCodes) / 2);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    Ints pairs[kPairs];
    unpack_unit<kCodes>(w + v * kLanes * 4, odd, table, pairs);
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; ++i) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* at = x + 4 * (i * kRows + r);
        Ints& sum = integers[i % kChains<kRows> * kRows + r][v];
        sum = kRows > 1 ? dot_pairs_at(sum, pairs[i], at) : dot_pairs(sum, pairs[i], broadcast(at));
      }
    }
  }
}

template <Codes kCodes, bool kAsymmetric, int kRows>
KVOPT_INLINE void direct_tile(const QLinearParams& p, const QLinearLayout& layout,
                              const Panel& panel, const Table& table, int64_t tile) {
  constexpr int64_t kUnitColumns = unit_columns(kCodes);
  constexpr int64_t kStep = kUnitColumns * 2 * kRows;
  // Units that are unrolled, 32 columns: the loop would cost a quarter of the instructions.
  constexpr int64_t kTogether = kRows > 2 ? 2 : 32 / kUnitColumns;
  // As many sums at a time as leave registers for the codes.
  constexpr int kParts = kLanes == 8 ? 2 : 1;
  constexpr int kVectors = kTileVectors / kParts;
  const Floats middle = set_floats(static_cast<float>(middle_of(kCodes)));
  const uint8_t* tile_codes = p.packed + tile * layout.tile_bytes;
  const uint16_t* meta = p.meta + tile * layout.groups * layout.meta_stride;
  const uint8_t* x = panel.x;
  Floats sums[kRows][kTileVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sums[r][v] = zero_floats();
  }
  int64_t unit = 0;
  Cursor cursor;
  while (cursor.column < p.k) {
    const int64_t columns = columns_at(p, layout, cursor);
    const int64_t end = unit + (columns + kUnitColumns - 1) / kUnitColumns;
    const int64_t at = cursor.block * kRows;
    const uint16_t* group_meta = meta + cursor.group * layout.meta_stride;
    prefetch_meta<kAsymmetric>(group_meta);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const int64_t lane = static_cast<int64_t>(part) * kVectors * kLanes;
      Ints integers[kChains<kRows> * kRows][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kChains<kRows> * kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          integers[r][v] = r < kRows ? set_ints(panel.start[at + r]) : zero_ints();
        }
      }
      int64_t u = unit;
      const uint8_t* unit_x = x;
      for (; u + kTogether <= end; u += kTogether, unit_x += kTogether * kStep) {
        const uint8_t* w = unit_address<kCodes>(tile_codes, u);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kTogether; ++i) {
          const uint8_t* at_w =
              kCodes == Codes::kInt3 ? unit_address<kCodes>(tile_codes, u + i) : w + i * kUnitBytes;
          if (part == 0) prefetch_stream(at_w);
          multiply_direct<kCodes, kRows, kVectors>(at_w + lane * 4, (u + i) % 2 != 0,
                                                   unit_x + i * kStep, table, integers);
        }
      }
      for (; u < end; ++u, unit_x += kStep) {
        const uint8_t* w = unit_address<kCodes>(tile_codes, u);
        if (part == 0) prefetch_stream(w);
        multiply_direct<kCodes, kRows, kVectors>(w + lane * 4, u % 2 != 0, unit_x, table, integers);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Meta m = load_meta<kAsymmetric>(group_meta + lane + v * kLanes, middle);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          Ints integer = integers[r][v];
          if constexpr (kChains<kRows> == 2) integer = add_ints(integer, integers[kRows + r][v]);
          Floats& sum = sums[r][part * kVectors + v];
          sum = add_block<kAsymmetric>(sum, integer, m.scale, m.offset, panel.scale[at + r],
                                       panel.sum[at + r]);
        }
      }
    }
    x += (end - unit) * kStep;
    unit = end;
    advance(layout, columns, &cursor);
  }
  alignas(64) float result[kRows * kTileRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      store_floats(result + r * kTileRows + v * kLanes, sums[r][v]);
    }
  }
  finish_rows(p, 0, kRows, tile, result);
}

template <Codes kCodes, int kRows>
void run_direct(const QLinearParams& p, const QLinearLayout& layout, int64_t tile_begin,
                int64_t tile_end) {
  const Panel panel = panel_at(p, layout, 0);
  const Table table = table_of(p.format);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    if constexpr (kCodes != Codes::kBook) {
      if (p.format.has_zeros()) {
        direct_tile<kCodes, true, kRows>(p, layout, panel, table, tile);
        continue;
      }
    }
    direct_tile<kCodes, false, kRows>(p, layout, panel, table, tile);
  }
}

// run_direct for a number of rows known only now, kRows or fewer.
template <Codes kCodes, int kRows>
void run_direct_rows(const QLinearParams& p, const QLinearLayout& layout, int64_t tile_begin,
                     int64_t tile_end) {
  if constexpr (kRows > 1) {
    if (p.m < kRows) return run_direct_rows<kCodes, kRows - 1>(p, layout, tile_begin, tile_end);
  }
  run_direct<kCodes, kRows>(p, layout, tile_begin, tile_end);
}

}  // namespace
}  // namespace kvopt::cpu
