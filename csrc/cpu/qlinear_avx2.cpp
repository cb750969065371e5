// SPDX-License-Identifier: Apache-2.0
// qlinear for AVX2 with FMA and F16C: int16 pairs by vpmaddwd, 8 rows of w to a register. Compiled
// with -mavx2 -mfma -mf16c; nothing here may have external linkage but the table at the end.
//
// The mathematics, the picture and the order of sums are those of qlinear_tiles.h.
//
// Registers (16): the micro-kernel holds 4 rows of x times 16 rows of w in 8 sums, a vector of w, a
// broadcast and products; a tile of 32 rows is walked in two parts. For one pair of columns these
// are 16 arithmetic instructions beside 6 loads: bound by arithmetic.
//
// Bytes, M = 1: a 32-byte register of 4-bit codes yields four multiplications, four additions and
// six instructions of unpacking, some 5 cycles: 20 to 25 GB/s a core from cache, above the memory
// rate of one core of most such processors.
#define KVOPT_QLINEAR_AVX2

#include "cpu/qlinear_tiles.h"

namespace kvopt::cpu {
namespace {

template <int kBits>
void run_bits(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  const QLinearLayout layout = qlinear_layout(p, kIsa);
  if (p.m == 1) {
    run_direct<kBits>(p, layout, tile_begin, tile_end);
  } else {
    run_panels<kBits>(p, layout, tile_begin, tile_end);
  }
}

void run(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  if (p.m == 0) return;
  if (p.format.bits == 4) {
    run_bits<4>(p, tile_begin, tile_end);
  } else {
    run_bits<8>(p, tile_begin, tile_end);
  }
}

}  // namespace

const QLinearKernels kQLinearAvx2 = {prepare, run};

}  // namespace kvopt::cpu
