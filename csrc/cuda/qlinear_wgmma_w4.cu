// SPDX-License-Identifier: Apache-2.0
// The warpgroup product for codes of 4 bits.
#include "cuda/device/qlinear_wgmma_launch.cuh"

namespace kvopt::cuda::wgmma {

int launch_w4(const QLinearProblem& p, const HalfRows& x, void* partials, const Device& device,
              cudaStream_t stream) {
  return launch_format<4, false>(p, x, partials, device, stream);
}

bool w4_is_compiled() { return is_compiled<4, false>(); }

}  // namespace kvopt::cuda::wgmma
