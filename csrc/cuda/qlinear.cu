// SPDX-License-Identifier: Apache-2.0
// Runs what qlinear_plan.cu decided: the prologue where x needs one, then one product kernel.
// Whatever splits K adds its parts in a fixed order, so results repeat bit for bit.
#include <cuda_runtime_api.h>

#include "cuda/device/qlinear_problem.cuh"
#include "cuda/qlinear.h"
#include "cuda/qlinear_plan.h"

namespace kvopt::cuda {
namespace {

// x as fp16 rows: itself, or prepared.
int half_rows(const QLinearProblem& q, const QLinearPlan& plan, uint8_t* workspace, HalfRows& x,
              const Device& device, cudaStream_t stream) {
  x = {static_cast<const __half*>(q.x), plan.pitch, nullptr};
  if (!plan.prologue) return cudaSuccess;
  auto* const rows = reinterpret_cast<__half*>(workspace + plan.rows_at);
  auto* const scales = reinterpret_cast<float*>(workspace + plan.scales_at);
  x = {rows, plan.pitch, scales};
  return launch_prologue_half(q, rows, plan.pitch, scales, device, stream);
}

}  // namespace

int qlinear(const QLinearParams& p, void* stream_handle) {
  if (!is_valid_product(p)) return cudaErrorInvalidValue;
  if (p.m == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Device device{};
  if (const int error = query_device(device); error != cudaSuccess) return error;
  const QLinearPlan plan = plan_qlinear(p, device);
  auto* const workspace = static_cast<uint8_t*>(p.workspace);
  if (plan.workspace_bytes > 0 && workspace == nullptr) return cudaErrorInvalidValue;
  QLinearProblem q = make_problem(p);
  int error = cudaSuccess;
  switch (plan.fused) {
    case QLinearPath::kGemv:
      return launch_gemv(q, device, stream);
    case QLinearPath::kW8A8Gemv:
      return launch_w8a8_gemv(q, device, stream);
    case QLinearPath::kGemm:
    case QLinearPath::kWgmma: {
      HalfRows x{};
      error = half_rows(q, plan, workspace, x, device, stream);
      if (error != cudaSuccess) return error;
      return plan.fused == QLinearPath::kGemm
                 ? launch_gemm(q, x, device, stream)
                 : launch_wgmma(q, x, workspace + plan.partials_at, device, stream);
    }
    case QLinearPath::kW8A8: {
      auto* const rows = reinterpret_cast<int8_t*>(workspace + plan.rows_at);
      auto* const scales = reinterpret_cast<float*>(workspace + plan.scales_at);
      error = launch_prologue_int8(q, rows, plan.pitch, scales, device, stream);
      if (error != cudaSuccess) return error;
      return launch_w8a8(q, {rows, plan.pitch, scales}, device, stream);
    }
    case QLinearPath::kSimt:
      if (plan.prologue) {
        auto* const rows = reinterpret_cast<float*>(workspace + plan.rows_at);
        error = launch_simt_rows(q, rows, device, stream);
        if (error != cudaSuccess) return error;
        q.x = rows;
        q.input_scale = nullptr;
        q.activation_bits = 16;
      }
      return launch_simt(q, device, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace kvopt::cuda
