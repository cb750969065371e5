// SPDX-License-Identifier: Apache-2.0
// Round-to-nearest quantisation and the tile32 layout, in portable C++.
//
// The rule is the one of params.h, bit for bit: fp32 arithmetic with true division, ties to even.
// Rounding adds and subtracts 1.5 * 2^23, which leaves no fraction bits and so rounds in the
// current (nearest-even) mode without a library call. Values are clamped to +-kClamp first, which
// changes no result, because every clamp that follows is tighter. All loops over columns vectorise.
// A weight is read twice (range, then codes), the second time from cache unless a group is very
// long.
//
// Packing goes row by row into the 128-byte blocks of quant_format.h. Rows past N get codes, scale
// and zero point 0; columns past K get code 0.
#include "cpu/wquant.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/float16.h"

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
  if (!format.symmetric) {
    scale = (range.high - range.low) / largest_code;
  } else {
    const float magnitude = std::max(range.high, -range.low);
    scale = format.bits == 8 ? magnitude / 127.0f : 2.0f * magnitude / largest_code;
  }
  return std::max(half_to_float(float_to_half(scale)), kSmallestHalf);
}

void quantize_values(const float* values, int64_t count, float scale, float zero,
                     float largest_code, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    const float steps = round_to_even(clamp(values[i] / scale, -kClamp, kClamp));
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(clamp(steps + zero, 0.0f, largest_code)));
  }
}

void quantize_row(const RtnParams& p, int64_t row) {
  const int64_t groups = group_count(p.format, p.k);
  const float largest_code = static_cast<float>((1 << p.format.bits) - 1);
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
    const float zero =
        p.format.symmetric
            ? static_cast<float>(symmetric_zero(p.format))
            : clamp(round_to_even(clamp(-range.low / scale, -kClamp, kClamp)), 0.0f, largest_code);
    p.scale[row * groups + group] = float_to_half(scale);
    p.zero[row * groups + group] = float_to_half(zero);
    for (int64_t column = begin; column < end; column += kChunk) {
      const int64_t count = std::min(kChunk, end - column);
      if (end - begin > kChunk) {
        load_floats(p.dtype, p.weight, row * p.k + column, count, values);
      }
      quantize_values(values, count, scale, zero, largest_code, p.codes + row * p.k + column);
    }
  }
}

// One row's codes of a tile: `block` is the row's first byte of the tile, 128 bytes on is the next
// block of columns.
void pack_row(const QuantFormat& format, const uint8_t* codes, int64_t k, uint8_t* block) {
  const int64_t columns = tile32::block_columns(format);
  int64_t column = 0;
  for (; column + columns <= k; column += columns, block += tile32::kBlockBytes) {
    const uint8_t* c = codes + column;
    for (int j = 0; j < 4; ++j) {
      block[j] = format.bits == 4 ? static_cast<uint8_t>((c[j] & 15) | (c[j + 4] << 4)) : c[j];
    }
  }
  if (column == k) return;
  uint8_t last[8] = {};
  std::memcpy(last, codes + column, static_cast<size_t>(k - column));
  for (int j = 0; j < 4; ++j) {
    block[j] =
        format.bits == 4 ? static_cast<uint8_t>((last[j] & 15) | (last[j + 4] << 4)) : last[j];
  }
}

void unpack_row(const QuantFormat& format, const uint8_t* block, int64_t k, uint8_t* codes) {
  const int64_t columns = tile32::block_columns(format);
  int64_t column = 0;
  for (; column + columns <= k; column += columns, block += tile32::kBlockBytes) {
    uint8_t* c = codes + column;
    for (int j = 0; j < 4; ++j) {
      if (format.bits == 4) {
        c[j] = block[j] & 15;
        c[j + 4] = block[j] >> 4;
      } else {
        c[j] = block[j];
      }
    }
  }
  for (int64_t c = 0; column + c < k; ++c) {
    codes[column + c] =
        static_cast<uint8_t>((block[c % 4] >> (c / 4 * 4)) & ((1 << format.bits) - 1));
  }
}

// Where in its tile the bytes of a row begin; its other bytes lie kBlockBytes apart.
int64_t row_byte(const QuantFormat& format, int64_t k, int64_t row) {
  return tile32::code_address(format, k, row, 0).byte;
}

}  // namespace

void wquant_rtn(const RtnParams& p, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) quantize_row(p, row);
}

void wquant_pack(const PackParams& p, int64_t row_begin, int64_t row_end) {
  const int64_t groups = group_count(p.format, p.k);
  const int64_t padded_end = ceil_div(row_end, tile32::kRows) * tile32::kRows;
  for (int64_t row = row_begin; row < padded_end; ++row) {
    const bool padding = row >= row_end;
    uint8_t* first = p.packed + row_byte(p.format, p.k, row);
    if (padding) {
      const int64_t blocks = ceil_div(p.k, tile32::block_columns(p.format));
      for (int64_t b = 0; b < blocks; ++b) std::memset(first + b * tile32::kBlockBytes, 0, 4);
    } else {
      pack_row(p.format, p.codes + row * p.k, p.k, first);
    }
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t plain = row * groups + group;
      p.meta[tile32::scale_index(p.format, p.k, row, group)] = padding ? 0 : p.scale[plain];
      if (!p.format.symmetric) {
        p.meta[tile32::zero_index(p.format, p.k, row, group)] = padding ? 0 : p.zero[plain];
      }
    }
  }
}

void wquant_unpack(const PackParams& p, int64_t row_begin, int64_t row_end) {
  const int64_t groups = group_count(p.format, p.k);
  const uint16_t middle = float_to_half(static_cast<float>(symmetric_zero(p.format)));
  for (int64_t row = row_begin; row < row_end; ++row) {
    unpack_row(p.format, p.packed + row_byte(p.format, p.k, row), p.k, p.codes + row * p.k);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t plain = row * groups + group;
      p.scale[plain] = p.meta[tile32::scale_index(p.format, p.k, row, group)];
      p.zero[plain] =
          p.format.symmetric ? middle : p.meta[tile32::zero_index(p.format, p.k, row, group)];
    }
  }
}

void wquant_dequantize(const DequantizeParams& p, int64_t row_begin, int64_t row_end) {
  const int64_t groups = group_count(p.format, p.k);
  uint8_t codes[kChunk];
  float values[kChunk];
  for (int64_t row = row_begin; row < row_end; ++row) {
    const uint8_t* first = p.packed + row_byte(p.format, p.k, row);
    for (int64_t group = 0; group < groups; ++group) {
      const float scale = half_to_float(p.meta[tile32::scale_index(p.format, p.k, row, group)]);
      const float zero = p.format.symmetric
                             ? static_cast<float>(symmetric_zero(p.format))
                             : half_to_float(p.meta[tile32::zero_index(p.format, p.k, row, group)]);
      const int64_t begin = group * p.format.group_size;
      const int64_t end = std::min<int64_t>(begin + p.format.group_size, p.k);
      for (int64_t column = begin; column < end; column += kChunk) {
        const int64_t count = std::min(kChunk, end - column);
        const int64_t block = column / tile32::block_columns(p.format);  // groups begin at blocks
        unpack_row(p.format, first + block * tile32::kBlockBytes, count, codes);
        for (int64_t i = 0; i < count; ++i) {
          values[i] = scale * (static_cast<float>(codes[i]) - zero);
        }
        store_floats(p.dtype, values, count, p.weight, row * p.k + column);
      }
    }
  }
}

}  // namespace kvopt::cpu
