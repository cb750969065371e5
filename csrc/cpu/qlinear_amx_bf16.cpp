// SPDX-License-Identifier: Apache-2.0
// qlinear for AMX with 16-bit-class activations. Compiled with the flags of qlinear_vnni.cpp and
// -mamx-tile -mamx-bf16; nothing here may have external linkage but the table at the end.
//
// Mathematics, picture and bound are those of qlinear_amx_tiles.h: one product of bf16 for bf16
// activations, two for fp16 and fp32.
#include "cpu/qlinear_amx_tiles.h"

namespace kvopt::cpu {

const QLinearKernels kAmxBf16 = {workspace_bytes, prepare, run};

}  // namespace kvopt::cpu
