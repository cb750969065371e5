// SPDX-License-Identifier: Apache-2.0
// qlinear for AVX-512 with VNNI. Compiled with the flags of qlinear_avx512.cpp and -mavx512vnni;
// nothing here may have external linkage but the table at the end.
//
// The order of sums and the result, bit for bit, are those of qlinear_tiles.h. Panels of rows use
// vpdpwssd, which adds what it multiplies; a few rows of x take a shorter way to the codes:
//
// Up to 6 rows. X = 256 h + l, two planes of signed bytes, multiplies the codes where they lie, as
// unsigned bytes (vpdpbusd). A 64-byte register is 16 rows of w; its low nibbles are columns 0..3,
// its high nibbles columns 4..7:
//
//      v       & 0x0F0F0F0F   x   h h h h | l l l l   of columns 0..3 (broadcast)
//     (v >> 4) & 0x0F0F0F0F   x   h h h h | l l l l   of columns 4..7
//
//     I = 256 H + L + start                             (H, L: the sums of the planes)
//
// Four multiply-adds and three instructions of unpacking for 64 bytes: 3.5 cycles on two vector
// ports, some 50 GB/s a core from cache. So the memory rate is the bound, one contiguous stream.
// For one row the high nibbles are not shifted at all: masked in place they count 16 times, and
// their own sums are shifted once a block.
//
// Overflow: |H| <= 64 * 255 * 128, and for unshifted nibbles 32 * 240 * 128: far inside 32 bits.
#define KVOPT_QLINEAR_VNNI

#include "cpu/qlinear_tiles.h"

namespace kvopt::cpu {
namespace {

// The integers of one block for kRows rows of x: walks `units` of w (8 or 4 columns, 128 bytes) and
// x.
template <int kRows, int kBits>
KVOPT_INLINE void multiply_planes(const uint8_t* w, const uint8_t* x, int64_t units,
                                  const int32_t* start, Ints (*integers)[2]) {
  constexpr bool kOwnHighSums = kRows == 1 && kBits == 4;
  constexpr int64_t kQuadBytes = 8 * kRows;  // four columns of all rows
  const Ints low_mask = set_ints(0x0F0F0F0F);
  const Ints high_mask = set_ints(static_cast<int32_t>(0xF0F0F0F0u));
  Ints h[kRows][2];
  Ints l[kRows][2];
  Ints own_h[2] = {zero_ints(), zero_ints()};
  Ints own_l[2] = {zero_ints(), zero_ints()};
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    h[r][0] = h[r][1] = zero_ints();
    l[r][0] = l[r][1] = set_ints(start[r]);
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    prefetch_stream(w);
    Ints codes[2] = {load_ints(w), load_ints(w + 64)};
    keep_in_register(&codes[0]);
    keep_in_register(&codes[1]);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Ints low = kBits == 4 ? bit_and(codes[v], low_mask) : codes[v];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        h[r][v] = dot_bytes(h[r][v], low, broadcast(x + 8 * r));
        l[r][v] = dot_bytes(l[r][v], low, broadcast(x + 8 * r + 4));
      }
      if constexpr (kOwnHighSums) {
        const Ints high = bit_and(codes[v], high_mask);
        own_h[v] = dot_bytes(own_h[v], high, broadcast(x + kQuadBytes));
        own_l[v] = dot_bytes(own_l[v], high, broadcast(x + kQuadBytes + 4));
      } else if constexpr (kBits == 4) {
        const Ints high = bit_and(shift_right_16<4>(codes[v]), low_mask);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          h[r][v] = dot_bytes(h[r][v], high, broadcast(x + kQuadBytes + 8 * r));
          l[r][v] = dot_bytes(l[r][v], high, broadcast(x + kQuadBytes + 8 * r + 4));
        }
      }
    }
    w += kBlockBytes;
    x += kBits == 4 ? 2 * kQuadBytes : kQuadBytes;
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      if constexpr (kOwnHighSums) {
        h[r][v] = add_ints(h[r][v], shift_right_32<4>(own_h[v]));
        l[r][v] = add_ints(l[r][v], shift_right_32<4>(own_l[v]));
      }
      integers[r][v] = add_ints(shift_left_32<8>(h[r][v]), l[r][v]);
    }
  }
}

template <int kRows, int kBits, bool kAsymmetric>
void planes_tile(const QLinearParams& p, const QLinearLayout& layout, const Panel& panel,
                 int64_t tile) {
  constexpr int64_t kUnitColumns = kBits == 4 ? 8 : 4;
  const Floats middle = set_floats(static_cast<float>(1 << (kBits - 1)));
  const uint8_t* w = p.packed + tile * layout.tile_bytes;
  const uint16_t* meta = p.meta + tile * layout.groups * layout.meta_stride;
  const uint8_t* x = panel.x;
  Floats sums[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = zero_floats();
  Cursor cursor;
  while (cursor.column < p.k) {
    const int64_t columns = columns_at(p, layout, cursor);
    const int64_t units = (columns + kUnitColumns - 1) / kUnitColumns;
    const int64_t at = cursor.block * kRows;
    Ints integers[kRows][2];
    multiply_planes<kRows, kBits>(w, x, units, panel.start + at, integers);
    w += units * kBlockBytes;
    x += units * kUnitColumns * 2 * kRows;
    const uint16_t* group_meta = meta + cursor.group * layout.meta_stride;
    prefetch_meta<kAsymmetric>(group_meta);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Meta m = load_meta<kAsymmetric>(group_meta + v * kLanes, middle);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        sums[r][v] = add_block<kAsymmetric>(sums[r][v], integers[r][v], m.scale, m.offset,
                                            panel.scale[at + r], panel.sum[at + r]);
      }
    }
    advance(layout, columns, &cursor);
  }
  alignas(64) float result[kRows * kTileRows];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    store_floats(result + r * kTileRows, sums[r][0]);
    store_floats(result + r * kTileRows + kLanes, sums[r][1]);
  }
  finish_rows(p, 0, kRows, tile, result);
}

template <int kRows, int kBits>
void run_planes(const QLinearParams& p, const QLinearLayout& layout, int64_t tile_begin,
                int64_t tile_end) {
  const Panel panel = panel_at(p, layout, 0);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    if (p.format.symmetric) {
      planes_tile<kRows, kBits, false>(p, layout, panel, tile);
    } else {
      planes_tile<kRows, kBits, true>(p, layout, panel, tile);
    }
  }
}

template <int kBits>
void run_bits(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  const QLinearLayout layout = qlinear_layout(p, kIsa);
  if (!layout.planes) return run_panels<kBits>(p, layout, tile_begin, tile_end);
  switch (p.m) {
    case 1:
      return run_planes<1, kBits>(p, layout, tile_begin, tile_end);
    case 2:
      return run_planes<2, kBits>(p, layout, tile_begin, tile_end);
    case 3:
      return run_planes<3, kBits>(p, layout, tile_begin, tile_end);
    case 4:
      return run_planes<4, kBits>(p, layout, tile_begin, tile_end);
    case 5:
      return run_planes<5, kBits>(p, layout, tile_begin, tile_end);
    case 6:
      return run_planes<6, kBits>(p, layout, tile_begin, tile_end);
  }
}

void run(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  if (p.m == 0) return;
  if (p.format.bits == 4) {
    run_bits<4>(p, tile_begin, tile_end);
  } else {
    run_bits<8>(p, tile_begin, tile_end);
  }
}

}  // namespace

const QLinearKernels kQLinearVnni = {prepare, run};

}  // namespace kvopt::cpu
