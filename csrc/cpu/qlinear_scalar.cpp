// SPDX-License-Identifier: Apache-2.0
// The product in portable C++: the kernel of processors without AVX2, the arithmetic of rows that
// the integer kernels decline (NaN, infinity), and the plainest statement of what all compute.
//
//     w[n][k] = scale * (q - zero) or scale * book[q]     fp32, as `wquant_dequantize` would give
//     it y[m][n] = sum over chunks of 64 columns of (sum over the chunk of w[n][k] x[m][k]),
//               then the epilogue of params.h
//
// A stretch of a tile (32 rows of w, at most 64 columns of one group) is dequantised into 8 KB on
// the stack, columns outermost, and meets kRowBlock rows of x before the next one: 32 running sums
// side by side are what a compiler turns into whatever vectors its target has.
//
//              32 rows of w
//            +--------------+
//     64 k   | w[k][r]      |   x  x[m][k]   ->   partial[r]   ->   sums[m][r] += partial[r]
//            +--------------+
//
// Sums in chunks keep the rounding error of long rows near that of a pairwise sum. Nothing past
// column K is touched, so a padding column never meets an infinity. The bound is arithmetic: one
// multiply-add per weight and row of x on the baseline instruction set, and one dequantisation per
// kRowBlock rows.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/float16.h"
#include "cpu/qlinear_layout.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kRows = tile32::kRows;
constexpr int64_t kChunk = 64;     // columns dequantised at a time
constexpr int64_t kRowBlock = 16;  // rows of x that use them

struct GroupMeta {
  float scale[kRows];
  float zero[kRows];
};

void load_meta(const QLinearParams& p, int64_t tile, int64_t group, GroupMeta* meta) {
  const int64_t row = tile * kRows;
  const uint16_t* scale = p.meta + tile32::scale_index(p.format, p.k, row, group);
  for (int64_t r = 0; r < kRows; ++r) meta->scale[r] = half_to_float(scale[r]);
  if (p.format.has_zeros()) {
    const uint16_t* zero = p.meta + tile32::zero_index(p.format, p.k, row, group);
    for (int64_t r = 0; r < kRows; ++r) meta->zero[r] = half_to_float(zero[r]);
  } else {
    for (float& zero : meta->zero) zero = static_cast<float>(symmetric_zero(p.format));
  }
}

// weights[c][r] for `count` columns from `column`, all of one group.
void dequantize_chunk(const QLinearParams& p, int64_t tile, const GroupMeta& meta, int64_t column,
                      int64_t count, float (*weights)[kRows]) {
  float book[16] = {};
  if (p.format.has_book()) {
    for (int32_t code = 0; code < 16; ++code) book[code] = book_value(p.format.scheme, code);
  }
  for (int64_t c = 0; c < count; ++c) {
    // The 32 rows of a column have their fields in 32 consecutive words.
    const CodePieces pieces = tile32::code_pieces(p.format, p.k, tile * kRows, column + c);
    uint32_t codes[kRows] = {};
    for (int32_t i = 0; i < pieces.count; ++i) {
      const CodePiece& piece = pieces.piece[i];
      const uint32_t mask = (1u << piece.bits) - 1u;
      uint32_t words[kRows];
      std::memcpy(words, p.packed + piece.word * 4, sizeof(words));
      for (int64_t r = 0; r < kRows; ++r) {
        codes[r] |= ((words[r] >> piece.shift) & mask) << piece.from;
      }
    }
    if (p.format.has_book()) {
      for (int64_t r = 0; r < kRows; ++r) weights[c][r] = meta.scale[r] * book[codes[r]];
    } else {
      for (int64_t r = 0; r < kRows; ++r) {
        const float code = static_cast<float>(static_cast<int32_t>(codes[r]));
        weights[c][r] = meta.scale[r] * (code - meta.zero[r]);
      }
    }
  }
}

void accumulate(const float (*weights)[kRows], const float* x, int64_t count, float* sums) {
  float partial[kRows] = {};
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t r = 0; r < kRows; ++r) partial[r] += weights[c][r] * x[c];
  }
  for (int64_t r = 0; r < kRows; ++r) sums[r] += partial[r];
}

