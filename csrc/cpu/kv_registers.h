// SPDX-License-Identifier: Apache-2.0
// What decode attention needs of a register: sums over its lanes, and the codes of every codec as
// floats. The including file names its instruction set by a macro (simd.h), everything has internal
// linkage.
#pragma once

#include "cpu/simd.h"

namespace kvopt::cpu {
namespace {

#if defined(KVOPT_QLINEAR_AVX2)

KVOPT_INLINE float total_of(Floats v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

// out[i] = the sum of the lanes of sums[i], kLanes of them.
KVOPT_INLINE Floats totals_of(const Floats* sums) {
  Floats fours[2];
  for (int i = 0; i < 2; ++i) {
    const Floats* s = sums + 4 * i;
    const Floats a = add(_mm256_unpacklo_ps(s[0], s[1]), _mm256_unpackhi_ps(s[0], s[1]));
    const Floats b = add(_mm256_unpacklo_ps(s[2], s[3]), _mm256_unpackhi_ps(s[2], s[3]));
    fours[i] = add(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE));
  }
  return add(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
             _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
}

KVOPT_INLINE Floats load_bytes(const uint8_t* codes) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}
// e4m3fn times 2^-8: the bits of an fp16 number with the same exponent field; bit 14, a copy of the
// sign, is cleared.
KVOPT_INLINE Floats load_e4m3(const uint8_t* codes) {
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(~0x4000)));
}
KVOPT_INLINE Floats load_nibbles(const uint8_t* codes) {
  uint32_t word;
  memcpy(&word, codes, sizeof(word));
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256i moved = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shifts);
  return _mm256_cvtepi32_ps(_mm256_and_si256(moved, _mm256_set1_epi32(15)));
}
KVOPT_INLINE Floats to_order_of_nibbles(Floats v) { return v; }
KVOPT_INLINE Floats from_order_of_nibbles(Floats v) { return v; }
KVOPT_INLINE Floats load_pairs_of_bits(const uint8_t* codes) {
  uint16_t word;
  memcpy(&word, codes, sizeof(word));
  const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i moved = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
  return _mm256_cvtepi32_ps(_mm256_and_si256(moved, _mm256_set1_epi32(3)));
}

#else

KVOPT_INLINE float total_of(Floats v) { return _mm512_reduce_add_ps(v); }

KVOPT_INLINE Floats totals_of(const Floats* sums) {
  Floats fours[4];
  for (int i = 0; i < 4; ++i) {
    const Floats* s = sums + 4 * i;
    const Floats a = add(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
    const Floats b = add(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
    fours[i] = add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  }
  const Floats low = add(_mm512_shuffle_f32x4(fours[0], fours[1], 0x44),
                         _mm512_shuffle_f32x4(fours[0], fours[1], 0xEE));
  const Floats high = add(_mm512_shuffle_f32x4(fours[2], fours[3], 0x44),
                          _mm512_shuffle_f32x4(fours[2], fours[3], 0xEE));
  return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
}

KVOPT_INLINE Floats load_bytes(const uint8_t* codes) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}
// e4m3fn times 2^-8: the bits of an fp16 number with the same exponent field; bit 14, a copy of the
// sign, is cleared.
KVOPT_INLINE Floats load_e4m3(const uint8_t* codes) {
  const __m256i wide =
      _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(~0x4000)));
}
// The lookups take the low four bits of a lane, so nothing needs masking.
// A word's two halves alternate in the register and both are shifted: see to_order_of_nibbles.
KVOPT_INLINE Floats load_nibbles(const uint8_t* codes) {
  int64_t word;
  memcpy(&word, codes, sizeof(word));
  const __m512i shifts =
      _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  const Floats table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi64(word), shifts), table);
}
// 16 numbers in that order: 0 8 1 9 2 10 ...; and back.
KVOPT_INLINE Floats to_order_of_nibbles(Floats v) {
  return _mm512_permutexvar_ps(
      _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), v);
}
KVOPT_INLINE Floats from_order_of_nibbles(Floats v) {
  return _mm512_permutexvar_ps(
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), v);
}
KVOPT_INLINE Floats load_pairs_of_bits(const uint8_t* codes) {
  uint32_t word;
  memcpy(&word, codes, sizeof(word));
  const __m512i shifts =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Floats table = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(word)), shifts),
                               table);
}

