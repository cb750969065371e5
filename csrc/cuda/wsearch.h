// SPDX-License-Identifier: Apache-2.0
// Searches over scales and zero points, and a block of GPTQ: common/{wsearch,gptq}.h. Same
// conventions as qlinear.h.
#pragma once

#include "common/gptq.h"

namespace kvopt::cuda {

int wsearch(const SearchParams<float>& p, void* stream);
int wsearch(const SearchParams<double>& p, void* stream);
int wsearch_hqq(const HqqParams& p, void* stream);
int gptq_block(const GptqBlockParams<float>& p, void* stream);
int gptq_block(const GptqBlockParams<double>& p, void* stream);

}  // namespace kvopt::cuda
