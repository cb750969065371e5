// SPDX-License-Identifier: Apache-2.0
// The KV operators on the host for one purpose: to check kernels. Written from the words of
// common/kv_store.h, slot by slot, sums in fp64; codes and scales in fp32, as they are defined.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "check_cuda.h"
#include "common/kv_store.h"

namespace kvopt::test {

inline DType as_dtype(KvType type) { return static_cast<DType>(type); }

// e4m3fn: sign, four exponent bits (bias 7), three mantissa bits.
inline double fp8_number(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code & 128 ? -magnitude : magnitude;
}

inline uint8_t nearest_fp8(float x) {
  int best = 0;
  double apart = std::numeric_limits<double>::infinity();
  for (int code = 0; code < 127; ++code) {
    const double d = std::fabs(fp8_number(code) - std::fabs(static_cast<double>(x)));
    if (d < apart || (d == apart && code % 2 == 0)) {
      apart = d;
      best = code;
    }
  }
  return static_cast<uint8_t>(best | (std::signbit(x) ? 128 : 0));
}

inline uint16_t clamped_half(float v) { return half_bits(std::clamp(v, -65504.0f, 65504.0f)); }

struct Layer {
  KvStore s{};  // sizes; the pointers are those of view()
  std::vector<int32_t> segments, lengths, positions;
  std::vector<float> scores, factors;
  std::vector<uint8_t> plain_keys, plain_values, packed_keys, packed_values;
  std::vector<uint16_t> key_scale, value_scale;

