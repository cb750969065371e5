// SPDX-License-Identifier: Apache-2.0
// Quantised product on CUDA. `stream` is a cudaStream_t; calls only launch and never synchronise or
// allocate, so they can be captured in a graph. Each returns the launch's cudaError_t (0 =
// success).
#pragma once

#include "common/params.h"

namespace kvopt::cuda {

// Whether, at this many rows of x, a dense product (cuBLAS) on the dequantised weight is faster
// than `qlinear`. The op layer then takes that way; `qlinear` itself computes any M.
bool prefers_dense(const QLinearParams& p);

// Of p.workspace, 256-byte aligned; depends on the parameters and the current device alone.
int64_t qlinear_workspace_bytes(const QLinearParams& p);
int qlinear(const QLinearParams& p, void* stream);

// Which path the product takes and why, its bytes and floors, as one paragraph of text. capability:
// 10 * major + minor of a chip that need not be here, with so many multiprocessors (0: as many as
// its usual chip has); capability 0: the current device. Pointers in p only say which optional
// parts there are.
int qlinear_explain(const QLinearParams& p, int capability, int multiprocessors, char* out,
                    int size);

}  // namespace kvopt::cuda
