// SPDX-License-Identifier: Apache-2.0
// Which products the matrix-vector kernel takes, and which of its instances.
#include "cuda/device/qlinear_gemv_plan.cuh"

namespace kvopt::cuda {
namespace gemv {

template <int kBits, bool kBook>
int launch_bits(const QLinearProblem& p, const Device& device, cudaStream_t stream);

}  // namespace gemv

bool gemv_fits(const QLinearProblem& p, const Device& device) {
  if (p.dtype == DType::kFloat32 || p.format.scheme == Scheme::kInt8Dynamic) return false;
  if (p.m < 1 || p.m > gemv::kMaxRows) return false;
  if (reinterpret_cast<uintptr_t>(p.packed) % 16 != 0) return false;
  if (reinterpret_cast<uintptr_t>(p.meta) % 16 != 0) return false;
  return gemv::make_plan(p, device).shared_bytes + 2048 <= device.block_shared;
}

int launch_gemv(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  if (p.format.has_book()) return gemv::launch_bits<4, true>(p, device, stream);
  switch (p.format.bits) {
    case 2:
      return gemv::launch_bits<2, false>(p, device, stream);
    case 3:
      return gemv::launch_bits<3, false>(p, device, stream);
    case 4:
      return gemv::launch_bits<4, false>(p, device, stream);
    default:
      return gemv::launch_bits<8, false>(p, device, stream);
  }
}

}  // namespace kvopt::cuda
