// SPDX-License-Identifier: Apache-2.0
// How a value becomes a code of NF4 and FP4, as data: bitsandbytes' choice (0.50, its CPU path),
// bit for bit, for every device.
//
//     scaled = w * (1 / max(absmax, 1e-38))            fp32; the reciprocal is rounded first
//     rank   = how many of the 15 bounds are < scaled  (the bounds: fp32 midpoints of neighbours)
//     code   = the book's entry of that rank
//
// A value on a bound takes the lower neighbour. FP4 has two codes of value 0: 0 for scaled in
// (-1/384, 0], 8 for (0, 1/384]. NaN counts as below every bound.
#pragma once

#include "common/quant_format.h"

namespace kvopt {

KVOPT_HOST_DEVICE constexpr float book_bound(Scheme scheme, int32_t index) {
  constexpr float kNf4[15] = {-0x1.b239b0p-1f, -0x1.38a4e0p-1f, -0x1.d70900p-2f, -0x1.5bd4ecp-2f,
                              -0x1.e079d8p-3f, -0x1.1a7178p-3f, -0x1.74f0e2p-5f, 0x1.45f5fep-5f,
                              0x1.ec90c4p-4f,  0x1.a0cfc0p-3f,  0x1.2b05a8p-2f,  0x1.8ea7f2p-2f,
                              0x1.00da08p-1f,  0x1.491b5ep-1f,  0x1.b913b4p-1f};
  constexpr float kFp4[15] = {-0x1.aaaaacp-1f, -0x1.2aaaacp-1f, -0x1.aaaaacp-2f, -0x1.2aaaacp-2f,
                              -0x1.aaaaacp-3f, -0x1.600000p-4f, -0x1.555556p-9f, 0.0f,
                              0x1.555556p-9f,  0x1.600000p-4f,  0x1.aaaaacp-3f,  0x1.2aaaacp-2f,
                              0x1.aaaaacp-2f,  0x1.2aaaacp-1f,  0x1.aaaaacp-1f};
  return scheme == Scheme::kNf4 ? kNf4[index] : kFp4[index];
}

// The code of each rank, one nibble each from the lowest.
KVOPT_HOST_DEVICE constexpr uint64_t book_order(Scheme scheme) {
  return scheme == Scheme::kNf4 ? 0xFEDCBA9876543210u : 0x3254761809EFCDABu;
}

KVOPT_HOST_DEVICE constexpr int32_t code_of_rank(Scheme scheme, int32_t rank) {
  return static_cast<int32_t>((book_order(scheme) >> (4 * rank)) & 15u);
}

KVOPT_HOST_DEVICE constexpr int32_t choose_code(Scheme scheme, float scaled) {
  int32_t rank = 0;
  for (int32_t i = 0; i < 15; ++i) rank += book_bound(scheme, i) < scaled ? 1 : 0;
  return code_of_rank(scheme, rank);
}

}  // namespace kvopt
