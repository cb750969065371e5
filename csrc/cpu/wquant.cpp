// SPDX-License-Identifier: Apache-2.0
// Plain codes into the tile32 layout and back, in portable C++.
//
// Of a tile, a row has one 32-bit word in every 128 bytes: the quads (4 codes, one a byte) of a
// block's columns, each shifted to its place in the byte:
//
//     bits 4    word = q0 | q1 << 4                        bits 8    word = q0
//     bits 2    word = q0 | q1 << 2 | q2 << 4 | q3 << 6
//     bits 3    two words as for 2 bits, of the low two bits, and
//               word = bit 2 of q0 | bit 2 of q1 << 1 | ... | bit 2 of q7 << 7
//
// So a few word operations move 4 to 32 codes, far faster than memory brings them. A tile is walked
// in chunks of columns whose bytes (both sides) stay in the first level of cache. Rows past N get
// codes, scale and zero point 0; columns past K get code 0.
//
// A weight of many pages is asked to lie in huge ones before it is first written: a product reads
// all of it, and small pages cost it a tenth of its speed.
#include "cpu/wquant.h"

#include <algorithm>
#include <cstring>

#include "cpu/float16.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kRows = tile32::kRows;
constexpr int64_t kChunk = 256;             // columns at a time, a multiple of every block
constexpr int64_t kWordStride = kRows * 4;  // bytes from a row's word to its next

uint32_t load_word(const uint8_t* source) {
  uint32_t word;
  std::memcpy(&word, source, sizeof(word));
  return word;
}

void store_word(uint8_t* target, uint32_t word) { std::memcpy(target, &word, sizeof(word)); }

// One row's codes of a block; `out` is the row's word of the block's first 128 bytes.
template <int kBits>
void pack_block(const uint8_t* codes, uint8_t* out) {
  if constexpr (kBits == 8) {
    store_word(out, load_word(codes));
  } else if constexpr (kBits == 4) {
    constexpr uint32_t kMask = 0x0F0F0F0Fu;
    store_word(out, (load_word(codes) & kMask) | (load_word(codes + 4) & kMask) << 4);
  } else if constexpr (kBits == 2) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word |= (load_word(codes + 4 * i) & 0x03030303u) << (2 * i);
    store_word(out, word);
  } else {
    uint32_t third = 0;
    for (int i = 0; i < 8; ++i) {
      third |= ((load_word(codes + 4 * i) >> 2) & 0x01010101u) << i;
    }
    pack_block<2>(codes, out);
    pack_block<2>(codes + 16, out + kWordStride);
    store_word(out + 2 * kWordStride, third);
  }
}

template <int kBits>
void unpack_block(const uint8_t* in, uint8_t* codes) {
  if constexpr (kBits == 8) {
    store_word(codes, load_word(in));
  } else if constexpr (kBits == 4) {
    const uint32_t word = load_word(in);
    store_word(codes, word & 0x0F0F0F0Fu);
    store_word(codes + 4, (word >> 4) & 0x0F0F0F0Fu);
  } else if constexpr (kBits == 2) {
    const uint32_t word = load_word(in);
    for (int i = 0; i < 4; ++i) store_word(codes + 4 * i, (word >> (2 * i)) & 0x03030303u);
  } else {
    const uint32_t third = load_word(in + 2 * kWordStride);
    for (int i = 0; i < 8; ++i) {
      const uint32_t low = load_word(in + i / 4 * kWordStride) >> (i % 4 * 2);
      store_word(codes + 4 * i, (low & 0x03030303u) | ((third >> i) & 0x01010101u) << 2);
    }
  }
}

constexpr QuantFormat format_of(int bits) { return {bits, 0, Scheme::kSymmetric}; }

// `count` codes of a row from a column that starts a block; `out` as for pack_block.
template <int kBits>
void pack_columns(const uint8_t* codes, int64_t count, uint8_t* out) {
  constexpr int64_t kColumns = tile32::block_columns(format_of(kBits));
  constexpr int64_t kBytes = tile32::block_bytes(format_of(kBits));
  int64_t column = 0;
  for (; column + kColumns <= count; column += kColumns, out += kBytes) {
    pack_block<kBits>(codes + column, out);
  }
  if (column == count) return;
  uint8_t last[kColumns] = {};
  std::memcpy(last, codes + column, static_cast<size_t>(count - column));
  pack_block<kBits>(last, out);
}

template <int kBits>
void unpack_columns(const uint8_t* in, int64_t count, uint8_t* codes) {
  constexpr int64_t kColumns = tile32::block_columns(format_of(kBits));
  constexpr int64_t kBytes = tile32::block_bytes(format_of(kBits));
  int64_t column = 0;
  for (; column + kColumns <= count; column += kColumns, in += kBytes) {
    unpack_block<kBits>(in, codes + column);
  }
  if (column == count) return;
  uint8_t last[kColumns];
  unpack_block<kBits>(in, last);
  std::memcpy(codes + column, last, static_cast<size_t>(count - column));
}

using PackColumns = void (*)(const uint8_t*, int64_t, uint8_t*);

