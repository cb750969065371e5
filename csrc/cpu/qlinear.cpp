// SPDX-License-Identifier: Apache-2.0
// Dispatch over instruction sets and the sizes that their kernels share.
#include "cpu/qlinear.h"

#include <algorithm>

#include "cpu/qlinear_layout.h"

namespace kvopt::cpu {
namespace {

int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// Rows of x up to which a kernel takes its weights straight from the packed bytes; with more rows,
// unpacking a stretch of the tile once and reading it for every panel is cheaper.
int64_t direct_rows(Isa isa) { return isa == Isa::kVnni ? 6 : 1; }

// The height of the micro-kernel: as many rows as keep its accumulators in registers.
int64_t panel_rows(Isa isa) { return isa == Isa::kAvx2 ? 4 : 12; }

}  // namespace

QLinearLayout qlinear_layout(const QLinearParams& p, Isa isa) {
  QLinearLayout layout = {};
  layout.tile_bytes = tile32::tile_bytes(p.format, p.k);
  layout.groups = group_count(p.format, p.k);
  layout.group_columns = std::min<int64_t>(p.format.group_size, p.k);
  layout.meta_stride = tile32::meta_stride(p.format);
  layout.blocks_per_group = ceil_div(layout.group_columns, kBlockColumns);
  layout.blocks = layout.groups * layout.blocks_per_group;

  layout.planes = isa == Isa::kVnni && p.m <= direct_rows(isa);
  layout.panel_rows = panel_rows(isa);
  layout.panels = ceil_div(p.m, layout.panel_rows);
  layout.panel_base = p.m == 0 ? 0 : p.m / layout.panels;
  layout.panel_extra = p.m == 0 ? 0 : p.m % layout.panels;
  layout.padded_columns = round_up(p.k, 8);
  layout.row_bytes = round_up(layout.padded_columns * 2 + layout.blocks * 12, 64);
  layout.flag_bytes = round_up(p.m, 64);
  return layout;
}

int64_t qlinear_workspace_bytes(const QLinearParams& p, Isa isa) {
  if (isa == Isa::kScalar || p.m == 0) return 0;
  const QLinearLayout layout = qlinear_layout(p, isa);
  return layout.flag_bytes + p.m * layout.row_bytes;
}

const QLinearKernels& qlinear_kernels(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kScalar:
      return kQLinearScalar;
    case Isa::kAvx2:
      return kQLinearAvx2;
    case Isa::kAvx512:
      return kQLinearAvx512;
    case Isa::kVnni:
      return kQLinearVnni;
  }
#endif
  (void)isa;
  return kQLinearScalar;
}

}  // namespace kvopt::cpu
