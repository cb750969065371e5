// SPDX-License-Identifier: Apache-2.0
// qlinear with int8 activations for AVX-512 with VNNI. Compiled with the flags of qlinear_vnni.cpp;
// nothing here may have external linkage but the table at the end.
//
// Many rows of x: as qlinear_a8_tiles.h says; one multiply-add of four bytes is one instruction,
// vpdpbusd.
//
// Up to kDirectRows rows and codes of 4 or 8 bits, the codes are multiplied where they lie, with no
// panel in between:
//
//      bits 4    v & 0x0F0F0F0F  x  columns 0..3       (v >> 4) & 0x0F0F0F0F  x  columns 4..7
//      bits 8    v of columns 0..3                     v of columns 4..7
//
// each into sums of its own for few rows, so that no addition waits for another. For 4 bits and one
// row that is 2 multiply-adds and 3 instructions of unpacking for 64 bytes: the bound is the bytes
// of w, one contiguous stream, prefetched on two levels.
#define KVOPT_QLINEAR_VNNI

#include "cpu/qlinear_a8_tiles.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kDirectRows = 8;
constexpr int64_t kNearBytes = 1024;  // prefetch distances: to the first level of cache
constexpr int64_t kFarBytes = 4096;   // and, past the next page, to the second

KVOPT_INLINE void prefetch_stream(const uint8_t* w) {
  for (int64_t i = 0; i < kQuadBytes; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(w + kNearBytes + i), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(w + kFarBytes + i), _MM_HINT_T1);
  }
}

// The integers of one chunk for kRows rows of x.
template <int kRows, int kBits>
KVOPT_INLINE void direct_chunk(const uint8_t* w, const uint8_t* x, int64_t quads,
                               const int32_t* start, Ints (*integers)[2]) {
  constexpr bool kOther = kRows <= 4;  // second quads have sums of their own
  const Ints mask = set_ints(0x0F0F0F0F);
  Ints other[kOther ? kRows : 1][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    integers[r][0] = integers[r][1] = set_ints(start[r]);
    if constexpr (kOther) other[r][0] = other[r][1] = zero_ints();
  }
  // Bits 4: a block holds a pair of quads, also where the second lies past K and x is 0.
  int64_t quad = 0;
  for (; quad + 2 <= quads || (kBits == 4 && quad < quads); quad += 2, x += 8 * kRows) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      Ints first;
      Ints second;
      if constexpr (kBits == 4) {
        if (v == 0) prefetch_stream(w);
        Ints codes = load_ints(w + v * 64);
        keep_in_register(&codes);
        first = bit_and(codes, mask);
        second = bit_and(shift_right_16<4>(codes), mask);
      } else {
        prefetch_stream(w + v * kQuadBytes);
        first = load_ints(w + v * 64);
        second = load_ints(w + kQuadBytes + v * 64);
        keep_in_register(&first);
        keep_in_register(&second);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        integers[r][v] = dot_bytes(integers[r][v], first, broadcast(x + 4 * r));
        Ints& sum = kOther ? other[kOther ? r : 0][v] : integers[r][v];
        sum = dot_bytes(sum, second, broadcast(x + 4 * (kRows + r)));
      }
    }
    w += kBits == 4 ? kQuadBytes : 2 * kQuadBytes;
  }
  if (quad < quads) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Ints codes = load_ints(w + v * 64);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        integers[r][v] = dot_bytes(integers[r][v], codes, broadcast(x + 4 * r));
      }
    }
  }
  if constexpr (kOther) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      integers[r][0] = add_ints(integers[r][0], other[r][0]);
      integers[r][1] = add_ints(integers[r][1], other[r][1]);
    }
  }
}

