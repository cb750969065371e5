// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary of the qlinear kernels in 256-bit registers: 8 lanes. Included by files
// compiled for AVX2, FMA and F16C; everything has internal linkage.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "common/params.h"
#include "cpu/isa.h"

#define KVOPT_INLINE inline __attribute__((always_inline))

namespace kvopt::cpu {
namespace {

constexpr Isa kIsa = Isa::kAvx2;
constexpr int kLanes = 8;
using Ints = __m256i;
using Floats = __m256;

KVOPT_INLINE Ints load_ints(const void* source) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(source));
}
KVOPT_INLINE void store_ints(void* target, Ints v) {
  _mm256_storeu_si256(static_cast<__m256i*>(target), v);
}
KVOPT_INLINE Ints set_ints(int32_t value) { return _mm256_set1_epi32(value); }
KVOPT_INLINE Ints zero_ints() { return _mm256_setzero_si256(); }
KVOPT_INLINE Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
KVOPT_INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
KVOPT_INLINE Ints subtract_ints(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
KVOPT_INLINE Ints max_ints(Ints a, Ints b) { return _mm256_max_epi32(a, b); }

// a where the mask's bits are set, else b
KVOPT_INLINE Ints select_bits(Ints mask, Ints a, Ints b) {
  return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}

KVOPT_INLINE Ints shift_left_16_by(Ints a, int bits) {
  return _mm256_sll_epi16(a, _mm_cvtsi32_si128(bits));
}
KVOPT_INLINE Ints shift_right_16_by(Ints a, int bits) {
  return _mm256_srl_epi16(a, _mm_cvtsi32_si128(bits));
}

template <int kBits>
KVOPT_INLINE Ints shift_left_16(Ints a) {
  return _mm256_slli_epi16(a, kBits);
}

template <int kBits>
KVOPT_INLINE Ints shift_right_32(Ints a) {
  return _mm256_srai_epi32(a, kBits);
}

// 2^n for n in [-126, 127]
KVOPT_INLINE Floats power_of_two(Ints n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

template <int kBits>
KVOPT_INLINE Ints shift_right_16(Ints a) {
  return _mm256_srli_epi16(a, kBits);
}

// sum[lane] + w.lo16 * x.lo16 + w.hi16 * x.hi16
KVOPT_INLINE Ints dot_pairs(Ints sum, Ints w, Ints x) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
}

// The same with a pair of x in memory, repeated.
KVOPT_INLINE Ints dot_pairs_at(Ints sum, Ints w, const uint8_t* x) {
  int32_t word;
  memcpy(&word, x, sizeof(word));
  return dot_pairs(sum, w, _mm256_set1_epi32(word));
}

KVOPT_INLINE Floats load_floats(const float* source) { return _mm256_loadu_ps(source); }
KVOPT_INLINE void store_floats(float* target, Floats v) { _mm256_storeu_ps(target, v); }
KVOPT_INLINE Floats set_floats(float value) { return _mm256_set1_ps(value); }
KVOPT_INLINE Floats zero_floats() { return _mm256_setzero_ps(); }
KVOPT_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
KVOPT_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
KVOPT_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
KVOPT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
KVOPT_INLINE Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
KVOPT_INLINE Floats min_floats(Floats a, Floats b) { return _mm256_min_ps(a, b); }  // NaN: b
KVOPT_INLINE Floats max_floats(Floats a, Floats b) { return _mm256_max_ps(a, b); }  // NaN: b
KVOPT_INLINE Floats absolute(Floats v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

// Of 16 values in two registers, eights 0 and 1.
KVOPT_INLINE Floats first_eights(Floats a, Floats) { return a; }
KVOPT_INLINE Floats second_eights(Floats, Floats b) { return b; }

KVOPT_INLINE int32_t sum_of(Ints v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, _MM_SHUFFLE(1, 0, 3, 2)));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(sum);
}
KVOPT_INLINE int32_t largest_of(Ints v) {
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, _MM_SHUFFLE(1, 0, 3, 2)));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(most);
}
KVOPT_INLINE float largest_of(Floats v) {
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  most = _mm_max_ss(most, _mm_movehdup_ps(most));
  return _mm_cvtss_f32(most);
}
// Bit i: lane i is `value`.
KVOPT_INLINE uint32_t lanes_equal(Floats v, float value) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, set_floats(value), _CMP_EQ_OQ)));
}