  int64_t vector_bytes() const { return kv_packed_bytes(s.codec, s.type, s.dim); }
  int64_t segment(int64_t row, int64_t head) const { return row * s.heads + head; }
  const int32_t* place(int64_t row, int64_t head) const {
    return &segments[4 * segment(row, head)];
  }
  int32_t* length(int64_t row, int64_t head) { return &lengths[2 * segment(row, head)]; }
  const int32_t* length(int64_t row, int64_t head) const {
    return &lengths[2 * segment(row, head)];
  }
  int filled(int64_t row, int64_t head) const {
    return length(row, head)[0] + length(row, head)[1];
  }
  int64_t packed_at(int64_t row, int64_t slot) const {
    return row * (s.packed_slots + s.plain_slots) + slot;
  }
  int64_t plain_at(int64_t row, int64_t slot) const {
    return packed_at(row, s.packed_slots + slot);
  }
  int64_t at(int64_t row, int64_t head, int index) const {
    const int packed = length(row, head)[0];
    return index < packed ? packed_at(row, place(row, head)[0] + index)
                          : plain_at(row, place(row, head)[2] + index - packed);
  }
  void note(int64_t where, int32_t position, float score) {
    positions[where] = position;
    if (!scores.empty()) scores[where] = score;
  }
  std::vector<float> plain(bool value, int64_t row, int64_t slot) const {
    std::vector<float> out(s.dim);
    const auto& data = value ? plain_values : plain_keys;
    for (int64_t d = 0; d < s.dim; ++d) {
      out[d] = load(as_dtype(s.type), data.data(), (row * s.plain_slots + slot) * s.dim + d);
    }
    return out;
  }
  void set_plain(bool value, int64_t row, int64_t slot, const std::vector<float>& x) {
    auto& data = value ? plain_values : plain_keys;
    for (int64_t d = 0; d < s.dim; ++d) {
      store(as_dtype(s.type), data.data(), (row * s.plain_slots + slot) * s.dim + d, x[d]);
    }
  }
};

struct Range {
  uint16_t scale, lowest;
};

inline Range range_of(const std::vector<float>& x, int bits) {
  const auto [low, high] = std::minmax_element(x.begin(), x.end());
  return {clamped_half((*high - *low) / static_cast<float>((1 << bits) - 1)), clamped_half(*low)};
}

inline int code_of(float x, Range range, int bits) {
  const float scale = half_value(range.scale);
  if (scale == 0) return 0;
  const volatile float offset = x - half_value(range.lowest);  // no contraction
  const float code = std::nearbyint(offset / scale);
  return static_cast<int>(std::clamp(code, 0.0f, static_cast<float>((1 << bits) - 1)));
}

inline void put_code(std::vector<uint8_t>& data, int64_t vector_at, int64_t d, int bits, int code) {
  uint8_t& byte = data[vector_at + d * bits / 8];
  const int shift = static_cast<int>(d * bits % 8);
  byte = static_cast<uint8_t>((byte & ~(((1 << bits) - 1) << shift)) | code << shift);
}

inline float direct(std::vector<float>& x) {
  double sum = 0;
  for (const float v : x) sum += static_cast<double>(v) * v;
  const auto norm = static_cast<float>(std::sqrt(sum));
  for (float& v : x) v = norm == 0 ? 0 : v / norm;
  return norm;
}

using Vectors = std::vector<std::vector<float>>;

inline void pack_slots(Layer& layer, int64_t row, int64_t slot, Vectors keys, Vectors values,
                       bool into_group) {
  const KvStore& s = layer.s;
  const int64_t count = static_cast<int64_t>(keys.size()), bytes = layer.vector_bytes();
  const int bits = kv_code_bits(s.codec);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t vector = row * s.packed_slots + slot + i;
    if (!layer.factors.empty()) {
      layer.factors[2 * vector] = direct(keys[i]);
      layer.factors[2 * vector + 1] = direct(values[i]);
    }
    for (const bool value : {false, true}) {
      const auto& x = value ? values[i] : keys[i];
      auto& data = value ? layer.packed_values : layer.packed_keys;
      if (s.codec == KvCodec::kModel) {
        for (int64_t d = 0; d < s.dim; ++d) {
          store(as_dtype(s.type), data.data(), vector * s.dim + d, x[d]);
        }
      } else if (s.codec == KvCodec::kFp8) {
        float largest = 0;
        for (const float v : x) largest = std::max(largest, std::fabs(v));
        const uint16_t scale = clamped_half(std::max(largest / 448.0f, 0x1p-24f));
        (value ? layer.value_scale : layer.key_scale)[vector] = scale;
        for (int64_t d = 0; d < s.dim; ++d) {
          data[vector * bytes + d] =
              nearest_fp8(std::clamp(x[d] / half_value(scale), -448.0f, 448.0f));
        }
      }
    }
    if (bits == 0) continue;
    const int64_t groups = kv_value_groups(s.dim, s.group);
    for (int64_t j = 0; j < groups; ++j) {
      const int64_t end = std::min(s.dim, (j + 1) * s.group);
      const Range range =
          range_of({values[i].begin() + j * s.group, values[i].begin() + end}, bits);
      layer.value_scale[2 * (vector * groups + j)] = range.scale;
      layer.value_scale[2 * (vector * groups + j) + 1] = range.lowest;
      for (int64_t d = j * s.group; d < end; ++d) {
        put_code(layer.packed_values, vector * bytes, d, bits, code_of(values[i][d], range, bits));
      }
    }
  }
  if (bits == 0) return;
  const int64_t step = into_group ? 1 : s.group;
  for (int64_t first = 0; first < count; first += step) {
    const int64_t group = row * (s.packed_slots / s.group) + (slot + first) / s.group;
    for (int64_t d = 0; d < s.dim; ++d) {
      uint16_t* scale = &layer.key_scale[(2 * group) * s.dim + d];
      if (!into_group) {
        std::vector<float> column;
        for (int64_t i = 0; i < step; ++i) column.push_back(keys[first + i][d]);
        const Range range = range_of(column, bits);
        scale[0] = range.scale;
        scale[s.dim] = range.lowest;
      }
      for (int64_t i = 0; i < step; ++i) {
        put_code(layer.packed_keys, (row * s.packed_slots + slot + first + i) * bytes, d, bits,
                 code_of(keys[first + i][d], {scale[0], scale[s.dim]}, bits));
      }
    }
  }
}

