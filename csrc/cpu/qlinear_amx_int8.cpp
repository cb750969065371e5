// SPDX-License-Identifier: Apache-2.0
// qlinear for AMX with int8 activations. Compiled with the flags of qlinear_vnni.cpp and -mamx-tile
// -mamx-int8; nothing here may have external linkage but the tables at the end.
//
// Weights with groups or zero points: as qlinear_amx_tiles.h says. Eight-bit codes with one scale a
// row (kInt8Dynamic): the 128 bytes of a tile's four columns are row i of both operands B as they
// lie (rows 128 bytes apart), so nothing is unpacked; codes are unsigned (tdpbsud) and sums start
// at -128 (sum of X), so they stay exact in int32 over all of K:
//
//     y[m][n] = (scale[n] s[m]) I[m][n]
//
// Sums of a batch wait in memory as images of C between stretches of kWholeSteps steps, 16 KB of
// w each: 4 loads and 4 multiplications of 16 cycles a step, 8 tile moves a stretch. The bound is
// the tile multiplier; for few rows, the bytes of w.
#define KVOPT_AMX_INT8

#include "cpu/qlinear_amx_tiles.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kStepBytes = 2048;  // of a packed tile
constexpr int64_t kPackedPitch = 128;
constexpr int64_t kWholeSteps = 8;  // between two moves of C

template <int kA>
KVOPT_INLINE void multiply_whole(const QLinearParams& p, const AmxLayout& layout, int64_t operand,
                                 int64_t first, int64_t steps, const uint8_t* b,
                                 const uint8_t* ahead, int64_t ahead_bytes, int32_t* c) {
  constexpr int64_t kImage = kOperandBytes / 4;
  _tile_loadd(0, c, 64);
  _tile_loadd(1, c + kImage, 64);
  if constexpr (kA == 2) {
    _tile_loadd(2, c + 2 * kImage, 64);
    _tile_loadd(3, c + 3 * kImage, 64);
  }
  for (int64_t step = 0; step < steps; ++step, b += kStepBytes) {
    const uint8_t* a = operand_at(p, layout, operand, first + step);
    _tile_loadd(4, a, 64);
    if constexpr (kA == 2) _tile_loadd(5, a + layout.operand_bytes, 64);
    _tile_loadd(6, b, kPackedPitch);
    _tile_loadd(7, b + 64, kPackedPitch);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if constexpr (kA == 2) {
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    prefetch_ahead(ahead, ahead_bytes);
    ahead += ahead_bytes;
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kImage, 64);
  if constexpr (kA == 2) {
    _tile_stored(2, c + 2 * kImage, 64);
    _tile_stored(3, c + 3 * kImage, 64);
  }
}

void whole_batch(const QLinearParams& p, const AmxLayout& layout, int64_t operand_begin,
                 int64_t operand_end, int64_t tile) {
  // Images of C: for each operand A, those of both halves of the tile.
  alignas(64) int32_t integers[kBatchTiles * 2 * kOperandBytes / 4];
  alignas(64) uint8_t edge[kStepBytes];
  const int64_t operands = operand_end - operand_begin;
  const int64_t first_row = operand_begin * layout.height;
  const float* starts = vector_at(p, layout, layout.sum_offset, 0) + first_row;
  for (int64_t a = 0; a < operands; ++a) {
    for (int64_t r = 0; r < layout.height; ++r) {
      int32_t start;
      memcpy(&start, starts + a * layout.height + r, sizeof(start));
      int32_t* c = integers + a * 2 * kOperandBytes / 4 + r * kLanes;
      store_ints(c, set_ints(start));
      store_ints(c + kOperandBytes / 4, set_ints(start));
    }
  }
  const uint8_t* w = p.packed + tile * layout.tile_bytes;
  const int64_t full = layout.tile_bytes / kStepBytes;  // steps whose bytes all exist
  if (full < layout.steps) {
    memset(edge, 0, sizeof(edge));
    memcpy(edge, w + full * kStepBytes, static_cast<size_t>(layout.tile_bytes - full * kStepBytes));
  }
  const int64_t pairs = (operands + 1) / 2;
  for (int64_t step = 0; step < layout.steps;) {
    int64_t steps = full - step < kWholeSteps ? full - step : kWholeSteps;
    const uint8_t* b = w + step * kStepBytes;
    if (steps == 0) {
      steps = 1;
      b = edge;
    }
    // Every pair of operands fetches its share of the next stretch.
    const int64_t share = (kStepBytes / 64 + pairs - 1) / pairs * 64;
    const uint8_t* ahead = w + (step + steps) * kStepBytes;
    for (int64_t a = 0; a < operands; a += 2, ahead += share * steps) {
      int32_t* c = integers + a * 2 * kOperandBytes / 4;
      if (operands - a < 2) {
        multiply_whole<1>(p, layout, operand_begin + a, step, steps, b, ahead, share, c);
      } else {
        multiply_whole<2>(p, layout, operand_begin + a, step, steps, b, ahead, share, c);
      }
    }
    step += steps;
  }
  const int64_t rows = operands * layout.height;
  prefetch_rows(p, first_row, p.m - first_row < rows ? p.m - first_row : rows, tile);
  const uint16_t* meta = p.meta + tile * layout.meta_stride;
  const Floats scales[2] = {load_halves(meta), load_halves(meta + kLanes)};
  const float* x_scale = vector_at(p, layout, layout.scale_offset, 0) + first_row;
  alignas(64) float sums[kOperandRows * kTileRows];
  for (int64_t a = 0; a < operands; ++a) {
    const int64_t row = first_row + a * layout.height;
    const int32_t* c = integers + a * 2 * kOperandBytes / 4;
    for (int64_t r = 0; r < layout.height; ++r, ++x_scale) {
      for (int half = 0; half < 2; ++half) {
        store_floats(sums + r * kTileRows + half * kLanes,
                     multiply(to_floats(load_ints(c + half * kOperandBytes / 4 + r * kLanes)),
                              multiply(scales[half], set_floats(*x_scale))));
      }
    }
    finish_rows(p, row, p.m - row < layout.height ? p.m - row : layout.height, tile, sums);
  }
}

void run_whole(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  if (p.m == 0) return;
  const AmxLayout layout = amx_layout(p, kInt8);
  configure_tiles(layout.height);
  for (int64_t begin = 0; begin < layout.tiles; begin += layout.batch_tiles) {
    const int64_t end =
        begin + layout.batch_tiles < layout.tiles ? begin + layout.batch_tiles : layout.tiles;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      whole_batch(p, layout, begin, end, tile);
    }
  }
  _tile_release();
}

}  // namespace

const QLinearKernels kAmxInt8 = {workspace_bytes, prepare, run};
const QLinearKernels kAmxInt8Whole = {workspace_bytes, prepare, run_whole};

}  // namespace kvopt::cpu
