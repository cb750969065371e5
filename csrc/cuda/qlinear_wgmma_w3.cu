// SPDX-License-Identifier: Apache-2.0
// The warpgroup product for codes of 3 bits.
#include "cuda/device/qlinear_wgmma_launch.cuh"

namespace kvopt::cuda::wgmma {

int launch_w3(const QLinearProblem& p, const HalfRows& x, void* partials, const Device& device,
              cudaStream_t stream) {
  return launch_format<3, false>(p, x, partials, device, stream);
}

}  // namespace kvopt::cuda::wgmma
