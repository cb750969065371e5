// SPDX-License-Identifier: Apache-2.0
// A few rows of x with VNNI: X = 256 h + l, two planes of signed bytes, multiplies the codes as
// unsigned bytes (vpdpbusd), without making 16-bit numbers of them. The mathematics are those of
// qlinear_codes.h; everything has internal linkage.
//
// A quad is four columns of 16 rows of w, a code in each byte of a register. Masks find two quads
// at a time, one in the low halves of the bytes and one in the high halves, which is not shifted
// for a single row of x: masked in place it counts 16 times, and its sums are shifted once a block.
//
//     bits 4    v         low: quad 0      high: quad 1
//     bits 2    v         low: quad 0      high: quad 2           (two bits each)
//               v >> 2    low: quad 1      high: quad 3
//     bits 3    two registers a, b of two-bit fields (quads 0..3, 4..7), t of third bits:
//               p = a | b << 4 of their low halves    q = a >> 4 | b of their high halves
//               p      + t << 2    low: quad 0      high: quad 4
//               p >> 2 + t << 1    low: quad 1      high: quad 5
//               q      + t         low: quad 2      high: quad 6
//               q >> 2 + t >> 1    low: quad 3      high: quad 7
//     bits 8    v         quad 0
//
//     I = 256 H + L + start                             (H, L: the sums of the planes)
//
// Vector instructions for 64 bytes of w and one row of x: 6 for 4 bits, 13 for 2, 12.3 for 3, 2 for
// 8, and 7 to end a block; at two a cycle and 3 GHz at least 25 GB/s a core from cache (measured:
// 44, 26, 25). So the memory rate is the bound, one contiguous stream, of which 89 % (3 bits) to
// 97 % arrive. Rows of x up to six keep all sums in registers; more take half a tile at a time.
//
// Overflow: |H| <= 64 * 255 * 128, and for unshifted halves 64 * 112 * 128: far inside 32 bits.
#pragma once

#include "cpu/qlinear_codes.h"

