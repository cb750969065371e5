// SPDX-License-Identifier: Apache-2.0
// How the vector kernels of `qlinear` cut their work, and what `prepare` leaves in the workspace.
// Plain data and plain declarations: the arithmetic lives in qlinear_layout.cpp, so that no inline
// function but a few of constants is compiled under two sets of flags.
//
// Columns. A weight group is cut into activation blocks of kBlockColumns columns (NF4: half of it;
// the last block of a group may be shorter). In a block, a row of x is X = round(x / s): 16-bit
// integers with s = max |x| / kMaxCode.
//
// Why 64 columns: rounding moves a column by at most s / 2, by s / sqrt(12) on average. In a
// Gaussian block that is 2e-5 of the result; where one outlier dominates its block, it is
// sqrt(64 / 12) / 32639 = 7e-5, and three standard deviations of that are 9e-5. A block of 128
// would reach 1e-4, and so would a block of 64 whose roundings were not balanced
// (qlinear_prepare.h).
//
// Code books. Their values become integers too: round(book * book_steps), found by a permutation of
// one register. FP4's are exact in steps of 1/192. NF4's are not; 7854 steps lie close to all of
// them (3.6e-5 of their norm, 1.5e-4 for the worst one) and leave room: 32-bit sums hold the
// product of a block as long as sum |X| < 2^31 / 7854, so s grows with the mean magnitude of the
// block where that asks for more than its largest. Blocks of NF4 have 32 columns, so that neither
// bound costs more than 5e-5: 32 / (sqrt(12) 2^31 / 7854) for equal magnitudes.
//
// Rows. The M rows are dealt evenly into panels of at most `panel_rows` rows, the height of the
// micro-kernel. A panel interleaves its rows, so that the kernel walks one pointer:
//
//     X:      for each unit of columns, for each row of the panel, that row's bytes of the unit
//             pairs    a unit is 2 columns, int16: 0 2 | 1 3 | 4 6 | 5 7 | ... as masks find codes
//             planes   a unit is 4 columns, int8:  h h h h l l l l, X = 256 h + l
//     scale:  for each block, for each row: float s (books: s / book_steps)
//     start:  for each block, for each row: int32 -2^(bits-1) (sum of X)       (recentres codes;
//     books: 0) sum:    for each block, for each row: float sum of x                     (for zero
//     points)
//
// In front of the panels stand M flag bytes: 1 for a row that integers cannot carry (NaN, infinity,
// beyond 2^60, or all but vanishing). `run` computes such a row from x in plain fp32 arithmetic.
#pragma once

#include "cpu/qlinear.h"

namespace kvopt::cpu {

constexpr int32_t kBlockColumns = 64;
constexpr int32_t kMaxCode = 32639;  // 127 * 256 + 127: the largest that two signed bytes can say

constexpr int32_t kDirectRowsVnni = 8;  // the most rows of a direct product
constexpr int32_t kDirectRowsAvx512 = 4;
constexpr int32_t kDirectRowsAvx2 = 2;

// How `run` finds codes. Books have 4 bits.
enum class Codes : int32_t { kInt8, kInt4, kInt3, kInt2, kBook };

constexpr int64_t block_columns(Scheme scheme) {
  return scheme == Scheme::kNf4 ? kBlockColumns / 2 : kBlockColumns;
}

constexpr int32_t book_steps(Scheme scheme) { return scheme == Scheme::kNf4 ? 7854 : 192; }

// Sum of |X| over a block that its sums can take: half a step for each column less than 2^31
// allows.
constexpr int32_t book_limit(Scheme scheme) {
  return 0x7fffffff / book_steps(scheme) - kBlockColumns;
}

struct QLinearLayout {
  // The weight.
  int64_t tile_bytes;        // packed bytes of a tile of 32 rows
  int64_t groups;            // groups of a row
  int64_t group_columns;     // columns of a group (the last one may have fewer)
  int64_t meta_stride;       // fp16 values of a (tile, group)
  int64_t block_columns;     // of an activation block: block_columns(scheme)
  int64_t blocks_per_group;  // activation blocks of a whole group
  int64_t blocks;  // groups * blocks_per_group; those past the end of a short group are not used
  Codes codes;
  // The activations.
  bool direct;         // codes are used as they come; all rows form one panel
  bool planes;         // two int8 planes, else pairs of int16
  int64_t panel_rows;  // the most rows of a panel
  int64_t panels;      // ceil(M / panel_rows)
  int64_t panel_base;  // rows of a panel; the first `panel_extra` panels have one more
  int64_t panel_extra;
  int64_t padded_columns;  // K rounded up to 32
  int64_t row_bytes;       // of the workspace, a multiple of 64
  int64_t flag_bytes;      // in front of the panels, a multiple of 64
};

// Instruction sets other than the scalar one.
QLinearLayout qlinear_layout(const QLinearParams& p, Isa isa);

// The product for some rows of x and some tiles of w, in plain fp32 on dequantised weights
// (qlinear_scalar.cpp).
void qlinear_plain(const QLinearParams& p, int64_t row_begin, int64_t row_end, int64_t tile_begin,
                   int64_t tile_end);

// The portable epilogue (qlinear_scalar.cpp): 32 sums of the product of a row of x and a tile of w
// become their values of y. `sums` is overwritten.
void qlinear_finish_plain(const QLinearParams& p, int64_t row, int64_t tile, float* sums);

// The `workspace_bytes` of the kernels below.
int64_t qlinear_workspace_scalar(const QLinearParams& p);
int64_t qlinear_workspace_avx2(const QLinearParams& p);
int64_t qlinear_workspace_avx512(const QLinearParams& p);
int64_t qlinear_workspace_vnni(const QLinearParams& p);

extern const QLinearKernels kQLinearScalar;
extern const QLinearKernels kQLinearAvx2;
extern const QLinearKernels kQLinearAvx512;
extern const QLinearKernels kQLinearVnni;

}  // namespace kvopt::cpu
