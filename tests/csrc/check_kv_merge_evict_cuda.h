// SPDX-License-Identifier: Apache-2.0
// Room in two layers that share what they pack, on CUDA, against the words of common/kv_store.h
// slot by slot. Directions, norms and distances are those of the device's own kv_merge_pair, whose
// accuracy another check looks at; so everything here agrees byte for byte.
#pragma once

#include "kv_cuda_fixture.h"

namespace kvopt::test {

struct Merged {
  Vectors directions;
  std::vector<float> norm_a, norm_b, distances;
};

inline Merged merge_on_device(const Vectors& a, const Vectors& b, KvType type, float t) {
  const int64_t count = static_cast<int64_t>(a.size());
  if (count == 0) return {};
  const int64_t dim = static_cast<int64_t>(a[0].size());
  const DeviceBuffer<uint8_t> device_a(bytes_of(a, type)), device_b(bytes_of(b, type));
  const DeviceBuffer<uint8_t> direction(device_a.size());
  const DeviceBuffer<float> norm_a(count), norm_b(count), distance(count);
  const KvMergeParams p{.vectors = count,
                        .dim = dim,
                        .type = type,
                        .a = device_a.get(),
                        .b = device_b.get(),
                        .t = t,
                        .direction = direction.get(),
                        .norm_a = norm_a.get(),
                        .norm_b = norm_b.get(),
                        .distance = distance.get()};
  CHECK_CUDA(cuda::kv_merge_pair(p, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  Merged m{Vectors(count, std::vector<float>(dim)), norm_a.host(), norm_b.host(), distance.host()};
  const auto bytes = direction.host();
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < dim; ++d) {
      m.directions[i][d] = load(as_dtype(type), bytes.data(), i * dim + d);
    }
  }
  return m;
}

// Two layers on the host. What they pack is in the first.
struct Pair {
  Layer lower, upper;

  float score(int64_t at) const {
    if (lower.scores.empty()) return 0;
    const volatile float sum = lower.scores[at] + upper.scores[at];
    return sum;
  }

  Merged merged(bool values, int64_t row, int64_t head, const std::vector<int>& plain,
                float t) const {
    Vectors a, b;
    for (const int i : plain) {
      a.push_back(lower.plain(values, row, lower.place(row, head)[2] + i));
      b.push_back(upper.plain(values, row, lower.place(row, head)[2] + i));
    }
    return merge_on_device(a, b, lower.s.type, t);
  }

  std::vector<int> nearest(int64_t row, int64_t head, int count, int64_t residual, float t) const {
    const int n = lower.length(row, head)[1];
    const auto position_of = [&](int i) {
      return lower.positions[lower.plain_at(row, lower.place(row, head)[2] + i)];
    };
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int x, int y) { return position_of(x) < position_of(y); });
    order.resize(n - std::max<int64_t>(0, std::min<int64_t>(residual, n) - lower.s.group));
    const std::vector<float> distances = merged(false, row, head, order, t).distances;
    std::vector<int> places(order.size()), out;
    std::iota(places.begin(), places.end(), 0);
    std::stable_sort(places.begin(), places.end(),
                     [&](int x, int y) { return distances[x] < distances[y]; });
    places.resize(count);
    std::sort(places.begin(), places.end());
    for (const int i : places) out.push_back(order[i]);
    return out;
  }

  void merge_into(int64_t row, int64_t head, int index, const std::vector<int>& plain,
                  bool into_group, float t) {
    const int32_t* place = lower.place(row, head);
    const Merged keys = merged(false, row, head, plain, t);
    const Merged values = merged(true, row, head, plain, t);
    std::vector<float> factors;  // directions are packed as they are
    std::swap(factors, lower.factors);
    pack_slots(lower, row, place[0] + index, keys.directions, values.directions, into_group);
    std::swap(factors, lower.factors);
    for (size_t i = 0; i < plain.size(); ++i) {
      const int64_t slot = place[0] + index + static_cast<int64_t>(i);
      const int64_t factor = 2 * (row * lower.s.packed_slots + slot);
      lower.factors[factor] = keys.norm_a[i];
      lower.factors[factor + 1] = values.norm_a[i];
      upper.factors[factor] = keys.norm_b[i];
      upper.factors[factor + 1] = values.norm_b[i];
      const int64_t from = lower.plain_at(row, place[2] + plain[i]);
      for (Layer* layer : {&lower, &upper}) {
        layer->note(layer->packed_at(row, slot), layer->positions[from],
                    layer->scores.empty() ? 0 : layer->scores[from]);
      }
    }
  }

  void make_room(const KvMergeEvictParams& p, const std::vector<int32_t>& position,
                 const std::vector<int32_t>& victim) {
    const KvStore& s = lower.s;
    const int group = static_cast<int>(s.group);
    for (int64_t row = 0; row < s.rows; ++row) {
      int common = -1;
      if (p.shared) {
        const int n = lower.filled(row, 0);
        std::vector<float> total(n, 0.0f);
        std::vector<int32_t> positions(n);
        for (int i = 0; i < n; ++i) {
          for (int64_t h = 0; h < s.heads; ++h) total[i] += score(lower.at(row, h, i));
          positions[i] = lower.positions[lower.at(row, 0, i)];
        }
        const int32_t* first = lower.place(row, 0);
        if (n > 0) common = lowest_slot(p, first[1] + first[3], total, positions, position[row]);
      }
      for (int64_t h = 0; h < s.heads; ++h) {
        const int32_t newest = position[row * p.position_heads + h % p.position_heads];
        const int32_t* place = lower.place(row, h);
        int32_t* length = lower.length(row, h);
        if (newest < 0 || place[3] == 0 || length[1] < place[3]) continue;
        std::vector<int> leaving;
        int packed = length[0];
        if (packed + group <= place[1]) {
          leaving = nearest(row, h, group, p.residual, p.t);
          merge_into(row, h, packed, leaving, false, p.t);
          packed += group;
        } else {
          const int n = length[0] + length[1];
          int index = victim.empty() ? -1 : victim[row * p.victim_heads + h % p.victim_heads];
          if (index < 0 || index >= n) index = p.shared ? common : -1;
          if (index < 0) {
            std::vector<float> scores;
            std::vector<int32_t> positions;
            for (int i = 0; i < n; ++i) {
              scores.push_back(score(lower.at(row, h, i)));
              positions.push_back(lower.positions[lower.at(row, h, i)]);
            }
            index = lowest_slot(p, place[1] + place[3], scores, positions, newest);
          }
          if (index >= packed) {
            leaving = {index - packed};
          } else {
            leaving = nearest(row, h, 1, p.residual, p.t);
            merge_into(row, h, index, leaving, kv_code_bits(s.codec) != 0, p.t);
          }
        }
        for (Layer* layer : {&lower, &upper}) {
          close_gaps(*layer, row, h, leaving);
          layer->length(row, h)[0] = packed;
          layer->length(row, h)[1] -= static_cast<int32_t>(leaving.size());
        }
      }
    }
  }
};