// source[32 * lane]
KVOPT_INLINE Floats load_stride_32(const float* source) {
  const __m256i at = _mm256_setr_epi32(0, 32, 64, 96, 128, 160, 192, 224);
  return _mm256_i32gather_ps(source, at, 4);
}

KVOPT_INLINE Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
KVOPT_INLINE Ints round_to_ints(Floats v) { return _mm256_cvtps_epi32(v); }
KVOPT_INLINE Ints magnitude_bits(Floats v) {
  return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}

// Sixteen int16 values, found by the low four bits of each 16-bit half.
struct Table {
  Ints low;  // bytes
  Ints high;
};

KVOPT_INLINE Table make_table(const int16_t* values) {
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  const __m256i low = _mm256_and_si256(all, _mm256_set1_epi16(0xFF));
  const __m256i high = _mm256_srli_epi16(all, 8);
  const __m256i bytes = _mm256_packus_epi16(low, high);  // low 0..7, high 0..7, low 8.., high 8..
  return {_mm256_permute4x64_epi64(bytes, _MM_SHUFFLE(2, 0, 2, 0)),
          _mm256_permute4x64_epi64(bytes, _MM_SHUFFLE(3, 1, 3, 1))};
}
// The values of a register of 4-bit codes, in pairs of columns: 0 2 | 1 3 | 4 6 | 5 7.
KVOPT_INLINE void look_up(const Table& table, Ints codes, Ints* pairs) {
  const Ints mask = _mm256_set1_epi8(15);
  const Ints byte = _mm256_set1_epi16(0xFF);
  const Ints at[2] = {bit_and(codes, mask), bit_and(shift_right_16<4>(codes), mask)};
  for (int i = 0; i < 2; ++i) {
    const Ints low = _mm256_shuffle_epi8(table.low, at[i]);
    const Ints high = _mm256_shuffle_epi8(table.high, at[i]);
    pairs[2 * i] = _mm256_or_si256(bit_and(low, byte), shift_left_16<8>(high));
    pairs[2 * i + 1] = _mm256_or_si256(shift_right_16<8>(low), _mm256_andnot_si256(byte, high));
  }
}

KVOPT_INLINE Floats load_halves(const uint16_t* source) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}

template <DType kType>
KVOPT_INLINE Floats load_as_floats(const void* source) {
  if constexpr (kType == DType::kFloat32) {
    return _mm256_loadu_ps(static_cast<const float*>(source));
  } else if constexpr (kType == DType::kFloat16) {
    return load_halves(static_cast<const uint16_t*>(source));
  } else {
    const __m128i bits = _mm_loadu_si128(static_cast<const __m128i*>(source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
}

// 8 codes as int16, in order.
KVOPT_INLINE __m128i narrow(Ints codes) {
  return _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
}

// Rounds to nearest even; a NaN of bf16 stays a NaN.
template <DType kType>
KVOPT_INLINE void store_as(void* target, Floats v) {
  if constexpr (kType == DType::kFloat32) {
    _mm256_storeu_ps(static_cast<float*>(target), v);
  } else if constexpr (kType == DType::kFloat16) {
    _mm_storeu_si128(static_cast<__m128i*>(target),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i result = _mm256_blendv_epi8(rounded, quiet, nan);
    // An arithmetic shift keeps the upper half within int16, so that the saturating pack changes
    // nothing.
    _mm_storeu_si128(static_cast<__m128i*>(target), narrow(_mm256_srai_epi32(result, 16)));
  }
}

// 8 codes of consecutive columns as int16, each four columns in the order 0 2 1 3.
KVOPT_INLINE void store_pairs(void* target, Ints codes) {
  __m128i v = narrow(codes);
  v = _mm_shufflelo_epi16(v, _MM_SHUFFLE(3, 1, 2, 0));
  v = _mm_shufflehi_epi16(v, _MM_SHUFFLE(3, 1, 2, 0));
  _mm_storeu_si128(static_cast<__m128i*>(target), v);
}

}  // namespace
}  // namespace kvopt::cpu
