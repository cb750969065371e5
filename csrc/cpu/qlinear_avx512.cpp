// SPDX-License-Identifier: Apache-2.0
// qlinear for AVX-512 without VNNI (F, BW, VL, DQ): int16 pairs by vpmaddwd, 16 rows of w to a
// register. Compiled with the flags of qlinear_avx2.cpp and -mavx512f -mavx512bw -mavx512vl
// -mavx512dq; nothing here may have external linkage but the table at the end.
//
// The mathematics, the picture and the order of sums are those of qlinear_codes.h.
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

#include "cpu/qlinear_direct.h"
#include "cpu/qlinear_panels.h"

namespace kvopt::cpu {
namespace {

template <Codes kCodes>
void run_codes(const QLinearParams& p, const QLinearLayout& layout, int64_t tile_begin,
               int64_t tile_end) {
  if (layout.direct) {
    run_direct_rows<kCodes, kDirectRowsAvx512>(p, layout, tile_begin, tile_end);
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

const QLinearKernels kQLinearAvx512 = {qlinear_workspace_avx512, prepare, run};

}  // namespace kvopt::cpu