inline void check_merge_evict(Random& random) {
  LayerShape shape = random_shape(random, 100);
  shape.factors = true;
  shape.residual = std::max<int64_t>(shape.residual, 1);
  KvMergeEvictParams p{};
  p.shared = random.below(3) == 0;
  if (p.shared) shape.even = true;
  p.order = shape.scores && random.below(3) != 0 ? KvOrder::kLowestScore : KvOrder::kOldest;
  p.first = static_cast<int32_t>(random.below(3) * 4);
  p.recent = static_cast<int32_t>(random.below(4) == 0 ? 100000 : random.below(40) - 1);
  p.age = random.below(3) == 0;
  p.residual = random.below(2 * shape.residual + 2);
  p.t = random.below(2) == 0 ? 0.6f : static_cast<float>(random.uniform());
  Pair pair{empty_layer(random, shape), {}};
  pair.upper = pair.lower;
  const KvStore& s = pair.lower.s;
  const int64_t segments = s.rows * s.heads;
  p.position_heads = !p.shared && random.below(2) ? s.heads : 1;
  p.victim_heads = !p.shared && random.below(2) ? s.heads : 1;
  const DeviceLayer lower(pair.lower), upper(pair.upper);
  p.lower = lower.store();
  p.upper = upper.store();
  p.upper.packed_keys = p.lower.packed_keys, p.upper.packed_values = p.lower.packed_values;
  p.upper.key_scale = p.lower.key_scale, p.upper.value_scale = p.lower.value_scale;
  const std::string name = "merge and evict " + name_of(shape) + (p.shared ? " shared" : "") +
                           (p.age ? " age" : "") + " recent " + std::to_string(p.recent) +
                           " residual " + std::to_string(p.residual);
  const int steps = 20 + static_cast<int>(random.below(120));
  for (int step = 0; step < steps; ++step) {
    std::vector<int32_t> position, victim;
    for (int64_t i = 0; i < s.rows * p.position_heads; ++i) {
      position.push_back(random.below(12) == 0 ? -1 : step);
    }
    if (random.below(4) == 0) {
      for (int64_t i = 0; i < s.rows * p.victim_heads; ++i) {
        victim.push_back(static_cast<int32_t>(random.below(110)) - 5);
      }
    }
    const DeviceBuffer<int32_t> device_position(position), device_victim(victim);
    p.position = device_position.get();
    p.victim = victim.empty() ? nullptr : device_victim.get();
    const DeviceBuffer<uint8_t> workspace(cuda::kv_merge_evict_workspace(p));
    workspace.poison();
    CHECK_CUDA(cuda::kv_merge_evict(p, workspace.get(), nullptr));
    pair.make_room(p, position, victim);
    // One token into both layers.
    const Vectors keys = random_vectors(random, segments, s.dim, s.type);
    const double alike = random.uniform();
    for (const bool is_upper : {false, true}) {
      Append a;
      a.keys = keys;
      a.values = random_vectors(random, segments, s.dim, s.type);
      if (is_upper) {
        for (auto& key : a.keys) {
          for (float& x : key) {
            x = static_cast<float>(rounded(as_dtype(s.type), x + alike * random.normal()));
          }
        }
      }
      a.position = position;
      a.p.position_heads = p.position_heads;
      a.p.victim_heads = 1;
      for (int64_t i = 0; i < segments; ++i) {
        a.token_score.push_back(0.25f * static_cast<float>(random.below(12)));
      }
      append(is_upper ? pair.upper : pair.lower, a);
      const DeviceBuffer<uint8_t> key(bytes_of(a.keys, s.type)), value(bytes_of(a.values, s.type));
      const DeviceBuffer<float> token_score(a.token_score);
      KvAppendParams q = a.p;
      q.store = is_upper ? p.upper : p.lower;
      q.key = key.get(), q.value = value.get(), q.position = device_position.get();
      q.token_score = token_score.get();
      CHECK_CUDA(cuda::kv_evict_append(q, nullptr, nullptr));
      CHECK_CUDA(cudaDeviceSynchronize());
    }
    if (step % 20 != 19 && step + 1 != steps) continue;
    lower.expect_equal(pair.lower, name + " lower, step " + std::to_string(step));
    upper.expect_equal(pair.upper, name + " upper, step " + std::to_string(step));
  }
}

}  // namespace kvopt::test
