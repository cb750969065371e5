// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace kvopt::host {

// Hands the pages that the C allocator keeps for later back to the operating system. Weights freed
// one by one leave holes in its heap, which otherwise stay resident. Returns whether anything was
// given back.
bool release_free_memory();

}  // namespace kvopt::host
