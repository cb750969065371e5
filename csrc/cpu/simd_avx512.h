// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary of the qlinear kernels in 512-bit registers: 16 lanes. Included by files
// compiled for AVX-512; everything has internal linkage. KVOPT_QLINEAR_VNNI selects the fused dot
// products.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc bug 105593: in its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstdint>
#include <cstring>

#include "common/params.h"
#include "cpu/isa.h"

#define KVOPT_INLINE inline __attribute__((always_inline))

namespace kvopt::cpu {
namespace {

#if defined(KVOPT_QLINEAR_VNNI)
constexpr Isa kIsa = Isa::kVnni;
#else
constexpr Isa kIsa = Isa::kAvx512;
#endif
constexpr int kLanes = 16;
using Ints = __m512i;
using Floats = __m512;

KVOPT_INLINE Ints load_ints(const void* source) { return _mm512_loadu_si512(source); }
KVOPT_INLINE void store_ints(void* target, Ints v) { _mm512_storeu_si512(target, v); }
KVOPT_INLINE Ints set_ints(int32_t value) { return _mm512_set1_epi32(value); }
KVOPT_INLINE Ints zero_ints() { return _mm512_setzero_si512(); }
KVOPT_INLINE Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
KVOPT_INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
KVOPT_INLINE Ints subtract_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
KVOPT_INLINE Ints max_ints(Ints a, Ints b) { return _mm512_max_epi32(a, b); }

// a where the mask's bits are set, else b
KVOPT_INLINE Ints select_bits(Ints mask, Ints a, Ints b) {
  return _mm512_ternarylogic_epi32(mask, a, b, 0xCA);
}

template <int kBits>
KVOPT_INLINE Ints shift_right_16(Ints a) {
  return _mm512_srli_epi16(a, kBits);
}

// sum[lane] + w.lo16 * x.lo16 + w.hi16 * x.hi16. In assembly because gcc 12 copies and spills the
// accumulators of the intrinsic when there are more than a few.
KVOPT_INLINE Ints dot_pairs(Ints sum, Ints w, Ints x) {
#if defined(KVOPT_QLINEAR_VNNI)
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x));
#endif
}

// Four bytes of x, as an operand of the assembler.
struct Word {
  uint8_t bytes[4];
};

// The same with a pair of x in memory, repeated: it takes no register. gcc would gather the
// broadcasts of several rows in registers that their sums need.
KVOPT_INLINE Ints dot_pairs_at(Ints sum, Ints w, const uint8_t* x) {
#if defined(KVOPT_QLINEAR_VNNI)
  __asm__("vpdpwssd %2%{1to16%}, %1, %0"
          : "+v"(sum)
          : "v"(w), "m"(*reinterpret_cast<const Word*>(x)));
  return sum;
#else
  int32_t word;
  memcpy(&word, x, sizeof(word));
  return dot_pairs(sum, w, _mm512_set1_epi32(word));
#endif
}

KVOPT_INLINE Ints shift_left_16_by(Ints a, int bits) {
  return _mm512_sll_epi16(a, _mm_cvtsi32_si128(bits));
}
KVOPT_INLINE Ints shift_right_16_by(Ints a, int bits) {
  return _mm512_srl_epi16(a, _mm_cvtsi32_si128(bits));
}

template <int kBits>
KVOPT_INLINE Ints shift_left_16(Ints a) {
  return _mm512_slli_epi16(a, kBits);
}

template <int kBits>
KVOPT_INLINE Ints shift_right_32(Ints a) {
  return _mm512_srai_epi32(a, kBits);
}

template <int kBits>
KVOPT_INLINE Ints shift_left_32(Ints a) {
  return _mm512_slli_epi32(a, kBits);
}

// 2^n for n in [-126, 127]
KVOPT_INLINE Floats power_of_two(Ints n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}

KVOPT_INLINE Floats load_floats(const float* source) { return _mm512_loadu_ps(source); }
KVOPT_INLINE void store_floats(float* target, Floats v) { _mm512_storeu_ps(target, v); }
KVOPT_INLINE Floats set_floats(float value) { return _mm512_set1_ps(value); }
KVOPT_INLINE Floats zero_floats() { return _mm512_setzero_ps(); }
KVOPT_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
KVOPT_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
KVOPT_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
KVOPT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
KVOPT_INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
KVOPT_INLINE Floats min_floats(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // NaN: b
KVOPT_INLINE Floats max_floats(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // NaN: b
KVOPT_INLINE Floats absolute(Floats v) { return _mm512_abs_ps(v); }

KVOPT_INLINE int32_t sum_of(Ints v) { return _mm512_reduce_add_epi32(v); }
KVOPT_INLINE int32_t largest_of(Ints v) { return _mm512_reduce_max_epi32(v); }
KVOPT_INLINE float largest_of(Floats v) { return _mm512_reduce_max_ps(v); }
// Bit i: lane i is `value`.
KVOPT_INLINE uint32_t lanes_equal(Floats v, float value) {
  return _mm512_cmp_ps_mask(v, set_floats(value), _CMP_EQ_OQ);
}

// Of 32 values in two registers, eights 0 and 2, and eights 1 and 3.
KVOPT_INLINE Floats first_eights(Floats a, Floats b) {
  return _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(1, 0, 1, 0));
}
KVOPT_INLINE Floats second_eights(Floats a, Floats b) {
  return _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(3, 2, 3, 2));
}

