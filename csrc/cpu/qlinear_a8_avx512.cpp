// SPDX-License-Identifier: Apache-2.0
// qlinear with int8 activations for AVX-512 without VNNI. Compiled with the
// flags of qlinear_avx512.cpp; nothing here may have external linkage
// but the table at the end.
//
// Mathematics, picture and bound are those of qlinear_a8_tiles.h. One multiply-add of four bytes is
// three instructions here (vpmaddubsw, vpmaddwd, vpaddd).
#define KVOPT_QLINEAR_AVX512

#include "cpu/qlinear_a8_tiles.h"

namespace kvopt::cpu {

const QLinearKernels kA8Avx512 = {workspace_bytes, prepare, run};

}  // namespace kvopt::cpu
