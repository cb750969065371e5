// SPDX-License-Identifier: Apache-2.0
#include "host/read_probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/huge_pages.h"

namespace kvopt::host {
namespace {

// Eight independent sums, so that the loop waits for memory and not for an addition.
uint64_t sum_range(const uint64_t* data, size_t count) {
  uint64_t sums[8] = {};
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __builtin_prefetch(data + i + 256);
    for (int j = 0; j < 8; ++j) sums[j] += data[i + j];
  }
  for (; i < count; ++i) sums[0] += data[i];
  return sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
}

}  // namespace

ReadProbe::ReadProbe(size_t bytes) : count_(bytes / sizeof(uint64_t)) {
  if (count_ == 0) throw std::invalid_argument("ReadProbe: bytes must be at least 8");
  const size_t pages = (bytes + cpu::kHugePageBytes - 1) / cpu::kHugePageBytes;
  const size_t rounded = pages * cpu::kHugePageBytes;
  buffer_.reset(static_cast<uint64_t*>(std::aligned_alloc(cpu::kHugePageBytes, rounded)));
  if (buffer_ == nullptr) throw std::bad_alloc();
  cpu::advise_huge_pages(buffer_.get(), rounded, 0, rounded);
  std::fill_n(buffer_.get(), count_, uint64_t{0x9E3779B97F4A7C15});
}

double ReadProbe::run(int threads) {
  if (threads < 1) throw std::invalid_argument("ReadProbe.run: threads must be at least 1");
  std::atomic<uint64_t> sink{0};
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  const auto work = [&](int t) {
    const size_t begin = count_ * t / threads, end = count_ * (t + 1) / threads;
    ready.fetch_add(1);
    while (!go.load(std::memory_order_acquire)) {
    }
    sink.fetch_add(sum_range(buffer_.get() + begin, end - begin));
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  while (ready.load() < threads - 1) {
  }
  const auto start = std::chrono::steady_clock::now();
  go.store(true, std::memory_order_release);
  work(0);
  for (std::thread& thread : others) thread.join();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  volatile uint64_t keep = sink.load();  // the sums are not to be optimised away
  (void)keep;
  return static_cast<double>(count_ * sizeof(uint64_t)) / seconds.count();
}

}  // namespace kvopt::host
