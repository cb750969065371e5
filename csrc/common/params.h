// SPDX-License-Identifier: Apache-2.0
// What the op layer hands to a kernel: raw pointers, sizes, a format. No framework type crosses
// this line.
#pragma once

#include <cstdint>

#include "common/quant_format.h"

namespace kvopt {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

KVOPT_HOST_DEVICE constexpr int64_t dtype_bytes(DType t) { return t == DType::kFloat32 ? 4 : 2; }

// y (M, N) = x (M, K) @ w (N, K)^T + bias (N), w packed as quant_format.h says for the device.
// All row-major and dense; x, bias and y share `dtype`; bias may be null; M may be 0; N, K >= 1.
struct QLinearParams {
  int64_t m, n, k;
  DType dtype;
  QuantFormat format;
  const void* x;
  const uint8_t* packed;
  const uint16_t* meta;  // fp16 bit patterns
  const void* bias;
  void* y;
  void* workspace;  // as many bytes as the device's workspace function asks for, 64-byte aligned;
                    // null if it asks 0
};

// Round-to-nearest quantisation of weight (N, K) into plain codes (N, K) uint8, scale and zero (N,
// groups) fp16. One rule for every device, bit for bit (fp32 arithmetic, true division, ties to
// even; Q = 2^bits - 1; all over one row's group):
//   asymmetric:        lo = min(0, min w), hi = max(0, max w), scale = (hi - lo) / Q
//   symmetric, 8 bits: scale = max |w| / 127              symmetric, fewer: scale = 2 max |w| / Q
//   scale is rounded to fp16 and is at least 2^-24 (the smallest fp16), and used as rounded from
//   here on zero = clamp(round(-lo / scale), 0, Q)                symmetric: 2^(bits-1) q    =
//   clamp(round(w / scale) + zero, 0, Q)
struct RtnParams {
  int64_t n, k;
  DType dtype;  // of weight
  QuantFormat format;
  const void* weight;
  uint8_t* codes;
  uint16_t* scale;
  uint16_t* zero;  // written for symmetric formats too: 2^(bits-1)
};

// Between plain codes / scale / zero (as in RtnParams) and the device's packed layout, either
// direction.
struct PackParams {
  int64_t n, k;
  QuantFormat format;
  uint8_t* codes;
  uint16_t* scale;
  uint16_t* zero;
  uint8_t* packed;
  uint16_t* meta;
};

// Packed layout -> dense (N, K) weight in `dtype`, each value scale * (q - zero) computed in fp32
// and rounded once.
struct DequantizeParams {
  int64_t n, k;
  DType dtype;
  QuantFormat format;
  const uint8_t* packed;
  const uint16_t* meta;
  void* weight;
};

}  // namespace kvopt
