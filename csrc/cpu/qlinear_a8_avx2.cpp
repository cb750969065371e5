// SPDX-License-Identifier: Apache-2.0
// qlinear with int8 activations for AVX2 (with FMA and F16C). Compiled with the
// flags of qlinear_avx2.cpp; nothing here may have external linkage
// but the table at the end.
//
// Mathematics, picture and bound are those of qlinear_a8_tiles.h. One multiply-add of four bytes is
// three instructions here (vpmaddubsw, vpmaddwd, vpaddd), so 32 products a cycle and a half on two
// ports.
#define KVOPT_QLINEAR_AVX2

#include "cpu/qlinear_a8_tiles.h"

namespace kvopt::cpu {

const QLinearKernels kA8Avx2 = {workspace_bytes, prepare, run};

}  // namespace kvopt::cpu