// What slot `index` of a segment stands for. `rounding`, if asked for, gets per channel the
// magnitude that a product with 16-bit operands rounds: an integer code times its scale.
inline std::vector<double> read_slot(const Layer& layer, int64_t row, int64_t head, int index,
                                     bool value, std::vector<double>* rounding = nullptr) {
  const KvStore& s = layer.s;
  std::vector<double> out(s.dim);
  if (rounding) rounding->assign(s.dim, 0);
  const int packed = layer.length(row, head)[0];
  if (index >= packed) {
    const auto x = layer.plain(value, row, layer.place(row, head)[2] + index - packed);
    return {x.begin(), x.end()};
  }
  const int64_t slot = layer.place(row, head)[0] + index, vector = row * s.packed_slots + slot;
  const auto& data = value ? layer.packed_values : layer.packed_keys;
  const auto& scales = value ? layer.value_scale : layer.key_scale;
  const int bits = kv_code_bits(s.codec);
  for (int64_t d = 0; d < s.dim; ++d) {
    if (s.codec == KvCodec::kModel) {
      out[d] = load(as_dtype(s.type), data.data(), vector * s.dim + d);
    } else if (s.codec == KvCodec::kFp8) {
      out[d] = half_value(scales[vector]) * fp8_number(data[vector * s.dim + d]);
    } else {
      const int code =
          data[vector * layer.vector_bytes() + d * bits / 8] >> (d * bits % 8) & ((1 << bits) - 1);
      const int64_t at = value
                             ? 2 * (vector * kv_value_groups(s.dim, s.group) + d / s.group)
                             : 2 * (row * (s.packed_slots / s.group) + slot / s.group) * s.dim + d;
      const double scaled = static_cast<double>(half_value(scales[at])) * code;
      out[d] = scaled + half_value(scales[at + (value ? 1 : s.dim)]);
      if (rounding) (*rounding)[d] = std::fabs(scaled);
    }
  }
  if (!layer.factors.empty()) {
    const double factor = layer.factors[2 * vector + (value ? 1 : 0)];
    for (int64_t d = 0; d < s.dim; ++d) {
      out[d] *= factor;
      if (rounding) (*rounding)[d] *= std::fabs(factor);
    }
  }
  return out;
}

// Plain tokens behind the segment's new end take the slots that `leaving` leave below it.
inline void close_gaps(Layer& layer, int64_t row, int64_t head, const std::vector<int>& leaving) {
  const int32_t* place = layer.place(row, head);
  const int rest = layer.length(row, head)[1] - static_cast<int>(leaving.size());
  const auto leaves = [&](int i) {
    return std::find(leaving.begin(), leaving.end(), i) != leaving.end();
  };
  for (int hole = 0, mover = rest; hole < rest; ++hole) {
    if (!leaves(hole)) continue;
    while (leaves(mover)) ++mover;
    for (const bool v : {false, true}) {
      layer.set_plain(v, row, place[2] + hole, layer.plain(v, row, place[2] + mover));
    }
    const int64_t from = layer.plain_at(row, place[2] + mover);
    layer.note(layer.plain_at(row, place[2] + hole), layer.positions[from],
               layer.scores.empty() ? 0 : layer.scores[from]);
    ++mover;
  }
}

struct Append {
  KvAppendParams p{};
  Vectors keys, values;  // per segment
  std::vector<int32_t> position, victim;
  std::vector<float> token_score;
};

// Of a segment that holds `capacity` tokens.
inline int lowest_slot(const KvVictimRule& p, int64_t capacity, const std::vector<float>& scores,
                       const std::vector<int32_t>& positions, int32_t newest) {
  const int64_t recent = p.recent == kKvHalf ? (capacity + 1) / 2 : p.recent;
  const auto eligible = [&](int level, int32_t position) {
    return level == 2 || (position >= p.first && (level == 1 || position <= newest - recent));
  };
  int level = 0;
  while (std::none_of(positions.begin(), positions.end(),
                      [&](int32_t x) { return eligible(level, x); })) {
    ++level;
  }
  int best = -1;
  float lowest = 0;
  for (int i = 0; i < static_cast<int>(positions.size()); ++i) {
    if (!eligible(level, positions[i])) continue;
    float priority = scores[i];
    if (p.age) priority /= static_cast<float>(std::max(1, newest - positions[i]));
    if (std::isnan(priority)) priority = INFINITY;
    if (p.order == KvOrder::kOldest) priority = 0;  // positions decide
    const bool less =
        best < 0 || priority < lowest || (priority == lowest && positions[i] < positions[best]);
    if (less) {
      best = i;
      lowest = priority;
    }
  }
  return best;
}

