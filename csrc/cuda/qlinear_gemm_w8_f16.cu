// SPDX-License-Identifier: Apache-2.0
#include "cuda/device/qlinear_gemm.cuh"

namespace kvopt::cuda {

template int launch_gemm<__half, 8>(const QLinearProblem&, const Device&, cudaStream_t);

}  // namespace kvopt::cuda
