// SPDX-License-Identifier: Apache-2.0
// The end of every vector kernel: what params.h calls bias, low rank, addend, act and residual, for
// some rows of x and one tile of 32 rows of w. The including file names its instruction set by a
// macro (simd.h); everything has internal linkage.
//
// A tile's product arrives as sums (rows, 32) in fp32, in cache, so that all parts cost little
// beside it: each reads its operand once. The low-rank factor of the tile is transposed on its way
// to fp32, 32 columns of it (4 KB) at a time, so that its product is one multiply-add for 16 (8)
// outputs, for one row of x as for many. Gate and up rows alternate in eights: two registers hold
// 16 gates and their 16 ups after one exchange of halves.
//
// The order of additions depends on nothing but the column, so that results are the same bit for
// bit whatever M is and on every vector instruction set.
#pragma once

#include "common/params.h"
#include "cpu/simd.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kTileRows = 32;
constexpr int kTileVectors = 32 / kLanes;  // vectors of a tile's rows

// `count` values from index `first` (32 or fewer) as fp32, zeros behind them.
template <DType kType>
KVOPT_INLINE void load_tile(const void* source, int64_t first, int64_t count, float* values) {
  constexpr int64_t kBytes = kType == DType::kFloat32 ? 4 : 2;
  const uint8_t* from = static_cast<const uint8_t*>(source) + first * kBytes;
  alignas(64) uint8_t edge[kTileRows * kBytes];
  if (count < kTileRows) {  // never read past the array
    memset(edge, 0, sizeof(edge));
    memcpy(edge, from, static_cast<size_t>(count * kBytes));
    from = edge;
  }
  for (int v = 0; v < kTileVectors; ++v) {
    store_floats(values + v * kLanes, load_as_floats<kType>(from + v * kLanes * kBytes));
  }
}

// e^v within 2e-7; 0 becomes 1, large becomes infinity, NaN stays.
KVOPT_INLINE Floats exponential(Floats v) {
  v = min_floats(set_floats(89.0f), max_floats(set_floats(-87.0f), v));  // NaN passes both
  const Ints whole = round_to_ints(multiply(v, set_floats(1.44269504f)));
  const Floats n = to_floats(whole);
  Floats r = multiply_add(n, set_floats(-0.693359375f), v);
  r = multiply_add(n, set_floats(2.12194440e-4f), r);
  Floats y = set_floats(1.9875691500e-4f);  // Cephes' expf
  y = multiply_add(y, r, set_floats(1.3981999507e-3f));
  y = multiply_add(y, r, set_floats(8.3334519073e-3f));
  y = multiply_add(y, r, set_floats(4.1665795894e-2f));
  y = multiply_add(y, r, set_floats(1.6666665459e-1f));
  y = multiply_add(y, r, set_floats(5.0000001201e-1f));
  y = add(multiply_add(multiply(y, r), r, r), set_floats(1.0f));
  const Ints half = shift_right_32<1>(whole);  // in two steps, since 2^128 is no number
  return multiply(multiply(y, power_of_two(half)), power_of_two(subtract_ints(whole, half)));
}

KVOPT_INLINE Floats silu(Floats v) {
  return divide(v, add(set_floats(1.0f), exponential(subtract(zero_floats(), v))));
}

