// SPDX-License-Identifier: Apache-2.0
#include "cuda/device/qlinear_gemm.cuh"

namespace kvopt::cuda {

template int launch_gemm_format<4, true>(const QLinearProblem&, const HalfRows&, const Device&,
                                         cudaStream_t);

}  // namespace kvopt::cuda
