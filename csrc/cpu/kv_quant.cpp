// SPDX-License-Identifier: Apache-2.0
// Filling a store and reading it, in portable C++. Loops run over channels, side by side in memory,
// so that the compiler vectorises them.
#include <algorithm>
#include <utility>

#include "cpu/kv.h"
#include "cpu/kv_numbers.h"

namespace kvopt::cpu {
namespace {

constexpr float kLargestHalf = 65504.0f;

uint16_t finite_half(float x) {
  return float_to_half(x > kLargestHalf ? kLargestHalf : x < -kLargestHalf ? -kLargestHalf : x);
}

// Sticky: a NaN stays.
float smaller(float a, float b) { return a < b || a != a ? a : b; }
float larger(float a, float b) { return a > b || a != a ? a : b; }

uint32_t code_of(float x, float scale, float lowest, float largest_code) {
  const float scaled = (x - lowest) / scale;
  const float clamped = scaled > 0.0f ? (scaled < largest_code ? scaled : largest_code) : 0.0f;
  return scale == 0.0f ? 0u : static_cast<uint32_t>(round_half_even(clamped));
}

void write_codes(const uint8_t* codes, int64_t dim, int bits, uint8_t* bytes) {
  const int64_t per_byte = 8 / bits;
  for (int64_t i = 0; i < dim / per_byte; ++i) {
    uint32_t byte = 0;
    for (int64_t j = 0; j < per_byte; ++j) byte |= codes[i * per_byte + j] << (j * bits);
    bytes[i] = static_cast<uint8_t>(byte);
  }
}

// x = direction * norm, in place.
float take_norm(float* x, int64_t dim) {
  double sum = 0.0;
  for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(x[d]) * x[d];
  const float norm = static_cast<float>(std::sqrt(sum));
  for (int64_t d = 0; d < dim; ++d) x[d] = norm == 0.0f ? 0.0f : x[d] / norm;
  return norm;
}

void pack_fp8(const float* x, int64_t dim, uint8_t* codes, uint16_t* scale) {
  float largest = 0.0f;
  for (int64_t d = 0; d < dim; ++d) largest = larger(largest, std::fabs(x[d]));
  const float wanted = largest / 448.0f;
  *scale = float_to_half(wanted < 0x1p-24f       ? 0x1p-24f
                         : wanted > kLargestHalf ? kLargestHalf
                                                 : wanted);
  const float used = half_to_float(*scale);
  for (int64_t d = 0; d < dim; ++d) {
    const float scaled = x[d] / used;
    codes[d] = float_to_e4m3(scaled > 448.0f ? 448.0f : scaled < -448.0f ? -448.0f : scaled);
  }
}

void pack_integer_keys(const KvStore& s, int64_t slot, int64_t count, bool into_group,
                       const float* keys) {
  const int bits = kv_code_bits(s.codec);
  const int64_t bytes = s.dim * bits / 8;
  const float largest_code = static_cast<float>((1 << bits) - 1);
  float scale[kKvMostDim], lowest[kKvMostDim];
  uint8_t codes[kKvMostDim];
  for (int64_t first = 0; first < count; first += s.group) {
    uint16_t* stored = s.key_scale + (slot + first) / s.group * 2 * s.dim;
    const int64_t vectors = std::min(s.group, count - first);
    const float* x = keys + first * s.dim;
    if (!into_group) {
      float* highest = scale;
      for (int64_t d = 0; d < s.dim; ++d) lowest[d] = highest[d] = x[d];
      for (int64_t i = 1; i < vectors; ++i) {
        for (int64_t d = 0; d < s.dim; ++d) {
          lowest[d] = smaller(lowest[d], x[i * s.dim + d]);
          highest[d] = larger(highest[d], x[i * s.dim + d]);
        }
      }
      for (int64_t d = 0; d < s.dim; ++d) {
        stored[d] = finite_half((highest[d] - lowest[d]) / largest_code);
        stored[s.dim + d] = finite_half(lowest[d]);
      }
    }
    for (int64_t d = 0; d < s.dim; ++d) {
      scale[d] = half_to_float(stored[d]);
      lowest[d] = half_to_float(stored[s.dim + d]);
    }
    for (int64_t i = 0; i < vectors; ++i) {
      for (int64_t d = 0; d < s.dim; ++d) {
        codes[d] =
            static_cast<uint8_t>(code_of(x[i * s.dim + d], scale[d], lowest[d], largest_code));
      }
      write_codes(codes, s.dim, bits, s.packed_keys + (slot + first + i) * bytes);
    }
  }
}

void pack_integer_values(const KvStore& s, int64_t slot, int64_t count, const float* values) {
  const int bits = kv_code_bits(s.codec);
  const int64_t bytes = s.dim * bits / 8, groups = kv_value_groups(s.dim, s.group);
  const float largest_code = static_cast<float>((1 << bits) - 1);
  uint8_t codes[kKvMostDim];
  for (int64_t i = 0; i < count; ++i) {
    const float* x = values + i * s.dim;
    uint16_t* stored = s.value_scale + (slot + i) * groups * 2;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * s.group, end = std::min(s.dim, begin + s.group);
      float lowest = x[begin], highest = x[begin];
      for (int64_t d = begin + 1; d < end; ++d) {
        lowest = smaller(lowest, x[d]);
        highest = larger(highest, x[d]);
      }
      stored[2 * g] = finite_half((highest - lowest) / largest_code);
      stored[2 * g + 1] = finite_half(lowest);
      const float scale = half_to_float(stored[2 * g]), low = half_to_float(stored[2 * g + 1]);
      for (int64_t d = begin; d < end; ++d) {
        codes[d] = static_cast<uint8_t>(code_of(x[d], scale, low, largest_code));
      }
    }
    write_codes(codes, s.dim, bits, s.packed_values + (slot + i) * bytes);
  }
}

template <int kBits, typename Real>
void read_integer_key(const KvStore& s, int64_t slot, Real* values) {
  const uint8_t* bytes = s.packed_keys + slot * (s.dim * kBits / 8);
  const uint16_t* stored = s.key_scale + slot / s.group * 2 * s.dim;
  for (int64_t d = 0; d < s.dim; ++d) {
    const Real scale = half_to_float(stored[d]), lowest = half_to_float(stored[s.dim + d]);
    values[d] = scale * static_cast<Real>(code_at<kBits>(bytes, d)) + lowest;
  }
}

template <int kBits, typename Real>
void read_integer_value(const KvStore& s, int64_t slot, Real* values) {
  const uint8_t* bytes = s.packed_values + slot * (s.dim * kBits / 8);
  const uint16_t* stored = s.value_scale + slot * kv_value_groups(s.dim, s.group) * 2;
  for (int64_t begin = 0; begin < s.dim; begin += s.group, stored += 2) {
    const Real scale = half_to_float(stored[0]), lowest = half_to_float(stored[1]);
    const int64_t end = std::min(s.dim, begin + s.group);
    for (int64_t d = begin; d < end; ++d) {
      values[d] = scale * static_cast<Real>(code_at<kBits>(bytes, d)) + lowest;
    }
  }
}

template <typename Real>
void read_fp8(const uint8_t* codes, uint16_t scale, int64_t dim, Real* values) {
  const Real factor = half_to_float(scale);
  for (int64_t d = 0; d < dim; ++d) values[d] = factor * e4m3_to_float(codes[d]);
}

template <typename Real>
void apply_factor(const KvStore& s, int64_t slot, int which, Real* values) {
  if (s.factors == nullptr) return;
  const Real factor = s.factors[slot * 2 + which];
  for (int64_t d = 0; d < s.dim; ++d) values[d] *= factor;
}

template <typename Real>
void unpack_segment(const KvUnpackParams& p, int64_t unit) {
  const KvStore& s = p.store;
  const KvSegment segment(s, unit / s.heads, unit % s.heads);
  const int64_t filled = std::min(p.slots, segment.filled());
  const int64_t packed = std::min(filled, segment.packed());
  Real values[kKvMostDim];
  for (int64_t i = 0; i < packed; ++i) {
    kv_read_packed_key(s, segment.packed_begin + i, values);
    kv_save(s.type, values, s.dim, p.keys, (unit * p.slots + i) * s.dim);
    kv_read_packed_value(s, segment.packed_begin + i, values);
    kv_save(s.type, values, s.dim, p.values, (unit * p.slots + i) * s.dim);
  }
  const int64_t to = (unit * p.slots + packed) * s.dim, from = segment.plain_begin * s.dim;
  const size_t copied = static_cast<size_t>((filled - packed) * s.dim * kv_type_bytes(s.type));
  const size_t empty = static_cast<size_t>((p.slots - filled) * s.dim * kv_type_bytes(s.type));
  const int64_t behind = (unit * p.slots + filled) * s.dim;
  for (const auto& [out, in] : {std::pair{p.keys, s.plain_keys}, {p.values, s.plain_values}}) {
    if (copied > 0) std::memcpy(kv_at(s.type, out, to), kv_at(s.type, in, from), copied);
    if (empty > 0) std::memset(kv_at(s.type, out, behind), 0, empty);
  }
  for (int64_t i = 0; i < p.slots; ++i) {
    p.positions[unit * p.slots + i] = i < filled ? s.positions[segment.state(i)] : -1;
  }
}

}  // namespace

