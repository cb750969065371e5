// SPDX-License-Identifier: Apache-2.0
#include "cuda/device/qlinear_gemv.cuh"

namespace kvopt::cuda {

template int launch_gemv<__nv_bfloat16>(const QLinearProblem&, int, const Device&, cudaStream_t);

}  // namespace kvopt::cuda
