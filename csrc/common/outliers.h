// SPDX-License-Identifier: Apache-2.0
// LLM.int8() (Dettmers et al. 2022, section 3.2): what a W8A8 product leaves to 16 bits.
//
// With v = x * input_scale in fp32 and O = the columns k in which any |v[m][k]| >= threshold (or is
// NaN), all rows of x together:
//
//     y = W8A8 product of v without the columns O  +  v[:, O] @ w[:, O]^T
//
// The first part is qlinear's: a product with `inlier_scale` as its input_scale, whose entries are
// 0 in O, so that neither the integers nor the scale of a token know of outliers. The second part
// is summed in fp32 from x and the codes, times the row's scale. Either it is rounded and becomes
// that product's addend, or it is added to the finished y: two roundings at most. As in
// bitsandbytes the weights of O are those that int8 stores, not the ones before quantisation.
#pragma once

#include "common/params.h"

namespace kvopt {

struct OutlierParams {
  int64_t m, n, k;
  DType dtype;         // of x, input_scale, inlier_scale, part
  QuantFormat format;  // kInt8Dynamic
  float threshold;     // > 0
  const void* x;
  const void* input_scale;  // (K) or null
  const uint8_t* packed;
  const uint16_t* meta;
  void* inlier_scale;  // out (K): input_scale or 1, and 0 in O
  int32_t* columns;    // out (K): O, ascending
  int32_t* count;      // out (1): how many; CUDA only
  uint32_t* bitmap;    // scratch, ceil(K / 32) words: bit k % 32 of word k / 32 is set for k in O
  void* part;          // out (M, N): v[:, O] @ w[:, O]^T
  bool accumulate;     // add to what stands in `part`; CUDA only
  void* workspace;     // CUDA: as many bytes as outliers_workspace_bytes says; null if 0
};

KVOPT_HOST_DEVICE constexpr int64_t bitmap_words(int64_t k) { return ceil_div(k, 32); }

}  // namespace kvopt
