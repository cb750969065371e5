// SPDX-License-Identifier: Apache-2.0
// The products of the vector kernels with 16-bit pairs, and what `run` is made of. Everything has
// internal linkage and is compiled anew for each instruction set.
//
// Mathematics. For an activation block b (64 columns of a weight group g), integers are exact:
//
//     I        = sum over k in b of (q[n][k] - mid) X[m][k]                     mid = 2^(bits-1)
//     y[m][n] += (scale[n][g] s[m][b]) I
//     y[m][n] -= scale[n][g] (zero[n][g] - mid) (sum of x[m] over b)            asymmetric only
//
// I starts at -mid (sum of X), and |I| <= 64 * 128 * 32639 < 2^28. Only the last two lines round,
// in fp32 and always in the order of the columns. So a row of y is the same bit for bit whatever M
// is, however the work is split, and on every vector instruction set.
//
// Codes to pairs. A 32-bit lane of a tile is one row and four bytes; masks find int16 pairs in it:
//
//     bits 4    v & 0x000F000F    (v >> 8) & 0x000F000F    (v >> 4) & 0x000F000F    v >> 12
//               columns 0 2       columns 1 3              columns 4 6              columns 5 7
//     bits 8    v & 0x00FF00FF    v >> 8                   (shifts are of 16-bit halves)
//               columns 0 2       columns 1 3
//
// Beside a broadcast pair of X, one multiplication of pairs is two multiply-adds for each row of w.
//
// One row of x ("direct"): codes are used as they come, 32 rows of w at a time. The bound is the
// bytes of w, one contiguous stream, prefetched on two levels.
//
// More rows: a stretch of the tile, up to 256 columns, is unpacked to pairs (16 KB, first level of
// cache) and met by panels of x. For a block the micro-kernel keeps rows x 2 vectors of integers
// in registers; the floating-point sums of the tile lie in cache. Panels come in batches whose X
// fits the second level, and prefetch the next stretch meanwhile. The bound is multiply-adds: a
// block costs each sum 32 of them beside 3 or 4 floating-point operations.
//
//              2 vectors = 32 (AVX2: 16) rows of w
//            +-----------+
//     x row  |  |  |  |  |    += X pair (broadcast) * 2 vectors of pairs, 32 times a block
//      ...   |  |  |  |  |
//            +-----------+
#pragma once

#include "cpu/qlinear_layout.h"
#include "cpu/qlinear_prepare.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kTileRows = 32;
constexpr int64_t kBlockBytes = 128;       // of 8 columns (bits 4) or 4 columns (bits 8) of a tile
constexpr int kTileVectors = 32 / kLanes;  // vectors of a tile's rows
constexpr int64_t kNearBytes = 1024;      // prefetch distances in a stream of weights: to the first
constexpr int64_t kFarBytes = 4096;       // and, past the next page, to the second level of cache
constexpr int64_t kMetaBytes = 512;       // and in the stream of scales
constexpr int64_t kStretchColumns = 256;  // unpacked at a time
constexpr int64_t kStretchBlocks = 16;    // a group has at least 16 columns
constexpr int64_t kBatchRows = 96;        // rows of x that share an unpacked stretch, at most
constexpr int64_t kBatchBytes = 512 * 1024;  // of X that they may occupy
constexpr int kPanelRows = kLanes == 16 ? 12 : 4;

KVOPT_INLINE Ints broadcast(const uint8_t* x) {
  int32_t word;
  memcpy(&word, x, sizeof(word));
  return set_ints(word);
}

KVOPT_INLINE void prefetch(const uint8_t* address) {
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
}

// For the 128 bytes at `w` of a stream that is read from memory once.
KVOPT_INLINE void prefetch_stream(const uint8_t* w) {
  prefetch(w + kNearBytes);
  prefetch(w + kNearBytes + 64);
  _mm_prefetch(reinterpret_cast<const char*>(w + kFarBytes), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(w + kFarBytes + 64), _MM_HINT_T1);
}