PackColumns pack_columns_of(const QuantFormat& f) {
  return f.bits == 8   ? pack_columns<8>
         : f.bits == 4 ? pack_columns<4>
         : f.bits == 3 ? pack_columns<3>
                       : pack_columns<2>;
}

PackColumns unpack_columns_of(const QuantFormat& f) {
  return f.bits == 8   ? unpack_columns<8>
         : f.bits == 4 ? unpack_columns<4>
         : f.bits == 3 ? unpack_columns<3>
                       : unpack_columns<2>;
}

// Offset of a row's first word in the packed buffer, for a column that starts a block.
int64_t word_offset(const QuantFormat& f, int64_t k, int64_t row, int64_t column) {
  return tile32::code_pieces(f, k, row, column).piece[0].word * 4;
}

void pack_meta(const PackParams& p, int64_t row_begin, int64_t row_end, int64_t padded_end) {
  const int64_t groups = group_count(p.format, p.k);
  for (int64_t row = row_begin; row < padded_end; ++row) {
    const bool padding = row >= row_end;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t plain = row * groups + group;
      p.meta[tile32::scale_index(p.format, p.k, row, group)] = padding ? 0 : p.scale[plain];
      if (p.format.has_zeros()) {
        p.meta[tile32::zero_index(p.format, p.k, row, group)] = padding ? 0 : p.zero[plain];
      }
    }
  }
}

}  // namespace

void wquant_pack(const PackParams& p, int64_t row_begin, int64_t row_end) {
  static constexpr uint8_t kNoCodes[kChunk] = {};
  const int64_t padded_end = ceil_div(row_end, kRows) * kRows;
  const PackColumns pack = pack_columns_of(p.format);
  for (int64_t first = row_begin; first < row_end; first += kRows) {
    for (int64_t column = 0; column < p.k; column += kChunk) {
      const int64_t count = std::min(kChunk, p.k - column);
      for (int64_t row = first; row < first + kRows; ++row) {
        const uint8_t* codes = row < row_end ? p.codes + row * p.k + column : kNoCodes;
        pack(codes, count, p.packed + word_offset(p.format, p.k, row, column));
      }
    }
  }
  pack_meta(p, row_begin, row_end, padded_end);
}

void wquant_unpack(const PackParams& p, int64_t row_begin, int64_t row_end) {
  const int64_t groups = group_count(p.format, p.k);
  const uint16_t implied_zero =
      p.format.has_book() ? 0 : float_to_half(static_cast<float>(symmetric_zero(p.format)));
  const PackColumns unpack = unpack_columns_of(p.format);
  for (int64_t first = row_begin; first < row_end; first += kRows) {
    const int64_t last = std::min(first + kRows, row_end);
    for (int64_t column = 0; column < p.k; column += kChunk) {
      const int64_t count = std::min(kChunk, p.k - column);
      for (int64_t row = first; row < last; ++row) {
        unpack(p.packed + word_offset(p.format, p.k, row, column), count,
               p.codes + row * p.k + column);
      }
    }
  }
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t plain = row * groups + group;
      p.scale[plain] = p.meta[tile32::scale_index(p.format, p.k, row, group)];
      p.zero[plain] = p.format.has_zeros() ? p.meta[tile32::zero_index(p.format, p.k, row, group)]
                                           : implied_zero;
    }
  }
}

void wquant_dequantize(const DequantizeParams& p, int64_t row_begin, int64_t row_end) {
  const PackColumns unpack = unpack_columns_of(p.format);
  float book[16] = {};
  if (p.format.has_book()) {
    for (int32_t code = 0; code < 16; ++code) book[code] = book_value(p.format.scheme, code);
  }
  uint8_t codes[kChunk];
  float values[kChunk];
  for (int64_t first = row_begin; first < row_end; first += kRows) {
    const int64_t last = std::min(first + kRows, row_end);
    for (int64_t column = 0; column < p.k; column += kChunk) {
      const int64_t end = std::min(column + kChunk, p.k);
      for (int64_t row = first; row < last; ++row) {
        unpack(p.packed + word_offset(p.format, p.k, row, column), end - column, codes);
        for (int64_t c = column; c < end;) {  // the part of each group
          const int64_t group = c / p.format.group_size;
          const int64_t stop = std::min<int64_t>((group + 1) * p.format.group_size, end);
          const float scale = half_to_float(p.meta[tile32::scale_index(p.format, p.k, row, group)]);
          if (p.format.has_book()) {
            for (; c < stop; ++c) values[c - column] = scale * book[codes[c - column]];
            continue;
          }
          const float zero =
              p.format.has_zeros()
                  ? half_to_float(p.meta[tile32::zero_index(p.format, p.k, row, group)])
                  : static_cast<float>(symmetric_zero(p.format));
          for (int64_t i = c - column; i < stop - column; ++i) {
            values[i] = scale * (static_cast<float>(codes[i]) - zero);
          }
          c = stop;
        }
        store_floats(p.dtype, values, end - column, p.weight, row * p.k + column);
      }
    }
  }
}

}  // namespace kvopt::cpu
