// SPDX-License-Identifier: Apache-2.0
// qlinear for AVX2 with FMA and F16C: int16 pairs by vpmaddwd, 8 rows of w to a register. Compiled
// with -mavx2 -mfma -mf16c; nothing here may have external linkage but the table at the end.
//
// The mathematics, the picture and the order of sums are those of qlinear_codes.h.
//
// Registers (16): the micro-kernel holds 4 rows of x times 16 rows of w in 8 sums, a vector of w, a
// broadcast and products; a tile of 32 rows is walked in two parts. For one pair of columns these
// are 16 arithmetic instructions beside 6 loads: bound by arithmetic.
//
// Bytes, M = 1: a 32-byte register of 4-bit codes yields four multiplications, four additions and
// six instructions of unpacking, some 5 cycles: 20 to 25 GB/s a core from cache, above the memory
// rate of one core of most such processors.
#define KVOPT_QLINEAR_AVX2

#include "cpu/qlinear_direct.h"
#include "cpu/qlinear_panels.h"

namespace kvopt::cpu {
namespace {

template <Codes kCodes>
void run_codes(const QLinearParams& p, const QLinearLayout& layout, int64_t tile_begin,
               int64_t tile_end) {
  if (layout.direct) {
    run_direct_rows<kCodes, kDirectRowsAvx2>(p, layout, tile_begin, tile_end);
  } else {
    run_panels<kCodes>(p, layout, tile_begin, tile_end);
  }
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

const QLinearKernels kQLinearAvx2 = {qlinear_workspace_avx2, prepare, run};

}  // namespace kvopt::cpu
