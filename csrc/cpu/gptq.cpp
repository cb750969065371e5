// SPDX-License-Identifier: Apache-2.0
// A block of GPTQ, row by row, in portable C++. A row of the block (128 values) stays in the
// first-level cache and so, from the second row on, does the block of U (64 KiB in fp32: the second
// level). Work: B^2 / 2 multiply-adds a row, 64 for each weight, and the search where a group
// begins.
#include "cpu/gptq.h"

#include <algorithm>

#include "cpu/float16.h"

namespace kvopt::cpu {
namespace {

template <typename T>
GroupChoice<T> given_choice(const GptqBlockParams<T>& p, int64_t index) {
  return {static_cast<T>(half_to_float(p.given_scale[index])),
          static_cast<T>(half_to_float(p.given_zero[index]))};
}

template <typename T>
void quantize_row(const GptqBlockParams<T>& p, CandidateErrors<T> errors, int64_t row) {
  const int64_t size = p.end - p.begin;
  const int64_t groups = gptq_groups(p.begin, p.end, p.format.group_size);
  const T top = static_cast<T>((1 << p.format.bits) - 1);
  const T* const source = p.weight + row * p.k + p.begin;
  T w[kGptqBlock];
  std::copy(source, source + size, w);
  GroupChoice<T> choice = {};
  for (int64_t i = 0; i < size; ++i) {
    if (p.given_scale != nullptr) {
      choice = given_choice(p, row * size + i);
    } else if (i % p.format.group_size == 0) {
      const int64_t count = std::min<int64_t>(p.format.group_size, p.k - p.begin - i);
      const T* const values = i + count <= size ? w + i : source;  // a longer one begins the block
      const T* const importance = p.importance == nullptr ? nullptr : p.importance + p.begin + i;
      choice = search_group(p.format, p.grid, values, importance, count, errors);
      const int64_t index = row * groups + i / p.format.group_size;
      p.scale[index] = float_to_half(static_cast<float>(choice.scale));
      p.zero[index] = float_to_half(static_cast<float>(choice.zero));
    }
    const T code = code_of(w[i], choice, top);
    const T* const factor = p.factor + (p.begin + i) * p.k + p.begin;
    const T error = (w[i] - choice.scale * (code - choice.zero)) / factor[i];
    p.codes[row * size + i] = static_cast<uint8_t>(code);
    p.errors[row * size + i] = error;
    for (int64_t j = i + 1; j < size; ++j) w[j] -= error * factor[j];
  }
}

}  // namespace

template <typename T>
void gptq_block(const GptqBlockParams<T>& p, CandidateErrors<T> errors, int64_t row_begin,
                int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) quantize_row(p, errors, row);
}

template void gptq_block(const GptqBlockParams<float>&, CandidateErrors<float>, int64_t, int64_t);
template void gptq_block(const GptqBlockParams<double>&, CandidateErrors<double>, int64_t, int64_t);

}  // namespace kvopt::cpu
