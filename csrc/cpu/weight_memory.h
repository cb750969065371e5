// SPDX-License-Identifier: Apache-2.0
// Memory for packed weights, on huge pages. A product with one row of x reads every byte of a
// weight once, and on pages of 4 KB waits for address translations: 12.4 GB/s on one core of a
// virtual machine where huge pages give 17.0. A general allocator starts a tensor anywhere, so huge
// pages hold only the 2 MB blocks that it covers whole: none of a 2048 x 2048 weight with 4 bits,
// nor of most scales.
//
// Here pieces lie one behind the other in chunks that are advised before they are first written:
//
//     | packed | meta | packed | meta | ...                      | not touched: no memory yet |
//     +--------+------+--------+------+--------------------------+----------------------------+
//     2 MB aligned, kChunkBytes of address space
//
// A released piece gives its pages back at once, a chunk its addresses when its last piece goes.
// Beyond the pieces this costs less than a huge page a chunk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#include "cpu/huge_pages.h"

namespace kvopt::cpu {

class WeightMemory {
 public:
  static constexpr size_t kChunkBytes = size_t{256} << 20;
  static constexpr size_t kAlignment = 4096;

  // Never destroyed: tensors may outlive every static object.
  static WeightMemory& instance() {
    static WeightMemory* memory = new WeightMemory;
    return *memory;
  }

  // Null where the system has no such memory; the caller then takes any other.
  void* allocate(size_t bytes) {
#if defined(__linux__)
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t size = round_up(bytes, kAlignment);
    if (current_ == chunks_.end() || current_->second.used + size > current_->second.size) {
      if (!add_chunk(round_up(size > kChunkBytes ? size : kChunkBytes, kHugePageBytes))) {
        return nullptr;
      }
    }
    Chunk& chunk = current_->second;
    void* piece = reinterpret_cast<void*>(current_->first + chunk.used);
    chunk.used += size;
    ++chunk.pieces;
    return piece;
#else
    (void)bytes;
    return nullptr;
#endif
  }

  void release(void* piece, size_t bytes) {
#if defined(__linux__)
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto chunk = --chunks_.upper_bound(reinterpret_cast<uintptr_t>(piece));
    if (--chunk->second.pieces > 0) {
      (void)madvise(piece, round_up(bytes, kAlignment), MADV_DONTNEED);
      return;
    }
    (void)munmap(reinterpret_cast<void*>(chunk->first), chunk->second.size);
    if (chunk == current_) current_ = chunks_.end();
    chunks_.erase(chunk);
#else
    (void)piece, (void)bytes;
#endif
  }

 private:
  struct Chunk {
    size_t size;
    size_t used = 0;
    size_t pieces = 0;
  };

  WeightMemory() : current_(chunks_.end()) {}

  static constexpr size_t round_up(size_t value, size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
  }

#if defined(__linux__)
  bool add_chunk(size_t size) {
    void* mapped = mmap(nullptr, size + kHugePageBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return false;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped);
    const uintptr_t aligned = round_up(begin, kHugePageBytes);
    if (aligned > begin) (void)munmap(mapped, aligned - begin);
    if (begin + kHugePageBytes > aligned) {
      (void)munmap(reinterpret_cast<void*>(aligned + size), begin + kHugePageBytes - aligned);
    }
    (void)madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);
    current_ = chunks_.emplace(aligned, Chunk{size}).first;
    return true;
  }
#endif

  std::mutex mutex_;
  std::map<uintptr_t, Chunk> chunks_;             // by address
  std::map<uintptr_t, Chunk>::iterator current_;  // the one that grows
};

}  // namespace kvopt::cpu
