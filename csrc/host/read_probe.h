// SPDX-License-Identifier: Apache-2.0
// How fast this machine reads memory in order: the roof of every product that reads its weights
// once. The buffer lies on huge pages where the system gives them, as packed weights do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace kvopt::host {

class ReadProbe {
 public:
  // `bytes` should be several times the last-level cache where DRAM is meant.
  explicit ReadProbe(size_t bytes);

  // One pass over the buffer, split into one contiguous range a thread. Returns bytes per second.
  double run(int threads);

 private:
  struct Free {
    void operator()(uint64_t* data) const { std::free(data); }
  };
  size_t count_;
  std::unique_ptr<uint64_t[], Free> buffer_;
};

}  // namespace kvopt::host
