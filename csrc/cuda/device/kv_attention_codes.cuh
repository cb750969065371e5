// SPDX-License-Identifier: Apache-2.0
// Packed codes as operands of the tensor cores, without a conversion where one can be avoided.
//
// Lane = 4 * g + t. As a key's row of A a lane holds a quarter of the vector (chosen by t), as a
// value's column an eighth of it (chosen by g), both as whole words from memory; which channel lies
// where in the product is free, as long as the other operand agrees.
//
//   keys     An integer code c, put into the low bits of an fp16, *is* the number c * 2^-24 (a
//            subnormal, which the tensor cores multiply exactly), so a mask is all it takes: two
//            codes 16 bits apart per operand register. Codes that the mask leaves at a higher place
//            are larger by a power of two, which the query's operand takes back. The scale of a
//            channel is multiplied into the query once per group; the minimum is one more product.
//   values   Codes of two neighbouring slots are brought together by a byte permute; 0x6400 | c is
//            1024 + c, from which one subtraction and one multiply-add make scale * c + minimum.
//   fp8      e4m3 shifted into an fp16's place is its value times 2^-8.
#pragma once

#include "cuda/device/kv_store.cuh"

namespace kvopt::cuda {

constexpr uint32_t kLowHalves = 0x5410, kHighHalves = 0x7632;  // of two words, for byte_perm

__device__ __forceinline__ uint32_t multiply_halves(uint32_t a, uint32_t b) {
  uint32_t out;
  asm volatile("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

__device__ __forceinline__ uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm volatile("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// Two fp16 with the same exponent, 2^exponent, as bits.
__host__ __device__ constexpr uint32_t power_pair(int exponent) {
  return static_cast<uint32_t>((exponent + 15) << 10) * 0x10001u;
}

// bytes << 8 of both halves: e4m3 codes in the upper bytes.
__device__ __forceinline__ uint32_t fp8_pair(uint32_t upper) {
  return (upper & 0x80008000) | (upper >> 1 & 0x3F803F80);
}

template <KvCodec kCodec>
struct Codes {
  static constexpr int kBits = kCodec == KvCodec::kModel ? 16
                               : kCodec == KvCodec::kFp8 ? 8
                                                         : kv_code_bits(kCodec);
  static constexpr bool kInteger = kv_code_bits(kCodec) != 0;

  // Pair n of the operand's channels from a lane's words of a key.
  __device__ static uint32_t key_pair(const uint32_t* words, int n) {
    if constexpr (kCodec == KvCodec::kModel) {
      return words[n];
    } else if constexpr (kCodec == KvCodec::kFp8) {
      return fp8_pair(__byte_perm(words[n / 2], 0, n % 2 == 0 ? 0x1404 : 0x3424));
    } else if constexpr (kCodec == KvCodec::kInt8) {
      return __byte_perm(words[n / 2], 0, n % 2 == 0 ? 0x4140 : 0x4342);
    } else if constexpr (kCodec == KvCodec::kInt4) {
      const uint32_t word = words[n / 4];
      return (n & 2 ? word >> 8 : word) & (n & 1 ? 0x00F000F0 : 0x000F000F);
    } else {
      const uint32_t word = words[n / 8];
      return (n & 4 ? word >> 8 : word) & 0x00030003 << 2 * (n & 3);
    }
  }

  // By which power of two the pair's codes are too large.
  static constexpr __host__ __device__ int key_exponent(int n) {
    return kCodec == KvCodec::kInt4 ? 4 * (n & 1) : kCodec == KvCodec::kInt2 ? 2 * (n & 3) : 0;
  }

  // The channel of element e of pair n, within the lane's channels side by side (packed codes).
  static constexpr __host__ __device__ int key_channel(int n, int e) {
    return kCodec == KvCodec::kInt4   ? 8 * (n / 4) + (n & 3) + 4 * e
           : kCodec == KvCodec::kInt2 ? 16 * (n / 8) + (n & 7) + 8 * e
                                      : 2 * n + e;
  }

  // Channel k of a lane's channels of two values (slots a and b), as numbers in the operand's type;
  // fp8 times 2^-8.
  __device__ static uint32_t value_pair(const uint32_t* a, const uint32_t* b, int k, uint32_t scale,
                                        uint32_t lowest) {
    constexpr int kWord = 32 / kBits, kHalf = kWord / 2;  // channels
    const uint32_t both =
        __byte_perm(a[k / kWord], b[k / kWord], k % kWord < kHalf ? kLowHalves : kHighHalves);
    const int i = k % kHalf;
    if constexpr (kCodec == KvCodec::kModel) {
      return both;
    } else if constexpr (kCodec == KvCodec::kFp8) {
      return fp8_pair(i == 0 ? both << 8 & 0xFF00FF00 : both & 0xFF00FF00);
    } else {
      constexpr int kPerByte = 8 / kBits;
      constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x10001u;
      const int place = kBits * (i % kPerByte);
      const uint32_t shifted = i / kPerByte == 0 ? both : both >> 8;
      const uint32_t large = (shifted & kMask << place) | 0x64006400;  // 1024 + 2^place * code
      const uint32_t code =
          fma_halves(large, power_pair(-place), power_pair(10 - place) | 0x80008000);
      return fma_halves(code, scale, lowest);
    }
  }
};

}  // namespace kvopt::cuda
