// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary of the including file, which names its instruction set by a macro:
// KVOPT_QLINEAR_AVX2, KVOPT_QLINEAR_AVX512 or KVOPT_QLINEAR_VNNI.
#pragma once

#if defined(KVOPT_QLINEAR_AVX2)
#include "cpu/simd_avx2.h"
#elif defined(KVOPT_QLINEAR_AVX512) || defined(KVOPT_QLINEAR_VNNI)
#include "cpu/simd_avx512.h"
#else
#error "name an instruction set"
#endif