template <bool kAsymmetric>
KVOPT_INLINE void prefetch_meta(const uint16_t* meta) {
  const uint8_t* address = reinterpret_cast<const uint8_t*>(meta) + kMetaBytes;
  prefetch(address);
  if constexpr (kAsymmetric) prefetch(address + 64);
}

// Keeps the compiler from holding in registers, across blocks, what belongs in memory.
KVOPT_INLINE void forget_memory() { __asm__ volatile("" ::: "memory"); }

// scale and -scale * (zero - mid) of kLanes rows.
struct Meta {
  Floats scale;
  Floats offset;
};

template <bool kAsymmetric>
KVOPT_INLINE Meta load_meta(const uint16_t* meta, Floats middle) {
  Meta result;
  result.scale = load_halves(meta);
  if constexpr (kAsymmetric) {
    result.offset = multiply(result.scale, subtract(middle, load_halves(meta + kTileRows)));
  } else {
    result.offset = zero_floats();
  }
  return result;
}

// The two multiply-adds that end a block.
template <bool kAsymmetric>
KVOPT_INLINE Floats add_block(Floats sum, Ints integers, Floats scale, Floats offset, float x_scale,
                              float x_sum) {
  sum = multiply_add(to_floats(integers), multiply(scale, set_floats(x_scale)), sum);
  if constexpr (kAsymmetric) sum = multiply_add(offset, set_floats(x_sum), sum);
  return sum;
}

template <DType kType>
KVOPT_INLINE void finish(const QLinearParams& p, int64_t row, int64_t tile, const float* sums) {
  constexpr int64_t kBytes = kType == DType::kFloat32 ? 4 : 2;
  const int64_t n = tile * kTileRows;
  const int64_t count = p.n - n < kTileRows ? p.n - n : kTileRows;
  alignas(64) uint8_t edge[kTileRows * kBytes];
  uint8_t* y = static_cast<uint8_t*>(p.y) + (row * p.n + n) * kBytes;
  uint8_t* out = count == kTileRows ? y : edge;
  const uint8_t* bias = static_cast<const uint8_t*>(p.bias);
  alignas(64) uint8_t bias_edge[kTileRows * kBytes];
  if (bias != nullptr) {
    bias += n * kBytes;
    if (count < kTileRows) {
      memset(bias_edge, 0, sizeof(bias_edge));
      memcpy(bias_edge, bias, static_cast<size_t>(count * kBytes));
      bias = bias_edge;
    }
  }
  for (int v = 0; v < kTileVectors; ++v) {
    Floats value = load_floats(sums + v * kLanes);
    if (bias != nullptr) value = add(value, load_as_floats<kType>(bias + v * kLanes * kBytes));
    store_as<kType>(out + v * kLanes * kBytes, value);
  }
  if (count < kTileRows) memcpy(y, edge, static_cast<size_t>(count * kBytes));
}

// Writes rows [row, row + count) of y from sums (count, 32); rows that integers could not carry are
// computed anew.
void finish_rows(const QLinearParams& p, int64_t row, int64_t count, int64_t tile,
                 const float* sums) {
  const uint8_t* flags = static_cast<const uint8_t*>(p.workspace);
  for (int64_t i = 0; i < count; ++i, ++row, sums += kTileRows) {
    if (flags[row] != 0) {
      qlinear_plain(p, row, row + 1, tile, tile + 1);
      continue;
    }
    switch (p.dtype) {
      case DType::kFloat32:
        finish<DType::kFloat32>(p, row, tile, sums);
        break;
      case DType::kFloat16:
        finish<DType::kFloat16>(p, row, tile, sums);
        break;
      case DType::kBFloat16:
        finish<DType::kBFloat16>(p, row, tile, sums);
        break;
    }
  }
}

// Walks the blocks of a row in the order of their columns.
struct Cursor {
  int64_t group = 0;
  int64_t block = 0;   // of the row
  int64_t column = 0;  // first of the block
};

