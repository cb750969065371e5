// SPDX-License-Identifier: Apache-2.0
// Random KV layers and their copies on the device.
#pragma once

#include <set>
#include <string>

#include "cuda/kv.h"
#include "kv_reference.h"

namespace kvopt::test {

inline int failures = 0, checks = 0;

inline void expect(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  if (++failures <= 25) std::printf("FAILED %s\n", what.c_str());
}

inline const char* name_of(KvType type) { return name_of(as_dtype(type)); }

inline const char* name_of(KvCodec codec) {
  constexpr const char* kNames[] = {"model", "fp8", "int8", "int4", "int2"};
  return kNames[static_cast<int>(codec)];
}

struct LayerShape {
  int64_t rows, heads, dim;
  KvType type;
  KvCodec codec;
  int64_t group;     // of slots and channels
  int64_t residual;  // at least this many plain slots beside packed ones
  int64_t tokens;    // capacity of a segment: up to this, or exactly this if `even`
  bool even, scores, factors;
};

inline std::string name_of(const LayerShape& l) {
  char text[160];
  std::snprintf(text, sizeof text, "%s %s g%ld r%ld B%ld H%ld D%ld tokens %ld%s%s", name_of(l.type),
                name_of(l.codec), long(l.group), long(l.residual), long(l.rows), long(l.heads),
                long(l.dim), long(l.tokens), l.even ? "" : " uneven", l.factors ? " factors" : "");
  return text;
}

inline constexpr KvType kTypes[] = {KvType::kFloat32, KvType::kFloat16, KvType::kBFloat16};
inline constexpr KvCodec kCodecs[] = {KvCodec::kModel, KvCodec::kFp8, KvCodec::kInt8,
                                      KvCodec::kInt4, KvCodec::kInt2};

template <typename T, size_t N>
T any(Random& random, const T (&of)[N]) {
  return of[random.below(N)];
}

inline LayerShape random_shape(Random& random, int64_t most_tokens) {
  LayerShape l{};
  l.rows = 1 + random.below(3);
  l.heads = 1 + random.below(4);
  l.dim = any(random, {4, 20, 32, 64, 80, 96, 128, 128, 192, 256});
  l.type = any(random, kTypes);
  l.codec = any(random, kCodecs);
  const bool integer = kv_code_bits(l.codec) != 0;
  l.group = integer ? any(random, {4, 16, 32, 32, 64}) : 1;
  l.residual = integer ? l.group * (1 + random.below(3)) + random.below(5) : random.below(3) * 7;
  l.tokens = 1 + random.below(most_tokens);
  l.even = random.below(3) == 0;
  l.scores = random.below(4) != 0;
  l.factors = random.below(3) == 0;
  return l;
}

inline std::vector<float> random_vector(Random& random, int64_t dim, KvType type, double size = 1) {
  std::vector<float> x(dim);
  const int kind = static_cast<int>(random.below(16));
  for (auto& v : x) {
    const double number = kind == 0 ? 0 : kind == 1 ? 0.5 : size * random.normal();
    v = static_cast<float>(rounded(as_dtype(type), number));
  }
  return x;
}

// Segments one behind the other, filled lengths 0: every byte of content is poison.
inline Layer empty_layer(Random& random, const LayerShape& l) {
  Layer layer;
  KvStore& s = layer.s;
  s.rows = l.rows, s.heads = l.heads, s.dim = l.dim, s.type = l.type, s.codec = l.codec;
  s.group = l.group;
  const bool packs = l.codec != KvCodec::kModel || l.factors;
  for (int64_t row = 0; row < l.rows; ++row) {
    int64_t packed = 0, plain = 0;
    for (int64_t head = 0; head < l.heads; ++head) {
      const int64_t capacity = l.even                 ? l.tokens
                               : random.below(8) == 0 ? 0
                                                      : 1 + random.below(l.tokens);
      const int64_t into =
          packs ? l.group * (std::max<int64_t>(0, capacity - l.residual) / l.group) : 0;
      for (const int64_t v : {packed, into, plain, capacity - into}) {
        layer.segments.push_back(static_cast<int32_t>(v));
      }
      packed += into;
      plain += capacity - into;
    }
    s.packed_slots = std::max(s.packed_slots, packed);
    s.plain_slots = std::max(s.plain_slots, plain);
  }
  const int64_t slots = l.rows * (s.packed_slots + s.plain_slots);
  const int64_t packed = l.rows * s.packed_slots;
  layer.lengths.assign(2 * l.rows * l.heads, 0);
  layer.positions.assign(slots, -7);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (l.scores) layer.scores.assign(slots, nan);
  if (l.factors) layer.factors.assign(2 * packed, nan);
  const int64_t plain_bytes = l.rows * s.plain_slots * l.dim * kv_type_bytes(l.type);
  layer.plain_keys.assign(plain_bytes, 0xFF);
  layer.plain_values.assign(plain_bytes, 0xFF);
  layer.packed_keys.assign(packed * layer.vector_bytes(), 0xFF);
  layer.packed_values.assign(packed * layer.vector_bytes(), 0xFF);
  if (l.codec == KvCodec::kFp8) {
    layer.key_scale.assign(packed, 0xFFFF);
    layer.value_scale.assign(packed, 0xFFFF);
  } else if (l.codec != KvCodec::kModel) {
    layer.key_scale.assign(packed / l.group * 2 * l.dim, 0xFFFF);
    layer.value_scale.assign(2 * packed * kv_value_groups(l.dim, l.group), 0xFFFF);
  }
  return layer;
}

// How much of each segment is filled: all of it (1), or anything from nothing on (0).
inline void fill_layer(Random& random, Layer& layer, bool full) {
  const KvStore& s = layer.s;
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t head = 0; head < s.heads; ++head) {
      const int32_t* place = layer.place(row, head);
      int32_t* length = layer.length(row, head);
      const int64_t kind = full ? 0 : random.below(4);
      const int64_t groups = place[1] / s.group;
      length[0] = static_cast<int32_t>(s.group * (kind == 0   ? groups
                                                  : kind == 1 ? 0
                                                              : random.below(groups + 1)));
      length[1] = static_cast<int32_t>(kind <= 0 ? place[3] : random.below(place[3] + 1));
      Vectors keys, values;
      for (int i = 0; i < length[0]; ++i) {
        keys.push_back(random_vector(random, s.dim, s.type));
        values.push_back(random_vector(random, s.dim, s.type));
      }
      if (length[0] > 0) pack_slots(layer, row, place[0], keys, values, false);
      for (int i = 0; i < length[1]; ++i) {
        layer.set_plain(false, row, place[2] + i, random_vector(random, s.dim, s.type));
        layer.set_plain(true, row, place[2] + i, random_vector(random, s.dim, s.type));
      }
      // Positions in any order, some twice, few different scores: ties are common.
      const int32_t alike = 1 + static_cast<int32_t>(random.below(2));
      std::vector<int32_t> order(layer.filled(row, head));
      std::iota(order.begin(), order.end(), 0);
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
      for (size_t i = 0; i < order.size(); ++i) {
        const int64_t kind_of_score = random.below(24);
        const float score = kind_of_score == 0   ? -0.0f
                            : kind_of_score == 1 ? std::numeric_limits<float>::infinity()
                                                 : 0.25f * static_cast<float>(kind_of_score - 8);
        layer.note(layer.at(row, head, static_cast<int>(i)), order[i] / alike, score);
      }
    }
  }
}

