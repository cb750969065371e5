// SPDX-License-Identifier: Apache-2.0
// The AMX kernels of `qlinear`: which product fits which, and how `prepare` lays out x. What they
// compute stands in qlinear_amx_tiles.h and, for whole rows, in qlinear_amx_int8.cpp.
//
// A tile register is 16 rows of 64 bytes. An operand A is up to 16 rows of x by one step of columns
// (64 int8 or 32 bf16); the rows of x are dealt evenly over ceil(M / 16) operands, so that all have
// the same height. Steps never cross a weight group: its last one is padded with zeros. The
// workspace holds
//
//     flags:  M bytes, 1 for a row that qlinear_plain has to compute (as in qlinear_a8.h)
//     X:      for each kBlockSteps steps, for each operand's rows, for each step and term: height *
//     64
//             bytes, so that all rows of a stretch of columns are one stream
//     scale:  for each group, for each row: float s                               (int8)
//     sum:    for each group, for each row: float s (sum of X) or the sum of x; whole rows: int32
//             -128 (sum of X)
//
// Terms: x = high + low in bf16 carries 16 bits of significand (2^-17 relative error). One term is
// exact for bf16 activations without an input scale.
#pragma once

#include "cpu/qlinear.h"

namespace kvopt::cpu {

constexpr int64_t kBlockSteps = 4;

struct AmxLayout {
  int64_t tile_bytes;     // packed bytes of a tile of 32 rows of w
  int64_t groups;         // groups of a row
  int64_t group_columns;  // columns of a group (the last one may have fewer)
  int64_t meta_stride;    // fp16 values of a (tile, group)
  int64_t group_steps;    // steps of a whole group
  int64_t steps;          // of a row
  int64_t terms;          // of x: 1, or 2
  int64_t height;         // rows of x of an operand
  int64_t tiles;          // operands that hold all M rows
  int64_t padded_rows;    // tiles * height
  int64_t batch_tiles;    // operands that share an unpacked weight: as many as the caches like
  int64_t step_bytes;     // of x: one step of an operand, all terms
  int64_t operand_bytes;  // a block of steps of an operand
  int64_t block_bytes;    // a block of steps of all operands
  int64_t x_offset;       // of the workspace, in bytes, as all that follow
  int64_t scale_offset;
  int64_t sum_offset;
  int64_t bytes;
};

AmxLayout amx_layout(const QLinearParams& p, bool int8);

// The weight integers of codes of up to 4 bits as bf16, code c at c and c + 16: q - mid, FP4's
// 192 book[q], all exact in one term; NF4's book[q] in two. w = (scale * unit) * (high + low).
struct AmxWords {
  alignas(64) uint16_t high[32];
  alignas(64) uint16_t low[32];
  float unit;
};

AmxWords amx_words(const QuantFormat& format);

constexpr bool amx_two_terms(const QuantFormat& format) { return format.scheme == Scheme::kNf4; }

extern const QLinearKernels kAmxBf16;       // 16-bit-class activations
extern const QLinearKernels kAmxInt8;       // int8 activations, any weight
extern const QLinearKernels kAmxInt8Whole;  // int8 activations, a8_is_whole weights

}  // namespace kvopt::cpu
