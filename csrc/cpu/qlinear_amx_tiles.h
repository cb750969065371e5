// SPDX-License-Identifier: Apache-2.0
// `qlinear` on AMX tile registers, for many rows of x. Included twice: for int8 activations
// (KVOPT_AMX_INT8: tdpbssd) and for 16-bit activations (tdpbf16ps). Everything has internal
// linkage.
//
// Mathematics. For a chunk of columns (a weight group, or a part of a long one), with integers
// W = q - mid that are exact in int8 and in bf16:
//
//     C        = sum over the chunk of W[n][k] X[m][k]           int32, or fp32 of bf16 products
//     y[m][n] += scale[n][g] s[m][g] C                           (bf16: s = 1)
//     y[m][n] -= scale[n][g] (zero[n][g] - mid) sum[m][g]        asymmetric only
//
// bf16 activations are exact, fp16 and fp32 ones are two terms (qlinear_amx.h); the weight's scale
// never touches a bf16 number. Code books: NF4's values are two bf16 terms, or two int8 planes that
// are chunks of their own, the high one with 128 times the scale; FP4's are whole numbers.
//
//                                     32 rows of w (one tile of the packed layout)
//                                   +--------------+--------------+
//       operand B: 16 x 64 bytes    |  B0          |  B1          |   one step: 64 or 32 columns
//                                   +--------------+--------------+
//     x: 16 rows of one step  A0      C0             C1
//        16 more rows         A1      C2             C3               4 loads, 4 multiplications
//
// A stretch of up to kStretchSteps steps of the tile is unpacked to operands B (8 KB, first level
// of cache): tile32's 64 bytes of 16 rows x 4 columns are such a row once nibbles are bytes; bf16
// takes columns 0 2 | 1 3 of four, and x is stored in the same order. Then all operands A of a
// batch pass by.
//
// The bound. tdp* takes 16 cycles and one issue slot, so a chunk of 128 columns is 128 (int8) or
// 256 (bf16) cycles for 32 x 32 sums; taking C out and scaling it costs 64 registers of tile store,
// load, multiply-add and store, about as much. So the sums of chunk c are scaled between the
// multiplications of chunk c + 1, which the processor then executes side by side. What remains is
// the second level of cache: 8 KB of A and 4 KB of sums in and out for each chunk, a third of the
// time (0.85 of 3.2 TFLOP/s a core; with A in the first level 1.1).
#pragma once

#include "cpu/qlinear_amx_weights.h"