class DeviceLayer {
 public:
  explicit DeviceLayer(const Layer& l)
      : segments_(l.segments),
        lengths_(l.lengths),
        positions_(l.positions),
        scores_(l.scores),
        factors_(l.factors),
        plain_keys_(l.plain_keys),
        plain_values_(l.plain_values),
        packed_keys_(l.packed_keys),
        packed_values_(l.packed_values),
        key_scale_(l.key_scale),
        value_scale_(l.value_scale),
        store_(l.s) {
    store_.segments = segments_.get();
    store_.lengths = lengths_.get();
    store_.positions = positions_.get();
    store_.scores = l.scores.empty() ? nullptr : scores_.get();
    store_.factors = l.factors.empty() ? nullptr : factors_.get();
    store_.plain_keys = plain_keys_.get();
    store_.plain_values = plain_values_.get();
    store_.packed_keys = packed_keys_.get();
    store_.packed_values = packed_values_.get();
    store_.key_scale = key_scale_.get();
    store_.value_scale = value_scale_.get();
  }

  const KvStore& store() const { return store_; }
  std::vector<float> scores() const { return scores_.host(); }

  // Every array, unfilled slots included, byte for byte.
  void expect_equal(const Layer& l, const std::string& what) const {
    expect(lengths_.host() == l.lengths, what + ": lengths");
    expect(positions_.host() == l.positions, what + ": positions");
    expect(same(scores_.host(), l.scores), what + ": scores");
    expect(same(factors_.host(), l.factors), what + ": factors");
    expect(plain_keys_.host() == l.plain_keys, what + ": plain keys");
    expect(plain_values_.host() == l.plain_values, what + ": plain values");
    expect(packed_keys_.host() == l.packed_keys, what + ": packed keys");
    expect(packed_values_.host() == l.packed_values, what + ": packed values");
    expect(key_scale_.host() == l.key_scale, what + ": key scales");
    expect(value_scale_.host() == l.value_scale, what + ": value scales");
  }

 private:
  static bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() &&
           (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
  }

  DeviceBuffer<int32_t> segments_, lengths_, positions_;
  DeviceBuffer<float> scores_, factors_;
  DeviceBuffer<uint8_t> plain_keys_, plain_values_, packed_keys_, packed_values_;
  DeviceBuffer<uint16_t> key_scale_, value_scale_;
  KvStore store_;
};

// Vectors (or any numbers) side by side in a model's type.
inline std::vector<uint8_t> bytes_of(const Vectors& vectors, KvType type) {
  std::vector<uint8_t> out;
  for (const auto& x : vectors) {
    const size_t at = out.size();
    out.resize(at + x.size() * kv_type_bytes(type));
    for (size_t d = 0; d < x.size(); ++d) store(as_dtype(type), out.data() + at, d, x[d]);
  }
  return out;
}

inline Vectors random_vectors(Random& random, int64_t count, int64_t dim, KvType type,
                              double size = 1) {
  Vectors out;
  for (int64_t i = 0; i < count; ++i) out.push_back(random_vector(random, dim, type, size));
  return out;
}

}  // namespace kvopt::test