template <typename Real>
void kv_read_packed_key(const KvStore& s, int64_t slot, Real* values) {
  switch (s.codec) {
    case KvCodec::kModel:
      kv_load(s.type, s.packed_keys, slot * s.dim, s.dim, values);
      break;
    case KvCodec::kFp8:
      read_fp8(s.packed_keys + slot * s.dim, s.key_scale[slot], s.dim, values);
      break;
    case KvCodec::kInt8:
      read_integer_key<8>(s, slot, values);
      break;
    case KvCodec::kInt4:
      read_integer_key<4>(s, slot, values);
      break;
    case KvCodec::kInt2:
      read_integer_key<2>(s, slot, values);
      break;
  }
  apply_factor(s, slot, 0, values);
}

template <typename Real>
void kv_read_packed_value(const KvStore& s, int64_t slot, Real* values) {
  switch (s.codec) {
    case KvCodec::kModel:
      kv_load(s.type, s.packed_values, slot * s.dim, s.dim, values);
      break;
    case KvCodec::kFp8:
      read_fp8(s.packed_values + slot * s.dim, s.value_scale[slot], s.dim, values);
      break;
    case KvCodec::kInt8:
      read_integer_value<8>(s, slot, values);
      break;
    case KvCodec::kInt4:
      read_integer_value<4>(s, slot, values);
      break;
    case KvCodec::kInt2:
      read_integer_value<2>(s, slot, values);
      break;
  }
  apply_factor(s, slot, 1, values);
}