namespace kvopt::cpu {
namespace {

// A unit of this file: the columns of whole blocks of the layout.
constexpr int64_t plane_columns(Codes codes) {
  return codes == Codes::kInt3 ? 32 : unit_columns(codes);
}
constexpr int64_t plane_bytes(Codes codes) { return codes == Codes::kInt3 ? 384 : kUnitBytes; }
constexpr int plane_pairs(Codes codes) {  // of quads, low and high
  return codes == Codes::kInt3 ? 4 : codes == Codes::kInt2 ? 2 : 1;
}

// The low and high quads of 16 rows of a unit; the high ones in place or shifted down.
template <Codes kCodes, bool kInPlace>
KVOPT_INLINE void unpack_quads(const uint8_t* w, Ints* low, Ints* high) {
  Ints v = load_ints(w);
  keep_in_register(&v);
  if constexpr (kCodes == Codes::kInt8) {
    low[0] = v;
    return;
  } else {
    constexpr int32_t kField = kCodes == Codes::kInt4   ? 0x0F0F0F0F
                               : kCodes == Codes::kInt2 ? 0x03030303
                                                        : 0x07070707;
    Ints both[plane_pairs(kCodes)];
    if constexpr (kCodes == Codes::kInt4) {
      both[0] = v;
    } else if constexpr (kCodes == Codes::kInt2) {
      both[0] = v;
      both[1] = shift_right_16<2>(v);
    } else {
      Ints b = load_ints(w + kUnitBytes);
      Ints t = load_ints(w + 2 * kUnitBytes);
      keep_in_register(&b);
      keep_in_register(&t);
      const Ints halves = set_ints(0x0F0F0F0F);
      const Ints fields = set_ints(0x33333333);
      const Ints p = select_bits(halves, v, shift_left_16<4>(b));
      const Ints q = select_bits(halves, shift_right_16<4>(v), b);
      both[0] = select_bits(fields, p, shift_left_16<2>(t));
      both[1] = select_bits(fields, shift_right_16<2>(p), shift_left_16<1>(t));
      both[2] = select_bits(fields, q, t);
      both[3] = select_bits(fields, shift_right_16<2>(q), shift_right_16<1>(t));
    }
    const auto split = [&](int i) {
      low[i] = bit_and(both[i], set_ints(kField));
      if constexpr (kInPlace) {
        high[i] =
            bit_and(both[i], set_ints(static_cast<int32_t>(static_cast<uint32_t>(kField) << 4)));
      } else {
        high[i] = bit_and(shift_right_16<4>(both[i]), set_ints(kField));
      }
    };
    split(0);
    if constexpr (plane_pairs(kCodes) > 1) split(1);
    if constexpr (plane_pairs(kCodes) > 2) split(2), split(3);
  }
}

// Sums of a block: both planes of every row, and of the unshifted halves.
template <int kRows>
struct PlaneSums {
  Ints h[kRows][2];
  Ints l[kRows][2];
  Ints own_h[2];
  Ints own_l[2];
};

template <Codes kCodes, int kRows>
constexpr bool kOwnHighSums = kRows == 1 && kCodes != Codes::kInt8;

// Several rows take x from memory, because gcc would gather its broadcasts in registers that the
// sums need.
template <int kRows>
KVOPT_INLINE Ints dot_quad(Ints sum, Ints w, const uint8_t* x) {
  if constexpr (kRows > 1) return dot_bytes_at(sum, w, x);
  return dot_bytes(sum, w, broadcast(x));
}

// One unit at `w` and its columns of x at `x`, for the half tiles [kFirst, kEnd).
template <int kRows, Codes kCodes, int kFirst, int kEnd>
KVOPT_INLINE void multiply_unit(const uint8_t* w, const uint8_t* x, PlaneSums<kRows>* sums) {
  constexpr int kPairs = plane_pairs(kCodes);
  constexpr int64_t kQuadBytes = 8 * kRows;  // four columns of all rows
#pragma GCC unroll 2
  for (int v = kFirst; v < kEnd; ++v) {
    for (int64_t i = 0; i < plane_bytes(kCodes); i += kUnitBytes) prefetch_line(w + i + v * 64);
    Ints low[kPairs];
    Ints high[kPairs];
    unpack_quads<kCodes, kOwnHighSums<kCodes, kRows>>(w + v * 64, low, high);
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      const uint8_t* low_x = x + i * kQuadBytes;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sums->h[r][v] = dot_quad<kRows>(sums->h[r][v], low[i], low_x + 8 * r);
        sums->l[r][v] = dot_quad<kRows>(sums->l[r][v], low[i], low_x + 8 * r + 4);
      }
      const uint8_t* high_x = low_x + kPairs * kQuadBytes;
      if constexpr (kOwnHighSums<kCodes, kRows>) {
        sums->own_h[v] = dot_bytes(sums->own_h[v], high[i], broadcast(high_x));
        sums->own_l[v] = dot_bytes(sums->own_l[v], high[i], broadcast(high_x + 4));
      } else if constexpr (kCodes != Codes::kInt8) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sums->h[r][v] = dot_quad<kRows>(sums->h[r][v], high[i], high_x + 8 * r);
          sums->l[r][v] = dot_quad<kRows>(sums->l[r][v], high[i], high_x + 8 * r + 4);
        }
      }
    }
  }
}

