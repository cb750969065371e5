// SPDX-License-Identifier: Apache-2.0
// Which kernel computes y = x w^T + bias. The rule, from top to bottom:
//
//   M >= 224 (16 for fp32)                 dequantise, then cuBLAS       prefers_dense, below
//   fp32 activations, or bf16 on sm_75     fp32 arithmetic               qlinear_simt.cu
//   M <= 8 (4 when N is small), x fits     tensor-core matrix-vector     device/qlinear_gemv.cuh
//   else                                   tiled tensor-core product     device/qlinear_gemm.cuh
//
// No workspace: whatever splits K adds its parts inside one block, in a fixed order, so results
// repeat bit for bit.
//
// KVOPT_FORCE_SM (a macro, 75 for example) makes the host side treat every GPU as that chip.
// Compiled together with -gencode arch=compute_75,code=sm_90 it runs the exact sm_75 device code on
// a newer GPU, for tests.
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <limits>

#include "cuda/device/qlinear_problem.cuh"
#include "cuda/qlinear.h"

namespace kvopt::cuda {
namespace {

int query_device(Device& device) {
  int id = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&id);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, id);
  };
  read(major, cudaDevAttrComputeCapabilityMajor);
  read(minor, cudaDevAttrComputeCapabilityMinor);
  read(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(device.multiprocessor_shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  read(device.block_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.sm = 10 * major + minor;
#ifdef KVOPT_FORCE_SM
  device.sm = KVOPT_FORCE_SM;
  if (device.sm == 75) device.multiprocessor_shared = device.block_shared = 64 * 1024;
#endif
  return error;
}

QLinearProblem make_problem(const QLinearParams& p) {
  QLinearProblem q{};
  q.x = p.x;
  q.packed = p.packed;
  q.meta = reinterpret_cast<const __half*>(p.meta);
  q.bias = p.bias;
  q.y = p.y;
  q.m = static_cast<int32_t>(p.m);
  q.n = static_cast<int32_t>(p.n);
  q.k = static_cast<int32_t>(p.k);
  q.tiles = static_cast<int32_t>(ceil_div(p.n, mma16::kRows));
  q.blocks = static_cast<int32_t>(ceil_div(p.k, mma16::kPadColumns));
  q.groups = static_cast<int32_t>(group_count(p.format, p.k));
  q.group_steps = p.format.group_size / kStepColumns;
  if (q.groups == 1) {
    q.group_steps = q.blocks * 4;
    q.group_shift = 31;
  } else {
    q.group_shift = -1;
    for (int shift = 0; shift < 31; ++shift) {
      if (q.group_steps == 1 << shift) q.group_shift = shift;
    }
  }
  q.tile_bytes = mma16::tile_bytes(p.format, p.k);
  q.symmetric_zero = static_cast<float>(symmetric_zero(p.format));
  q.symmetric = p.format.symmetric;
  q.aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.k * dtype_bytes(p.dtype) % 16 == 0;
  return q;
}

bool is_valid(const QLinearParams& p) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() / 2;
  const bool sizes = p.m >= 0 && p.m <= kMax && p.n >= 1 && p.n <= kMax && p.k >= 1 && p.k <= kMax;
  const QuantFormat& f = p.format;
  return sizes && (f.bits == 4 || f.bits == 8) && f.group_size >= 1 &&
         (f.group_size % kStepColumns == 0 || f.group_size >= p.k);
}

template <typename T>
int launch_tensor_cores(const QLinearProblem& q, int bits, const Device& device,
                        cudaStream_t stream) {
  if (gemv_fits(q, device)) return launch_gemv<T>(q, bits, device, stream);
  return bits == 4 ? launch_gemm<T, 4>(q, device, stream) : launch_gemm<T, 8>(q, device, stream);
}

}  // namespace

// Measured on an H200 with fp16: at M = 128 the fused product is 1.35 to 1.6 times faster, at 256
// between even and 1.14 times slower, at 512 1.4 to 1.6 times slower. fp32 arithmetic has no tensor
// cores and loses its advantage of fewer bytes after a few rows.
bool prefers_dense(const QLinearParams& p) {
  return p.m >= (p.dtype == DType::kFloat32 ? 16 : 224);
}

int64_t qlinear_workspace_bytes(const QLinearParams& /*p*/) { return 0; }

int qlinear(const QLinearParams& p, void* stream_handle) {
  if (!is_valid(p)) return cudaErrorInvalidValue;
  if (p.m == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Device device{};
  if (const int error = query_device(device); error != cudaSuccess) return error;
  const QLinearProblem q = make_problem(p);
  const int bits = p.format.bits;
  if (p.dtype == DType::kFloat32) return launch_simt<float>(q, bits, device, stream);
  if (p.dtype == DType::kFloat16) return launch_tensor_cores<__half>(q, bits, device, stream);
  if (device.sm < 80) return launch_simt<__nv_bfloat16>(q, bits, device, stream);
  return launch_tensor_cores<__nv_bfloat16>(q, bits, device, stream);
}

}  // namespace kvopt::cuda
