// SPDX-License-Identifier: Apache-2.0
#include "cuda/device/qlinear_gemv.cuh"

namespace kvopt::cuda::gemv {

template int launch_bits<4, false>(const QLinearProblem&, const Device&, cudaStream_t);

}  // namespace kvopt::cuda::gemv
