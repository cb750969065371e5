// SPDX-License-Identifier: Apache-2.0
#include "cuda/device/qlinear_gemm.cuh"

namespace kvopt::cuda {

int launch_gemm(const QLinearProblem& p, const HalfRows& x, const Device& device,
                cudaStream_t stream) {
  QLinearProblem q = p;
  q.epilogue.row_scale = x.row_scale;
  if (p.format.has_book()) return launch_gemm_format<4, true>(q, x, device, stream);
  if (p.format.bits == 2) return launch_gemm_format<2, false>(q, x, device, stream);
  if (p.format.bits == 3) return launch_gemm_format<3, false>(q, x, device, stream);
  if (p.format.bits == 4) return launch_gemm_format<4, false>(q, x, device, stream);
  return launch_gemm_format<8, false>(q, x, device, stream);
}

}  // namespace kvopt::cuda