#endif

// The fp16 pairs number min(first + lane, last) * stride: their first and their second halves.
KVOPT_INLINE void load_pairs(const uint16_t* pairs, int64_t stride, int64_t first, int64_t last,
                             Floats* low, Floats* high) {
#if defined(KVOPT_QLINEAR_AVX2)
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i at = _mm256_min_epi32(_mm256_add_epi32(lane, set_ints(static_cast<int>(first))),
                                      set_ints(static_cast<int>(last)));
  const __m256i both =
      _mm256_i32gather_epi32(reinterpret_cast<const int*>(pairs),
                             _mm256_mullo_epi32(at, set_ints(static_cast<int>(stride))), 4);
  const __m256i halves = _mm256_permute4x64_epi64(
      _mm256_packus_epi32(_mm256_and_si256(both, set_ints(0xffff)), _mm256_srli_epi32(both, 16)),
      _MM_SHUFFLE(3, 1, 2, 0));
  *low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  *high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
#else
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i at = _mm512_min_epi32(_mm512_add_epi32(lane, set_ints(static_cast<int>(first))),
                                      set_ints(static_cast<int>(last)));
  const __m512i both =
      _mm512_i32gather_epi32(_mm512_mullo_epi32(at, set_ints(static_cast<int>(stride))), pairs, 4);
  *low = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
  *high = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
#endif
}

// What a part's vectors are made of; `chunk` counts kLanes channels. A reader may give them in an
// order of its own.
struct InOrder {
  static KVOPT_INLINE Floats arrange(Floats v) { return v; }
  static KVOPT_INLINE Floats restore(Floats v) { return v; }
};
struct ReadFloat : InOrder {
  static constexpr bool kInteger = false;
  static constexpr float kUnit = 1.0f;
  static KVOPT_INLINE Floats load(const uint8_t* vector, int64_t chunk) {
    return load_as_floats<DType::kFloat32>(vector + chunk * kLanes * 4);
  }
};
struct ReadHalf : InOrder {
  static constexpr bool kInteger = false;
  static constexpr float kUnit = 1.0f;
  static KVOPT_INLINE Floats load(const uint8_t* vector, int64_t chunk) {
    return load_as_floats<DType::kFloat16>(vector + chunk * kLanes * 2);
  }
};
struct ReadBFloat : InOrder {
  static constexpr bool kInteger = false;
  static constexpr float kUnit = 1.0f;
  static KVOPT_INLINE Floats load(const uint8_t* vector, int64_t chunk) {
    return load_as_floats<DType::kBFloat16>(vector + chunk * kLanes * 2);
  }
};
struct ReadE4m3 : InOrder {
  static constexpr bool kInteger = false;
  static constexpr float kUnit = 256.0f;
  static KVOPT_INLINE Floats load(const uint8_t* vector, int64_t chunk) {
    return load_e4m3(vector + chunk * kLanes);
  }
};
struct ReadInt8 : InOrder {
  static constexpr bool kInteger = true;
  static constexpr float kUnit = 1.0f;
  static KVOPT_INLINE Floats load(const uint8_t* vector, int64_t chunk) {
    return load_bytes(vector + chunk * kLanes);
  }
};
struct ReadInt4 {
  static KVOPT_INLINE Floats arrange(Floats v) { return to_order_of_nibbles(v); }
  static KVOPT_INLINE Floats restore(Floats v) { return from_order_of_nibbles(v); }
  static constexpr bool kInteger = true;
  static constexpr float kUnit = 1.0f;
  static KVOPT_INLINE Floats load(const uint8_t* vector, int64_t chunk) {
    return load_nibbles(vector + chunk * (kLanes / 2));
  }
};
struct ReadInt2 : InOrder {
  static constexpr bool kInteger = true;
  static constexpr float kUnit = 1.0f;
  static KVOPT_INLINE Floats load(const uint8_t* vector, int64_t chunk) {
    return load_pairs_of_bits(vector + chunk * (kLanes / 4));
  }
};

}  // namespace
}  // namespace kvopt::cpu
