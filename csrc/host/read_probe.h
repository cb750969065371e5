// SPDX-License-Identifier: Apache-2.0
// How fast this machine reads memory in order: the roof of every product that reads its weights
// once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvopt::host {

class ReadProbe {
 public:
  // `bytes` should be several times the last-level cache where DRAM is meant.
  explicit ReadProbe(size_t bytes);

  // One pass over the buffer, split into one contiguous range a thread. Returns bytes per second.
  double run(int threads);

 private:
  std::vector<uint64_t> buffer_;
};

}  // namespace kvopt::host
