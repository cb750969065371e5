// SPDX-License-Identifier: Apache-2.0
// The arithmetic of qlinear_a8.h, compiled once for the baseline instruction set.
#include "cpu/qlinear_a8.h"

#include <algorithm>

namespace kvopt::cpu {
namespace {

int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

}  // namespace

A8Layout a8_layout(const QLinearParams& p, int64_t panel_rows) {
  A8Layout layout = {};
  layout.tile_bytes = tile32::tile_bytes(p.format, p.k);
  layout.groups = group_count(p.format, p.k);
  layout.group_columns = std::min<int64_t>(p.format.group_size, p.k);
  layout.group_chunks = ceil_div(layout.group_columns, kChunkColumns);
  layout.chunks = layout.groups * layout.group_chunks;
  layout.meta_stride = tile32::meta_stride(p.format);
  layout.panels = ceil_div(p.m, panel_rows);
  layout.panel_base = p.m == 0 ? 0 : p.m / layout.panels;
  layout.panel_extra = p.m == 0 ? 0 : p.m % layout.panels;
  layout.padded_columns = round_up(p.k, 16);
  layout.row_bytes = round_up(layout.padded_columns + layout.chunks * 12, 64);
  layout.flag_bytes = round_up(p.m, 64);
  layout.middle = p.format.has_book() ? kBookMiddle : symmetric_zero(p.format);
  return layout;
}

int64_t a8_workspace_bytes(const QLinearParams& p, int64_t panel_rows) {
  if (p.m == 0) return 0;
  const A8Layout layout = a8_layout(p, panel_rows);
  return layout.flag_bytes + p.m * layout.row_bytes;
}

A8Book a8_book(Scheme scheme) {
  A8Book book = {};
  for (int32_t code = 0; code < 16; ++code) {
    const int32_t v = book_integer(scheme, code) + kBookMiddle;
    book.high[code] = static_cast<uint8_t>(v >> kPlaneBits);
    book.low[code] = static_cast<uint8_t>(v & ((1 << kPlaneBits) - 1));
  }
  book.unit = 1.0f / static_cast<float>(book_steps(scheme));
  return book;
}

}  // namespace kvopt::cpu
