// SPDX-License-Identifier: Apache-2.0
// qlinear for AVX-512 without VNNI (F, BW, VL, DQ): int16 pairs by vpmaddwd, 16 rows of w to a
// register. Compiled with the flags of qlinear_avx2.cpp and -mavx512f -mavx512bw -mavx512vl
// -mavx512dq; nothing here may have external linkage but the table at the end.
//
// The mathematics, the picture and the order of sums are those of qlinear_tiles.h.
//
// Registers (32): the micro-kernel holds 12 rows of x times 32 rows of w in 24 sums, 2 vectors of
// w, a broadcast and a product. For one pair of columns these are 48 arithmetic instructions beside
// 14 loads: bound by arithmetic, half of what VNNI reaches, because a multiplication and its
// addition are two instructions.
//
// Bytes, M = 1: a 64-byte register of 4-bit codes yields four multiplications, four additions and
// six instructions of unpacking, 7 cycles on two ports: nearly 30 GB/s a core from cache, above the
// memory rate of one core of such a processor.
#define KVOPT_QLINEAR_AVX512

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

const QLinearKernels kQLinearAvx512 = {prepare, run};

}  // namespace kvopt::cpu