template void kv_read_packed_key(const KvStore&, int64_t, float*);
template void kv_read_packed_key(const KvStore&, int64_t, double*);
template void kv_read_packed_value(const KvStore&, int64_t, float*);
template void kv_read_packed_value(const KvStore&, int64_t, double*);

void kv_pack_vectors(const KvStore& s, int64_t slot, int64_t count, bool into_group,
                     const void* keys, const void* values, const int64_t* vectors, float* scratch) {
  if (s.codec == KvCodec::kModel && s.factors == nullptr) {  // fp64 stays what it is
    const size_t bytes = static_cast<size_t>(s.dim * kv_type_bytes(s.type));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t to = (slot + i) * s.dim, from = vectors[i] * s.dim;
      std::memcpy(kv_at(s.type, s.packed_keys, to), kv_at(s.type, keys, from), bytes);
      std::memcpy(kv_at(s.type, s.packed_values, to), kv_at(s.type, values, from), bytes);
    }
    return;
  }
  float* const k = scratch;
  float* const v = scratch + count * s.dim;
  for (int64_t i = 0; i < count; ++i) {
    kv_load(s.type, keys, vectors[i] * s.dim, s.dim, k + i * s.dim);
    kv_load(s.type, values, vectors[i] * s.dim, s.dim, v + i * s.dim);
    if (s.factors == nullptr) continue;
    s.factors[(slot + i) * 2] = take_norm(k + i * s.dim, s.dim);
    s.factors[(slot + i) * 2 + 1] = take_norm(v + i * s.dim, s.dim);
  }
  if (s.codec == KvCodec::kModel) {
    kv_save(s.type, k, count * s.dim, s.packed_keys, slot * s.dim);
    kv_save(s.type, v, count * s.dim, s.packed_values, slot * s.dim);
  } else if (s.codec == KvCodec::kFp8) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = slot + i;
      pack_fp8(k + i * s.dim, s.dim, s.packed_keys + at * s.dim, s.key_scale + at);
      pack_fp8(v + i * s.dim, s.dim, s.packed_values + at * s.dim, s.value_scale + at);
    }
  } else {
    pack_integer_keys(s, slot, count, into_group, k);
    pack_integer_values(s, slot, count, v);
  }
}

