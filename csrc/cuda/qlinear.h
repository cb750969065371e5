// SPDX-License-Identifier: Apache-2.0
// Weight-only quantised product on CUDA. `stream` is a cudaStream_t; calls only launch and never
// synchronise or allocate, so they can be captured in a graph. Each returns the launch's
// cudaError_t (0 = success).
#pragma once

#include "common/params.h"

namespace kvopt::cuda {

// Whether, at this many rows of x, a dense product (cuBLAS) on the dequantised weight is faster
// than `qlinear`. The op layer then takes that way; `qlinear` itself computes any M.
bool prefers_dense(const QLinearParams& p);

int64_t qlinear_workspace_bytes(const QLinearParams& p);
int qlinear(const QLinearParams& p, void* stream);

}  // namespace kvopt::cuda
