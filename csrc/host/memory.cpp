// SPDX-License-Identifier: Apache-2.0
#include "host/memory.h"

#include <stdlib.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace kvopt::host {

bool release_free_memory() {
#if defined(__GLIBC__)
  return malloc_trim(0) != 0;
#else
  return false;  // other C libraries give large blocks back by themselves
#endif
}

}  // namespace kvopt::host
