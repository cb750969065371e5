// SPDX-License-Identifier: Apache-2.0
// Searches over scales and zero points on the CPU: common/wsearch.h. Rows are independent; each
// call works on [row_begin, row_end).
#pragma once

#include "common/wsearch.h"
#include "cpu/isa.h"

namespace kvopt::cpu {

template <typename T>
struct GroupChoice {
  T scale;  // as stored: an fp16 value
  T zero;
};

// Adds to errors[0 .. candidates) what each candidate costs on `count` columns.
template <typename T>
using CandidateErrors = void (*)(const T* values, const T* importance, int64_t count,
                                 const T* scales, const T* zeros, int64_t candidates,
                                 T largest_code, T* errors);

template <typename T>
CandidateErrors<T> candidate_errors(Isa isa);

template <typename T>
GroupChoice<T> search_group(const QuantFormat& format, const SearchGrid& grid, const T* values,
                            const T* importance, int64_t count, CandidateErrors<T> errors);

// clamp(round(value / scale) + zero, 0, largest_code)
template <typename T>
T code_of(T value, const GroupChoice<T>& choice, T largest_code);

template <typename T>
void wsearch(const SearchParams<T>& p, CandidateErrors<T> errors, int64_t row_begin,
             int64_t row_end);

void wsearch_hqq(const HqqParams& p, int64_t row_begin, int64_t row_end);

// Of one instruction set each.
void candidate_errors_avx2(const float* values, const float* importance, int64_t count,
                           const float* scales, const float* zeros, int64_t candidates,
                           float largest_code, float* errors);
void candidate_errors_avx512(const float* values, const float* importance, int64_t count,
                             const float* scales, const float* zeros, int64_t candidates,
                             float largest_code, float* errors);

}  // namespace kvopt::cpu
