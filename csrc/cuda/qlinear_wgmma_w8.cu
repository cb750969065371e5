// SPDX-License-Identifier: Apache-2.0
// The warpgroup product for codes of 8 bits.
#include "cuda/device/qlinear_wgmma_launch.cuh"

namespace kvopt::cuda::wgmma {

int launch_w8(const QLinearProblem& p, const HalfRows& x, void* partials, const Device& device,
              cudaStream_t stream) {
  return launch_format<8, false>(p, x, partials, device, stream);
}

}  // namespace kvopt::cuda::wgmma
