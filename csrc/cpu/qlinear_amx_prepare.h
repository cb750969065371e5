// SPDX-License-Identifier: Apache-2.0
// `prepare` of the AMX kernels: rows of x become operands A, int8 with a scale for each weight
// group or one or two terms of bf16, in the order that qlinear_amx.h draws; `finish_rows` ends a
// tile. Everything has internal linkage. One pass over a row of bf16 (two for int8, the second from
// cache), 32 or 64 columns at a time: the bound is instructions, some 5 % of a product's time.
#pragma once

#define KVOPT_QLINEAR_VNNI

#include "cpu/qlinear_a8.h"
#include "cpu/qlinear_amx.h"
#include "cpu/qlinear_epilogue.h"
#include "cpu/qlinear_layout.h"

namespace kvopt::cpu {
namespace {

#if defined(KVOPT_AMX_INT8)
constexpr bool kInt8 = true;
#else
constexpr bool kInt8 = false;
#endif
constexpr int64_t kOperandRows = 16;
constexpr int64_t kOperandBytes = 1024;
constexpr int64_t kUnitColumns = 16;  // unpacked at a time; weight groups begin at multiples
constexpr int64_t kStepColumns = kInt8 ? 64 : 32;
constexpr int64_t kStepUnits = kStepColumns / kUnitColumns;
constexpr int64_t kUnitBytes = kInt8 ? 256 : 512;  // of an operand B: its columns of 16 rows of w
constexpr int64_t kStretchSteps = kBlockSteps;
constexpr int64_t kTilesTogether = 1;  // tiles of w that pass while an operand A is in cache
constexpr int64_t kStretchChunks = kStretchSteps;
constexpr int64_t kBatchTiles = 16;
constexpr int64_t kBatchRows = kBatchTiles * kOperandRows;
constexpr int32_t kHugeBits = (127 + 60) << 23;  // of qlinear_prepare.h: see there
constexpr int32_t kTinyBits = (127 - 110) << 23;
constexpr int32_t kSmallBits = (127 - 70) << 23;

KVOPT_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16{0xFFFF}
                     : static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1u);
}

// 16 values from `column` of a row; those past `count` are 0 and not read.
template <DType kType>
KVOPT_INLINE Floats load_some(const void* row, int64_t column, int64_t count) {
  const __mmask16 mask = first_lanes(count);
  if constexpr (kType == DType::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(row) + column);
  } else {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + column);
    if constexpr (kType == DType::kFloat16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
}

template <DType kType>
struct Row {
  const void* x;
  const void* input_scale;

  KVOPT_INLINE Floats load(int64_t column, int64_t count) const {
    Floats v = load_some<kType>(x, column, count);
    if (input_scale != nullptr) v = multiply(v, load_some<kType>(input_scale, column, count));
    return v;
  }
};

// The operand with rows from `operand * height` of x, at one step.
KVOPT_INLINE uint8_t* operand_at(const QLinearParams& p, const AmxLayout& layout, int64_t operand,
                                 int64_t step) {
  return static_cast<uint8_t*>(p.workspace) + layout.x_offset +
         step / kBlockSteps * layout.block_bytes + operand * layout.operand_bytes +
         step % kBlockSteps * layout.step_bytes;
}

// Where a row's 64 bytes of a step lie.
struct Target {
  const QLinearParams& p;
  const AmxLayout& layout;
  int64_t operand;
  int64_t row;  // of the operand

  KVOPT_INLINE uint8_t* at(int64_t step) const {
    return operand_at(p, layout, operand, step) + row * 64;
  }
};

KVOPT_INLINE Target target_of(const QLinearParams& p, const AmxLayout& layout, int64_t row) {
  return {p, layout, row / layout.height, row % layout.height};
}

KVOPT_INLINE float* vector_at(const QLinearParams& p, const AmxLayout& layout, int64_t offset,
                              int64_t group) {
  return reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) + offset) +
         group * layout.padded_rows;
}