int64_t kv_pack_scratch(const KvStore& s) { return s.packed_slots > 0 ? 2 * s.group * s.dim : 0; }

int64_t kv_quant_pack_fault(const KvPackParams& p) {
  const KvStore& s = p.store;
  for (int64_t unit = 0; unit < s.rows * s.heads; ++unit) {
    const int64_t row = unit / s.heads, head = unit % s.heads;
    const KvSegment segment(s, row, head);
    const int64_t count = std::min({static_cast<int64_t>(p.counts[unit]), p.chosen_count,
                                    segment.packed_capacity + segment.plain_capacity});
    const int32_t* chosen =
        p.chosen + (row * p.chosen_heads + (p.chosen_heads > 1 ? head : 0)) * p.chosen_count;
    for (int64_t i = 0; i < count; ++i) {
      if (chosen[i] < 0 || chosen[i] >= p.candidates) return unit;
    }
  }
  return -1;
}

void kv_quant_pack(const KvPackParams& p, float* scratch, int64_t begin, int64_t end) {
  const KvStore& s = p.store;
  const size_t vector_bytes = static_cast<size_t>(s.dim * kv_type_bytes(s.type));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / s.heads, head = unit % s.heads;
    const KvSegment segment(s, row, head);
    const int64_t capacity = segment.packed_capacity + segment.plain_capacity;
    const int64_t count = std::max<int64_t>(
        0, std::min({static_cast<int64_t>(p.counts[unit]), p.chosen_count, capacity}));
    const int64_t beyond = std::max<int64_t>(0, count - segment.plain_capacity);
    const int64_t packed = (beyond + s.group - 1) / s.group * s.group;
    segment.lengths[0] = static_cast<int32_t>(packed);
    segment.lengths[1] = static_cast<int32_t>(count - packed);
    const int32_t* chosen =
        p.chosen + (row * p.chosen_heads + (p.chosen_heads > 1 ? head : 0)) * p.chosen_count;
    const int32_t* positions =
        p.key_positions +
        (row * p.position_heads + (p.position_heads > 1 ? head : 0)) * p.candidates;
    int64_t vectors[kKvMostGroup];
    for (int64_t first = 0; first < packed; first += s.group) {
      for (int64_t i = 0; i < s.group; ++i) vectors[i] = unit * p.candidates + chosen[first + i];
      kv_pack_vectors(s, segment.packed_begin + first, s.group, false, p.keys, p.values, vectors,
                      scratch);
    }
    for (int64_t i = packed; i < count; ++i) {
      const int64_t from = (unit * p.candidates + chosen[i]) * s.dim;
      const int64_t to = (segment.plain_begin + i - packed) * s.dim;
      std::memcpy(kv_at(s.type, s.plain_keys, to), kv_at(s.type, p.keys, from), vector_bytes);
      std::memcpy(kv_at(s.type, s.plain_values, to), kv_at(s.type, p.values, from), vector_bytes);
    }
    for (int64_t i = 0; i < count; ++i) {
      s.positions[segment.state(i)] = positions[chosen[i]];
      if (s.scores == nullptr) continue;
      s.scores[segment.state(i)] =
          p.token_scores == nullptr ? 0.0f : p.token_scores[unit * p.candidates + chosen[i]];
    }
  }
}

void kv_quant_unpack(const KvUnpackParams& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    is_double(p.store.type) ? unpack_segment<double>(p, unit) : unpack_segment<float>(p, unit);
  }
}

}  // namespace kvopt::cpu
