// SPDX-License-Identifier: Apache-2.0
// Int8 activations in portable C++: the rule of qlinear_a8.h as plainly as it can be said, and the
// kernel of processors without AVX2.
//
// A row of x is quantised once into the workspace: K signed bytes, then for each group s and the
// sum of X. A tile of w is walked group by group: codes of 32 rows are unpacked to int16, columns
// outermost, so that 32 running sums lie side by side for the compiler's vectors. Integers are
// exact, so only the two lines per group that leave them round. The bound is arithmetic.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/float16.h"
#include "cpu/qlinear_a8.h"
#include "cpu/qlinear_layout.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kRows = tile32::kRows;
constexpr int64_t kChunk = 64;     // columns unpacked at a time
constexpr int64_t kRowBlock = 16;  // rows of x that use them
constexpr float kHuge = 0x1p60f;
constexpr float kTiny = 0x1p-110f;
constexpr float kSmall = 0x1p-70f;

// Panels of one row: X, then scale, start (unused here) and sum of each group.
struct Row {
  int8_t* x;
  float* scale;
  int32_t* total;
};

Row row_at(const QLinearParams& p, const A8Layout& layout, int64_t row) {
  uint8_t* base = static_cast<uint8_t*>(p.workspace) + layout.flag_bytes + row * layout.row_bytes;
  Row r;
  r.x = reinterpret_cast<int8_t*>(base);
  r.scale = reinterpret_cast<float*>(base + layout.padded_columns);
  r.total = reinterpret_cast<int32_t*>(r.scale + layout.groups);
  return r;
}

// `count` values of x * input_scale.
void load_x(const QLinearParams& p, int64_t row, int64_t column, int64_t count, float* values) {
  load_floats(p.dtype, p.x, row * p.k + column, count, values);
  if (p.input_scale == nullptr) return;
  float scale[kChunk];
  load_floats(p.dtype, p.input_scale, column, count, scale);
  for (int64_t c = 0; c < count; ++c) values[c] *= scale[c];
}

void prepare(const QLinearParams& p, int64_t row_begin, int64_t row_end) {
  const A8Layout layout = a8_layout(p, 1);
  float values[kChunk];
  for (int64_t row = row_begin; row < row_end; ++row) {
    const Row out = row_at(p, layout, row);
    float largest = 0.0f;
    bool plain = false;
    bool vanishing = false;
    for (int64_t group = 0; group < layout.groups; ++group) {
      const int64_t begin = group * layout.group_columns;
      const int64_t end = std::min(begin + layout.group_columns, p.k);
      float magnitude = 0.0f;
      for (int64_t column = begin; column < end; column += kChunk) {
        const int64_t count = std::min(kChunk, end - column);
        load_x(p, row, column, count, values);
        for (int64_t c = 0; c < count; ++c) {
          if (!(std::fabs(values[c]) < kHuge)) plain = true;  // NaN too
          magnitude = std::max(magnitude, std::fabs(values[c]));
        }
      }
      largest = std::max(largest, magnitude);
      vanishing |= magnitude > 0.0f && magnitude < kTiny;
      const bool zero = plain || !(magnitude >= kTiny && magnitude < kHuge);
      const float scale = zero ? 0.0f : magnitude / 127.0f;
      int32_t total = 0;
      for (int64_t column = begin; column < end; column += kChunk) {
        const int64_t count = std::min(kChunk, end - column);
        load_x(p, row, column, count, values);
        for (int64_t c = 0; c < count; ++c) {
          const int32_t code = zero ? 0 : static_cast<int32_t>(std::nearbyintf(values[c] / scale));
          out.x[column + c] = static_cast<int8_t>(code);
          total += code;
        }
      }
      out.scale[group] = scale;
      out.total[group] = total;
    }
    const bool flag = plain || (vanishing && largest < kSmall);
    static_cast<uint8_t*>(p.workspace)[row] = flag ? 1 : 0;
  }
}