KVOPT_INLINE Ints magnitude_max(Ints largest, Floats v) {
  return _mm512_max_epi32(largest, magnitude_bits(v));
}

#if defined(KVOPT_AMX_INT8)

// round(v / s). The product with the inverse decides unless it comes near a tie.
KVOPT_INLINE Ints quantize(Floats v, Floats scale, Floats inverse) {
  const Floats quotient = multiply(v, inverse);
  const Floats integer = _mm512_roundscale_ps(quotient, _MM_FROUND_TO_NEAREST_INT);
  const Floats distance = _mm512_abs_ps(subtract(quotient, integer));
  if (_mm512_cmp_ps_mask(distance, set_floats(0.5f - 0x1p-13f), _CMP_GE_OQ) != 0) {
    return round_to_ints(_mm512_div_ps(v, scale));
  }
  return round_to_ints(integer);
}

// One group: writes its operand bytes, s and the sum; returns the bits of its largest magnitude.
template <DType kType>
KVOPT_INLINE int32_t prepare_group(const QLinearParams& p, const AmxLayout& layout,
                                   const Row<kType>& row, int64_t index, int64_t group,
                                   const Target& target) {
  const int64_t begin = group * layout.group_columns;
  const int64_t end = begin + layout.group_columns < p.k ? begin + layout.group_columns : p.k;
  Ints largest = zero_ints();
  for (int64_t column = begin; column < end; column += 16) {
    largest = magnitude_max(largest, row.load(column, end - column));
  }
  const int32_t bits = _mm512_reduce_max_epi32(largest);
  int64_t step = group * layout.group_steps;
  float scale = 0.0f;
  int32_t total = 0;
  if (bits >= kTinyBits && bits < kHugeBits) {
    float magnitude;
    memcpy(&magnitude, &bits, sizeof(magnitude));
    scale = magnitude / 127.0f;
    const Floats scales = set_floats(scale);
    const Floats inverses = set_floats(127.0f / magnitude);
    Ints totals = zero_ints();
    for (int64_t column = begin; column < end; column += kStepColumns, ++step) {
      uint8_t* out = target.at(step);
      for (int64_t c = 0; c < kStepColumns; c += 16) {
        const Ints codes = quantize(row.load(column + c, end - column - c), scales, inverses);
        totals = add_ints(totals, codes);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c), _mm512_cvtepi32_epi8(codes));
      }
    }
    total = _mm512_reduce_add_epi32(totals);
  } else {
    for (int64_t column = begin; column < end; column += kStepColumns, ++step) {
      store_ints(target.at(step), zero_ints());
    }
  }
  vector_at(p, layout, layout.scale_offset, group)[index] = scale;
  float* sum = vector_at(p, layout, layout.sum_offset, group) + index;
  if (a8_is_whole(p)) {
    total *= -128;
    memcpy(sum, &total, sizeof(total));
  } else {
    *sum = scale * static_cast<float>(total);
  }
  return bits;
}

#else

// bf16 in the low halves of lanes, to nearest even.
KVOPT_INLINE Ints round_to_bf16(Floats v) {
  const Ints bits = _mm512_castps_si512(v);
  const Ints odd = bit_and(_mm512_srli_epi32(bits, 16), set_ints(1));
  return _mm512_srli_epi32(add_ints(bits, add_ints(odd, set_ints(0x7fff))), 16);
}

// 32 bf16 of consecutive columns, each four in the order 0 2 1 3.
KVOPT_INLINE void store_words(uint8_t* target, Ints first, Ints second) {
  Ints words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(first)),
                                  _mm512_cvtepi32_epi16(second), 1);
  words = _mm512_shufflelo_epi16(words, _MM_SHUFFLE(3, 1, 2, 0));
  store_ints(target, _mm512_shufflehi_epi16(words, _MM_SHUFFLE(3, 1, 2, 0)));
}

KVOPT_INLINE Floats as_floats(Ints bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(bf16, 16));
}