namespace kvopt::cpu {
namespace {

// ---- tile registers -----------------------------------------------------------------------------

// Registers 0..3 are C, 4 and 5 are A, 6 and 7 are B.
void configure_tiles(int64_t height) {
  struct alignas(64) Configuration {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } c;
  for (int i = 0; i < 8; ++i) {
    c.row_bytes[i] = 64;
    c.rows[i] = static_cast<uint8_t>(i < 6 ? height : kOperandRows);
  }
  _tile_loadconfig(&c);
}

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

// Rows of y lie pages apart; asking for their lines while the last products run hides the wait.
KVOPT_INLINE void prefetch_rows(const QLinearParams& p, int64_t row, int64_t count, int64_t tile) {
  const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t halving = p.swiglu ? 2 : 1;
  const int64_t width = p.n / halving * bytes;
  const uint8_t* y = static_cast<const uint8_t*>(p.y) + row * width;
  y += tile * (kTileRows / halving) * bytes;
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(y + i * width, 1);
}

// ---- multiplication -----------------------------------------------------------------------------

// A chunk that has been multiplied: sums (rows, 32) += C, scaled, some rows at a time.
struct Scaling {
  int64_t row = 0;
  int64_t rows = 0;
  int64_t height = 0;  // rows of an operand
  const uint8_t* c = nullptr;
  const float* scale = nullptr;
  const float* offset = nullptr;
  const float* x_scale = nullptr;
  const float* x_sum = nullptr;
  float* sums = nullptr;
};

template <bool kAsymmetric>
KVOPT_INLINE void scale_rows(Scaling* work, int64_t count) {
  const int64_t end = work->row + count < work->rows ? work->row + count : work->rows;
  if (work->row >= end) return;
  const Floats scales[2] = {load_floats(work->scale), load_floats(work->scale + kLanes)};
  const Floats offsets[2] = {kAsymmetric ? load_floats(work->offset) : zero_floats(),
                             kAsymmetric ? load_floats(work->offset + kLanes) : zero_floats()};
  for (int64_t row = work->row; row < end; ++row) {
    const uint8_t* c =
        work->c + (row < work->height ? row * 64 : 2 * kOperandBytes + (row - work->height) * 64);
    float* sum = work->sums + row * kTileRows;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Floats value = load_floats(sum + half * kLanes);
      if constexpr (kInt8) {
        const Floats scale = multiply(scales[half], set_floats(work->x_scale[row]));
        value = multiply_add(to_floats(load_ints(c + half * kOperandBytes)), scale, value);
      } else {
        const float* products = reinterpret_cast<const float*>(c + half * kOperandBytes);
        value = multiply_add(load_floats(products), scales[half], value);
      }
      if constexpr (kAsymmetric) {
        value = multiply_add(offsets[half], set_floats(work->x_sum[row]), value);
      }
      store_floats(sum + half * kLanes, value);
    }
  }
  work->row = end;
}

// Issues the products of a chunk with kA operands A from number `operand`: C0..C(2 kA - 1). Between
// them, in equal shares, goes the scaling of the chunk before: the processor looks some 500
// instructions ahead, too few to find it behind the whole chunk.
template <int kA, bool kAsymmetric>
KVOPT_INLINE void multiply_chunk(const QLinearParams& p, const AmxLayout& layout,
                                 const Chunk& chunk, int64_t operand, bool two_terms,
                                 Scaling* before) {
  const int64_t term_bytes = layout.height * 64;
  const int64_t moments = chunk.steps * layout.terms;
  const int64_t share = (before->rows + moments - 1) / moments;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kA == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint8_t* b = chunk.b;
  const uint8_t* next_a = operand_at(p, layout, operand, chunk.first);
  int64_t left = kBlockSteps - chunk.first % kBlockSteps;  // of the block of steps
  for (int64_t step = 0; step < chunk.steps; ++step, b += 2 * kOperandBytes) {
    const uint8_t* a = next_a;
    next_a += layout.step_bytes;
    if (--left == 0) {
      next_a += layout.block_bytes - layout.operand_bytes;
      left = kBlockSteps;
    }
    for (int64_t term = 0; term < layout.terms; ++term, a += term_bytes) {
      _tile_loadd(4, a, 64);
      if constexpr (kA == 2) _tile_loadd(5, a + layout.operand_bytes, 64);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + kOperandBytes, 64);
#if defined(KVOPT_AMX_INT8)
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      if constexpr (kA == 2) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
      (void)two_terms;
#else
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kA == 2) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      if (two_terms && term == 0) {  // the product of two low terms is below 2^-16
        _tile_loadd(6, b + kTermBytes, 64);
        _tile_loadd(7, b + kTermBytes + kOperandBytes, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kA == 2) {
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
#endif
      scale_rows<kAsymmetric>(before, share);
    }
  }
}

template <int kA>
KVOPT_INLINE void store_chunk(uint8_t* scratch) {
  _tile_stored(0, scratch, 64);
  _tile_stored(1, scratch + kOperandBytes, 64);
  if constexpr (kA == 2) {
    _tile_stored(2, scratch + 2 * kOperandBytes, 64);
    _tile_stored(3, scratch + 3 * kOperandBytes, 64);
  }
}

template <int kBits, bool kBook, bool kAsymmetric>
void multiply_batch(const QLinearParams& p, const AmxLayout& layout, int64_t operand_begin,
                    int64_t operand_end, int64_t tile, int64_t tiles, const Tables& tables,
                    float unit_scale) {
  alignas(64) float sums[kTilesTogether][kBatchRows * kTileRows];
  alignas(64) uint8_t scratch[2][4 * kOperandBytes];
  Stretch stretch[kTilesTogether];
  Cursor cursor[kTilesTogether];
  const bool two_terms = !kInt8 && kBook && amx_two_terms(p.format);
  const int64_t operands = operand_end - operand_begin;
  const int64_t rows = operands * layout.height;
  const int64_t first_row = operand_begin * layout.height;
  const int64_t row_count = p.m - first_row < rows ? p.m - first_row : rows;
  for (int64_t t = 0; t < tiles; ++t) {
    memset(sums[t], 0, static_cast<size_t>(rows * kTileRows) * sizeof(float));
  }
  while (cursor[0].group < layout.groups) {
    for (int64_t t = 0; t < tiles; ++t) {
      unpack_stretch<kBits, kBook, kAsymmetric>(p, layout, tile + t, tables, unit_scale, &cursor[t],
                                                &stretch[t]);
    }
    if (cursor[0].group >= layout.groups) {
      for (int64_t t = 0; t < tiles; ++t) prefetch_rows(p, first_row, row_count, tile + t);
    }
    Scaling before;
    int turn = 0;
    for (int64_t operand = 0; operand < operands; operand += 2) {
      const int64_t count = operands - operand < 2 ? 1 : 2;
      const int64_t row = operand * layout.height;
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t c = 0; c < stretch[t].chunks; ++c, turn ^= 1) {
          const Chunk& chunk = stretch[t].chunk[c];
          if (count == 2) {
            multiply_chunk<2, kAsymmetric>(p, layout, chunk, operand_begin + operand, two_terms,
                                           &before);
            store_chunk<2>(scratch[turn]);
          } else {
            multiply_chunk<1, kAsymmetric>(p, layout, chunk, operand_begin + operand, two_terms,
                                           &before);
            store_chunk<1>(scratch[turn]);
          }
          before.row = 0;
          before.rows = count * layout.height;
          before.height = layout.height;
          before.c = scratch[turn];
          before.scale = stretch[t].scale[c];
          before.offset = stretch[t].offset[c];
          before.x_scale = vector_at(p, layout, layout.scale_offset, chunk.group) + first_row + row;
          before.x_sum = vector_at(p, layout, layout.sum_offset, chunk.group) + first_row + row;
          before.sums = sums[t] + row * kTileRows;
        }
      }
    }
    scale_rows<kAsymmetric>(&before, before.rows);
  }
  for (int64_t t = 0; t < tiles; ++t) finish_rows(p, first_row, row_count, tile + t, sums[t]);
}