// weights[c][r] = q - mid, or V[q] of a code book.
void unpack_chunk(const QLinearParams& p, int64_t tile, int64_t column, int64_t count,
                  int16_t (*weights)[kRows]) {
  int16_t values[256];
  for (int32_t q = 0; q < 1 << p.format.bits; ++q) {
    values[q] = static_cast<int16_t>(p.format.has_book() ? book_integer(p.format.scheme, q)
                                                         : q - symmetric_zero(p.format));
  }
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t r = 0; r < kRows; ++r) {
      const CodePieces pieces = tile32::code_pieces(p.format, p.k, tile * kRows + r, column + c);
      uint32_t code = 0;
      for (int32_t i = 0; i < pieces.count; ++i) {
        const CodePiece& piece = pieces.piece[i];
        uint32_t word;
        std::memcpy(&word, p.packed + piece.word * 4, sizeof(word));
        code |= ((word >> piece.shift) & ((1u << piece.bits) - 1u)) << piece.from;
      }
      weights[c][r] = values[code];
    }
  }
}

void tile_rows(const QLinearParams& p, const A8Layout& layout, int64_t tile, int64_t row_begin,
               int64_t row_end) {
  float sums[kRowBlock][kRows] = {};
  int16_t weights[kChunk][kRows];
  const uint8_t* flags = static_cast<const uint8_t*>(p.workspace);
  const float unit =
      p.format.has_book() ? 1.0f / static_cast<float>(book_steps(p.format.scheme)) : 1.0f;
  for (int64_t group = 0; group < layout.groups; ++group) {
    int64_t integers[kRowBlock][kRows] = {};
    const int64_t begin = group * layout.group_columns;
    const int64_t end = std::min(begin + layout.group_columns, p.k);
    for (int64_t column = begin; column < end; column += kChunk) {
      const int64_t count = std::min(kChunk, end - column);
      unpack_chunk(p, tile, column, count, weights);
      for (int64_t row = row_begin; row < row_end; ++row) {
        const int8_t* x = row_at(p, layout, row).x + column;
        int32_t partial[kRows] = {};
        for (int64_t c = 0; c < count; ++c) {
          for (int64_t r = 0; r < kRows; ++r) partial[r] += weights[c][r] * x[c];
        }
        for (int64_t r = 0; r < kRows; ++r) integers[row - row_begin][r] += partial[r];
      }
    }
    const uint16_t* scale = p.meta + tile32::scale_index(p.format, p.k, tile * kRows, group);
    const uint16_t* zero = scale + kRows;
    for (int64_t row = row_begin; row < row_end; ++row) {
      const Row x = row_at(p, layout, row);
      const float x_sum = x.scale[group] * static_cast<float>(x.total[group]);
      for (int64_t r = 0; r < kRows; ++r) {
        const float w_scale = half_to_float(scale[r]) * unit;
        float& sum = sums[row - row_begin][r];
        sum += static_cast<float>(integers[row - row_begin][r]) * (w_scale * x.scale[group]);
        if (p.format.has_zeros()) {
          const float middle = static_cast<float>(symmetric_zero(p.format));
          sum += w_scale * (middle - half_to_float(zero[r])) * x_sum;
        }
      }
    }
  }
  for (int64_t row = row_begin; row < row_end; ++row) {
    if (flags[row] != 0) {
      qlinear_plain(p, row, row + 1, tile, tile + 1);
    } else {
      qlinear_finish_plain(p, row, tile, sums[row - row_begin]);
    }
  }
}

void run(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  const A8Layout layout = a8_layout(p, 1);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (int64_t row = 0; row < p.m; row += kRowBlock) {
      tile_rows(p, layout, tile, row, std::min(row + kRowBlock, p.m));
    }
  }
}

int64_t workspace_bytes(const QLinearParams& p) { return a8_workspace_bytes(p, 1); }

}  // namespace

const QLinearKernels kA8Scalar = {workspace_bytes, prepare, run};

}  // namespace kvopt::cpu