template <DType kType>
KVOPT_INLINE int32_t prepare_group(const QLinearParams& p, const AmxLayout& layout,
                                   const Row<kType>& row, int64_t index, int64_t group,
                                   const Target& target) {
  const int64_t begin = group * layout.group_columns;
  const int64_t end = begin + layout.group_columns < p.k ? begin + layout.group_columns : p.k;
  Ints largest = zero_ints();
  Floats totals[2] = {zero_floats(), zero_floats()};
  int64_t step = group * layout.group_steps;
  for (int64_t column = begin; column < end; column += kStepColumns, ++step) {
    uint8_t* out = target.at(step);
    Floats v[2] = {row.load(column, end - column), row.load(column + 16, end - column - 16)};
    Ints high[2];
    Ints low[2];
    for (int i = 0; i < 2; ++i) {
      largest = magnitude_max(largest, v[i]);
      if (layout.terms == 1) {
        high[i] = _mm512_srli_epi32(_mm512_castps_si512(v[i]), 16);
        totals[i] = add(totals[i], v[i]);
      } else {  // the sum is that of the terms: whatever rounding took is gone from q and zero
                // alike
        high[i] = round_to_bf16(v[i]);
        low[i] = round_to_bf16(subtract(v[i], as_floats(high[i])));
        totals[i] = add(totals[i], add(as_floats(high[i]), as_floats(low[i])));
      }
    }
    store_words(out, high[0], high[1]);
    if (layout.terms == 2) store_words(out + layout.height * 64, low[0], low[1]);
  }
  vector_at(p, layout, layout.sum_offset, group)[index] =
      _mm512_reduce_add_ps(add(totals[0], totals[1]));
  return _mm512_reduce_max_epi32(largest);
}

#endif

template <DType kType>
void prepare_row(const QLinearParams& p, const AmxLayout& layout, int64_t index) {
  constexpr int64_t kBytes = kType == DType::kFloat32 ? 4 : 2;
  const Row<kType> row = {static_cast<const uint8_t*>(p.x) + index * p.k * kBytes, p.input_scale};
  const Target target = target_of(p, layout, index);
  int32_t largest = 0;
  bool vanishing = false;
  for (int64_t group = 0; group < layout.groups; ++group) {
    const int32_t bits = prepare_group<kType>(p, layout, row, index, group, target);
    largest = bits > largest ? bits : largest;
    vanishing |= bits > 0 && bits < kTinyBits;
  }
  const bool plain = largest >= kHugeBits || (vanishing && largest < kSmallBits);
  static_cast<uint8_t*>(p.workspace)[index] = plain ? 1 : 0;
}

void prepare(const QLinearParams& p, int64_t row_begin, int64_t row_end) {
  const AmxLayout layout = amx_layout(p, kInt8);
  for (int64_t row = row_begin; row < row_end; ++row) {
    if (p.dtype == DType::kFloat32) prepare_row<DType::kFloat32>(p, layout, row);
    if (p.dtype == DType::kFloat16) prepare_row<DType::kFloat16>(p, layout, row);
    if (p.dtype == DType::kBFloat16) prepare_row<DType::kBFloat16>(p, layout, row);
  }
  if (row_end != p.m) return;
  for (int64_t row = p.m; row < layout.padded_rows; ++row) {  // rows that fill the last operand
    const Target target = target_of(p, layout, row);
    for (int64_t step = 0; step < layout.steps; ++step) {
      for (int64_t i = 0; i < layout.terms; ++i) {
        store_ints(target.at(step) + i * layout.height * 64, zero_ints());
      }
    }
    for (int64_t group = 0; group < layout.groups; ++group) {
      if (kInt8) vector_at(p, layout, layout.scale_offset, group)[row] = 0.0f;
      vector_at(p, layout, layout.sum_offset, group)[row] = 0.0f;
    }
  }
}

int64_t workspace_bytes(const QLinearParams& p) { return amx_layout(p, kInt8).bytes; }

}  // namespace
}  // namespace kvopt::cpu
