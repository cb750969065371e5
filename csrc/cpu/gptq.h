// SPDX-License-Identifier: Apache-2.0
// A block of GPTQ on the CPU: common/gptq.h. Each call works on the rows [row_begin, row_end).
#pragma once

#include "common/gptq.h"
#include "cpu/wsearch.h"

namespace kvopt::cpu {

template <typename T>
void gptq_block(const GptqBlockParams<T>& p, CandidateErrors<T> errors, int64_t row_begin,
                int64_t row_end);

}  // namespace kvopt::cpu
