// SPDX-License-Identifier: Apache-2.0
// The outlier columns of common/outliers.h: found, gathered, multiplied.
//
//   mark      one pass over x, 32 columns at a time: a bit a column
//   gather    v[:, O] as fp32, so that x is read across its rows once and not once a tile
//   multiply  for a tile of 32 rows of w: 64 columns of O unpacked to fp32 (8 KB), then for 64 rows
//             of x (their sums are 8 KB) one multiply-add for 32 outputs
//
// A weight's column lies in one 32-bit word of each of a tile's rows, side by side (quant_format.h,
// tile32). Bytes: x once, 128 for each tile and column of O. Few columns are outliers, so plain
// vectors of the baseline do; any number is right.
#include "cpu/outliers.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/float16.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kWordColumns = 32;
constexpr int64_t kTile = tile32::kRows;
constexpr int64_t kChunk = 64;     // columns of O unpacked at a time
constexpr int64_t kRowBlock = 64;  // rows of x that use them

float scale_of(const OutlierParams& p, int64_t column) {
  float scale = 1.0f;
  if (p.input_scale != nullptr) load_floats(p.dtype, p.input_scale, column, 1, &scale);
  return scale;
}

// weights[j][r] = code - 128 of row r of the tile and column columns[j].
void unpack_columns(const OutlierParams& p, int64_t tile, const int32_t* columns, int64_t count,
                    float (*weights)[kTile]) {
  const int32_t middle = symmetric_zero(p.format);
  for (int64_t j = 0; j < count; ++j) {
    const CodePiece first = tile32::code_pieces(p.format, p.k, tile * kTile, columns[j]).piece[0];
    const uint8_t* words = p.packed + first.word * 4;
    for (int64_t r = 0; r < kTile; ++r) {
      uint32_t word;
      std::memcpy(&word, words + r * 4, sizeof(word));
      weights[j][r] = static_cast<float>(static_cast<int32_t>(word >> first.shift & 0xff) - middle);
    }
  }
}

}  // namespace

void outliers_mark(const OutlierParams& p, int64_t word_begin, int64_t word_end) {
  for (int64_t word = word_begin; word < word_end; ++word) {
    const int64_t column = word * kWordColumns;
    const int64_t count = std::min(kWordColumns, p.k - column);
    float scale[kWordColumns], values[kWordColumns];
    std::fill_n(scale, kWordColumns, 1.0f);
    if (p.input_scale != nullptr) load_floats(p.dtype, p.input_scale, column, count, scale);
    uint32_t outside[kWordColumns] = {};
    for (int64_t row = 0; row < p.m; ++row) {
      load_floats(p.dtype, p.x, row * p.k + column, count, values);
      for (int64_t c = 0; c < count; ++c) {
        outside[c] |= !(std::fabs(values[c] * scale[c]) < p.threshold);  // NaN too
      }
    }
    uint32_t bits = 0;
    for (int64_t c = 0; c < count; ++c) bits |= outside[c] << c;
    p.bitmap[word] = bits;
  }
}

int64_t outliers_collect(const OutlierParams& p) {
  int64_t count = 0;
  for (int64_t word = 0; word < bitmap_words(p.k); ++word) {
    for (uint32_t bits = p.bitmap[word]; bits != 0; bits &= bits - 1) {
      p.columns[count++] = static_cast<int32_t>(word * kWordColumns + __builtin_ctz(bits));
    }
  }
  return count;
}

void outliers_scale(const OutlierParams& p) {
  float scale[kWordColumns];
  for (int64_t word = 0; word < bitmap_words(p.k); ++word) {
    const int64_t column = word * kWordColumns;
    const int64_t count = std::min(kWordColumns, p.k - column);
    std::fill_n(scale, kWordColumns, 1.0f);
    if (p.input_scale != nullptr) load_floats(p.dtype, p.input_scale, column, count, scale);
    for (int64_t c = 0; c < count; ++c) {
      if (p.bitmap[word] >> c & 1) scale[c] = 0.0f;
    }
    store_floats(p.dtype, scale, count, p.inlier_scale, column);
  }
}

void outliers_gather(const OutlierParams& p, int64_t count, float* gathered, int64_t row_begin,
                     int64_t row_end) {
  for (int64_t j = 0; j < count; ++j) {
    const float scale = scale_of(p, p.columns[j]);
    for (int64_t row = row_begin; row < row_end; ++row) {
      float& value = gathered[row * count + j];
      load_floats(p.dtype, p.x, row * p.k + p.columns[j], 1, &value);
      value *= scale;
    }
  }
}

void outliers_multiply(const OutlierParams& p, int64_t count, const float* gathered,
                       int64_t tile_begin, int64_t tile_end) {
  float weights[kChunk][kTile];
  float sums[kRowBlock][kTile];
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t n = tile * kTile;
    const int64_t outputs = std::min(kTile, p.n - n);
    const uint16_t* bits = p.meta + tile32::scale_index(p.format, p.k, n, 0);
    float scale[kTile];
    for (int64_t r = 0; r < kTile; ++r) scale[r] = half_to_float(bits[r]);
    for (int64_t block = 0; block < p.m; block += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, p.m - block);
      std::memset(sums, 0, sizeof(sums));
      for (int64_t chunk = 0; chunk < count; chunk += kChunk) {
        const int64_t columns = std::min(kChunk, count - chunk);
        unpack_columns(p, tile, p.columns + chunk, columns, weights);
        for (int64_t i = 0; i < rows; ++i) {
          const float* x = gathered + (block + i) * count + chunk;
          for (int64_t j = 0; j < columns; ++j) {
            for (int64_t r = 0; r < kTile; ++r) sums[i][r] += weights[j][r] * x[j];
          }
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t r = 0; r < kTile; ++r) sums[i][r] *= scale[r];
        store_floats(p.dtype, sums[i], outputs, p.part, (block + i) * p.n + n);
      }
    }
  }
}

}  // namespace kvopt::cpu
