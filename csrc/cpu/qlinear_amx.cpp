// SPDX-License-Identifier: Apache-2.0
// The arithmetic of qlinear_amx.h, compiled once for the baseline instruction set.
#include "cpu/qlinear_amx.h"

#include <algorithm>

#include "cpu/float16.h"
#include "cpu/qlinear_a8.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kTileHeight = 16;
constexpr int64_t kBatchBytes = 1 << 20;  // of X: half of a second-level cache
constexpr int64_t kBatchTiles = 16;

int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

}  // namespace

AmxLayout amx_layout(const QLinearParams& p, bool int8) {
  AmxLayout layout = {};
  layout.tile_bytes = tile32::tile_bytes(p.format, p.k);
  layout.groups = group_count(p.format, p.k);
  layout.group_columns = std::min<int64_t>(p.format.group_size, p.k);
  layout.meta_stride = tile32::meta_stride(p.format);
  const int64_t step_columns = int8 ? 64 : 32;
  layout.group_steps = ceil_div(layout.group_columns, step_columns);
  const int64_t last = p.k - (layout.groups - 1) * layout.group_columns;
  layout.steps = (layout.groups - 1) * layout.group_steps + ceil_div(last, step_columns);
  layout.terms = int8 || (p.dtype == DType::kBFloat16 && p.input_scale == nullptr) ? 1 : 2;
  layout.tiles = ceil_div(p.m, kTileHeight);
  layout.height = p.m == 0 ? 0 : ceil_div(p.m, layout.tiles);
  layout.padded_rows = layout.tiles * layout.height;
  layout.step_bytes = layout.terms * layout.height * 64;
  layout.operand_bytes = layout.step_bytes * kBlockSteps;
  layout.block_bytes = layout.operand_bytes * layout.tiles;
  const int64_t blocks = ceil_div(layout.steps, kBlockSteps);
  if (p.m > 0) {
    layout.batch_tiles =
        std::clamp<int64_t>(kBatchBytes / (blocks * layout.operand_bytes), 2, kBatchTiles);
  }
  layout.x_offset = round_up(p.m, 64);
  layout.scale_offset = layout.x_offset + blocks * layout.block_bytes;
  const int64_t vector_bytes = round_up(layout.groups * layout.padded_rows * 4, 64);
  layout.sum_offset = layout.scale_offset + (int8 ? vector_bytes : 0);
  layout.bytes = layout.sum_offset + vector_bytes;
  return layout;
}

AmxWords amx_words(const QuantFormat& format) {
  AmxWords words = {};
  words.unit =
      format.scheme == Scheme::kFp4 ? 1.0f / static_cast<float>(book_steps(format.scheme)) : 1.0f;
  for (int32_t i = 0; i < 32; ++i) {
    const int32_t code = i % (1 << std::min(format.bits, 4));
    float value = static_cast<float>(code - symmetric_zero(format));
    if (format.scheme == Scheme::kNf4) value = book_value(format.scheme, code);
    if (format.scheme == Scheme::kFp4) {
      value = static_cast<float>(book_integer(format.scheme, code));
    }
    words.high[i] = float_to_bfloat16(value);
    words.low[i] = float_to_bfloat16(value - bfloat16_to_float(words.high[i]));
  }
  return words;
}

}  // namespace kvopt::cpu
