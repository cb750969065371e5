// SPDX-License-Identifier: Apache-2.0
// From packed bytes to int16 pairs, for every format, and what the walks over a tile share.
// Everything has internal linkage and is compiled anew for each instruction set.
//
// Mathematics. For an activation block b (64 columns of a weight group g), integers are exact:
//
//     I        = sum over k in b of (q[n][k] - mid) X[m][k]                     mid = 2^(bits-1)
//     y[m][n] += (scale[n][g] s[m][b]) I
//     y[m][n] -= scale[n][g] (zero[n][g] - mid) (sum of x[m] over b)            asymmetric only
//
// I starts at -mid (sum of X), and |I| <= 64 * 128 * 32639 < 2^28. With a code book, the integer of
// its value stands for q - mid, I starts at 0 and stays below 2^31 (qlinear_layout.h). Only the
// last two lines round, in fp32 and always in the order of the columns. So a row of y is the same
// bit for bit whatever M is, however the work is split, and on every vector instruction set.
//
// Codes to pairs. A 32-bit lane of a tile is one row and four bytes; shifts of its 16-bit halves
// and masks find int16 pairs in it. A unit is the columns of 128 bytes of a tile (3 bits: half a
// block, 16 columns), in pairs 0 2 | 1 3 of each four columns:
//
//     bits 8    v & 0x00FF       v >> 8
//     bits 4    v & 0x000F       (v >> 8) & 0x000F        (v >> 4) & 0x000F       v >> 12
//     books     table[v]         table[v >> 8]            table[v >> 4]           table[v >> 12]
//     bits 2    (v >> 2i) & 3    (v >> 8 + 2i) & 3                                i = 0..3
//     bits 3    as 2 bits, with bit 2 taken from the register of third bits
//
// On AVX-512 a table is one register of 32 int16 values and vpermw looks at five bits, the fifth of
// which changes nothing: no mask. On AVX2 vpshufb finds the values' low bytes and high bytes.
#pragma once

#include "cpu/qlinear_epilogue.h"
#include "cpu/qlinear_layout.h"
#include "cpu/qlinear_prepare.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kUnitBytes = 128;
constexpr int64_t kNearBytes = 1024;  // prefetch distances in a stream of weights: to the first
constexpr int64_t kFarBytes = 4096;   // and, past the next page, to the second level of cache
constexpr int64_t kMetaBytes = 512;   // and in the stream of scales

constexpr int64_t unit_columns(Codes codes) {
  return codes == Codes::kInt8 ? 4 : codes == Codes::kInt4 || codes == Codes::kBook ? 8 : 16;
}

constexpr int32_t middle_of(Codes codes) {
  return codes == Codes::kInt8   ? 128
         : codes == Codes::kInt4 ? 8
         : codes == Codes::kInt3 ? 4
         : codes == Codes::kInt2 ? 2
                                 : 0;
}

KVOPT_INLINE Ints broadcast(const uint8_t* x) {
  int32_t word;
  memcpy(&word, x, sizeof(word));
  return set_ints(word);
}

KVOPT_INLINE void prefetch(const uint8_t* address) {
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
}

// For the 64 bytes at `w` of a stream that is read from memory once.
KVOPT_INLINE void prefetch_line(const uint8_t* w) {
  prefetch(w + kNearBytes);
  _mm_prefetch(reinterpret_cast<const char*>(w + kFarBytes), _MM_HINT_T1);
}

KVOPT_INLINE void prefetch_stream(const uint8_t* w) {
  prefetch_line(w);
  prefetch_line(w + 64);
}

template <bool kAsymmetric>
KVOPT_INLINE void prefetch_meta(const uint16_t* meta) {
  const uint8_t* address = reinterpret_cast<const uint8_t*>(meta) + kMetaBytes;
  prefetch(address);
  if constexpr (kAsymmetric) prefetch(address + 64);
}

KVOPT_INLINE Table table_of(const QuantFormat& f) {
  int16_t values[16] = {};
  if (f.has_book()) {
    for (int32_t code = 0; code < 16; ++code) {
      const float steps = book_value(f.scheme, code) * static_cast<float>(book_steps(f.scheme));
      values[code] = static_cast<int16_t>(steps + (steps < 0.0f ? -0.5f : 0.5f));
    }
  }
  return make_table(values);
}

// The first byte of a unit in its tile. 3 bits: of its low two bits.
template <Codes kCodes>
KVOPT_INLINE const uint8_t* unit_address(const uint8_t* tile, int64_t unit) {
  if constexpr (kCodes == Codes::kInt3) return tile + unit / 2 * 384 + unit % 2 * kUnitBytes;
  return tile + unit * kUnitBytes;
}

