// SPDX-License-Identifier: Apache-2.0
// `qlinear` with int8 activations on vectors: the rule of qlinear_a8.h for AVX2, AVX-512 and VNNI.
// The including file names its instruction set by a macro (simd.h); everything has internal
// linkage.
//
//     I        = start + sum over a chunk of U[n][k] X[m][k]       U: unsigned bytes, start = -mid
//     sum X y[m][n] += (scale[n][g] s[m][g]) I                           exact until here y[m][n]
//     += scale[n][g] (mid - zero[n][g]) sum[m]             asymmetric only
//
// A stretch of the tile, up to 256 columns, becomes bytes in the first level of cache: 32 rows x 4
// columns are 128 bytes, the shape of vpdpbusd; panels prefetch the next stretch meanwhile. Where a
// code needs more than an instruction set can multiply, it is two planes, I = 128 H + L: code books
// everywhere, eight bits without VNNI (where vpmaddubsw adds two products in 16 bits: 2 * 127 * 127
// still fits).
//
//              2 vectors = 32 (AVX2: 16) rows of w
//            +-----------+
//     x row  |  |  |  |  |    += X quad (broadcast) * 2 vectors of bytes, 64 times a stretch
//      ...   |  |  |  |  |
//            +-----------+
//
// Registers: 12 rows of x (AVX2: 4) times 2 vectors of sums, 2 of w, a broadcast. With VNNI a quad
// is 24 multiply-adds beside 14 loads: 12 cycles on two ports. A chunk of 128 columns is 32 quads,
// after which every sum costs 4 or 5 more instructions. W8A8 keeps its sums as integers in memory
// and scales them once.
//
// One row of x is bound by the bytes of w: qlinear_a8_vnni.cpp takes codes where they lie.
#pragma once

#include "cpu/qlinear_a8_prepare.h"

