// SPDX-License-Identifier: Apache-2.0
// The arithmetic of qlinear_layout.h, compiled once for the baseline instruction set.
#include "cpu/qlinear_layout.h"

#include <algorithm>

namespace kvopt::cpu {
namespace {

int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

Codes codes_of(const QuantFormat& f) {
  if (f.has_book()) return Codes::kBook;
  return f.bits == 8   ? Codes::kInt8
         : f.bits == 4 ? Codes::kInt4
         : f.bits == 3 ? Codes::kInt3
                       : Codes::kInt2;
}

// Whether codes meet two int8 planes of x: VNNI, integers, and no group that ends inside a block of
// 3 bits.
bool can_use_planes(const QLinearParams& p, Isa isa, Codes codes) {
  if (isa != Isa::kVnni || codes == Codes::kBook) return false;
  return codes != Codes::kInt3 || p.format.group_size >= p.k || p.format.group_size % 32 == 0;
}

// Rows of x up to which a kernel takes its weights straight from the packed bytes; with more rows,
// unpacking a stretch of the tile once and reading it for every panel is cheaper. As measured, on a
// core of a Granite Rapids class processor.
int64_t direct_rows(const QLinearParams& p, Isa isa, Codes codes) {
  if (isa == Isa::kAvx2) return kDirectRowsAvx2;
  if (isa == Isa::kAvx512) return kDirectRowsAvx512;
  return codes == Codes::kInt3 && !can_use_planes(p, isa, codes) ? 2 : kDirectRowsVnni;
}

// The height of the micro-kernel: as many rows as keep its accumulators in registers.
int64_t panel_rows(Isa isa) { return isa == Isa::kAvx2 ? 4 : 12; }

int64_t workspace_bytes(const QLinearParams& p, Isa isa) {
  if (p.m == 0) return 0;
  const QLinearLayout layout = qlinear_layout(p, isa);
  return layout.flag_bytes + p.m * layout.row_bytes;
}

}  // namespace

QLinearLayout qlinear_layout(const QLinearParams& p, Isa isa) {
  QLinearLayout layout = {};
  layout.tile_bytes = tile32::tile_bytes(p.format, p.k);
  layout.groups = group_count(p.format, p.k);
  layout.group_columns = std::min<int64_t>(p.format.group_size, p.k);
  layout.meta_stride = tile32::meta_stride(p.format);
  layout.block_columns = block_columns(p.format.scheme);
  layout.blocks_per_group = ceil_div(layout.group_columns, layout.block_columns);
  layout.blocks = layout.groups * layout.blocks_per_group;

  layout.codes = codes_of(p.format);
  layout.direct = p.m <= direct_rows(p, isa, layout.codes);
  layout.planes = layout.direct && can_use_planes(p, isa, layout.codes);
  layout.panel_rows = panel_rows(isa);
  layout.panels = layout.direct ? std::min<int64_t>(p.m, 1) : ceil_div(p.m, layout.panel_rows);
  layout.panel_base = p.m == 0 ? 0 : p.m / layout.panels;
  layout.panel_extra = p.m == 0 ? 0 : p.m % layout.panels;
  layout.padded_columns = round_up(p.k, 32);
  layout.row_bytes = round_up(layout.padded_columns * 2 + layout.blocks * 12, 64);
  layout.flag_bytes = round_up(p.m, 64);
  return layout;
}

int64_t qlinear_workspace_scalar(const QLinearParams&) { return 0; }
int64_t qlinear_workspace_avx2(const QLinearParams& p) { return workspace_bytes(p, Isa::kAvx2); }
int64_t qlinear_workspace_avx512(const QLinearParams& p) {
  return workspace_bytes(p, Isa::kAvx512);
}
int64_t qlinear_workspace_vnni(const QLinearParams& p) { return workspace_bytes(p, Isa::kVnni); }

}  // namespace kvopt::cpu
