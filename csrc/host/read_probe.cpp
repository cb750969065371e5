// SPDX-License-Identifier: Apache-2.0
#include "host/read_probe.h"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

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

ReadProbe::ReadProbe(size_t bytes) : buffer_(bytes / sizeof(uint64_t), 0x9E3779B97F4A7C15u) {
  if (buffer_.empty()) throw std::invalid_argument("ReadProbe: bytes must be at least 8");
}

double ReadProbe::run(int threads) {
  if (threads < 1) throw std::invalid_argument("ReadProbe.run: threads must be at least 1");
  std::atomic<uint64_t> sink{0};
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  const auto work = [&](int t) {
    const size_t begin = buffer_.size() * t / threads, end = buffer_.size() * (t + 1) / threads;
    ready.fetch_add(1);
    while (!go.load(std::memory_order_acquire)) {
    }
    sink.fetch_add(sum_range(buffer_.data() + begin, end - begin));
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
  return static_cast<double>(buffer_.size() * sizeof(uint64_t)) / seconds.count();
}

}  // namespace kvopt::host
