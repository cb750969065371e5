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
#include <string>
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

// What to time; zero and empty mean everything.
struct Selection {
  int64_t megabytes = 1024;  // of rotating weights
  int64_t k = 0;
  int64_t n = 0;
  int64_t rows = 0;
  std::string format;
};

struct NamedFormat {
  const char* name;
  QuantFormat format;
};

constexpr NamedFormat kBenchFormats[] = {
    {"int8", {8, 128, Scheme::kSymmetric}},  {"int4", {4, 128, Scheme::kAsymmetric}},
    {"int3", {3, 128, Scheme::kAsymmetric}}, {"int2", {2, 64, Scheme::kAsymmetric}},
    {"nf4", {4, 64, Scheme::kNf4}},          {"fp4", {4, 64, Scheme::kFp4}},
};

// Copies of a weight, one after the other; random codes, harmless scales.
struct Weights {
  Weights(const QuantFormat& f, const Shape& shape, int64_t megabytes)
      : packed(tile32::packed_bytes(f, shape.n, shape.k)),
        both(ceil_div(packed + tile32::meta_count(f, shape.n, shape.k) * 2, 64) * 64),
        copies(std::max<int64_t>(1, megabytes * 1000000 / both)),
        data(allocate(copies * both + 64)) {
    for (int64_t c = 0; c < copies; ++c) {
      uint16_t* meta = reinterpret_cast<uint16_t*>(data + c * both + packed);
      for (int64_t i = 0; i < (both - packed) / 2; ++i) meta[i] = 0x2000;
    }
  }
  ~Weights() { std::free(data); }
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;
  int64_t packed, both, copies;
  uint8_t* data;
};

inline void time_product(cpu::Isa isa, const NamedFormat& named, const Shape& shape, int64_t rows,
                         const Weights& weights, Pair& pair) {
  static volatile uint64_t sink = 0;
  std::vector<float> x(static_cast<size_t>(rows * shape.k)), y(static_cast<size_t>(rows * shape.n));
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(static_cast<int>(i * 37 % 101) - 50);
  }
  QLinearParams p = {};
  p.m = rows, p.n = shape.n, p.k = shape.k;
  p.dtype = DType::kFloat32;
  p.format = named.format;
  p.x = x.data();
  p.y = y.data();
  p.activation_bits = 16;
  const cpu::QLinearKernels& kernels = cpu::qlinear_kernels(p, isa);
  const int64_t scratch = kernels.workspace_bytes(p);
  p.workspace = std::aligned_alloc(64, static_cast<size_t>((scratch + 127) / 64 * 64));
  const int64_t tiles = ceil_div(shape.n, tile32::kRows);
  for (int threads : {1, 2}) {
    std::vector<double> product, plain;
    int64_t copy = 0;
    double spent = 0;
    while (spent < 0.8 || product.size() < 5) {
      copy = (copy + 1) % weights.copies;
      QLinearParams q = p;
      q.packed = weights.data + copy * weights.both;
      q.meta = reinterpret_cast<const uint16_t*>(q.packed + weights.packed);
      product.push_back(seconds([&] {
        if (rows == 1) {
          kernels.prepare(q, 0, 1);
        } else {
          pair.run(threads, [&](int t) {
            kernels.prepare(q, rows * t / threads, rows * (t + 1) / threads);
          });
        }
        pair.run(threads,
                 [&](int t) { kernels.run(q, tiles * t / threads, tiles * (t + 1) / threads); });
      }));
      copy = (copy + 1) % weights.copies;
      const uint8_t* other = weights.data + copy * weights.both;
      plain.push_back(seconds([&] {
        pair.run(threads, [&](int t) {
          const int64_t part = weights.both / threads / 128 * 128;
          sink = sink + read(other + t * part, part);
        });
      }));
      spent += product.back() + plain.back();
    }
    const double time = median(product);
    const double bytes = static_cast<double>(weights.both);
    std::printf(
        "%-6s %-5s K=%-5lld N=%-5lld M=%-3lld %dT: %8.3f ms  %5.1f GB/s, best %5.1f (plain read "
        "%5.1f, best %5.1f: %3.0f %%)  %6.0f GOPS\n",
        cpu::isa_name(isa), named.name, static_cast<long long>(shape.k),
        static_cast<long long>(shape.n), static_cast<long long>(rows), threads, time * 1e3,
        bytes / time * 1e-9, bytes / *std::min_element(product.begin(), product.end()) * 1e-9,
        bytes / median(plain) * 1e-9, bytes / *std::min_element(plain.begin(), plain.end()) * 1e-9,
        100 * median(plain) / time,
        2.0 * static_cast<double>(rows * shape.n * shape.k) / time * 1e-9);
    std::fflush(stdout);
  }
  std::free(p.workspace);
}

inline void run(const std::vector<cpu::Isa>& isas, const Selection& only) {
  constexpr Shape kShapes[] = {
      {4096, 28672}, {2048, 2048}, {2048, 16384}, {8192, 2048}, {4096, 4096}};
  constexpr int64_t kRowCounts[] = {1, 2, 4, 8, 16, 64, 256};
  Pair pair;
  std::printf(
      "GB/s: weight bytes (codes and scales) per second; GOPS: 2 M N K per second; medians; %%: of "
      "the plain read beside it\n");
  for (cpu::Isa isa : isas) {
    for (const NamedFormat& named : kBenchFormats) {
      if (!only.format.empty() && only.format != named.name) continue;
      for (const Shape& shape : kShapes) {
        if (only.k != 0 && (only.k != shape.k || only.n != shape.n)) continue;
        const Weights weights(named.format, shape, only.megabytes);
        if (only.rows != 0) {
          time_product(isa, named, shape, only.rows, weights, pair);
          continue;
        }
        for (int64_t rows : kRowCounts) {
          if (rows > 1 && shape.k != 4096 && shape.n != 16384) continue;
          if (rows > 16 && shape.n == 28672) continue;
          if (isa == cpu::Isa::kScalar && rows > 16) continue;
          time_product(isa, named, shape, rows, weights, pair);
        }
      }
    }
  }
}

}  // namespace kvopt::bench
