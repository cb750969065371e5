// SPDX-License-Identifier: Apache-2.0
// What the op layer hands to a kernel: raw pointers, sizes, a format. No framework type crosses
// this line.
#pragma once

#include <cstdint>

#include "common/quant_format.h"

namespace kvopt {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

KVOPT_HOST_DEVICE constexpr int64_t dtype_bytes(DType t) { return t == DType::kFloat32 ? 4 : 2; }

// y = act(product + bias + low rank + addend) + residual, all row-major and dense, x, y and every
// vector and matrix but the weight in `dtype`; M may be 0; N, K >= 1; a null pointer leaves its
// part out:
//
//   product   (x (M, K) * input_scale (K)) @ w (N, K)^T, w packed as quant_format.h says for the
//             device. activation_bits 16: activations keep 16-bit-class precision, on every device
//             and for every M. 8: (x * input_scale) is rounded to int8 with one scale per token and
//             weight group, s = max |x| / 127, X = round(x / s). kInt8Dynamic always takes int8 per
//             token.
//   low rank  low_rank_x (M, rank) @ low_rank_w (N, rank)^T
//   act       swiglu: the rows of w (and of bias, low_rank_w) alternate in eights: 16j + i is gate
//             row 8j + i, 16j + 8 + i is up row 8j + i; y (M, N / 2) = silu(gate) * up, N % 16 ==
//             0. Otherwise the identity and y (M, N).
//   residual  of the shape of y; it may be y itself.
struct QLinearParams {
  int64_t m, n, k;
  DType dtype;
  QuantFormat format;
  const void* x;
  const uint8_t* packed;
  const uint16_t* meta;  // fp16 bit patterns
  const void* bias;
  void* y;
  void* workspace;  // as many bytes as the device's workspace function asks for, 64-byte aligned
                    // (256 on CUDA); null if it asks 0
  int32_t activation_bits;
  bool swiglu;
  const void* input_scale;
  const void* low_rank_x;
  const void* low_rank_w;
  int64_t rank;
  const void* residual;
  const void* addend;  // (M, N), added before act: a low-rank product made elsewhere (CUDA)
};

// Round-to-nearest quantisation of weight (N, K) into plain codes (N, K) uint8, scale and zero (N,
// groups) fp16. One rule for every device, bit for bit (fp32 arithmetic, true division, ties to
// even; Q = 2^bits - 1; all over one row's group):
//   asymmetric:        lo = min(0, min w), hi = max(0, max w), scale = (hi - lo) / Q
//   symmetric, 8 bits: scale = max |w| / 127              symmetric, fewer: scale = 2 max |w| / Q
//   scale is rounded to fp16 and is at least 2^-24 (the smallest fp16), and used as rounded from
//   here on;   zero = clamp(round(-lo / scale), 0, Q), symmetric: 2^(bits-1)
//   q = clamp(round(w / scale) + zero, 0, Q)
//   code books:        absmax = max |w| in fp32, q as code_book.h says for w and absmax, scale =
//   absmax rounded to fp16 as above; zero is written as 0
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

// Packed layout -> dense (N, K) weight in `dtype`, each value scale * (q - zero) or scale * book[q]
// computed in fp32 and rounded once.
struct DequantizeParams {
  int64_t n, k;
  DType dtype;
  QuantFormat format;
  const uint8_t* packed;
  const uint16_t* meta;
  void* weight;
};

}  // namespace kvopt
