// SPDX-License-Identifier: Apache-2.0
// What the CUDA test programs share: checked calls, device buffers, seeded random numbers,
// host-side types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "common/params.h"

#define CHECK_CUDA(call)                                                       \
  do {                                                                         \
    const int check_error = static_cast<int>(call);                            \
    if (check_error != 0) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call,       \
                   cudaGetErrorString(static_cast<cudaError_t>(check_error))); \
      std::exit(2);                                                            \
    }                                                                          \
  } while (0)

namespace kvopt::test {

template <typename T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t count) : count_(count) {
    CHECK_CUDA(cudaMalloc(&data_, (count == 0 ? 1 : count) * sizeof(T)));
  }
  explicit DeviceBuffer(const std::vector<T>& host) : DeviceBuffer(host.size()) {
    CHECK_CUDA(cudaMemcpy(data_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) cudaFree(data_);
  }
  T* get() const { return data_; }
  size_t size() const { return count_; }
  void poison() const { CHECK_CUDA(cudaMemset(data_, 0xFF, count_ * sizeof(T))); }
  std::vector<T> host() const {
    std::vector<T> out(count_);
    CHECK_CUDA(cudaMemcpy(out.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }

 private:
  void swap(DeviceBuffer& other) {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
  }
  T* data_ = nullptr;
  size_t count_ = 0;
};

// SplitMix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  double normal() {
    const double u = 1.0 - uniform();
    return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * uniform());
  }

 private:
  uint64_t state_;
};

inline uint16_t half_bits(float v) {
  const __half h = __float2half_rn(v);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

inline float half_value(uint16_t bits) {
  __half h;
  std::memcpy(static_cast<void*>(&h), &bits, 2);
  return __half2float(h);
}

// One element of `dtype`, as bytes and as a number.
inline void store(DType dtype, void* target, int64_t i, float v) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(target)[i] = v;
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(target)[i] = __float2half_rn(v);
  } else {
    static_cast<__nv_bfloat16*>(target)[i] = __float2bfloat16_rn(v);
  }
}

inline float load(DType dtype, const void* source, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(source)[i];
  if (dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(source)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(source)[i]);
}

inline double rounded(DType dtype, double v) {
  uint32_t slot = 0;
  store(dtype, &slot, 0, static_cast<float>(v));
  return load(dtype, &slot, 0);
}

// Half a unit in the last place, relative.
inline double unit_roundoff(DType dtype) {
  return dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
}

inline const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "fp32" : dtype == DType::kFloat16 ? "fp16" : "bf16";
}

}  // namespace kvopt::test
