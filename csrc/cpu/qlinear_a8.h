// SPDX-License-Identifier: Apache-2.0
// Products with int8 activations: activation_bits == 8 (one scale for each token and weight group)
// and kInt8Dynamic (one for each token; its weight has one group a row, so the rule is the same).
//
// The rule, the same on every instruction set, with v = x * input_scale in fp32, over one token's
// columns of one weight group:
//
//     s = max |v| / 127        X = round(v / s), ties to even        (true divisions)
//     I[n]     = sum of (q[n][k] - mid) X[k]                         exact in int32
//     y[m][n] += scale[n] s (I[n] - (zero[n] - mid) sum of X)        mid = 2^(bits-1)
//
// Code books: integers V[q] = round(steps book[q]) take the place of q - mid and scale / steps that
// of the scale, with the steps of qlinear_layout.h: FP4 is exact, NF4 within 4e-5 of its norm. Two
// planes of seven bits carry them, V + 8192 = 128 (h + 64) + l: no product of a byte and an int8
// then saturates a 16-bit sum of two.
//
// A row that int8 cannot carry (NaN, infinity, beyond 2^60, or all but vanishing) is flagged by
// `prepare` and computed by qlinear_plain, so that it shows what IEEE arithmetic would.
#pragma once

#include "cpu/qlinear_layout.h"

namespace kvopt::cpu {

constexpr int32_t kPlaneBits = 7;
constexpr int32_t kBookMiddle = 8192;

// V[q] of a code book.
constexpr int32_t book_integer(Scheme scheme, int32_t code) {
  const float v = book_value(scheme, code) * static_cast<float>(book_steps(scheme));
  return static_cast<int32_t>(v < 0 ? v - 0.5f : v + 0.5f);
}

// h + 64 and l of all sixteen codes.
struct A8Book {
  alignas(16) uint8_t high[16];
  alignas(16) uint8_t low[16];
  float unit;  // 1 / steps
};

A8Book a8_book(Scheme scheme);

// True where the activations are int8: everything else belongs to the 16-bit kernels.
constexpr bool is_a8(const QLinearParams& p) {
  return p.activation_bits == 8 || p.format.scheme == Scheme::kInt8Dynamic;
}

// How the vector kernels of qlinear_a8_tiles.h cut x. A weight group is cut into chunks of at most
// kChunkColumns columns. The M rows are dealt evenly into panels of at most `panel_rows`; a panel
// interleaves its rows so that the micro-kernel walks one pointer:
//
//     X:      for each four columns, for each row of the panel: four int8
//     scale:  for each chunk, for each row: float s of its group
//     start:  for each chunk, for each row: int32 -mid (sum of X)      (recentres unsigned codes)
//     sum:    for each chunk, for each row: float s (sum of X)         (for zero points)
constexpr int32_t kChunkColumns = 256;

struct A8Layout {
  int64_t tile_bytes;     // packed bytes of a tile of 32 rows
  int64_t groups;         // groups of a row
  int64_t group_columns;  // columns of a group (the last one may have fewer)
  int64_t group_chunks;   // chunks of a whole group
  int64_t chunks;         // groups * group_chunks; those past the end of a short group are not used
  int64_t meta_stride;    // fp16 values of a (tile, group)
  int64_t panels;
  int64_t panel_base;  // rows of a panel; the first `panel_extra` panels have one more
  int64_t panel_extra;
  int64_t padded_columns;  // K rounded up to 16
  int64_t row_bytes;       // of the workspace, a multiple of 64
  int64_t flag_bytes;      // one byte a row in front of the panels, a multiple of 64
  int32_t middle;          // 2^(bits-1), or kBookMiddle
};

A8Layout a8_layout(const QLinearParams& p, int64_t panel_rows);
int64_t a8_workspace_bytes(const QLinearParams& p, int64_t panel_rows);

// Eight-bit codes with one scale and no zero point a row: sums stay in int32 over all of K, which
// up to 2^17 columns no sum overflows.
constexpr bool a8_is_whole(const QLinearParams& p) {
  return p.format.bits == 8 && !p.format.has_zeros() && p.format.group_size >= p.k &&
         p.k <= (1 << 17);
}

extern const QLinearKernels kA8Scalar;
extern const QLinearKernels kA8Avx2;
extern const QLinearKernels kA8Avx512;
extern const QLinearKernels kA8Vnni;

}  // namespace kvopt::cpu