template <int kRows, int kBits, Mode kMode>
void direct_tile(const QLinearParams& p, const A8Layout& layout, const Panel& panel, int64_t tile) {
  const Floats middle = set_floats(static_cast<float>(layout.middle));
  const uint8_t* w = p.packed + tile * layout.tile_bytes;
  const uint16_t* meta = p.meta + tile * layout.groups * layout.meta_stride;
  Floats sums[kRows][2];
  Ints whole[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = sums[r][1] = zero_floats();
    whole[r][0] = whole[r][1] = zero_ints();
  }
  int64_t at = 0;  // of the chunk's entries
  for (int64_t group = 0; group < layout.groups; ++group, meta += layout.meta_stride) {
    int64_t column = group * layout.group_columns;
    const int64_t end = column + layout.group_columns < p.k ? column + layout.group_columns : p.k;
    _mm_prefetch(reinterpret_cast<const char*>(meta + 256), _MM_HINT_T0);
    if (kMode == Mode::kAsymmetric) {
      _mm_prefetch(reinterpret_cast<const char*>(meta + 288), _MM_HINT_T0);
    }
    for (; column < end; column += kChunkColumns, at += kRows) {
      const int64_t columns = end - column < kChunkColumns ? end - column : kChunkColumns;
      Ints integers[kRows][2];
      direct_chunk<kRows, kBits>(w + column / (32 / kBits) * kQuadBytes, panel.x + column * kRows,
                                 (columns + 3) / 4, panel.start + at, integers);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        Floats scale = zero_floats();
        Floats offset = zero_floats();
        if constexpr (kMode != Mode::kWhole) scale = load_halves(meta + v * kLanes);
        if constexpr (kMode == Mode::kAsymmetric) {
          offset = multiply(scale, subtract(middle, load_halves(meta + kTileRows + v * kLanes)));
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          if constexpr (kMode == Mode::kWhole) {
            whole[r][v] = add_ints(whole[r][v], integers[r][v]);
            continue;
          }
          sums[r][v] = multiply_add(to_floats(integers[r][v]),
                                    multiply(scale, set_floats(panel.scale[at + r])), sums[r][v]);
          if constexpr (kMode == Mode::kAsymmetric) {
            sums[r][v] = multiply_add(offset, set_floats(panel.sum[at + r]), sums[r][v]);
          }
        }
      }
    }
  }
  alignas(64) float result[kRows * kTileRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 2; ++v) {
      float* out = result + r * kTileRows + v * kLanes;
      if constexpr (kMode == Mode::kWhole) {
        store_ints(out, whole[r][v]);
      } else {
        store_floats(out, sums[r][v]);
      }
    }
  }
  if (kMode == Mode::kWhole) scale_whole(p, layout, 0, 1, tile, result);
  finish_rows(p, 0, kRows, tile, result);
}

template <int kRows, int kBits, Mode kMode>
void run_rows(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  const A8Layout layout = a8_layout(p, kPanelRows);
  const Panel panel = panel_at(p, layout, 0);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    direct_tile<kRows, kBits, kMode>(p, layout, panel, tile);
  }
}

template <int kBits, Mode kMode>
void run_direct(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  switch (p.m) {
    case 1:
      return run_rows<1, kBits, kMode>(p, tile_begin, tile_end);
    case 2:
      return run_rows<2, kBits, kMode>(p, tile_begin, tile_end);
    case 3:
      return run_rows<3, kBits, kMode>(p, tile_begin, tile_end);
    case 4:
      return run_rows<4, kBits, kMode>(p, tile_begin, tile_end);
    case 5:
      return run_rows<5, kBits, kMode>(p, tile_begin, tile_end);
    case 6:
      return run_rows<6, kBits, kMode>(p, tile_begin, tile_end);
    case 7:
      return run_rows<7, kBits, kMode>(p, tile_begin, tile_end);
    case 8:
      return run_rows<8, kBits, kMode>(p, tile_begin, tile_end);
  }
}

void run_vnni(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  const bool direct = p.m <= kDirectRows && p.format.bits >= 4 && !p.format.has_book();
  if (p.m == 0 || !direct) return run(p, tile_begin, tile_end);
  if (p.format.bits == 4) {
    if (p.format.has_zeros()) {
      return run_direct<4, Mode::kAsymmetric>(p, tile_begin, tile_end);
    }
    return run_direct<4, Mode::kSymmetric>(p, tile_begin, tile_end);
  }
  if (a8_is_whole(p)) return run_direct<8, Mode::kWhole>(p, tile_begin, tile_end);
  if (p.format.has_zeros()) return run_direct<8, Mode::kAsymmetric>(p, tile_begin, tile_end);
  run_direct<8, Mode::kSymmetric>(p, tile_begin, tile_end);
}

}  // namespace

const QLinearKernels kA8Vnni = {workspace_bytes, prepare, run_vnni};

}  // namespace kvopt::cpu
