// SPDX-License-Identifier: Apache-2.0
// qlinear for AVX-512 with VNNI. Compiled with the flags of qlinear_avx512.cpp and -mavx512vnni;
// nothing here may have external linkage but the table at the end.
//
// The order of sums and the result, bit for bit, are those of qlinear_codes.h. Panels of rows use
// vpdpwssd, which adds what it multiplies, and so do a few rows with a code book. A few rows of x
// take a shorter way to integer codes (qlinear_planes.h).
#define KVOPT_QLINEAR_VNNI

#include "cpu/qlinear_direct.h"
#include "cpu/qlinear_panels.h"
#include "cpu/qlinear_planes.h"

namespace kvopt::cpu {
namespace {

template <Codes kCodes>
void run_codes(const QLinearParams& p, const QLinearLayout& layout, int64_t tile_begin,
               int64_t tile_end) {
  if constexpr (kCodes != Codes::kBook) {
    if (layout.planes) {
      return run_planes_rows<kCodes, kDirectRowsVnni>(p, layout, tile_begin, tile_end);
    }
  }
  if constexpr (kCodes == Codes::kBook || kCodes == Codes::kInt3) {
    constexpr int kRows = kCodes == Codes::kBook ? kDirectRowsVnni : 2;
    if (layout.direct) return run_direct_rows<kCodes, kRows>(p, layout, tile_begin, tile_end);
  }
  run_panels<kCodes>(p, layout, tile_begin, tile_end);
}

void run(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  if (p.m == 0) return;
  const QLinearLayout layout = qlinear_layout(p, kIsa);
  switch (layout.codes) {
    case Codes::kInt8:
      return run_codes<Codes::kInt8>(p, layout, tile_begin, tile_end);
    case Codes::kInt4:
      return run_codes<Codes::kInt4>(p, layout, tile_begin, tile_end);
    case Codes::kInt3:
      return run_codes<Codes::kInt3>(p, layout, tile_begin, tile_end);
    case Codes::kInt2:
      return run_codes<Codes::kInt2>(p, layout, tile_begin, tile_end);
    case Codes::kBook:
      return run_codes<Codes::kBook>(p, layout, tile_begin, tile_end);
  }
}

}  // namespace

const QLinearKernels kQLinearVnni = {qlinear_workspace_vnni, prepare, run};

}  // namespace kvopt::cpu