namespace kvopt::cpu {
namespace {

// ---- w ------------------------------------------------------------------------------------------

KVOPT_INLINE Ints broadcast(const uint8_t* x) {
  int32_t word;
  memcpy(&word, x, sizeof(word));
  return set_ints(word);
}

KVOPT_INLINE Ints broadcast_table(const uint8_t* table) {
  const __m128i once = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
#if defined(KVOPT_QLINEAR_AVX2)
  return _mm256_broadcastsi128_si256(once);
#else
  return _mm512_broadcast_i32x4(once);
#endif
}

KVOPT_INLINE Ints look_up_bytes(Ints table, Ints codes) {
#if defined(KVOPT_QLINEAR_AVX2)
  return _mm256_shuffle_epi8(table, codes);
#else
  return _mm512_shuffle_epi8(table, codes);
#endif
}

// sum[lane] + the four products of unsigned bytes of w (without VNNI: up to 127) and int8 of x.
KVOPT_INLINE Ints dot_quad(Ints sum, Ints w, Ints x) {
#if defined(KVOPT_QLINEAR_VNNI)
  return dot_bytes(sum, w, x);
#elif defined(KVOPT_QLINEAR_AVX2)
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
#endif
}

KVOPT_INLINE Ints shift_left_plane(Ints v) {
#if defined(KVOPT_QLINEAR_AVX2)
  return _mm256_slli_epi32(v, kPlaneBits);
#else
  return _mm512_slli_epi32(v, kPlaneBits);
#endif
}

// The codes of 16 columns of kLanes rows from `w` (the unit's bytes of these rows) as four
// registers of bytes; `half` bit 0 of the unit's number, `third` the register's third bits (3
// bits).
template <int kBits>
KVOPT_INLINE void load_codes(const uint8_t* w, const uint8_t* third_bits, int odd, Ints* codes) {
  if constexpr (kBits == 8) {
    for (int i = 0; i < 4; ++i) codes[i] = load_ints(w + i * kQuadBytes);
  } else if constexpr (kBits == 4) {
    const Ints mask = set_ints(0x0F0F0F0F);
    for (int i = 0; i < 2; ++i) {
      const Ints v = load_ints(w + i * kQuadBytes);
      codes[2 * i] = bit_and(v, mask);
      codes[2 * i + 1] = bit_and(shift_right_16<4>(v), mask);
    }
  } else {
    const Ints mask = set_ints(0x03030303);
    const Ints v = load_ints(w);
    codes[0] = bit_and(v, mask);
    codes[1] = bit_and(shift_right_16<2>(v), mask);
    codes[2] = bit_and(shift_right_16<4>(v), mask);
    codes[3] = bit_and(shift_right_16<6>(v), mask);
    if constexpr (kBits == 3) {
      const Ints top = set_ints(0x04040404);
      const Ints third = shift_right_16_by(load_ints(third_bits), odd * 4);
      codes[0] = add_ints(codes[0], bit_and(shift_left_16<2>(third), top));
      codes[1] = add_ints(codes[1], bit_and(shift_left_16<1>(third), top));
      codes[2] = add_ints(codes[2], bit_and(third, top));
      codes[3] = add_ints(codes[3], bit_and(shift_right_16<1>(third), top));
    }
  }
}

struct Tables {
  Ints high;
  Ints low;
  float unit;  // of the scales
};

KVOPT_INLINE Tables load_tables(const QuantFormat& format) {
  Tables t = {zero_ints(), zero_ints(), 1.0f};
  if (format.has_book()) {
    const A8Book book = a8_book(format.scheme);
    t.high = broadcast_table(book.high);
    t.low = broadcast_table(book.low);
    t.unit = book.unit;
  }
  return t;
}

template <int kBits, bool kBook>
constexpr int kPlanes = kBook || (kBits == 8 && !kFullBytes) ? 2 : 1;

// The 16 columns at `source` to `out`, the high plane kPlaneBytes in front of the low one.
template <int kBits, bool kBook>
KVOPT_INLINE void unpack_unit(const uint8_t* source, int64_t unit, const Tables& tables,
                              uint8_t* out) {
  const int odd = static_cast<int>(unit % 2);
#pragma GCC unroll 4
  for (int v = 0; v < kTileVectors; ++v) {
    const int64_t lane = static_cast<int64_t>(v) * kLanes * 4;
    Ints codes[4];
    load_codes<kBits>(source + lane + (kBits == 3 ? odd * kQuadBytes : 0),
                      source + lane + 2 * kQuadBytes, odd, codes);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      uint8_t* target = out + lane + i * kQuadBytes;
      if constexpr (kBook) {
        store_ints(target, look_up_bytes(tables.high, codes[i]));
        store_ints(target + kPlaneBytes, look_up_bytes(tables.low, codes[i]));
      } else if constexpr (kPlanes<kBits, kBook> == 2) {
        store_ints(target, bit_and(shift_right_16<7>(codes[i]), set_ints(0x01010101)));
        store_ints(target + kPlaneBytes, bit_and(codes[i], set_ints(0x7F7F7F7F)));
      } else {
        store_ints(target, codes[i]);
      }
    }
  }
}

// Some consecutive chunks of a tile, unpacked.
struct Stretch {
  int64_t column;  // of the first chunk
  int64_t chunk;   // its index
  int64_t chunks;
  const uint8_t* next;  // the bytes after it, packed: they are prefetched during the multiplication
  int64_t next_step;    // bytes of them for each quad of each panel
  int32_t quads[kStretchChunks];
  alignas(64) float scale[kStretchChunks][kTileRows];
  alignas(64) float offset[kStretchChunks][kTileRows];
  alignas(64) uint8_t weights[2 * kPlaneBytes];
};

struct Cursor {
  int64_t group = 0;
  int64_t chunk = 0;  // of the row
  int64_t column = 0;
};

KVOPT_INLINE void prefetch(const uint8_t* w) {
  _mm_prefetch(reinterpret_cast<const char*>(w), _MM_HINT_T0);
}

template <int kBits, bool kBook, bool kAsymmetric>
void unpack_stretch(const QLinearParams& p, const A8Layout& layout, int64_t tile,
                    const Tables& tables, Cursor* cursor, Stretch* stretch) {
  const uint8_t* w = p.packed + tile * layout.tile_bytes;
  const uint16_t* meta = p.meta + tile * layout.groups * layout.meta_stride;
  stretch->column = cursor->column;
  stretch->chunk = cursor->chunk;
  stretch->chunks = 0;
  while (cursor->column < p.k) {
    const int64_t begin = cursor->group * layout.group_columns;
    const int64_t end = begin + layout.group_columns < p.k ? begin + layout.group_columns : p.k;
    const int64_t left = end - cursor->column;
    const int64_t columns = left < kChunkColumns ? left : kChunkColumns;
    const int64_t used = cursor->column - stretch->column;
    if (used + columns > kStretchColumns || stretch->chunks == kStretchChunks) break;
    uint8_t* out = stretch->weights + used / 4 * kQuadBytes;
    for (int64_t c = 0; c < columns; c += 16, out += 4 * kQuadBytes) {
      constexpr int64_t kSize = kBits == 3 ? 384 : kBits * 64;
      const int64_t unit = (cursor->column + c) / 16;
      const int64_t from = kBits == 3 ? unit / 2 * 384 : unit * kSize;
      if (from + kSize <= layout.tile_bytes) {
        unpack_unit<kBits, kBook>(w + from, unit, tables, out);
      } else {  // the tile ends inside the unit
        alignas(64) uint8_t edge[512] = {};
        memcpy(edge, w + from, static_cast<size_t>(layout.tile_bytes - from));
        unpack_unit<kBits, kBook>(edge, unit, tables, out);
      }
    }
    const int64_t index = stretch->chunks++;
    stretch->quads[index] = static_cast<int32_t>((columns + 15) / 16 * 4);
    const uint16_t* group_meta = meta + cursor->group * layout.meta_stride;
    for (int v = 0; v < kTileVectors; ++v) {
      const Floats scale = multiply(load_halves(group_meta + v * kLanes), set_floats(tables.unit));
      store_floats(stretch->scale[index] + v * kLanes, scale);
      if constexpr (kAsymmetric) {
        const Floats middle = set_floats(static_cast<float>(layout.middle));
        const Floats zero = load_halves(group_meta + kTileRows + v * kLanes);
        store_floats(stretch->offset[index] + v * kLanes, multiply(scale, subtract(middle, zero)));
      }
    }
    cursor->column += columns;
    ++cursor->chunk;
    if (cursor->column == end) ++cursor->group;
  }
  stretch->next = w + cursor->column / 16 * (kBits == 3 ? 192 : kBits * 64);
}

// ---- multiplication -----------------------------------------------------------------------------

// What a chunk's integers become: sums of floats, with or without zero points, or, for W8A8, sums
// of integers in the same memory.
enum class Mode { kSymmetric, kAsymmetric, kWhole };

// sums (kRows, 32) += the panel's stretch of x times the stretch of w.
template <int kRows, int kPlaneCount, Mode kMode, bool kWideSteps>
void multiply_panel(const Stretch& stretch, const Panel& panel, float* sums) {
  for (int part = 0; part < kTileVectors / 2; ++part) {
    const int64_t lane = static_cast<int64_t>(part) * 2 * kLanes;
    const uint8_t* x = panel.x + stretch.column * kRows;
    const uint8_t* w = stretch.weights + lane * 4;
    const uint8_t* next = stretch.next;
    for (int64_t b = 0; b < stretch.chunks; ++b) {
      const int64_t at = (stretch.chunk + b) * kRows;
      const int32_t quads = stretch.quads[b];  // never 0
      __asm__ volatile("" ::: "memory");       // nothing is kept in registers across chunks
      Ints integers[kRows][2];
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        integers[r][0] = kPlaneCount == 2 ? zero_ints() : set_ints(panel.start[at + r]);
        integers[r][1] = integers[r][0];
      }
#pragma GCC unroll 2
      for (int plane = 0; plane < kPlaneCount; ++plane) {
        if (plane == 1) {
#pragma GCC unroll 12
          for (int r = 0; r < kRows; ++r) {
            const Ints start = set_ints(panel.start[at + r]);
            integers[r][0] = add_ints(shift_left_plane(integers[r][0]), start);
            integers[r][1] = add_ints(shift_left_plane(integers[r][1]), start);
          }
        }
        const uint8_t* from = w + plane * kPlaneBytes;
        const uint8_t* quad_x = x;
        int32_t quad = quads;
        do {
          const Ints w0 = load_ints(from);
          const Ints w1 = load_ints(from + kLanes * 4);
#pragma GCC unroll 12
          for (int r = 0; r < kRows; ++r) {
            const Ints value = broadcast(quad_x + 4 * r);
            integers[r][0] = dot_quad(integers[r][0], w0, value);
            integers[r][1] = dot_quad(integers[r][1], w1, value);
          }
          from += kQuadBytes;
          quad_x += 4 * kRows;
          if (plane == 0 && part == 0) {
            prefetch(next);
            if (kWideSteps) prefetch(next + 64);
            next += stretch.next_step;
          }
        } while (--quad > 0);
      }
      w += quads * kQuadBytes;
      x += quads * 4 * kRows;
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const int64_t column = lane + v * kLanes;
          float* sum = sums + r * kTileRows + column;
          if constexpr (kMode == Mode::kWhole) {
            store_ints(sum, add_ints(load_ints(sum), integers[r][v]));
          } else {
            const Floats scale = load_floats(stretch.scale[b] + column);
            Floats value =
                multiply_add(to_floats(integers[r][v]),
                             multiply(scale, set_floats(panel.scale[at + r])), load_floats(sum));
            if constexpr (kMode == Mode::kAsymmetric) {
              value = multiply_add(load_floats(stretch.offset[b] + column),
                                   set_floats(panel.sum[at + r]), value);
            }
            store_floats(sum, value);
          }
        }
      }
    }
  }
}

