// SPDX-License-Identifier: Apache-2.0
// Times of the quantised product beside cuBLAS in fp16, in one process.
//
// Copies of the weight rotate (more than 200 MB together, so nothing survives in L2), the calls
// over all copies are captured in one graph, the graphs of all contenders are replayed in turn, and
// the median replay counts. cuBLAS is looked up at run time; without it the ratio is left out.
// Columns: microseconds a call, GB/s of weight bytes (with scales), ratio to cuBLAS fp16.
#pragma once

#include <dlfcn.h>
#include <library_types.h>

#include <algorithm>
#include <functional>
#include <string>

#include "check_cuda.h"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/qlinear.h"
#include "cuda/wquant.h"

namespace kvopt::test {

// The few calls of cuBLAS that are needed, declared by hand so that building needs no cuBLAS.
class Cublas {
 public:
  Cublas() {
    for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
      if (library_ == nullptr) library_ = dlopen(name, RTLD_NOW);
    }
    if (library_ == nullptr) return;
    find(create_, "cublasCreate_v2");
    find(set_stream_, "cublasSetStream_v2");
    find(set_workspace_, "cublasSetWorkspace_v2");
    find(gemm_, "cublasGemmEx");
    if (create_(&handle_) != 0) handle_ = nullptr;
  }
  bool available() const { return handle_ != nullptr; }
  // y (m, n) = x (m, k) w (n, k)^T, all fp16, fp32 sums.
  void linear(const void* x, const void* w, void* y, int m, int n, int k, cudaStream_t stream) {
    static const DeviceBuffer<uint8_t> workspace(64 << 20);
    const float one = 1, zero = 0;
    int status = set_stream_(handle_, stream);
    status |= set_workspace_(handle_, workspace.get(), workspace.size());
    status |= gemm_(handle_, /*T*/ 1, /*N*/ 0, n, m, k, &one, w, CUDA_R_16F, k, x, CUDA_R_16F, k,
                    &zero, y, CUDA_R_16F, n, /*CUBLAS_COMPUTE_32F*/ 68, /*default*/ -1);
    if (status != 0) {
      std::fprintf(stderr, "cuBLAS status %d\n", status);
      std::exit(2);
    }
  }

 private:
  template <typename F>
  void find(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(library_, name));
  }
  void* library_ = nullptr;
  void* handle_ = nullptr;
  int (*create_)(void**) = nullptr;
  int (*set_stream_)(void*, cudaStream_t) = nullptr;
  int (*set_workspace_)(void*, void*, size_t) = nullptr;
  int (*gemm_)(void*, int, int, int, int, int, const void*, const void*, cudaDataType, int,
               const void*, cudaDataType, int, const void*, void*, cudaDataType, int, int,
               int) = nullptr;
};

__global__ void fill_kernel(uint32_t* data, size_t words, uint32_t mask, uint32_t bits) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < words;
       i += stride) {
    uint32_t v = static_cast<uint32_t>(i) * 2654435761u;
    v = (v ^ (v >> 15)) * 2246822519u;
    v = (v ^ (v >> 13)) * 3266489917u;
    data[i] = ((v ^ (v >> 16)) & mask) | bits;
  }
}

struct Contender {
  std::string name;
  double bytes;  // of one weight
  std::function<void(int copy, cudaStream_t)> call;
  int copies = 0;
  cudaGraphExec_t graph = nullptr;
  std::vector<float> times;
};

