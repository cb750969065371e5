// SPDX-License-Identifier: Apache-2.0
// y = x w^T + b in portable C++: the kernel of processors without AVX2, the arithmetic of rows that
// the integer kernels decline (NaN, infinity), and the plainest statement of what all compute.
//
//     w[n][k] = scale * (q - zero)                    fp32, as `wquant_dequantize` would give it
//     y[m][n] = sum over chunks of 64 columns of (sum over the chunk of w[n][k] x[m][k]), + b[n]
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
  if (p.format.symmetric) {
    for (float& zero : meta->zero) zero = static_cast<float>(symmetric_zero(p.format));
  } else {
    const uint16_t* zero = p.meta + tile32::zero_index(p.format, p.k, row, group);
    for (int64_t r = 0; r < kRows; ++r) meta->zero[r] = half_to_float(zero[r]);
  }
}

// weights[c][r] for `count` columns from `column`, all of one group; `tile` is the first byte of
// the tile.
void dequantize_chunk(const QuantFormat& format, const uint8_t* tile, const GroupMeta& meta,
                      int64_t column, int64_t count, float (*weights)[kRows]) {
  const int64_t columns = tile32::block_columns(format);
  const uint32_t mask = (1u << format.bits) - 1u;
  for (int64_t c = 0; c < count; ++c) {
    // A block holds one 32-bit word per row; the column is one byte or nibble of it.
    uint32_t words[kRows];
    const int64_t block = (column + c) / columns;
    const int64_t within = (column + c) % columns;
    const uint32_t shift = static_cast<uint32_t>(within % 4 * 8 + within / 4 * 4);
    std::memcpy(words, tile + block * tile32::kBlockBytes, sizeof(words));
    for (int64_t r = 0; r < kRows; ++r) {
      const float code = static_cast<float>(static_cast<int32_t>((words[r] >> shift) & mask));
      weights[c][r] = meta.scale[r] * (code - meta.zero[r]);
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

void store_row(const QLinearParams& p, int64_t row, int64_t tile, float* sums) {
  const int64_t n = tile * kRows;
  const int64_t count = std::min(kRows, p.n - n);
  if (p.bias != nullptr) {
    float bias[kRows];
    load_floats(p.dtype, p.bias, n, count, bias);
    for (int64_t r = 0; r < count; ++r) sums[r] += bias[r];
  }
  store_floats(p.dtype, sums, count, p.y, row * p.n + n);
}

void plain_tile(const QLinearParams& p, int64_t row_begin, int64_t row_end, int64_t tile) {
  float sums[kRowBlock][kRows] = {};
  float weights[kChunk][kRows];
  float x[kChunk];
  GroupMeta meta;
  const uint8_t* packed = p.packed + tile * tile32::tile_bytes(p.format, p.k);
  const int64_t groups = group_count(p.format, p.k);
  for (int64_t group = 0; group < groups; ++group) {
    load_meta(p, tile, group, &meta);
    const int64_t begin = group * p.format.group_size;
    const int64_t end = std::min<int64_t>(begin + p.format.group_size, p.k);
    for (int64_t column = begin; column < end; column += kChunk) {
      const int64_t count = std::min(kChunk, end - column);
      dequantize_chunk(p.format, packed, meta, column, count, weights);
      for (int64_t row = row_begin; row < row_end; ++row) {
        load_floats(p.dtype, p.x, row * p.k + column, count, x);
        accumulate(weights, x, count, sums[row - row_begin]);
      }
    }
  }
  for (int64_t row = row_begin; row < row_end; ++row) {
    store_row(p, row, tile, sums[row - row_begin]);
  }
}

void prepare(const QLinearParams&, int64_t, int64_t) {}

void run(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  qlinear_plain(p, 0, p.m, tile_begin, tile_end);
}

}  // namespace

void qlinear_plain(const QLinearParams& p, int64_t row_begin, int64_t row_end, int64_t tile_begin,
                   int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
      plain_tile(p, row, std::min(row + kRowBlock, row_end), tile);
    }
  }
}

const QLinearKernels kQLinearScalar = {prepare, run};

}  // namespace kvopt::cpu
