// SPDX-License-Identifier: Apache-2.0
// The timings of `test_qlinear_cpu --bench`: each product beside a plain read of buffers of the
// same size, interleaved; the weights rotate through copies, so that they come from memory.
// Medians.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/params.h"
#include "cpu/isa.h"
#include "cpu/qlinear.h"

namespace kvopt::bench {

// Two threads that spin for work: a product of 60 microseconds would drown in the start of a
// thread.
class Pair {
 public:
  Pair() : helper_([this] { loop(); }) {}
  ~Pair() {
    stop_ = true;
    helper_.join();
  }
  void run(int threads, const std::function<void(int)>& work) {
    if (threads == 1) return work(0);
    work_ = &work;
    ready_.store(true, std::memory_order_release);
    work(1);
    while (ready_.load(std::memory_order_acquire)) {
    }
  }

 private:
  void loop() {
    while (!stop_) {
      if (!ready_.load(std::memory_order_acquire)) continue;
      (*work_)(0);
      ready_.store(false, std::memory_order_release);
    }
  }
  std::atomic<bool> ready_ = false;
  std::atomic<bool> stop_ = false;
  const std::function<void(int)>* work_ = nullptr;
  std::thread helper_;
};

inline uint8_t* allocate(int64_t bytes) {
  constexpr size_t kHuge = size_t{2} << 20;
  const size_t size = (static_cast<size_t>(bytes) + kHuge - 1) / kHuge * kHuge;
  uint8_t* data = static_cast<uint8_t*>(std::aligned_alloc(kHuge, size));
#if defined(__linux__)
  madvise(data, size, MADV_HUGEPAGE);
#endif
  for (size_t i = 0; i < size; ++i) data[i] = static_cast<uint8_t>(i * 2654435761u >> 24);
  return data;
}

// Reads [data, data + bytes), a multiple of 64, as fast as one thread can.
#if defined(__x86_64__)
__attribute__((target("avx2")))
#endif
inline uint64_t read(const uint8_t* data, int64_t bytes) {
  typedef int64_t Vector __attribute__((vector_size(32)));
  Vector sums[4] = {};
  for (int64_t i = 0; i + 128 <= bytes; i += 128) {
    __builtin_prefetch(data + i + 2048);
    __builtin_prefetch(data + i + 2048 + 64);
    for (int v = 0; v < 4; ++v) {
      Vector value;
      std::memcpy(&value, data + i + v * 32, sizeof(value));
      sums[v] ^= value;
    }
  }
  sums[0] ^= sums[1] ^ sums[2] ^ sums[3];
  return static_cast<uint64_t>(sums[0][0] ^ sums[0][1] ^ sums[0][2] ^ sums[0][3]);
}

inline double seconds(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

inline double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

struct Shape {
  int64_t k, n;
};

// `only_k`, `only_n`: one shape instead of all; 0 for all.
inline void run(const std::vector<cpu::Isa>& isas, int64_t megabytes, int64_t only_k,
                int64_t only_n) {
  constexpr Shape kShapes[] = {
      {4096, 28672}, {2048, 2048}, {2048, 16384}, {8192, 2048}, {4096, 4096}};
  constexpr int64_t kRowCounts[] = {1, 2, 4, 8, 16, 64, 256};
  Pair pair;
  volatile uint64_t sink = 0;
  std::printf(
      "GB/s: weight bytes (codes and scales) per second; GOPS: 2 M N K per second; medians\n");
  for (cpu::Isa isa : isas) {
    for (int bits : {4, 8}) {
      for (const Shape& shape : kShapes) {
        if (only_k != 0 && (only_k != shape.k || only_n != shape.n)) continue;
        const QuantFormat f = {bits, 128, bits == 8};
        const int64_t packed = tile32::packed_bytes(f, shape.n, shape.k);
        const int64_t meta = tile32::meta_count(f, shape.n, shape.k) * 2;
        const int64_t both = packed + meta;
        const int64_t copies = std::max<int64_t>(1, megabytes * 1000000 / both);
        uint8_t* weights = allocate(copies * both + 64);
        for (int64_t c = 0; c < copies; ++c) {  // harmless scales
          uint16_t* m = reinterpret_cast<uint16_t*>(weights + c * both + packed);
          for (int64_t i = 0; i < meta / 2; ++i) m[i] = 0x2000;
        }
        for (int64_t rows : kRowCounts) {
          if (rows > 1 && shape.k != 4096 && shape.n != 16384) continue;
          if (rows > 16 && shape.n == 28672) continue;
          if (isa == cpu::Isa::kScalar && rows > 16) continue;
          std::vector<float> x(static_cast<size_t>(rows * shape.k)),
              y(static_cast<size_t>(rows * shape.n));
          for (size_t i = 0; i < x.size(); ++i)
            x[i] = static_cast<float>(static_cast<int>(i * 37 % 101) - 50);
          QLinearParams p = {rows,    shape.n, shape.k, DType::kFloat32, f,      x.data(),
                             nullptr, nullptr, nullptr, y.data(),        nullptr};
          const int64_t scratch = cpu::qlinear_workspace_bytes(p, isa);
          p.workspace = std::aligned_alloc(64, static_cast<size_t>((scratch + 127) / 64 * 64));
          const cpu::QLinearKernels& kernels = cpu::qlinear_kernels(isa);
          const int64_t tiles = ceil_div(shape.n, tile32::kRows);
          for (int threads : {1, 2}) {
            std::vector<double> product, plain;
            int64_t copy = 0;
            double spent = 0;
            while (spent < 1.0 || product.size() < 5) {
              copy = (copy + 1) % copies;
              QLinearParams q = p;
              q.packed = weights + copy * both;
              q.meta = reinterpret_cast<const uint16_t*>(q.packed + packed);
              product.push_back(seconds([&] {
                if (rows == 1) {
                  kernels.prepare(q, 0, 1);
                } else {
                  pair.run(threads, [&](int t) {
                    kernels.prepare(q, rows * t / threads, rows * (t + 1) / threads);
                  });
                }
                pair.run(threads, [&](int t) {
                  kernels.run(q, tiles * t / threads, tiles * (t + 1) / threads);
                });
              }));
              copy = (copy + 1) % copies;
              const uint8_t* other = weights + copy * both;
              plain.push_back(seconds([&] {
                pair.run(threads, [&](int t) {
                  const int64_t half = both / threads / 128 * 128;
                  sink = sink + read(other + t * half, half);
                });
              }));
              spent += product.back() + plain.back();
            }
            const double time = median(product);
            std::printf(
                "%-6s int%d K=%-5lld N=%-5lld M=%-3lld %dT: %8.3f ms  %5.1f GB/s (plain read "
                "%5.1f)  %6.0f GOPS\n",
                cpu::isa_name(isa), bits, static_cast<long long>(shape.k),
                static_cast<long long>(shape.n), static_cast<long long>(rows), threads, time * 1e3,
                static_cast<double>(both) / time * 1e-9,
                static_cast<double>(both) / median(plain) * 1e-9,
                2.0 * static_cast<double>(rows * shape.n * shape.k) / time * 1e-9);
            std::fflush(stdout);
          }
          std::free(p.workspace);
        }
        std::free(weights);
      }
    }
  }
}

}  // namespace kvopt::bench