void plain_tile(const QLinearParams& p, int64_t row_begin, int64_t row_end, int64_t tile) {
  float sums[kRowBlock][kRows] = {};
  float weights[kChunk][kRows];
  float x[kChunk];
  float input_scale[kChunk];
  GroupMeta meta;
  const int64_t groups = group_count(p.format, p.k);
  for (int64_t group = 0; group < groups; ++group) {
    load_meta(p, tile, group, &meta);
    const int64_t begin = group * p.format.group_size;
    const int64_t end = std::min<int64_t>(begin + p.format.group_size, p.k);
    for (int64_t column = begin; column < end; column += kChunk) {
      const int64_t count = std::min(kChunk, end - column);
      dequantize_chunk(p, tile, meta, column, count, weights);
      if (p.input_scale != nullptr) {
        load_floats(p.dtype, p.input_scale, column, count, input_scale);
      }
      for (int64_t row = row_begin; row < row_end; ++row) {
        load_floats(p.dtype, p.x, row * p.k + column, count, x);
        if (p.input_scale != nullptr) {
          for (int64_t c = 0; c < count; ++c) x[c] *= input_scale[c];
        }
        accumulate(weights, x, count, sums[row - row_begin]);
      }
    }
  }
  for (int64_t row = row_begin; row < row_end; ++row) {
    qlinear_finish_plain(p, row, tile, sums[row - row_begin]);
  }
}

void prepare(const QLinearParams&, int64_t, int64_t) {}

void run(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  qlinear_plain(p, 0, p.m, tile_begin, tile_end);
}

// sums[r] += the low-rank product of rows [n, n + count) of w.
void add_low_rank(const QLinearParams& p, int64_t row, int64_t n, int64_t count, float* sums) {
  float x[kChunk];
  float w[kChunk];
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t column = 0; column < p.rank; column += kChunk) {
      const int64_t chunk = std::min(kChunk, p.rank - column);
      load_floats(p.dtype, p.low_rank_x, row * p.rank + column, chunk, x);
      load_floats(p.dtype, p.low_rank_w, (n + r) * p.rank + column, chunk, w);
      float partial = 0.0f;
      for (int64_t c = 0; c < chunk; ++c) partial += x[c] * w[c];
      sums[r] += partial;
    }
  }
}

}  // namespace

void qlinear_finish_plain(const QLinearParams& p, int64_t row, int64_t tile, float* sums) {
  int64_t n = tile * kRows;
  int64_t count = std::min(kRows, p.n - n);
  int64_t width = p.n;
  float other[kRows];
  if (p.bias != nullptr) {
    load_floats(p.dtype, p.bias, n, count, other);
    for (int64_t r = 0; r < count; ++r) sums[r] += other[r];
  }
  if (p.low_rank_w != nullptr) add_low_rank(p, row, n, count, sums);
  if (p.addend != nullptr) {
    load_floats(p.dtype, p.addend, row * width + n, count, other);
    for (int64_t r = 0; r < count; ++r) sums[r] += other[r];
  }
  if (p.swiglu) {
    n /= 2, count /= 2, width /= 2;
    for (int64_t r = 0; r < count; ++r) {
      const float gate = sums[r / 8 * 16 + r % 8];
      const float up = sums[r / 8 * 16 + 8 + r % 8];
      other[r] = gate / (1.0f + std::exp(-gate)) * up;
    }
    std::memcpy(sums, other, sizeof(float) * static_cast<size_t>(count));
  }
  if (p.residual != nullptr) {
    load_floats(p.dtype, p.residual, row * width + n, count, other);
    for (int64_t r = 0; r < count; ++r) sums[r] += other[r];
  }
  store_floats(p.dtype, sums, count, p.y, row * width + n);
}

void qlinear_plain(const QLinearParams& p, int64_t row_begin, int64_t row_end, int64_t tile_begin,
                   int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
      plain_tile(p, row, std::min(row + kRowBlock, row_end), tile);
    }
  }
}

const QLinearKernels kQLinearScalar = {qlinear_workspace_scalar, prepare, run};

}  // namespace kvopt::cpu
