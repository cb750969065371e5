// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use: the best one the processor has, or the one KVOPT_ISA
// names.
#pragma once

namespace kvopt::cpu {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kVnni = 3, kAmx = 4 };

Isa best_isa();      // by cpuid and the operating system's saved state; the first call asks Linux
                     // for the permission to use tile registers
Isa selected_isa();  // best_isa(), or KVOPT_ISA; decided once. Throws std::runtime_error for an
                     // unknown name or one that this processor lacks.
const char* isa_name(Isa isa);  // "scalar", "avx2", "avx512", "vnni", "amx"

}  // namespace kvopt::cpu