inline int bench() {
  constexpr size_t kPool = 640ull << 20;
  DeviceBuffer<uint8_t> dense(kPool), packed(kPool), meta_asym(kPool / 8), meta_sym(kPool / 8);
  const auto fill = [](const DeviceBuffer<uint8_t>& b, uint32_t mask, uint32_t bits) {
    fill_kernel<<<1024, 256>>>(reinterpret_cast<uint32_t*>(b.get()), b.size() / 4, mask, bits);
    CHECK_CUDA(cudaGetLastError());
  };
  fill(dense, 0x8FFF8FFF, 0x20002000);  // fp16 of random sign, 2^-7 .. 2^-4
  fill(packed, 0xFFFFFFFF, 0);
  fill(meta_asym, 0x000003FF, 0x48002000);  // {random scale, zero 8}
  fill(meta_sym, 0x03FF03FF, 0x20002000);
  DeviceBuffer<uint8_t> x(32 << 20), y(128 << 20), dequantised(480ull << 20), work(64 << 20);
  fill(x, 0x8FFF8FFF, 0x30003000);
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK_CUDA(cudaDeviceSynchronize());
  Cublas cublas;
  std::printf("%-6s %-6s %5s  %-22s %9s %8s %7s\n", "N", "K", "M", "contender", "us", "GB/s",
              "ratio");

  const int all_ms[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048};
  const int sizes[][2] = {{28672, 4096}, {4096, 4096}, {2048, 2048}, {16384, 2048}, {4096, 14336}};
  // Lists such as "1,16" and "28672x4096"; KVOPT_BENCH_NAME: part of a name.
  const auto wanted = [](const char* variable, const std::string& value) {
    const char* only = std::getenv(variable);
    return only == nullptr ||
           ("," + std::string(only) + ",").find("," + value + ",") != std::string::npos;
  };
  for (const auto& size : sizes) {
    const int n = size[0], k = size[1];
    if (!wanted("KVOPT_BENCH_SHAPE", std::to_string(n) + "x" + std::to_string(k))) continue;
    for (const int m : all_ms) {
      if (!wanted("KVOPT_BENCH_M", std::to_string(m))) continue;
      std::vector<Contender> contenders;
      if (cublas.available()) {
        contenders.push_back({"cuBLAS fp16", 2.0 * n * k, [&, n, k, m](int copy, cudaStream_t s) {
                                cublas.linear(x.get(), dense.get() + 2ull * copy * n * k, y.get(),
                                              m, n, k, s);
                              }});
      }
      const auto parameters = [=, &x, &y, &packed, &meta_asym, &meta_sym, &work](
                                  const QuantFormat& f, DType dtype, int copy) {
        const int64_t bytes = mma16::packed_bytes(f, n, k), metas = mma16::meta_count(f, n, k) * 2;
        QLinearParams p{};
        p.m = m;
        p.n = n;
        p.k = k;
        p.dtype = dtype;
        p.format = f;
        p.activation_bits = f.scheme == Scheme::kInt8Dynamic ? 8 : 16;
        p.x = x.get();
        p.packed = packed.get() + copy * bytes;
        p.meta = reinterpret_cast<const uint16_t*>((f.has_zeros() ? meta_asym : meta_sym).get() +
                                                   copy * metas);
        p.y = y.get();
        p.workspace = work.get();
        return p;
      };
      const auto add = [&](const char* name, QuantFormat f, DType dtype, bool tiled = false) {
        const int64_t bytes = mma16::packed_bytes(f, n, k), metas = mma16::meta_count(f, n, k) * 2;
        contenders.push_back(
            {name, static_cast<double>(bytes + metas), [=](int copy, cudaStream_t s) {
               const QLinearParams p = parameters(f, dtype, copy);
               if (!tiled) {
                 CHECK_CUDA(cuda::qlinear(p, s));
                 return;
               }
               cuda::Device device{};
               CHECK_CUDA(cuda::query_device(device));
               CHECK_CUDA(cuda::launch_gemm(cuda::make_problem(p),
                                            {static_cast<const __half*>(p.x), p.k, nullptr}, device,
                                            s));
             }});
      };
      constexpr Scheme kAsym = Scheme::kAsymmetric, kSym = Scheme::kSymmetric;
      const DType half = DType::kFloat16;
      add("w4 g128", {4, 128, kAsym}, half);
      add("w4 g128 bf16", {4, 128, kAsym}, DType::kBFloat16);
      add("w8 channel sym", {8, k, kSym}, half);
      add("w3 g128", {3, 128, kAsym}, half);
      add("w2 g128", {2, 128, kAsym}, half);
      add("nf4 g64", {4, 64, Scheme::kNf4}, half);
      add("w8a8", {8, k, Scheme::kInt8Dynamic}, half);
      add("w4 g128 mma.sync", {4, 128, kAsym}, half, true);
      add("w8 channel mma.sync", {8, k, kSym}, half, true);
      add("nf4 g64 mma.sync", {4, 64, Scheme::kNf4}, half, true);
      if (m <= 16) add("w4 g128 fp32", {4, 128, kAsym}, DType::kFloat32);
      if (m >= 64 && cublas.available()) {
        const QuantFormat f{4, 128, kAsym};
        contenders.push_back(
            {"w4 dequantise + cuBLAS",
             static_cast<double>(mma16::packed_bytes(f, n, k) + mma16::meta_count(f, n, k) * 2),
             [=, &x, &y, &dequantised, &cublas](int copy, cudaStream_t s) {
               const QLinearParams p = parameters(f, half, copy);
               const DequantizeParams d{n, k, half, f, p.packed, p.meta, dequantised.get()};
               CHECK_CUDA(cuda::wquant_dequantize(d, s));
               cublas.linear(x.get(), dequantised.get(), y.get(), m, n, k, s);
             }});
      }
      // Bytes read and written, beside a copy's.
      if (m == 1) {
        const auto dequantise = [&](const char* name, QuantFormat f) {
          contenders.push_back(
              {name,
               static_cast<double>(mma16::packed_bytes(f, n, k) + mma16::meta_count(f, n, k) * 2) +
                   2.0 * n * k,
               [=, &dequantised](int copy, cudaStream_t s) {
                 const QLinearParams p = parameters(f, half, copy);
                 const size_t to =
                     static_cast<size_t>(copy) % (dequantised.size() / (2ull * n * k));
                 const DequantizeParams d{
                     n, k, half, f, p.packed, p.meta, dequantised.get() + to * 2ull * n * k};
                 CHECK_CUDA(cuda::wquant_dequantize(d, s));
               }});
        };
        dequantise("dequantise w4 g128", {4, 128, kAsym});
        dequantise("dequantise w8 channel", {8, k, kSym});
        dequantise("dequantise w3 g128", {3, 128, kAsym});
        dequantise("dequantise nf4 g64", {4, 64, Scheme::kNf4});
        contenders.push_back(
            {"copy", 4.0 * n * k, [=, &dense, &dequantised](int copy, cudaStream_t s) {
               const size_t bytes = 2ull * n * k;
               const size_t to = static_cast<size_t>(copy) % (dequantised.size() / bytes);
               CHECK_CUDA(cudaMemcpyAsync(dequantised.get() + to * bytes,
                                          dense.get() + copy % (dense.size() / bytes) * bytes,
                                          bytes, cudaMemcpyDeviceToDevice, s));
             }});
      }
      if (const char* part = std::getenv("KVOPT_BENCH_NAME")) {
        std::erase_if(contenders, [&](const Contender& c) {
          return c.name.find(part) == std::string::npos && c.name != "cuBLAS fp16" &&
                 c.name != "copy";
        });
      }
      for (Contender& c : contenders) {
        c.copies = std::max(2, static_cast<int>(std::min(240e6 / c.bytes + 1,
                                                         static_cast<double>(kPool) / c.bytes)));
        const int calls = std::max(c.copies, 20);
        c.call(0, stream);
        CHECK_CUDA(cudaStreamSynchronize(stream));
        cudaGraph_t graph;
        CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < calls; ++i) c.call(i % c.copies, stream);
        CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
        CHECK_CUDA(cudaGraphInstantiate(&c.graph, graph, 0));
        CHECK_CUDA(cudaGraphDestroy(graph));
        c.copies = calls;
      }
      cudaEvent_t begin, end;
      CHECK_CUDA(cudaEventCreate(&begin));
      CHECK_CUDA(cudaEventCreate(&end));
      for (int round = 0; round < 24; ++round) {
        for (Contender& c : contenders) {
          CHECK_CUDA(cudaEventRecord(begin, stream));
          CHECK_CUDA(cudaGraphLaunch(c.graph, stream));
          CHECK_CUDA(cudaEventRecord(end, stream));
          CHECK_CUDA(cudaEventSynchronize(end));
          float ms = 0;
          CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
          if (round >= 3) c.times.push_back(ms * 1000 / static_cast<float>(c.copies));
        }
      }
      double baseline = 0;
      for (Contender& c : contenders) {
        std::sort(c.times.begin(), c.times.end());
        const double us = c.times[c.times.size() / 2];
        if (c.name == "cuBLAS fp16") baseline = us;
        std::printf("%-6d %-6d %5d  %-22s %9.2f %8.0f %7.2f\n", n, k, m, c.name.c_str(), us,
                    c.bytes / us * 1e-3, baseline / us);
        CHECK_CUDA(cudaGraphExecDestroy(c.graph));
      }
      CHECK_CUDA(cudaEventDestroy(begin));
      CHECK_CUDA(cudaEventDestroy(end));
    }
  }
  CHECK_CUDA(cudaStreamDestroy(stream));
  return 0;
}

}  // namespace kvopt::test
