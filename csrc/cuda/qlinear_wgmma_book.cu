// SPDX-License-Identifier: Apache-2.0
// The warpgroup product for code books (NF4, FP4).
#include "cuda/device/qlinear_wgmma_launch.cuh"

namespace kvopt::cuda::wgmma {

int launch_book(const QLinearProblem& p, const HalfRows& x, void* partials, const Device& device,
                cudaStream_t stream) {
  return launch_format<4, true>(p, x, partials, device, stream);
}

}  // namespace kvopt::cuda::wgmma