inline void append(Layer& layer, const Append& a) {
  const KvStore& s = layer.s;
  const KvAppendParams& p = a.p;
  const int group = static_cast<int>(s.group);
  for (int64_t row = 0; row < s.rows; ++row) {
    int common = -1;
    if (p.shared) {
      int n = INT32_MAX;
      for (int64_t h = 0; h < s.heads; ++h) n = std::min(n, layer.filled(row, h));
      std::vector<float> total(n, 0.0f);
      std::vector<int32_t> positions(n);
      for (int i = 0; i < n; ++i) {
        for (int64_t h = 0; h < s.heads; ++h) {
          if (!layer.scores.empty()) total[i] += layer.scores[layer.at(row, h, i)];
        }
        positions[i] = layer.positions[layer.at(row, 0, i)];
      }
      const int32_t* first = layer.place(row, 0);
      if (n > 0) common = lowest_slot(p, first[1] + first[3], total, positions, a.position[row]);
    }
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t segment = layer.segment(row, h);
      const int32_t newest = a.position[row * p.position_heads + h % p.position_heads];
      const int32_t* place = layer.place(row, h);
      int32_t* length = layer.length(row, h);
      if (newest < 0 || place[1] + place[3] == 0) continue;
      const float score = a.token_score.empty() ? p.new_score : a.token_score[segment];
      const auto& key = a.keys[segment];
      const auto& value = a.values[segment];
      const auto to_packed = [&](int64_t slot, const std::vector<int>& plain, bool into) {
        Vectors keys, values;
        for (size_t i = 0; i < plain.size(); ++i) {
          keys.push_back(layer.plain(false, row, place[2] + plain[i]));
          values.push_back(layer.plain(true, row, place[2] + plain[i]));
          const int64_t from = layer.plain_at(row, place[2] + plain[i]);
          layer.note(layer.packed_at(row, slot + static_cast<int64_t>(i)), layer.positions[from],
                     layer.scores.empty() ? 0 : layer.scores[from]);
        }
        pack_slots(layer, row, slot, keys, values, into);
      };
      const auto position_of = [&](int plain) {
        return layer.positions[layer.plain_at(row, place[2] + plain)];
      };
      const bool integer = kv_code_bits(s.codec) != 0;
      int slot = -1;
      int64_t into = -1;
      bool into_group = false;
      if (length[1] < place[3]) {
        slot = length[1]++;
      } else if (length[0] + group <= place[1]) {
        if (place[3] == 0) {
          into = place[0] + length[0]++;
        } else {
          std::vector<int> order(length[1]);
          std::iota(order.begin(), order.end(), 0);
          std::stable_sort(order.begin(), order.end(),
                           [&](int x, int y) { return position_of(x) < position_of(y); });
          order.resize(group);
          to_packed(place[0] + length[0], order, false);
          const int rest = place[3] - group;
          close_gaps(layer, row, h, order);
          slot = rest;
          length[0] += group;
          length[1] = rest + 1;
        }
      } else {
        int index = a.victim.empty() ? -1 : a.victim[row * p.victim_heads + h % p.victim_heads];
        const int n = length[0] + length[1];
        if (index < 0 || index >= n) index = p.shared ? common : -1;
        if (index < 0) {
          std::vector<float> scores;
          std::vector<int32_t> positions;
          for (int i = 0; i < n; ++i) {
            positions.push_back(layer.positions[layer.at(row, h, i)]);
            scores.push_back(layer.scores.empty() ? static_cast<float>(positions.back())
                                                  : layer.scores[layer.at(row, h, i)]);
          }
          index = lowest_slot(p, place[1] + place[3], scores, positions, newest);
        }
        if (index >= length[0]) {
          slot = index - length[0];
        } else if (place[3] == 0) {
          into = place[0] + index;
          into_group = integer;
        } else {
          slot = 0;
          for (int i = 1; i < length[1]; ++i) {
            if (position_of(i) < position_of(slot)) slot = i;
          }
          to_packed(place[0] + index, {slot}, integer);
        }
      }
      if (slot < 0) {
        pack_slots(layer, row, into, {key}, {value}, into_group);
        layer.note(layer.packed_at(row, into), newest, score);
      } else {
        layer.set_plain(false, row, place[2] + slot, key);
        layer.set_plain(true, row, place[2] + slot, value);
        layer.note(layer.plain_at(row, place[2] + slot), newest, score);
      }
    }
  }
}

}  // namespace kvopt::test
