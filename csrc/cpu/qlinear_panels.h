// SPDX-License-Identifier: Apache-2.0
// Many rows of x. The mathematics are those of qlinear_codes.h; everything has internal linkage.
//
// A stretch of the tile, up to 256 columns, is unpacked to pairs (16 KB, first level of cache) and
// met by panels of x. For a block the micro-kernel keeps rows x 2 vectors of integers in registers;
// the floating-point sums of the tile lie in cache. Panels come in batches whose X fits the second
// level, and prefetch the next stretch meanwhile. The bound is multiply-adds: a block costs each
// sum 32 of them beside 3 or 4 floating-point operations.
//
//              2 vectors = 32 (AVX2: 16) rows of w
//            +-----------+
//     x row  |  |  |  |  |    += X pair (broadcast) * 2 vectors of pairs, 32 times a block
//      ...   |  |  |  |  |
//            +-----------+
#pragma once

#include "cpu/qlinear_codes.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kStretchColumns = 256;     // unpacked at a time
constexpr int64_t kStretchBlocks = 16;       // a group has at least 16 columns
constexpr int64_t kBatchRows = 96;           // rows of x that share an unpacked stretch, at most
constexpr int64_t kBatchBytes = 512 * 1024;  // of X that they may occupy
constexpr int kPanelRows = kLanes == 16 ? 12 : 4;

// Keeps the compiler from holding in registers, across blocks, what belongs in memory.
KVOPT_INLINE void forget_memory() { __asm__ volatile("" ::: "memory"); }

// Some consecutive blocks of a tile, unpacked.
struct Stretch {
  int64_t column;  // of the first block
  int64_t block;   // index of the first block
  int64_t blocks;
  const uint8_t* next;  // the bytes after it, packed: they are prefetched during the multiplication
  int64_t next_step;    // bytes of them for each pair of columns of each panel
  int32_t pairs[kStretchBlocks];  // pairs of columns of each block, a multiple of 2
  alignas(64) float scale[kStretchBlocks][kTileRows];
  alignas(64) float offset[kStretchBlocks][kTileRows];
  alignas(64) int32_t weights[kStretchColumns / 2][kTileRows];
};

template <Codes kCodes, bool kAsymmetric>
void unpack_stretch(const QLinearParams& p, const QLinearLayout& layout, const Table& table,
                    int64_t tile, Cursor* cursor, Stretch* stretch) {
  constexpr int64_t kUnitColumns = unit_columns(kCodes);
  constexpr int kPairs = static_cast<int>(kUnitColumns / 2);
  const Floats middle = set_floats(static_cast<float>(middle_of(kCodes)));
  const uint8_t* tile_codes = p.packed + tile * layout.tile_bytes;
  const uint16_t* meta = p.meta + tile * layout.groups * layout.meta_stride;
  stretch->column = cursor->column;
  stretch->block = cursor->block;
  stretch->blocks = 0;
  while (cursor->column < p.k) {
    const int64_t columns = columns_at(p, layout, *cursor);
    const int64_t first = cursor->column - stretch->column;
    if (first + columns > kStretchColumns) break;
    const int64_t units = (columns + kUnitColumns - 1) / kUnitColumns;
    int32_t (*out)[kTileRows] = stretch->weights + first / 2;
    for (int64_t unit = cursor->column / kUnitColumns, last = unit + units; unit < last;
         ++unit, out += kPairs) {
      const uint8_t* w = unit_address<kCodes>(tile_codes, unit);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        Ints pairs[kPairs];
        unpack_unit<kCodes>(w + v * kLanes * 4, unit % 2 != 0, table, pairs);
        for (int i = 0; i < kPairs; ++i) store_ints(out[i] + v * kLanes, pairs[i]);
      }
    }
    stretch->pairs[stretch->blocks] = static_cast<int32_t>(units * kPairs);
    for (int v = 0; v < kTileVectors; ++v) {
      const Meta m =
          load_meta<kAsymmetric>(meta + cursor->group * layout.meta_stride + v * kLanes, middle);
      store_floats(stretch->scale[stretch->blocks] + v * kLanes, m.scale);
      if constexpr (kAsymmetric) {
        store_floats(stretch->offset[stretch->blocks] + v * kLanes, m.offset);
      }
    }
    ++stretch->blocks;
    advance(layout, columns, cursor);
  }
  stretch->next =
      unit_address<kCodes>(tile_codes, (cursor->column + kUnitColumns - 1) / kUnitColumns);
}