KVOPT_INLINE int64_t columns_at(const QLinearParams& p, const QLinearLayout& layout,
                                const Cursor& cursor) {
  int64_t end = (cursor.group + 1) * layout.group_columns;
  end = end < p.k ? end : p.k;
  const int64_t columns = end - cursor.column;
  return columns < kBlockColumns ? columns : kBlockColumns;
}

KVOPT_INLINE void advance(const QLinearLayout& layout, int64_t columns, Cursor* cursor) {
  cursor->column += columns;
  ++cursor->block;
  if (cursor->column == (cursor->group + 1) * layout.group_columns) ++cursor->group;
}

// ---- One row of x -------------------------------------------------------------------------------

template <int kBits, bool kAsymmetric>
void direct_tile(const QLinearParams& p, const QLinearLayout& layout, const Panel& panel,
                 int64_t tile) {
  constexpr int64_t kUnitColumns = kBits == 4 ? 8 : 4;
  const Ints mask = set_ints(kBits == 4 ? 0x000F000F : 0x00FF00FF);
  const Floats middle = set_floats(static_cast<float>(1 << (kBits - 1)));
  const uint8_t* w = p.packed + tile * layout.tile_bytes;
  const uint16_t* meta = p.meta + tile * layout.groups * layout.meta_stride;
  const uint8_t* x = panel.x;
  Floats sums[kTileVectors];
  for (Floats& sum : sums) sum = zero_floats();
  Cursor cursor;
  while (cursor.column < p.k) {
    const int64_t columns = columns_at(p, layout, cursor);
    Ints integers[kTileVectors];
    for (Ints& value : integers) value = set_ints(panel.start[cursor.block]);
    const int64_t units = (columns + kUnitColumns - 1) / kUnitColumns;
    for (int64_t unit = 0; unit < units; ++unit, w += kBlockBytes, x += kUnitColumns * 2) {
      prefetch_stream(w);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const Ints codes = load_ints(w + v * kLanes * 4);
        Ints sum = integers[v];
        sum = dot_pairs(sum, bit_and(codes, mask), broadcast(x));
        if constexpr (kBits == 4) {
          sum = dot_pairs(sum, bit_and(shift_right_16<8>(codes), mask), broadcast(x + 4));
          sum = dot_pairs(sum, bit_and(shift_right_16<4>(codes), mask), broadcast(x + 8));
          sum = dot_pairs(sum, shift_right_16<12>(codes), broadcast(x + 12));
        } else {
          sum = dot_pairs(sum, shift_right_16<8>(codes), broadcast(x + 4));
        }
        integers[v] = sum;
      }
    }
    const uint16_t* group_meta = meta + cursor.group * layout.meta_stride;
    prefetch_meta<kAsymmetric>(group_meta);
    for (int v = 0; v < kTileVectors; ++v) {
      const Meta m = load_meta<kAsymmetric>(group_meta + v * kLanes, middle);
      sums[v] = add_block<kAsymmetric>(sums[v], integers[v], m.scale, m.offset,
                                       panel.scale[cursor.block], panel.sum[cursor.block]);
    }
    advance(layout, columns, &cursor);
  }
  alignas(64) float result[kTileRows];
  for (int v = 0; v < kTileVectors; ++v) store_floats(result + v * kLanes, sums[v]);
  finish_rows(p, 0, 1, tile, result);
}

template <int kBits>
void run_direct(const QLinearParams& p, const QLinearLayout& layout, int64_t tile_begin,
                int64_t tile_end) {
  const Panel panel = panel_at(p, layout, 0);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    if (p.format.symmetric) {
      direct_tile<kBits, false>(p, layout, panel, tile);
    } else {
      direct_tile<kBits, true>(p, layout, panel, tile);
    }
  }
}

// ---- Panels of rows -----------------------------------------------------------------------------

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