// The integers of one block for kRows rows of x: walks `units` of w and x. A whole block for one
// row is unrolled: its loop would cost a quarter of its instructions.
template <int kRows, Codes kCodes>
KVOPT_INLINE void multiply_planes(const uint8_t* w, const uint8_t* x, int64_t units,
                                  const int32_t* start, Ints (*integers)[2]) {
  constexpr int64_t kWhole = kBlockColumns / plane_columns(kCodes);
  constexpr int64_t kStep = plane_columns(kCodes) * 2 * kRows;
  PlaneSums<kRows> sums;
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    sums.own_h[v] = sums.own_l[v] = zero_ints();
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums.h[r][v] = zero_ints();
      sums.l[r][v] = set_ints(start[r]);
    }
  }
  if (kRows == 1 && units == kWhole) {
#pragma GCC unroll 16
    for (int64_t unit = 0; unit < kWhole; ++unit) {
      multiply_unit<kRows, kCodes, 0, 2>(w + unit * plane_bytes(kCodes), x + unit * kStep, &sums);
    }
  } else if (kRows <= 6) {
    for (int64_t unit = 0; unit < units; ++unit) {
      multiply_unit<kRows, kCodes, 0, 2>(w, x, &sums);
      w += plane_bytes(kCodes);
      x += kStep;
    }
  } else {  // more sums than registers: half a tile at a time
    for (int64_t unit = 0; unit < units; ++unit) {
      multiply_unit<kRows, kCodes, 0, 1>(w + unit * plane_bytes(kCodes), x + unit * kStep, &sums);
    }
    for (int64_t unit = 0; unit < units; ++unit) {
      multiply_unit<kRows, kCodes, 1, 2>(w + unit * plane_bytes(kCodes), x + unit * kStep, &sums);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      if constexpr (kOwnHighSums<kCodes, kRows>) {
        sums.h[r][v] = add_ints(sums.h[r][v], shift_right_32<4>(sums.own_h[v]));
        sums.l[r][v] = add_ints(sums.l[r][v], shift_right_32<4>(sums.own_l[v]));
      }
      integers[r][v] = add_ints(shift_left_32<8>(sums.h[r][v]), sums.l[r][v]);
    }
  }
}

template <int kRows, Codes kCodes, bool kAsymmetric>
KVOPT_INLINE void planes_tile(const QLinearParams& p, const QLinearLayout& layout,
                              const Panel& panel, int64_t tile) {
  constexpr int64_t kUnitColumns = plane_columns(kCodes);
  const Floats middle = set_floats(static_cast<float>(middle_of(kCodes)));
  const uint8_t* w = p.packed + tile * layout.tile_bytes;
  const uint16_t* meta = p.meta + tile * layout.groups * layout.meta_stride;
  const uint8_t* x = panel.x;
  Floats sums[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = zero_floats();
  Cursor cursor;
  while (cursor.column < p.k) {
    const int64_t columns = columns_at(p, layout, cursor);
    const int64_t units = (columns + kUnitColumns - 1) / kUnitColumns;
    const int64_t at = cursor.block * kRows;
    Ints integers[kRows][2];
    multiply_planes<kRows, kCodes>(w, x, units, panel.start + at, integers);
    w += units * plane_bytes(kCodes);
    x += units * kUnitColumns * 2 * kRows;
    const uint16_t* group_meta = meta + cursor.group * layout.meta_stride;
    prefetch_meta<kAsymmetric>(group_meta);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Meta m = load_meta<kAsymmetric>(group_meta + v * kLanes, middle);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sums[r][v] = add_block<kAsymmetric>(sums[r][v], integers[r][v], m.scale, m.offset,
                                            panel.scale[at + r], panel.sum[at + r]);
      }
    }
    advance(layout, columns, &cursor);
  }
  alignas(64) float result[kRows * kTileRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    store_floats(result + r * kTileRows, sums[r][0]);
    store_floats(result + r * kTileRows + kLanes, sums[r][1]);
  }
  finish_rows(p, 0, kRows, tile, result);
}

// For a number of rows known only now, kRows or fewer.
template <Codes kCodes, int kRows>
void run_planes_rows(const QLinearParams& p, const QLinearLayout& layout, int64_t tile_begin,
                     int64_t tile_end) {
  if constexpr (kRows > 1) {
    if (p.m < kRows) return run_planes_rows<kCodes, kRows - 1>(p, layout, tile_begin, tile_end);
  }
  const Panel panel = panel_at(p, layout, 0);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    if (p.format.has_zeros()) {
      planes_tile<kRows, kCodes, true>(p, layout, panel, tile);
    } else {
      planes_tile<kRows, kCodes, false>(p, layout, panel, tile);
    }
  }
}

}  // namespace
}  // namespace kvopt::cpu
