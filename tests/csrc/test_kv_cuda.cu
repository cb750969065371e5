// SPDX-License-Identifier: Apache-2.0
// The KV-cache kernels against the host (kv_reference.h): stores byte for byte, attention and
// scores within the rounding of their operands.
//
//   test_kv_cuda [--seed S] [--rounds N]   checks; exit code 1 when one fails
//   test_kv_cuda --quick                   few cases, for a sanitizer
//   test_kv_cuda --bench                   times (bench_kv_cuda.h)
#include <chrono>

#include "bench_kv_cuda.h"
#include "check_kv_attention_cuda.h"
#include "check_kv_merge_evict_cuda.h"

namespace kvopt::test {
namespace {

void check_pack(Random& random) {
  const LayerShape shape = random_shape(random, 300);
  Layer layer = empty_layer(random, shape);
  const KvStore& s = layer.s;
  const std::string name = "pack " + name_of(shape);
  const int64_t n = 1 + random.below(320), m = random.below(n + 1), segments = s.rows * s.heads;
  const int64_t position_heads = random.below(2) ? s.heads : 1;
  const int64_t chosen_heads = random.below(2) ? s.heads : 1;
  const Vectors keys = random_vectors(random, segments * n, s.dim, s.type);
  const Vectors values = random_vectors(random, segments * n, s.dim, s.type);
  std::vector<int32_t> positions(s.rows * position_heads * n), chosen, counts;
  for (auto& v : positions) v = static_cast<int32_t>(random.below(100000));
  for (int64_t i = 0; i < s.rows * chosen_heads; ++i) {
    std::set<int32_t> picks;
    while (static_cast<int64_t>(picks.size()) < m) {
      picks.insert(static_cast<int32_t>(random.below(n)));
    }
    chosen.insert(chosen.end(), picks.begin(), picks.end());
  }
  for (int64_t i = 0; i < segments; ++i) {
    counts.push_back(static_cast<int32_t>(random.below(m + 2)));
  }
  std::vector<float> token_scores;
  if (random.below(2)) {
    for (int64_t i = 0; i < segments * n; ++i) {
      token_scores.push_back(static_cast<float>(random.normal()));
    }
  }

  const DeviceLayer device(layer);
  const DeviceBuffer<uint8_t> device_keys(bytes_of(keys, s.type));
  const DeviceBuffer<uint8_t> device_values(bytes_of(values, s.type));
  const DeviceBuffer<int32_t> device_positions(positions), device_chosen(chosen),
      device_counts(counts);
  const DeviceBuffer<float> device_scores(token_scores);
  const KvPackParams p{device.store(),
                       n,
                       device_keys.get(),
                       device_values.get(),
                       device_positions.get(),
                       position_heads,
                       token_scores.empty() ? nullptr : device_scores.get(),
                       device_chosen.get(),
                       chosen_heads,
                       m,
                       device_counts.get()};
  CHECK_CUDA(cuda::kv_quant_pack(p, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());

  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t head = 0; head < s.heads; ++head) {
      const int64_t segment = layer.segment(row, head);
      const int32_t* place = layer.place(row, head);
      const int count = std::min<int>({counts[segment], static_cast<int>(m), place[1] + place[3]});
      const int group = static_cast<int>(s.group);
      const int packed = (std::max(0, count - place[3]) + group - 1) / group * group;
      layer.length(row, head)[0] = packed;
      layer.length(row, head)[1] = count - packed;
      Vectors packed_keys, packed_values;
      for (int i = 0; i < count; ++i) {
        const int32_t token = chosen[(row * chosen_heads + head % chosen_heads) * m + i];
        const auto& key = keys[segment * n + token];
        const auto& value = values[segment * n + token];
        layer.note(layer.at(row, head, i),
                   positions[(row * position_heads + head % position_heads) * n + token],
                   token_scores.empty() ? 0 : token_scores[segment * n + token]);
        if (i < packed) {
          packed_keys.push_back(key);
          packed_values.push_back(value);
        } else {
          layer.set_plain(false, row, place[2] + i - packed, key);
          layer.set_plain(true, row, place[2] + i - packed, value);
        }
      }
      if (packed > 0) pack_slots(layer, row, place[0], packed_keys, packed_values, false);
    }
  }
  device.expect_equal(layer, name);
}

void check_unpack(Random& random) {
  const LayerShape shape = random_shape(random, 200);
  Layer layer = empty_layer(random, shape);
  fill_layer(random, layer, false);
  const KvStore& s = layer.s;
  const std::string name = "unpack " + name_of(shape);
  const int64_t slots = 1 + random.below(220), segments = s.rows * s.heads;
  const DeviceLayer device(layer);
  const DeviceBuffer<uint8_t> keys(segments * slots * s.dim * kv_type_bytes(s.type));
  const DeviceBuffer<uint8_t> values(keys.size());
  const DeviceBuffer<int32_t> positions(segments * slots);
  keys.poison(), values.poison(), positions.poison();
  CHECK_CUDA(cuda::kv_quant_unpack(
      {device.store(), slots, keys.get(), values.get(), positions.get()}, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto got_positions = positions.host();
  const std::vector<uint8_t> got[2] = {keys.host(), values.host()};
  bool positions_hold = true, vectors_hold = true;
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t head = 0; head < s.heads; ++head) {
      for (int i = 0; i < slots; ++i) {
        const int64_t at = layer.segment(row, head) * slots + i;
        const bool there = i < layer.filled(row, head);
        positions_hold &=
            got_positions[at] == (there ? layer.positions[layer.at(row, head, i)] : -1);
        for (const bool value : {false, true}) {
          const std::vector<double> want =
              there ? read_slot(layer, row, head, i, value) : std::vector<double>(s.dim, 0.0);
          for (int64_t d = 0; d < s.dim; ++d) {
            const double v = load(as_dtype(s.type), got[value].data(), at * s.dim + d);
            const double slack = unit_roundoff(as_dtype(s.type)) * 1.01 * std::fabs(want[d]) + 1e-6;
            vectors_hold &= there ? std::fabs(v - want[d]) <= slack : v == 0;
          }
        }
      }
    }
  }
  expect(positions_hold, name + ": positions");
  expect(vectors_hold, name + ": vectors");
  device.expect_equal(layer, name + " left as it was");
}

void check_append(Random& random) {
  LayerShape shape = random_shape(random, 150);
  Append a;
  KvAppendParams& p = a.p;
  p.shared = random.below(3) == 0;
  if (p.shared) shape.even = true;
  Layer layer = empty_layer(random, shape);
  fill_layer(random, layer, p.shared || random.below(2) == 0);
  const KvStore& s = layer.s;
  const int64_t segments = s.rows * s.heads;
  p.position_heads = !p.shared && random.below(2) ? s.heads : 1;
  p.victim_heads = !p.shared && random.below(2) ? s.heads : 1;
  p.new_score = 0.5f;
  p.order = random.below(3) == 0 ? KvOrder::kOldest : KvOrder::kLowestScore;
  p.first = static_cast<int32_t>(random.below(3) * 4);
  p.recent = static_cast<int32_t>(random.below(4) == 0 ? 100000 : random.below(40) - 1);
  p.age = random.below(3) == 0;
  const DeviceLayer device(layer);
  const std::string name = "append " + name_of(shape) + (p.shared ? " shared" : "") +
                           (p.age ? " age" : "") + " recent " + std::to_string(p.recent);
  for (int step = 0; step < 70; ++step) {
    a.keys = random_vectors(random, segments, s.dim, s.type);
    a.values = random_vectors(random, segments, s.dim, s.type);
    a.position.clear(), a.victim.clear(), a.token_score.clear();
    for (int64_t i = 0; i < s.rows * p.position_heads; ++i) {
      a.position.push_back(random.below(8) == 0 ? -1 : 400 + step);
    }
    if (random.below(4) == 0) {
      for (int64_t i = 0; i < s.rows * p.victim_heads; ++i) {
        a.victim.push_back(static_cast<int32_t>(random.below(160)) - 5);
      }
    }
    if (random.below(2) == 0) {
      for (int64_t i = 0; i < segments; ++i) {
        a.token_score.push_back(0.25f * static_cast<float>(random.below(12)));
      }
    }
    append(layer, a);
    const DeviceBuffer<uint8_t> keys(bytes_of(a.keys, s.type)), values(bytes_of(a.values, s.type));
    const DeviceBuffer<int32_t> position(a.position), victim(a.victim);
    const DeviceBuffer<float> token_score(a.token_score);
    KvAppendParams q = p;
    q.store = device.store();
    q.key = keys.get(), q.value = values.get(), q.position = position.get();
    q.token_score = a.token_score.empty() ? nullptr : token_score.get();
    q.victim = a.victim.empty() ? nullptr : victim.get();
    const DeviceBuffer<uint8_t> workspace(cuda::kv_evict_append_workspace(q));
    workspace.poison();
    CHECK_CUDA(cuda::kv_evict_append(q, workspace.get(), nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
    if (step % 10 == 9) device.expect_equal(layer, name + " step " + std::to_string(step));
  }
}

void check_select(Random& random) {
  const int64_t rows = 1 + random.below(2), heads = 1 + random.below(3);
  const int64_t group = any(random, {1, 2, 4, 3});
  const int64_t dim = any(random, {4, 20, 64, 80, 96, 128, 256});
  const KvType type = any(random, kTypes);
  const int64_t n = 1 + random.below(400), queries = 1 + random.below(random.below(2) ? 40 : 300);
  const bool maximum = random.below(2) == 0;
  const int64_t position_heads = random.below(2) ? heads : 1;
  const Vectors q = random_vectors(random, rows * heads * group * queries, dim, type, 1.5);
  const Vectors k = random_vectors(random, rows * heads * n, dim, type, 1);
  std::vector<int32_t> query_positions, key_positions;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t padding = random.below(3) == 0 ? random.below(n) : 0;
    for (int64_t i = 0; i < queries; ++i) {
      query_positions.push_back(static_cast<int32_t>(n - padding - queries + i));
    }
    for (int64_t h = 0; h < position_heads; ++h) {
      for (int64_t i = 0; i < n; ++i) {
        key_positions.push_back(static_cast<int32_t>(std::max<int64_t>(-1, i - padding)));
      }
    }
  }
  if (random.below(3) == 0) {  // in no order
    for (auto& v : key_positions) v = static_cast<int32_t>(random.below(n + 1)) - 1;
  }
  char text[160];
  std::snprintf(text, sizeof text, "select %s B%ld H%ld group %ld q %ld n %ld D%ld%s",
                name_of(type), long(rows), long(heads), long(group), long(queries), long(n),
                long(dim), maximum ? " maximum" : "");
  const DeviceBuffer<uint8_t> device_q(bytes_of(q, type)), device_k(bytes_of(k, type));
  const DeviceBuffer<int32_t> device_qp(query_positions), device_kp(key_positions);
  const DeviceBuffer<float> out(rows * heads * n);
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const KvSelectParams p{.rows = rows,
                         .heads = heads,
                         .query_group = group,
                         .queries = queries,
                         .keys = n,
                         .dim = dim,
                         .type = type,
                         .query = device_q.get(),
                         .key = device_k.get(),
                         .query_positions = device_qp.get(),
                         .key_positions = device_kp.get(),
                         .position_heads = position_heads,
                         .scale = scale,
                         .maximum = maximum,
                         .scores = out.get()};
  const DeviceBuffer<uint8_t> workspace(cuda::kv_select_scores_workspace(p));
  workspace.poison(), out.poison();
  CHECK_CUDA(cuda::kv_select_scores(p, workspace.get(), nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto got = out.host();
  double worst = 0;
  for (int64_t segment = 0; segment < rows * heads; ++segment) {
    const int64_t row = segment / heads, head = segment % heads;
    const int32_t* kp = &key_positions[(row * position_heads + head % position_heads) * n];
    std::vector<double> want(n, 0.0);
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t i = 0; i < queries; ++i) {
        const auto& x = q[(segment * group + g) * queries + i];
        const int32_t newest = query_positions[row * queries + i];
        std::vector<double> weights(n, -INFINITY);
        double most = -INFINITY, sum = 0;
        for (int64_t j = 0; j < n; ++j) {
          if (kp[j] < 0 || kp[j] > newest) continue;
          double logit = 0;
          for (int64_t d = 0; d < dim; ++d) {
            logit += static_cast<double>(x[d]) * k[segment * n + j][d];
          }
          weights[j] = logit * scale;
          most = std::max(most, weights[j]);
        }
        if (most == -INFINITY) continue;
        for (auto& w : weights) sum += w = std::exp(w - most);
        for (int64_t j = 0; j < n; ++j) {
          const double w = weights[j] / sum;
          want[j] = maximum ? std::max(want[j], w) : want[j] + w;
        }
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      const double error = std::fabs(got[segment * n + j] - want[j]) / (4e-5 * want[j] + 1e-7);
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
  }
  expect(worst <= 1, std::string(text) + ": off by " + std::to_string(worst));
}

void check_merge(Random& random) {
  const int64_t count = 1 + random.below(200), dim = any(random, {4, 20, 64, 96, 128, 256});
  const KvType type = any(random, kTypes);
  Vectors a = random_vectors(random, count, dim, type),
          b = random_vectors(random, count, dim, type);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t kind = random.below(8);
    if (kind == 0) b[i] = a[i];
    if (kind == 1) {
      for (int64_t d = 0; d < dim; ++d) b[i][d] = -a[i][d];
    }
  }
  const float t = static_cast<float>(random.below(4) == 0 ? 0.5 : random.uniform());
  const DeviceBuffer<uint8_t> device_a(bytes_of(a, type)), device_b(bytes_of(b, type));
  const DeviceBuffer<uint8_t> direction(device_a.size());
  const DeviceBuffer<float> norm_a(count), norm_b(count), distance(count);
  direction.poison(), norm_a.poison(), norm_b.poison(), distance.poison();
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
  const auto got = direction.host();
  const auto got_a = norm_a.host(), got_b = norm_b.host(), got_distance = distance.host();
  const std::string name = std::string("merge ") + name_of(type) + " D" + std::to_string(dim);
  bool holds = true;
  for (int64_t i = 0; i < count; ++i) {
    const auto norm_of = [&](const std::vector<float>& x) {
      double sum = 0;
      for (const float v : x) sum += static_cast<double>(v) * v;
      return std::sqrt(sum);
    };
    const double na = norm_of(a[i]), nb = norm_of(b[i]);
    std::vector<double> u(dim), v(dim), e(dim);
    double apart = 0, along = 0, length = 0;
    for (int64_t d = 0; d < dim; ++d) {
      u[d] = na == 0 ? 0 : a[i][d] / na;
      v[d] = nb == 0 ? 0 : b[i][d] / nb;
      apart += (u[d] - v[d]) * (u[d] - v[d]);
      along += (u[d] + v[d]) * (u[d] + v[d]);
      const double line = (1 - t) * u[d] + t * v[d];
      length += line * line;
    }
    length = std::sqrt(length);
    const double angle = 2 * std::atan2(std::sqrt(apart), std::sqrt(along)), sine = std::sin(angle);
    const bool missing = na == 0 || nb == 0;
    // Nearly opposite vectors: the direction is ill-conditioned; the bound grows as 1 / sine.
    const double slack =
        unit_roundoff(as_dtype(type)) * 1.01 + 2e-6 * (sine > 1e-4 && !missing ? 1 + 1 / sine : 4);
    for (int64_t d = 0; d < dim; ++d) {
      e[d] = missing        ? u[d] + v[d]
             : sine >= 1e-4 ? (std::sin((1 - t) * angle) * u[d] + std::sin(t * angle) * v[d]) / sine
             : length >= 1e-4 ? ((1 - t) * u[d] + t * v[d]) / length
                              : u[d];
      const double x = load(as_dtype(type), got.data(), i * dim + d);
      holds &= std::fabs(x - e[d]) <= slack * std::max(1.0, std::fabs(e[d]));
    }
    holds &= std::fabs(got_a[i] - na) <= 1e-5 * na && std::fabs(got_b[i] - nb) <= 1e-5 * nb;
    holds &= std::fabs(got_distance[i] - (missing ? 0 : angle / 3.14159265358979)) <= 2e-6;
  }
  expect(holds, name);
}

int main_of(int argc, char** argv) {
  uint64_t seed = std::chrono::steady_clock::now().time_since_epoch().count() % 100000;
  int rounds = 60;
  bool quick = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--seed" && i + 1 < argc) seed = std::strtoull(argv[++i], nullptr, 10);
    if (argument == "--rounds" && i + 1 < argc) rounds = std::atoi(argv[++i]);
    if (argument == "--quick") quick = true;
    if (argument == "--bench") {
      for (const BenchShape& shape :
           {BenchShape{1, 8, 4, 128, 1024}, BenchShape{1, 8, 4, 128, 4096},
            BenchShape{1, 8, 4, 128, 32768}, BenchShape{8, 8, 4, 128, 4096},
            BenchShape{8, 8, 4, 128, 32768}}) {
        bench_decode(shape);
      }
      bench_select({1, 8, 4, 128, 4096}, 4096);
      bench_select({1, 8, 4, 128, 16384}, 16384);
      bench_select({1, 8, 4, 128, 32768}, 32);
      return 0;
    }
  }
  if (quick) rounds = 6;
  std::printf("seed %llu, %d rounds\n", static_cast<unsigned long long>(seed), rounds);
  Random random(seed);
  for (int i = 0; i < rounds; ++i) {
    check_pack(random);
    check_unpack(random);
    check_append(random);
    check_attention(random, quick ? 300 : i % 8 == 0 ? 3000 : 500);
    check_select(random);
    check_merge(random);
    check_merge_evict(random);
  }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace kvopt::test

int main(int argc, char** argv) { return kvopt::test::main_of(argc, argv); }