template <int kBits>
KVOPT_INLINE void unpack_units(const uint8_t* w, int64_t units, int32_t (*out)[kTileRows]) {
  const Ints mask = set_ints(kBits == 4 ? 0x000F000F : 0x00FF00FF);
  for (int64_t unit = 0; unit < units; ++unit, w += kBlockBytes, out += kBits == 4 ? 4 : 2) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const Ints codes = load_ints(w + v * kLanes * 4);
      store_ints(out[0] + v * kLanes, bit_and(codes, mask));
      if constexpr (kBits == 4) {
        store_ints(out[1] + v * kLanes, bit_and(shift_right_16<8>(codes), mask));
        store_ints(out[2] + v * kLanes, bit_and(shift_right_16<4>(codes), mask));
        store_ints(out[3] + v * kLanes, shift_right_16<12>(codes));
      } else {
        store_ints(out[1] + v * kLanes, shift_right_16<8>(codes));
      }
    }
  }
}

template <int kBits, bool kAsymmetric>
void unpack_stretch(const QLinearParams& p, const QLinearLayout& layout, int64_t tile,
                    Cursor* cursor, Stretch* stretch) {
  constexpr int64_t kUnitColumns = kBits == 4 ? 8 : 4;
  const Floats middle = set_floats(static_cast<float>(1 << (kBits - 1)));
  const uint8_t* w = p.packed + tile * layout.tile_bytes;
  const uint16_t* meta = p.meta + tile * layout.groups * layout.meta_stride;
  stretch->column = cursor->column;
  stretch->block = cursor->block;
  stretch->blocks = 0;
  while (cursor->column < p.k) {
    const int64_t columns = columns_at(p, layout, *cursor);
    const int64_t first = cursor->column - stretch->column;
    if (first + columns > kStretchColumns) break;
    const int64_t units = (columns + kUnitColumns - 1) / kUnitColumns;
    unpack_units<kBits>(w + cursor->column / kUnitColumns * kBlockBytes, units,
                        stretch->weights + first / 2);
    stretch->pairs[stretch->blocks] = static_cast<int32_t>(units * kUnitColumns / 2);
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
  stretch->next = w + (cursor->column + kUnitColumns - 1) / kUnitColumns * kBlockBytes;
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

template <int kBits, bool kAsymmetric>
void multiply_batch(const QLinearParams& p, const QLinearLayout& layout, int64_t panel_begin,
                    int64_t panel_end, int64_t tile) {
  alignas(64) float sums[(kBatchRows + kPanelRows) * kTileRows];
  Stretch stretch;
  const int64_t first_row = panel_at(p, layout, panel_begin).row;
  const Panel last = panel_at(p, layout, panel_end - 1);
  const int64_t rows = last.row + last.width - first_row;
  memset(sums, 0, static_cast<size_t>(rows * kTileRows) * sizeof(float));
  // The next stretch is prefetched in equal shares by the panels (rounded up: a little more than
  // all of it).
  constexpr int64_t kPairBytes = kBits == 4 ? 32 : 64;
  const int64_t panels = panel_end - panel_begin;
  stretch.next_step = (kPairBytes + panels - 1) / panels;
  Cursor cursor;
  while (cursor.column < p.k) {
    unpack_stretch<kBits, kAsymmetric>(p, layout, tile, &cursor, &stretch);
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

template <int kBits>
void run_panels(const QLinearParams& p, const QLinearLayout& layout, int64_t tile_begin,
                int64_t tile_end) {
  // Panels of a batch: as many as the caches like, and at least two.
  int64_t rows = kBatchBytes / layout.row_bytes;
  rows = rows < kBatchRows ? rows : kBatchRows;
  int64_t batch = rows / layout.panel_rows;
  batch = batch < 2 ? 2 : batch;
  for (int64_t begin = 0; begin < layout.panels; begin += batch) {
    const int64_t end = begin + batch < layout.panels ? begin + batch : layout.panels;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      if (p.format.symmetric) {
        multiply_batch<kBits, false>(p, layout, begin, end, tile);
      } else {
        multiply_batch<kBits, true>(p, layout, begin, end, tile);
      }
    }
  }
}

}  // namespace
}  // namespace kvopt::cpu
