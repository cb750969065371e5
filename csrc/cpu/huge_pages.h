// SPDX-License-Identifier: Apache-2.0
// Large buffers that are streamed ask for huge pages: one address translation for 2 MB instead of
// 512. A hint, so its failure means nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace kvopt::cpu {

inline constexpr size_t kHugePageBytes = size_t{2} << 20;

// For the whole pages that touch [begin, end) of a buffer of `bytes` and lie inside it: ranges that
// threads advise side by side join. To be called before the pages are first written.
inline void advise_huge_pages(void* buffer, size_t bytes, size_t begin, size_t end) {
#if defined(__linux__)
  if (bytes < kHugePageBytes) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t base = reinterpret_cast<uintptr_t>(buffer);
  uintptr_t low = (base + begin) / page * page;
  uintptr_t high = (base + end + page - 1) / page * page;
  if (low < base) low += page;
  if (high > base + bytes) high -= page;
  if (low < high) (void)madvise(reinterpret_cast<void*>(low), high - low, MADV_HUGEPAGE);
#else
  (void)buffer, (void)bytes, (void)begin, (void)end;
#endif
}

}  // namespace kvopt::cpu
