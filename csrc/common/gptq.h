// SPDX-License-Identifier: Apache-2.0
// One block of columns of GPTQ (Frantar et al. 2023, algorithm 1), every row for itself.
//
// With U upper triangular, H^-1 = U^T U, column i of the block is quantised and its error passed on
// to the block's columns j > i:
//     q = code of w_i     e_i = (w_i - scale * (q - zero)) / U_ii     w_j <- w_j - e_i U_ij
// The columns behind the block are the caller's: W[:, end:] -= errors @ U[begin:end, end:].
//
// Scales: given per column, or chosen by the search of wsearch.h whenever a group begins, from the
// working copy, that is with all errors of the columns before it. Then groups begin at `begin` and
// every group_size columns; one that does not end within the block must begin with it.
#pragma once

#include "common/wsearch.h"

namespace kvopt {

constexpr int64_t kGptqBlock = 128;  // columns, at most

template <typename T>
struct GptqBlockParams {
  int64_t n, k, begin, end;
  QuantFormat format;
  SearchGrid grid;
  const T* weight;              // (N, K), the working copy; read only
  const T* factor;              // (K, K), U
  const T* importance;          // (K) or null
  const uint16_t* given_scale;  // (N, end - begin) or null
  const uint16_t* given_zero;
  uint8_t* codes;   // (N, end - begin)
  T* errors;        // (N, end - begin), e
  uint16_t* scale;  // (N, groups that begin in the block); null where they are given
  uint16_t* zero;
};

// Groups that begin in a block.
KVOPT_HOST_DEVICE constexpr int64_t gptq_groups(int64_t begin, int64_t end, int64_t group_size) {
  return ceil_div(end - begin, group_size);
}

}  // namespace kvopt
