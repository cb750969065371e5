// SPDX-License-Identifier: Apache-2.0
// Round-to-nearest quantisation, in portable C++.
//
// The rule is the one of params.h, bit for bit: fp32 arithmetic with true division, ties to even.
// Rounding adds and subtracts 1.5 * 2^23, which leaves no fraction bits and so rounds in the
// current (nearest-even) mode without a library call. Values are clamped to +-kClamp first, which
// changes no result, because every clamp that follows is tighter. A code of a book is a count of
// bounds below the value, fifteen comparisons and no branch. All loops over columns vectorise. A
// weight is read twice (range, then codes), the second time from cache unless a group is very long.
#include <algorithm>
#include <cmath>

#include "common/code_book.h"
#include "cpu/float16.h"
#include "cpu/wquant.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kChunk = 256;  // columns converted at a time
constexpr float kClamp = 1024.0f;
constexpr float kSmallestHalf = 5.9604644775390625e-8f;  // 2^-24

float round_to_even(float value) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (value + kMagic) - kMagic;
}

float clamp(float value, float low, float high) {
  value = value > low ? value : low;  // NaN becomes low
  return value < high ? value : high;
}

struct Range {
  float low;   // min(0, min w)
  float high;  // max(0, max w)
  float magnitude() const { return std::max(high, -low); }
};

Range range_of(const float* values, int64_t count, Range range) {
  float low = range.low;
  float high = range.high;
  for (int64_t i = 0; i < count; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  return {low, high};
}

float scale_of(const QuantFormat& format, Range range) {
  const float largest_code = static_cast<float>((1 << format.bits) - 1);
  float scale;
  if (format.has_book()) {
    scale = range.magnitude();
  } else if (format.has_zeros()) {
    scale = (range.high - range.low) / largest_code;
  } else {
    scale = format.bits == 8 ? range.magnitude() / 127.0f : 2.0f * range.magnitude() / largest_code;
  }
  return std::max(half_to_float(float_to_half(scale)), kSmallestHalf);
}

// How the codes of one group are chosen.
struct Choice {
  bool book;
  float factor;  // book: 1 / absmax; else scale
  float zero;
  float largest_code;
  float bounds[15];
  uint8_t order[16];  // the code of each rank
};

Choice choice_of(const QuantFormat& format) {
  Choice choice = {};
  choice.book = format.has_book();
  choice.largest_code = static_cast<float>((1 << format.bits) - 1);
  if (choice.book) {
    for (int i = 0; i < 15; ++i) choice.bounds[i] = book_bound(format.scheme, i);
    for (int i = 0; i < 16; ++i) {
      choice.order[i] = static_cast<uint8_t>(code_of_rank(format.scheme, i));
    }
  }
  return choice;
}

void quantize_values(const Choice& choice, const float* values, int64_t count, uint8_t* codes) {
  if (!choice.book) {
    for (int64_t i = 0; i < count; ++i) {
      const float steps = round_to_even(clamp(values[i] / choice.factor, -kClamp, kClamp));
      codes[i] = static_cast<uint8_t>(
          static_cast<int32_t>(clamp(steps + choice.zero, 0.0f, choice.largest_code)));
    }
    return;
  }
  int32_t rank[kChunk];
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = values[i] * choice.factor;
    int32_t below = 0;
    for (int b = 0; b < 15; ++b) below += choice.bounds[b] < scaled ? 1 : 0;
    rank[i] = below;
  }
  for (int64_t i = 0; i < count; ++i) codes[i] = choice.order[rank[i]];
}

void quantize_row(const RtnParams& p, int64_t row) {
  const int64_t groups = group_count(p.format, p.k);
  Choice choice = choice_of(p.format);
  float values[kChunk];
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * p.format.group_size;
    const int64_t end = std::min<int64_t>(begin + p.format.group_size, p.k);
    Range range = {0.0f, 0.0f};
    for (int64_t column = begin; column < end; column += kChunk) {
      const int64_t count = std::min(kChunk, end - column);
      load_floats(p.dtype, p.weight, row * p.k + column, count, values);
      range = range_of(values, count, range);
    }
    const float scale = scale_of(p.format, range);
    if (choice.book) {
      choice.factor = 1.0f / std::max(range.magnitude(), 1e-38f);
    } else {
      choice.factor = scale;
      choice.zero = p.format.has_zeros()
                        ? clamp(round_to_even(clamp(-range.low / scale, -kClamp, kClamp)), 0.0f,
                                choice.largest_code)
                        : static_cast<float>(symmetric_zero(p.format));
    }
    p.scale[row * groups + group] = float_to_half(scale);
    p.zero[row * groups + group] = float_to_half(choice.zero);
    for (int64_t column = begin; column < end; column += kChunk) {
      const int64_t count = std::min(kChunk, end - column);
      if (end - begin > kChunk) {
        load_floats(p.dtype, p.weight, row * p.k + column, count, values);
      }
      quantize_values(choice, values, count, p.codes + row * p.k + column);
    }
  }
}

}  // namespace

void wquant_rtn(const RtnParams& p, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) quantize_row(p, row);
}

}  // namespace kvopt::cpu
