// SPDX-License-Identifier: Apache-2.0
// What a kernel needs to know of the GPU and of the product, worked out once on the host.
//
// KVOPT_FORCE_SM (a macro, 75 for example) makes the host side treat every GPU as that chip.
// Compiled together with -gencode arch=compute_75,code=sm_90 it runs the exact sm_75 device code on
// a newer GPU, for tests.
#include <cuda_runtime_api.h>

#include <mutex>

#include "cuda/device/qlinear_problem.cuh"

namespace kvopt::cuda {
namespace {

int read_device(int id, Device& device) {
  int major = 0, minor = 0;
  cudaError_t error = cudaSuccess;
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
  const Device forced = device_of(KVOPT_FORCE_SM, device.multiprocessors);
  device.sm = forced.sm;
  device.multiprocessor_shared = forced.multiprocessor_shared;
  device.block_shared = forced.block_shared;
#endif
  return error;
}

}  // namespace

// CUDA C++ Programming Guide, "Technical specifications per compute capability".
Device device_of(int capability, int multiprocessors) {
  int kilobytes = 64, multiprocessor_kilobytes = 64;  // 7.5
  switch (capability) {
    case 80:
    case 87:
      kilobytes = 163;
      multiprocessor_kilobytes = 164;
      break;
    case 86:
    case 89:
    case 120:
    case 121:
      kilobytes = 99;
      multiprocessor_kilobytes = 100;
      break;
    case 90:
    case 100:
    case 103:
      kilobytes = 227;
      multiprocessor_kilobytes = 228;
      break;
    default:
      break;
  }
  return {capability, multiprocessors, multiprocessor_kilobytes * 1024, kilobytes * 1024};
}

// Asked of the driver once per GPU: six queries cost about as much host time as a launch.
int query_device(Device& device) {
  constexpr int kKnown = 64;
  static std::once_flag once[kKnown];
  static Device known[kKnown];
  static int errors[kKnown];
  int id = 0;
  if (const cudaError_t error = cudaGetDevice(&id); error != cudaSuccess) return error;
  if (id >= kKnown) return read_device(id, device);
  std::call_once(once[id], [id] { errors[id] = read_device(id, known[id]); });
  device = known[id];
  return errors[id];
}

QLinearProblem make_problem(const QLinearParams& p) {
  QLinearProblem q{};
  const int64_t pad = mma16::pad_columns(p.format.bits);
  q.x = p.x;
  q.packed = p.packed;
  q.meta = reinterpret_cast<const __half*>(p.meta);
  q.input_scale = p.input_scale;
  q.dtype = p.dtype;
  q.format = p.format;
  q.activation_bits = p.format.scheme == Scheme::kInt8Dynamic ? 8 : p.activation_bits;
  q.m = static_cast<int32_t>(p.m);
  q.n = static_cast<int32_t>(p.n);
  q.k = static_cast<int32_t>(p.k);
  q.tiles = static_cast<int32_t>(ceil_div(p.n, mma16::kRows));
  q.blocks = static_cast<int32_t>(ceil_div(p.k, pad) * pad / kBlockColumns);
  q.groups = static_cast<int32_t>(group_count(p.format, p.k));
  q.group_columns = p.format.group_size;
  if (q.groups == 1) {
    q.group_columns = q.blocks * kBlockColumns;
    q.group_shift = 31;
  } else {
    q.group_shift = -1;
    for (int shift = 0; shift < 31; ++shift) {
      if (q.group_columns == 1 << shift) q.group_shift = shift;
    }
  }
  q.tile_bytes = mma16::is_row_major(p.format) ? mma16::kRows * mma16::row_pitch(p.k)
                                               : mma16::tile_bytes(p.format, p.k);
  q.zero = p.format.has_book() ? 0.0f : static_cast<float>(symmetric_zero(p.format));
  q.aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.k * dtype_bytes(p.dtype) % 16 == 0;
  Epilogue& e = q.epilogue;
  e.bias = p.bias;
  e.addend = p.addend;
  e.low_rank_x = p.low_rank_x;
  e.low_rank_w = p.low_rank_w;
  e.residual = p.residual;
  e.y = p.y;
  e.row_scale = nullptr;
  e.m = q.m;
  e.n = q.n;
  e.rank = p.low_rank_x != nullptr ? static_cast<int32_t>(p.rank) : 0;
  e.dtype = p.dtype;
  e.swiglu = p.swiglu;
  return q;
}

}  // namespace kvopt::cuda