// source[32 * lane]
KVOPT_INLINE Floats load_stride_32(const float* source) {
  const __m512i at =
      _mm512_setr_epi32(0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448, 480);
  return _mm512_i32gather_ps(at, source, 4);
}

KVOPT_INLINE Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
KVOPT_INLINE Ints round_to_ints(Floats v) { return _mm512_cvtps_epi32(v); }
KVOPT_INLINE Ints magnitude_bits(Floats v) {
  return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}

// Sixteen int16 values, found by the low four bits of each 16-bit half.
struct Table {
  Ints values;
};

KVOPT_INLINE Table make_table(const int16_t* values) {
  // Twice, so that the fifth bit of vpermw's index does not matter.
  const __m256i once = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return {_mm512_broadcast_i64x4(once)};
}
// The values of a register of 4-bit codes, in pairs of columns: 0 2 | 1 3 | 4 6 | 5 7.
KVOPT_INLINE void look_up(const Table& table, Ints codes, Ints* pairs) {
  pairs[0] = _mm512_permutexvar_epi16(codes, table.values);
  pairs[1] = _mm512_permutexvar_epi16(shift_right_16<8>(codes), table.values);
  pairs[2] = _mm512_permutexvar_epi16(shift_right_16<4>(codes), table.values);
  pairs[3] = _mm512_permutexvar_epi16(shift_right_16<12>(codes), table.values);
}

KVOPT_INLINE Floats load_halves(const uint16_t* source) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}

template <DType kType>
KVOPT_INLINE Floats load_as_floats(const void* source) {
  if constexpr (kType == DType::kFloat32) {
    return _mm512_loadu_ps(source);
  } else if constexpr (kType == DType::kFloat16) {
    return load_halves(static_cast<const uint16_t*>(source));
  } else {
    const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(source));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
}

// Rounds to nearest even; a NaN of bf16 stays a NaN.
template <DType kType>
KVOPT_INLINE void store_as(void* target, Floats v) {
  if constexpr (kType == DType::kFloat32) {
    _mm512_storeu_ps(target, v);
  } else if constexpr (kType == DType::kFloat16) {
    _mm256_storeu_si256(static_cast<__m256i*>(target),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(static_cast<__m256i*>(target),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
  }
}

// 16 codes of consecutive columns as int16, each four columns in the order 0 2 1 3.
KVOPT_INLINE void store_pairs(void* target, Ints codes) {
  __m256i v = _mm512_cvtepi32_epi16(codes);
  v = _mm256_shufflelo_epi16(v, _MM_SHUFFLE(3, 1, 2, 0));
  v = _mm256_shufflehi_epi16(v, _MM_SHUFFLE(3, 1, 2, 0));
  _mm256_storeu_si256(static_cast<__m256i*>(target), v);
}

#if defined(KVOPT_QLINEAR_VNNI)

// sum[lane] + the four products of unsigned bytes of w and signed bytes of x
KVOPT_INLINE Ints dot_bytes(Ints sum, Ints w, Ints x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}

// The same with four bytes of x in memory, repeated.
KVOPT_INLINE Ints dot_bytes_at(Ints sum, Ints w, const uint8_t* x) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0"
          : "+v"(sum)
          : "v"(w), "m"(*reinterpret_cast<const Word*>(x)));
  return sum;
}

// Loads once what is used twice: gcc folds a load into each use, and a line on its way from memory
// is then asked for twice. Volatile, because gcc's scheduler does not move prefetches across it: of
// an unrolled block it would issue all at once, more than there are fill buffers.
KVOPT_INLINE void keep_in_register(Ints* v) { __asm__ volatile("" : "+v"(*v)); }

// 16 codes of consecutive columns as bytes, four of 256 h + l each: h h h h l l l l.
KVOPT_INLINE void store_planes(void* target, Ints codes) {
  const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(codes, _mm512_set1_epi32(128)), 8);
  const __m512i l = _mm512_sub_epi32(codes, _mm512_slli_epi32(h, 8));
  const __m128i high = _mm512_cvtepi32_epi8(h);
  const __m128i low = _mm512_cvtepi32_epi8(l);
  __m128i* out = static_cast<__m128i*>(target);
  _mm_storeu_si128(out, _mm_unpacklo_epi32(high, low));
  _mm_storeu_si128(out + 1, _mm_unpackhi_epi32(high, low));
}

#endif

}  // namespace
}  // namespace kvopt::cpu
