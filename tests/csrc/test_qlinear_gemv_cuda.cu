// SPDX-License-Identifier: Apache-2.0
// The matrix-vector kernel against fp64, and its times beside cuBLAS.
//
//   test_qlinear_gemv_cuda [--seed S]   checks; exit code 1 when one fails
//   test_qlinear_gemv_cuda --quick      few shapes, for a sanitizer
//   test_qlinear_gemv_cuda --bench [list of M] [part of a contender's name, or =name] [N]
//
// Times: copies of a weight rotate (240 MB together, so nothing survives in L2), the calls over all
// copies are captured in one graph, the graphs of all contenders are replayed in turn, and the
// median replay counts. Columns: microseconds a call, GB/s of weight bytes (with scales), ratio to
// cuBLAS fp16.
#include <algorithm>
#include <chrono>
#include <random>

#include "bench_qlinear_cuda.h"
#include "cuda/device/qlinear_problem.cuh"
#include "qlinear_cuda_fixture.h"

namespace kvopt::test {
namespace {

bool fits(const QLinearParams& p) {
  cuda::Device device{};
  CHECK_CUDA(cuda::query_device(device));
  return cuda::gemv_fits(cuda::make_problem(p), device);
}

int launch(const QLinearParams& p, cudaStream_t stream) {
  cuda::Device device{};
  if (const int error = cuda::query_device(device); error != cudaSuccess) return error;
  const cuda::QLinearProblem problem = cuda::make_problem(p);
  if (!cuda::gemv_fits(problem, device)) return cudaErrorInvalidValue;
  return cuda::launch_gemv(problem, device, stream);
}

// Codes enter the sums exactly; activations do too, but for input_scale (Reference's own term).
constexpr Tolerance kExact{false, 0};

void check_product(Random& random, const Weight& w, DType dtype, const Parts& parts,
                   const std::vector<int64_t>& ms) {
  const Product product(random, w, dtype, parts, ms.back());
  const std::vector<Reference> reference = product.reference(ms.back());
  for (const int64_t m : ms) {
    if (!fits(product.params(m))) continue;
    RunOptions options;
    options.misaligned = random.below(4) == 0;
    const auto y = product.run(m, launch, options);
    product.compare(m, reference, y, kExact);
    if (random.below(4) != 0) continue;
    expect(product.run(m, launch, options) == y, product.name(m) + ": second run differs");
    options.graph = true;
    expect(product.run(m, launch, options) == y, product.name(m) + ": graph differs");
  }
}

// A chain of products, each fed by the one before, with nothing but stream order between them:
// launches may overlap (programmatic dependent launch), their results may not.
void check_chain(Random& random, DType dtype, int64_t m, QuantFormat format) {
  constexpr int64_t kSize = 1536;
  constexpr int kSteps = 6;
  Weight w = random_weight(random, kSize, kSize, format);
  for (auto& s : w.scale) {
    s = half_bits(static_cast<float>((1 + random.uniform()) * 0.06 / (1 << format.bits)));
  }
  pack_on_host(w);
  const size_t bytes = m * kSize * dtype_bytes(dtype);
  std::vector<uint8_t> start(bytes);
  for (int64_t i = 0; i < m * kSize; ++i) {
    store(dtype, start.data(), i, static_cast<float>(random.normal()));
  }
  const DeviceBuffer<uint8_t> source(w.packed), packed(w.packed.size());
  const DeviceBuffer<uint16_t> meta(w.meta);
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto run = [&](bool step_by_step) {
    const DeviceBuffer<uint8_t> even(start), odd(bytes);
    odd.poison();
    packed.poison();
    CHECK_CUDA(cudaDeviceSynchronize());
    CHECK_CUDA(cudaMemcpyAsync(packed.get(), source.get(), source.size(), cudaMemcpyDeviceToDevice,
                               stream));
    for (int step = 0; step < kSteps; ++step) {
      if (step_by_step) CHECK_CUDA(cudaStreamSynchronize(stream));
      QLinearParams p{};
      p.m = m;
      p.n = p.k = kSize;
      p.dtype = dtype;
      p.format = w.format;
      p.activation_bits = 16;
      p.x = step % 2 == 0 ? even.get() : odd.get();
      p.y = step % 2 == 0 ? odd.get() : even.get();
      p.packed = packed.get();
      p.meta = meta.get();
      CHECK_CUDA(launch(p, stream));
    }
    CHECK_CUDA(cudaStreamSynchronize(stream));
    return even.host();
  };
  const auto expected = run(true);
  bool same = true, finite = true;
  for (int i = 0; i < 20; ++i) same = same && run(false) == expected;
  for (int64_t i = 0; i < m * kSize; ++i) {
    finite = finite && std::isfinite(load(dtype, expected.data(), i));
  }
  const std::string name =
      "chain " + name_of(format) + " " + test::name_of(dtype) + " M" + std::to_string(m);
  expect(same, name);
  expect(finite, name + ": not finite");
  CHECK_CUDA(cudaStreamDestroy(stream));
}

struct BitsAndScheme {
  int bits;
  Scheme scheme;
};
constexpr BitsAndScheme kSchemes[] = {{2, Scheme::kAsymmetric}, {3, Scheme::kAsymmetric},
                                      {4, Scheme::kAsymmetric}, {8, Scheme::kAsymmetric},
                                      {2, Scheme::kSymmetric},  {3, Scheme::kSymmetric},
                                      {4, Scheme::kSymmetric},  {8, Scheme::kSymmetric},
                                      {4, Scheme::kNf4},        {4, Scheme::kFp4}};

void check_all(uint64_t seed, bool quick) {
  Random random(seed);
  struct Size {
    int64_t n, k;
  };
  std::vector<Size> sizes = {{1, 1},    {1, 16},    {15, 17},  {16, 64},   {17, 65},   {33, 100},
                             {40, 704}, {130, 333}, {48, 192}, {72, 1032}, {520, 456}, {96, 2048}};
  std::vector<int64_t> ms = {1, 2, 3, 4, 5, 6, 7, 8};
  if (quick) {
    sizes = {{17, 65}, {48, 704}, {130, 333}, {4304, 136}};  // the last: several tiles a block
    ms = {1, 5, 8};
  }
  const std::vector<DType> types = {DType::kFloat16, DType::kBFloat16};
  if (!quick) {
    for (const DType dtype : types) {
      check_chain(random, dtype, 1, {4, 128, Scheme::kAsymmetric});
      check_chain(random, dtype, 3, {8, 1536, Scheme::kSymmetric});
      check_chain(random, dtype, 8, {4, 64, Scheme::kNf4});
    }
  }
  for (const Size size : sizes) {
    for (const BitsAndScheme scheme : kSchemes) {
      for (const int64_t group : {int64_t{16}, int64_t{32}, int64_t{48}, int64_t{64}, int64_t{96},
                                  int64_t{128}, int64_t{256}, size.k}) {
        if (quick && random.below(3) != 0) continue;
        const QuantFormat format{scheme.bits, static_cast<int32_t>(group), scheme.scheme};
        const Zeros zeros = random.below(3) == 0 ? Zeros::kFractional : Zeros::kInteger;
        const Weight w = random_weight(random, size.n, size.k, format, zeros);
        for (const DType dtype : types) {
          const Parts parts = random.below(2) == 0 ? Parts{} : random_parts(random, w);
          check_product(random, w, dtype, parts, ms);
          Product product(random, w, dtype, random_parts(random, w), 8);
          product.check_special_values(random, 1 + random.below(8), launch);
        }
      }
    }
  }
  if (quick) return;
  // Many tiles, so that blocks take several; long rows.
  for (const Size size : {Size{2050, 200}, Size{4100, 1000}, Size{16390, 72}, Size{28672, 136},
                          Size{4096, 4096}, Size{48, 14336}, Size{1000, 16384}}) {
    for (const BitsAndScheme scheme : kSchemes) {
      const int64_t groups[] = {16, 64, 128, 80, size.k};
      const QuantFormat format{scheme.bits, static_cast<int32_t>(groups[random.below(5)]),
                               scheme.scheme};
      if (size.n * size.k > (5 << 20) && random.below(3) != 0) continue;
      const Weight w = random_weight(random, size.n, size.k, format);
      for (const DType dtype : types) {
        check_product(random, w, dtype, random_parts(random, w), {1, 2, 7});
      }
    }
  }
}

int bench_gemv(const std::string& ms, const std::string& part, int only_n) {
  constexpr size_t kPool = 640ull << 20;
  DeviceBuffer<uint8_t> dense(kPool), packed(kPool), zeros(kPool / 8), scales(kPool / 8);
  const auto fill = [](const DeviceBuffer<uint8_t>& b, uint32_t mask, uint32_t bits) {
    fill_kernel<<<1024, 256>>>(reinterpret_cast<uint32_t*>(b.get()), b.size() / 4, mask, bits);
    CHECK_CUDA(cudaGetLastError());
  };
  fill(dense, 0x8FFF8FFF, 0x20002000);  // fp16 of random sign, 2^-7 .. 2^-4
  fill(packed, 0xFFFFFFFF, 0);
  fill(zeros, 0x000003FF, 0x48002000);  // {random scale, zero 8}
  fill(scales, 0x03FF03FF, 0x20002000);
  DeviceBuffer<uint8_t> x(16 << 20), y(64 << 20);
  fill(x, 0x8FFF8FFF, 0x30003000);
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK_CUDA(cudaDeviceSynchronize());
  Cublas cublas;
  std::printf("%-6s %-6s %3s  %-14s %9s %8s %7s\n", "N", "K", "M", "contender", "us", "GB/s",
              "ratio");
  const int sizes[][2] = {{28672, 4096}, {4096, 4096}, {2048, 2048}, {16384, 2048}, {4096, 14336}};
  for (const auto& size : sizes) {
    const int n = size[0], k = size[1];
    if (only_n != 0 && n != only_n) continue;
    for (const int m : {1, 2, 4, 8}) {
      if (("," + ms + ",").find("," + std::to_string(m) + ",") == std::string::npos) continue;
      std::vector<Contender> contenders;
      if (cublas.available()) {
        contenders.push_back({"cuBLAS fp16", 2.0 * n * k, [&, n, k, m](int copy, cudaStream_t s) {
                                cublas.linear(x.get(), dense.get() + 2ull * copy * n * k, y.get(),
                                              m, n, k, s);
                              }});
      }
      const auto add = [&](const char* name, QuantFormat f, DType dtype, int activation_bits = 16) {
        if (part[0] == '=' ? part.substr(1) != name
                           : std::string(name).find(part) == std::string::npos)
          return;
        const int64_t bytes = mma16::packed_bytes(f, n, k), metas = mma16::meta_count(f, n, k) * 2;
        QLinearParams p{};
        p.m = m;
        p.n = n;
        p.k = k;
        p.dtype = dtype;
        p.format = f;
        p.activation_bits = activation_bits;
        p.x = x.get();
        p.y = y.get();
        p.packed = packed.get();
        p.meta = reinterpret_cast<const uint16_t*>((f.has_zeros() ? zeros : scales).get());
        if (!fits(p)) return;
        contenders.push_back(
            {name, static_cast<double>(bytes + metas), [=](int copy, cudaStream_t s) mutable {
               QLinearParams q = p;
               q.packed += copy * bytes;
               q.meta += copy * metas / 2;
               CHECK_CUDA(launch(q, s));
             }});
      };
      add("w4 g128", {4, 128, Scheme::kAsymmetric}, DType::kFloat16);
      add("w4 g128 bf16", {4, 128, Scheme::kAsymmetric}, DType::kBFloat16);
      add("w4 g128 a8", {4, 128, Scheme::kAsymmetric}, DType::kFloat16, 8);
      add("w4 g32", {4, 32, Scheme::kAsymmetric}, DType::kFloat16);
      add("w8 channel", {8, k, Scheme::kSymmetric}, DType::kFloat16);
      add("w3 g128", {3, 128, Scheme::kAsymmetric}, DType::kFloat16);
      add("w2 g128", {2, 128, Scheme::kAsymmetric}, DType::kFloat16);
      add("nf4 b64", {4, 64, Scheme::kNf4}, DType::kFloat16);
      for (Contender& c : contenders) {
        const int copies = std::max(
            2,
            static_cast<int>(std::min(240e6 / c.bytes + 1, static_cast<double>(kPool) / c.bytes)));
        c.copies = std::max(copies, 20);
        c.call(0, stream);
        CHECK_CUDA(cudaStreamSynchronize(stream));
        cudaGraph_t graph;
        CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < c.copies; ++i) c.call(i % copies, stream);
        CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
        CHECK_CUDA(cudaGraphInstantiate(&c.graph, graph, 0));
        CHECK_CUDA(cudaGraphDestroy(graph));
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
          float milliseconds = 0;
          CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin, end));
          if (round >= 3) c.times.push_back(milliseconds * 1000 / static_cast<float>(c.copies));
        }
      }
      double baseline = 0;
      for (Contender& c : contenders) {
        std::sort(c.times.begin(), c.times.end());
        const double us = c.times[c.times.size() / 2];
        if (c.name == "cuBLAS fp16") baseline = us;
        std::printf("%-6d %-6d %3d  %-14s %9.2f %8.0f %7.2f\n", n, k, m, c.name.c_str(), us,
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

}  // namespace
}  // namespace kvopt::test

int main(int argc, char** argv) {
  uint64_t seed = std::random_device{}();
  bool quick = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--seed" && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (argument == "--quick") {
      quick = true;
    } else if (argument == "--bench") {
      return kvopt::test::bench_gemv(i + 1 < argc ? argv[i + 1] : "1,2,4,8",
                                     i + 2 < argc ? argv[i + 2] : "",
                                     i + 3 < argc ? std::atoi(argv[i + 3]) : 0);
    } else {
      std::fprintf(stderr, "usage: %s [--seed S] [--quick] [--bench [Ms] [name] [N]]\n", argv[0]);
      return 2;
    }
  }
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  const auto begin = std::chrono::steady_clock::now();
  kvopt::test::check_all(seed, quick);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  std::printf("%lld checks, %d failures, %.1f s\n", static_cast<long long>(kvopt::test::checks),
              kvopt::test::failures, seconds.count());
  return kvopt::test::failures == 0 ? 0 : 1;
}
