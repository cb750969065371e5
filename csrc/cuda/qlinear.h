// SPDX-License-Identifier: Apache-2.0
// Weight-only quantised product on CUDA. `stream` is a cudaStream_t; calls only launch and never synchronise or
// allocate, so they can be captured in a graph. Each returns the launch's cudaError_t (0 = success).
#pragma once

#include "common/params.h"

namespace kvopt::cuda {

int64_t qlinear_workspace_bytes(const QLinearParams& p);
int qlinear(const QLinearParams& p, void* stream);

}  // namespace kvopt::cuda