template <int kBits, bool kBook, bool kAsymmetric>
void run_tiles(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  const AmxLayout layout = amx_layout(p, kInt8);
  const Tables tables = load_tables(p.format);
  float unit = 1.0f;
  if (kBook) unit = kInt8 ? a8_book(p.format.scheme).unit : amx_words(p.format).unit;
  configure_tiles(layout.height);
  for (int64_t begin = 0; begin < layout.tiles; begin += layout.batch_tiles) {
    const int64_t end =
        begin + layout.batch_tiles < layout.tiles ? begin + layout.batch_tiles : layout.tiles;
    for (int64_t tile = tile_begin; tile < tile_end; tile += kTilesTogether) {
      const int64_t tiles = tile_end - tile < kTilesTogether ? tile_end - tile : kTilesTogether;
      multiply_batch<kBits, kBook, kAsymmetric>(p, layout, begin, end, tile, tiles, tables, unit);
    }
  }
  _tile_release();
}

template <int kBits>
void run_bits(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  if (p.format.has_zeros()) return run_tiles<kBits, false, true>(p, tile_begin, tile_end);
  run_tiles<kBits, false, false>(p, tile_begin, tile_end);
}

void run(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  if (p.m == 0) return;
  if (p.format.has_book()) return run_tiles<4, true, false>(p, tile_begin, tile_end);
  switch (p.format.bits) {
    case 2:
      return run_bits<2>(p, tile_begin, tile_end);
    case 3:
      return run_bits<3>(p, tile_begin, tile_end);
    case 4:
      return run_bits<4>(p, tile_begin, tile_end);
    case 8:
      return run_bits<8>(p, tile_begin, tile_end);
  }
}

}  // namespace
}  // namespace kvopt::cpu