// sums (rows, 32) += low_rank_x (rows, rank) @ the tile's rows of low_rank_w^T.
template <DType kType>
void add_low_rank(const QLinearParams& p, int64_t row, int64_t rows, int64_t n, int64_t count,
                  float* sums) {
  constexpr int64_t kBytes = kType == DType::kFloat32 ? 4 : 2;
  constexpr int64_t kColumns = 32;
  const uint8_t* x = static_cast<const uint8_t*>(p.low_rank_x) + row * p.rank * kBytes;
  alignas(64) float plain[kTileRows * kColumns];
  alignas(64) float weights[kColumns][kTileRows];
  alignas(64) float values[kTileRows];
  memset(plain, 0, sizeof(plain));
  for (int64_t column = 0; column < p.rank; column += kColumns) {
    const int64_t columns = p.rank - column < kColumns ? p.rank - column : kColumns;
    for (int64_t r = 0; r < count; ++r) {
      load_tile<kType>(p.low_rank_w, (n + r) * p.rank + column, columns, plain + r * kColumns);
    }
    for (int64_t c = 0; c < columns; ++c) {
      for (int v = 0; v < kTileVectors; ++v) {
        store_floats(weights[c] + v * kLanes, load_stride_32(plain + v * kLanes * kColumns + c));
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      load_tile<kType>(x, i * p.rank + column, columns, values);
      float* out = sums + i * kTileRows;
      Floats total[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) total[v] = load_floats(out + v * kLanes);
      for (int64_t c = 0; c < columns; ++c) {
        for (int v = 0; v < kTileVectors; ++v) {
          total[v] =
              multiply_add(load_floats(weights[c] + v * kLanes), set_floats(values[c]), total[v]);
        }
      }
      for (int v = 0; v < kTileVectors; ++v) store_floats(out + v * kLanes, total[v]);
    }
  }
}

template <DType kType>
void finish_typed(const QLinearParams& p, int64_t row, int64_t rows, int64_t tile, float* sums) {
  constexpr int64_t kBytes = kType == DType::kFloat32 ? 4 : 2;
  const int64_t n = tile * kTileRows;
  const int64_t count = p.n - n < kTileRows ? p.n - n : kTileRows;
  if (p.low_rank_w != nullptr) add_low_rank<kType>(p, row, rows, n, count, sums);
  alignas(64) float bias[kTileRows] = {};
  alignas(64) float other[kTileRows];
  if (p.bias != nullptr) load_tile<kType>(p.bias, n, count, bias);
  const int64_t halving = p.swiglu ? 2 : 1;
  const int64_t width = p.n / halving;  // of y
  const int64_t out_n = n / halving;
  const int64_t out_count = count / halving;
  const int vectors = kTileVectors / static_cast<int>(halving);
  if (p.addend == nullptr && !p.swiglu && p.residual == nullptr && count == kTileRows) {
    uint8_t* y = static_cast<uint8_t*>(p.y) + (row * p.n + n) * kBytes;
    for (int64_t i = 0; i < rows; ++i, sums += kTileRows, y += p.n * kBytes) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        store_as<kType>(y + v * kLanes * kBytes,
                        add(load_floats(sums + v * kLanes), load_floats(bias + v * kLanes)));
      }
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i, sums += kTileRows) {
    Floats value[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) {
      value[v] = load_floats(sums + v * kLanes);
      if (p.bias != nullptr) value[v] = add(value[v], load_floats(bias + v * kLanes));
    }
    if (p.addend != nullptr) {
      load_tile<kType>(p.addend, (row + i) * p.n + n, count, other);
      for (int v = 0; v < kTileVectors; ++v)
        value[v] = add(value[v], load_floats(other + v * kLanes));
    }
    if (p.swiglu) {
      for (int v = 0; v < kTileVectors / 2; ++v) {
        const Floats gate = first_eights(value[2 * v], value[2 * v + 1]);
        const Floats up = second_eights(value[2 * v], value[2 * v + 1]);
        value[v] = multiply(silu(gate), up);
      }
    }
    const int64_t at = (row + i) * width + out_n;
    if (p.residual != nullptr) {
      load_tile<kType>(p.residual, at, out_count, other);
      for (int v = 0; v < vectors; ++v) value[v] = add(value[v], load_floats(other + v * kLanes));
    }
    uint8_t* y = static_cast<uint8_t*>(p.y) + at * kBytes;
    if (out_count == vectors * kLanes) {
      for (int v = 0; v < vectors; ++v) store_as<kType>(y + v * kLanes * kBytes, value[v]);
    } else {
      alignas(64) uint8_t edge[kTileRows * kBytes];
      for (int v = 0; v < vectors; ++v) store_as<kType>(edge + v * kLanes * kBytes, value[v]);
      memcpy(y, edge, static_cast<size_t>(out_count * kBytes));
    }
  }
}

// Writes rows [row, row + rows) of y, 32 columns of the tile (16 with swiglu), from sums (rows,
// 32), 64-byte aligned; `sums` may be overwritten.
inline void finish_sums(const QLinearParams& p, int64_t row, int64_t rows, int64_t tile,
                        float* sums) {
  switch (p.dtype) {
    case DType::kFloat32:
      return finish_typed<DType::kFloat32>(p, row, rows, tile, sums);
    case DType::kFloat16:
      return finish_typed<DType::kFloat16>(p, row, rows, tile, sums);
    case DType::kBFloat16:
      return finish_typed<DType::kBFloat16>(p, row, rows, tile, sums);
  }
}

}  // namespace
}  // namespace kvopt::cpu