// sums (kRows, 32) += the panel's stretch of x times the stretch of w.
template <int kRows, bool kAsymmetric>
void multiply_panel(const Stretch& stretch, const Panel& panel, float* sums) {
  constexpr int kVectors = 2;
  for (int part = 0; part < kTileVectors / kVectors; ++part) {
    const int64_t lane = static_cast<int64_t>(part) * kVectors * kLanes;
    const uint8_t* x = panel.x + stretch.column * 2 * kRows;
    const int32_t* w = stretch.weights[0] + lane;
    const uint8_t* next = stretch.next;
    for (int64_t b = 0; b < stretch.blocks; ++b) {
      const int64_t at = (stretch.block + b) * kRows;
      forget_memory();
      Ints integers[kRows][kVectors];
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        integers[r][0] = set_ints(panel.start[at + r]);
        integers[r][1] = integers[r][0];
      }
      int32_t pair = stretch.pairs[b];  // never 0
      do {
        const Ints w0 = load_ints(w);
        const Ints w1 = load_ints(w + kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          const Ints value = broadcast(x + 4 * r);
          integers[r][0] = dot_pairs(integers[r][0], w0, value);
          integers[r][1] = dot_pairs(integers[r][1], w1, value);
        }
        w += kTileRows;
        x += 4 * kRows;
        prefetch(next);
        next += stretch.next_step;
      } while (--pair > 0);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const int64_t column = lane + v * kLanes;
          float* sum = sums + r * kTileRows + column;
          const Floats offset =
              kAsymmetric ? load_floats(stretch.offset[b] + column) : zero_floats();
          store_floats(sum, add_block<kAsymmetric>(load_floats(sum), integers[r][v],
                                                   load_floats(stretch.scale[b] + column), offset,
                                                   panel.scale[at + r], panel.sum[at + r]));
        }
      }
    }
  }
}

// multiply_panel for a width known only now.
template <int kRows, bool kAsymmetric>
KVOPT_INLINE void multiply_panel_of(const Stretch& stretch, const Panel& panel, float* sums) {
  if constexpr (kRows > 1) {
    if (panel.width < kRows) return multiply_panel_of<kRows - 1, kAsymmetric>(stretch, panel, sums);
  }
  multiply_panel<kRows, kAsymmetric>(stretch, panel, sums);
}

template <Codes kCodes, bool kAsymmetric>
void multiply_batch(const QLinearParams& p, const QLinearLayout& layout, const Table& table,
                    int64_t panel_begin, int64_t panel_end, int64_t tile) {
  alignas(64) float sums[(kBatchRows + kPanelRows) * kTileRows];
  Stretch stretch;
  const int64_t first_row = panel_at(p, layout, panel_begin).row;
  const Panel last = panel_at(p, layout, panel_end - 1);
  const int64_t rows = last.row + last.width - first_row;
  memset(sums, 0, static_cast<size_t>(rows * kTileRows) * sizeof(float));
  // The next stretch is prefetched in equal shares by the panels (rounded up: a little more than
  // all of it).
  constexpr int64_t kPairBytes =
      (kCodes == Codes::kInt3 ? 192 : kUnitBytes) * 2 / unit_columns(kCodes);
  const int64_t panels = panel_end - panel_begin;
  stretch.next_step = (kPairBytes + panels - 1) / panels;
  Cursor cursor;
  while (cursor.column < p.k) {
    unpack_stretch<kCodes, kAsymmetric>(p, layout, table, tile, &cursor, &stretch);
    const int64_t share = stretch.next_step * ((cursor.column - stretch.column + 1) / 2);
    for (int64_t index = panel_begin; index < panel_end; ++index) {
      const Panel panel = panel_at(p, layout, index);
      multiply_panel_of<kPanelRows, kAsymmetric>(stretch, panel,
                                                 sums + (panel.row - first_row) * kTileRows);
      stretch.next += share;
    }
  }
  finish_rows(p, first_row, rows, tile, sums);
}

template <Codes kCodes>
void run_panels(const QLinearParams& p, const QLinearLayout& layout, int64_t tile_begin,
                int64_t tile_end) {
  const Table table = table_of(p.format);
  // Panels of a batch: as many as the caches like, and at least two.
  int64_t rows = kBatchBytes / layout.row_bytes;
  rows = rows < kBatchRows ? rows : kBatchRows;
  int64_t batch = rows / layout.panel_rows;
  batch = batch < 2 ? 2 : batch;
  for (int64_t begin = 0; begin < layout.panels; begin += batch) {
    const int64_t end = begin + batch < layout.panels ? begin + batch : layout.panels;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      if constexpr (kCodes != Codes::kBook) {
        if (p.format.has_zeros()) {
          multiply_batch<kCodes, true>(p, layout, table, begin, end, tile);
          continue;
        }
      }
      multiply_batch<kCodes, false>(p, layout, table, begin, end, tile);
    }
  }
}

}  // namespace
}  // namespace kvopt::cpu
