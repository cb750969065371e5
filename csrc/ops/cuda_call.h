// SPDX-License-Identifier: Apache-2.0
// The device and stream that torch is on, and CUDA errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops/checks.h"

// Declared here, and weak, because torch's header hides it unless USE_CUDA is set and a torch
// without CUDA does not define it: the module still loads there.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace kvopt::ops {

// Makes the tensor's device current for its lifetime and gives torch's current stream there.
class CudaCall {
 public:
  explicit CudaCall(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "kvopt: this torch has no CUDA, but a CUDA tensor came");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }

  void* stream() const { return stream_; }

  static void check(int error, const char* op) {
    STD_TORCH_CHECK(error == 0, op,
                    ": CUDA error: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace kvopt::ops
