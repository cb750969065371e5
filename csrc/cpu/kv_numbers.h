// SPDX-License-Identifier: Apache-2.0
// The numbers of a KV cache in portable C++: the model's types, e4m3fn, and where a segment's slots
// lie. For portable files only, as float16.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/kv_store.h"
#include "cpu/float16.h"

namespace kvopt::cpu {

constexpr bool is_double(KvType t) { return t == KvType::kFloat64; }

// `count` numbers from index `first` of an array of `type`.
template <typename Real>
void kv_load(KvType type, const void* source, int64_t first, int64_t count, Real* values) {
  if (type == KvType::kFloat64) {
    const double* from = static_cast<const double*>(source) + first;
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<Real>(from[i]);
  } else if (type == KvType::kFloat32) {
    const float* from = static_cast<const float*>(source) + first;
    for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(source) + first;
    if (type == KvType::kFloat16) {
      for (int64_t i = 0; i < count; ++i) values[i] = half_to_float(from[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) values[i] = bfloat16_to_float(from[i]);
    }
  }
}

template <typename Real>
void kv_save(KvType type, const Real* values, int64_t count, void* target, int64_t first) {
  if (type == KvType::kFloat64) {
    double* to = static_cast<double*>(target) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = values[i];
  } else if (type == KvType::kFloat32) {
    float* to = static_cast<float*>(target) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(values[i]);
  } else {
    uint16_t* to = static_cast<uint16_t*>(target) + first;
    for (int64_t i = 0; i < count; ++i) {
      const float value = static_cast<float>(values[i]);
      to[i] = type == KvType::kFloat16 ? float_to_half(value) : float_to_bfloat16(value);
    }
  }
}

inline const void* kv_at(KvType type, const void* base, int64_t index) {
  return static_cast<const uint8_t*>(base) + index * kv_type_bytes(type);
}
inline void* kv_at(KvType type, void* base, int64_t index) {
  return static_cast<uint8_t*>(base) + index * kv_type_bytes(type);
}

// Half to even in every rounding mode's default; |x| < 2^22.
inline float round_half_even(float x) {
  constexpr float kBig = 12582912.0f;  // 1.5 * 2^23: its unit is 1
  return (x + kBig) - kBig;
}

// x in [-448, 448] or NaN.
inline uint8_t float_to_e4m3(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = bits >> 24 & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t code;
  if (magnitude > 0x7f800000u) {
    code = 0x7fu;
  } else if (magnitude < 0x3c800000u) {  // below 2^-6, units of 2^-9
    code = static_cast<uint32_t>(round_half_even(float_from_bits(magnitude) * 512.0f));
  } else {
    code = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  }
  return static_cast<uint8_t>(sign | code);
}

inline float e4m3_to_float(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t exponent = code >> 3 & 0xfu, mantissa = code & 7u;
  if ((code & 0x7fu) == 0x7fu) return float_from_bits(0x7fc00000u | sign);
  if (exponent == 0) {
    const float value = static_cast<float>(mantissa) * 0x1p-9f;
    return sign ? -value : value;
  }
  return float_from_bits(((exponent + 120u) << 23 | mantissa << 20) | sign);
}

// Code `i` of a vector's bytes.
template <int kBits>
inline uint32_t code_at(const uint8_t* bytes, int64_t i) {
  constexpr int kPerByte = 8 / kBits;
  return bytes[i / kPerByte] >> (i % kPerByte * kBits) & ((1u << kBits) - 1u);
}

struct KvSegment {
  KvSegment(const KvStore& s, int64_t row, int64_t head) {
    const int32_t* numbers = s.segments + (row * s.heads + head) * 4;
    lengths = s.lengths + (row * s.heads + head) * 2;
    packed_begin = row * s.packed_slots + numbers[0];
    packed_capacity = numbers[1];
    plain_begin = row * s.plain_slots + numbers[2];
    plain_capacity = numbers[3];
    packed_state = row * (s.packed_slots + s.plain_slots) + numbers[0];
    plain_state = row * (s.packed_slots + s.plain_slots) + s.packed_slots + numbers[2];
  }
  int64_t packed() const { return lengths[0]; }
  int64_t plain() const { return lengths[1]; }
  int64_t filled() const { return packed() + plain(); }
  int64_t capacity() const { return packed_capacity + plain_capacity; }
  // Index of a slot's position and score.
  int64_t state(int64_t index) const {
    return index < packed() ? packed_state + index : plain_state + index - packed();
  }

  int64_t packed_begin, packed_capacity;  // among all packed slots of the store
  int64_t plain_begin, plain_capacity;    // among all plain slots
  int64_t packed_state, plain_state;      // among all positions
  int32_t* lengths;
};

// The vector that a slot stands for.
template <typename Real>
void kv_read_packed_key(const KvStore& s, int64_t slot, Real* values);
template <typename Real>
void kv_read_packed_value(const KvStore& s, int64_t slot, Real* values);

// Packs vectors number vectors[0 .. count) of keys and values, arrays of D numbers each in the
// store's type, into slots from `slot` on: whole groups, or with `into_group` one slot of a group
// whose range stays.
void kv_pack_vectors(const KvStore& s, int64_t slot, int64_t count, bool into_group,
                     const void* keys, const void* values, const int64_t* vectors, float* scratch);

}  // namespace kvopt::cpu