// multiply_panel for a width known only now.
template <int kRows, int kPlaneCount, Mode kMode, bool kWideSteps>
KVOPT_INLINE void multiply_panel_of(const Stretch& stretch, const Panel& panel, float* sums) {
  if constexpr (kRows > 1) {
    if (panel.width < kRows) {
      return multiply_panel_of<kRows - 1, kPlaneCount, kMode, kWideSteps>(stretch, panel, sums);
    }
  }
  multiply_panel<kRows, kPlaneCount, kMode, kWideSteps>(stretch, panel, sums);
}

// The integers of W8A8 become floats where they lie.
KVOPT_INLINE void scale_whole(const QLinearParams& p, const A8Layout& layout, int64_t panel_begin,
                              int64_t panel_end, int64_t tile, float* sums) {
  const uint16_t* meta = p.meta + tile * layout.meta_stride;
  for (int64_t index = panel_begin; index < panel_end; ++index) {
    const Panel panel = panel_at(p, layout, index);
    for (int64_t r = 0; r < panel.width; ++r, sums += kTileRows) {
      for (int v = 0; v < kTileVectors; ++v) {
        const Floats scale = multiply(load_halves(meta + v * kLanes), set_floats(panel.scale[r]));
        store_floats(sums + v * kLanes, multiply(to_floats(load_ints(sums + v * kLanes)), scale));
      }
    }
  }
}