// The unit_columns / 2 pairs of the register at `w`; `odd`: the unit's number is odd.
template <Codes kCodes>
KVOPT_INLINE void unpack_unit(const uint8_t* w, bool odd, const Table& table, Ints* pairs) {
  const Ints v = load_ints(w);
  if constexpr (kCodes == Codes::kInt8) {
    pairs[0] = bit_and(v, set_ints(0x00FF00FF));
    pairs[1] = shift_right_16<8>(v);
  } else if constexpr (kCodes == Codes::kInt4) {
    const Ints mask = set_ints(0x000F000F);
    pairs[0] = bit_and(v, mask);
    pairs[1] = bit_and(shift_right_16<8>(v), mask);
    pairs[2] = bit_and(shift_right_16<4>(v), mask);
    pairs[3] = shift_right_16<12>(v);
  } else if constexpr (kCodes == Codes::kBook) {
    look_up(table, v, pairs);
  } else if constexpr (kCodes == Codes::kInt2) {
    const Ints mask = set_ints(0x00030003);
    pairs[0] = bit_and(v, mask);
    pairs[1] = bit_and(shift_right_16<8>(v), mask);
    pairs[2] = bit_and(shift_right_16<2>(v), mask);
    pairs[3] = bit_and(shift_right_16<10>(v), mask);
    pairs[4] = bit_and(shift_right_16<4>(v), mask);
    pairs[5] = bit_and(shift_right_16<12>(v), mask);
    pairs[6] = bit_and(shift_right_16<6>(v), mask);
    pairs[7] = shift_right_16<14>(v);
  } else {
    // Third bits of columns 4i + j of the unit at bit i of bytes j.
    const Ints third = shift_right_16_by(load_ints(w + (odd ? 128 : 256)), odd ? 4 : 0);
    const Ints low = set_ints(0x00030003);
    const Ints mask = set_ints(0x00070007);
    pairs[0] = bit_and(select_bits(low, v, shift_left_16<2>(third)), mask);
    pairs[1] = bit_and(select_bits(low, shift_right_16<8>(v), shift_right_16<6>(third)), mask);
    pairs[2] = bit_and(select_bits(low, shift_right_16<2>(v), shift_left_16<1>(third)), mask);
    pairs[3] = bit_and(select_bits(low, shift_right_16<10>(v), shift_right_16<7>(third)), mask);
    pairs[4] = bit_and(select_bits(low, shift_right_16<4>(v), third), mask);
    pairs[5] = bit_and(select_bits(low, shift_right_16<12>(v), shift_right_16<8>(third)), mask);
    pairs[6] = bit_and(select_bits(low, shift_right_16<6>(v), shift_right_16<1>(third)), mask);
    pairs[7] = bit_and(select_bits(low, shift_right_16<14>(v), shift_right_16<9>(third)), mask);
  }
}

// scale and -scale * (zero - mid) of kLanes rows.
struct Meta {
  Floats scale;
  Floats offset;
};

template <bool kAsymmetric>
KVOPT_INLINE Meta load_meta(const uint16_t* meta, Floats middle) {
  Meta result;
  result.scale = load_halves(meta);
  if constexpr (kAsymmetric) {
    result.offset = multiply(result.scale, subtract(middle, load_halves(meta + kTileRows)));
  } else {
    result.offset = zero_floats();
  }
  return result;
}

// The two multiply-adds that end a block.
template <bool kAsymmetric>
KVOPT_INLINE Floats add_block(Floats sum, Ints integers, Floats scale, Floats offset, float x_scale,
                              float x_sum) {
  sum = multiply_add(to_floats(integers), multiply(scale, set_floats(x_scale)), sum);
  if constexpr (kAsymmetric) sum = multiply_add(offset, set_floats(x_sum), sum);
  return sum;
}

// Writes rows [row, row + count) of y from sums (count, 32); rows that integers could not carry are
// computed anew.
inline void finish_rows(const QLinearParams& p, int64_t row, int64_t count, int64_t tile,
                        float* sums) {
  const uint8_t* flags = static_cast<const uint8_t*>(p.workspace);
  for (int64_t i = 0; i < count;) {
    int64_t end = i;
    while (end < count && flags[row + end] == 0) ++end;
    if (end > i) finish_sums(p, row + i, end - i, tile, sums + i * kTileRows);
    if (end < count) qlinear_plain(p, row + end, row + end + 1, tile, tile + 1);
    i = end + 1;
  }
}

// Walks the blocks of a row in the order of their columns.
struct Cursor {
  int64_t group = 0;
  int64_t block = 0;   // of the row
  int64_t column = 0;  // first of the block
};

KVOPT_INLINE int64_t columns_at(const QLinearParams& p, const QLinearLayout& layout,
                                const Cursor& cursor) {
  int64_t end = (cursor.group + 1) * layout.group_columns;
  end = end < p.k ? end : p.k;
  const int64_t columns = end - cursor.column;
  return columns < layout.block_columns ? columns : layout.block_columns;
}

KVOPT_INLINE void advance(const QLinearLayout& layout, int64_t columns, Cursor* cursor) {
  cursor->column += columns;
  ++cursor->block;
  if (cursor->column == (cursor->group + 1) * layout.group_columns) ++cursor->group;
}

}  // namespace
}  // namespace kvopt::cpu
