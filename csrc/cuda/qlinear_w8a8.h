// SPDX-License-Identifier: Apache-2.0
// What the files of W8A8 say to each other.
#pragma once

#include "cuda/device/qlinear_w8a8_mma.cuh"

namespace kvopt::cuda::w8a8 {

// Only on sm_90, where wgmma_is_compiled() and RowsEpilogue::words.
bool wgmma_is_compiled();
int launch_wgmma(const Operands& o, const RowsEpilogue& epilogue, const Device& device,
                 cudaStream_t stream);

// At most 8 rows of x.
bool stream_fits(const Operands& o, const Device& device);
int launch_stream(const Operands& o, const RowsEpilogue& epilogue, const Device& device,
                  cudaStream_t stream);

}  // namespace kvopt::cuda::w8a8