template <int kBits, bool kBook, Mode kMode>
void multiply_batch(const QLinearParams& p, const A8Layout& layout, int64_t panel_begin,
                    int64_t panel_end, int64_t tile, const Tables& tables) {
  alignas(64) float sums[(kBatchRows + kPanelRows) * kTileRows];
  Stretch stretch;
  const int64_t first_row = panel_at(p, layout, panel_begin).row;
  const Panel last = panel_at(p, layout, panel_end - 1);
  const int64_t rows = last.row + last.width - first_row;
  memset(sums, 0, static_cast<size_t>(rows * kTileRows) * sizeof(float));
  // Every panel prefetches its share of the next stretch: at most two lines a quad.
  constexpr int64_t kNextBytes = kBits == 3 ? 48 : kBits * 16;
  const int64_t panels = panel_end - panel_begin;
  stretch.next_step = (kNextBytes + panels - 1) / panels;
  Cursor cursor;
  while (cursor.column < p.k) {
    unpack_stretch<kBits, kBook, kMode == Mode::kAsymmetric>(p, layout, tile, tables, &cursor,
                                                             &stretch);
    const int64_t share = (cursor.column - stretch.column + 3) / 4 * stretch.next_step;
    for (int64_t index = panel_begin; index < panel_end; ++index, stretch.next += share) {
      const Panel panel = panel_at(p, layout, index);
      multiply_panel_of<kPanelRows, kPlanes<kBits, kBook>, kMode, (kNextBytes > 64)>(
          stretch, panel, sums + (panel.row - first_row) * kTileRows);
    }
  }
  if (kMode == Mode::kWhole) scale_whole(p, layout, panel_begin, panel_end, tile, sums);
  finish_rows(p, first_row, rows, tile, sums);
}

template <int kBits, bool kBook, Mode kMode>
void run_panels(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  const A8Layout layout = a8_layout(p, kPanelRows);
  const Tables tables = load_tables(p.format);
  // Panels of a batch: as many as the caches like, and at least two.
  int64_t rows = kBatchBytes / layout.row_bytes;
  rows = rows < kBatchRows ? rows : kBatchRows;
  const int64_t batch = rows / kPanelRows < 2 ? 2 : rows / kPanelRows;
  for (int64_t begin = 0; begin < layout.panels; begin += batch) {
    const int64_t end = begin + batch < layout.panels ? begin + batch : layout.panels;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      multiply_batch<kBits, kBook, kMode>(p, layout, begin, end, tile, tables);
    }
  }
}

template <int kBits>
void run_bits(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  if (p.format.has_zeros())
    return run_panels<kBits, false, Mode::kAsymmetric>(p, tile_begin, tile_end);
  run_panels<kBits, false, Mode::kSymmetric>(p, tile_begin, tile_end);
}

void run(const QLinearParams& p, int64_t tile_begin, int64_t tile_end) {
  if (p.m == 0) return;
  if (p.format.has_book()) return run_panels<4, true, Mode::kSymmetric>(p, tile_begin, tile_end);
  if (a8_is_whole(p)) return run_panels<8, false, Mode::kWhole>(p, tile_begin, tile_end);
  switch (p.format.bits) {
    case 2:
      return run_bits<2>(p, tile_begin, tile_end);
    case 3:
      return run_bits<3>(p, tile_begin, tile_end);
    case 4:
      return run_bits<4>(p, tile_begin, tile_end);
    case 8:
      return run_bits<8>(p, tile_begin, tile_end);
  }
}

}  // namespace
}  // namespace kvopt::cpu
