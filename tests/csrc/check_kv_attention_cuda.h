// SPDX-License-Identifier: Apache-2.0
// Decode attention on CUDA against sums in fp64 over what the slots stand for, and how far each
// number may be off, for all inputs. u: unit roundoff of the model's 16-bit type. |q||k|: a sum of
// magnitudes, an integer code times its scale and the minimum apart.
//
//   logits    tensor cores cut bits below 2^-23 of the largest of 16 products and the sum before,
//             twice at most: 2^-22 (4 + D / 16) |q||k| scale; fp32 has fewer roundings of 2^-24.
//             Integer codecs: a query's number times a channel's scale is one in fp16, 2^-11 of
//             |q| |code scale|, or 2^-25 of the largest code where it is subnormal (shifted, so
//             that 2^-17 is more in every codec). A turned query is two numbers of the operand's
//             type: u^2 |q||k|. Products with scales and factors, the difference to the largest,
//             the exponential and a run's change of it: 2^-22 (8 + |logit| + |largest|).
//   weights   off by the difference of two logits' errors, twice the worst at most.
//   output    16 bits: a weight, a value made of codes, the output: u each of sum p |value|, and
//             2^-28 of |value| for a weight that is subnormal; fp32: a random walk, 4e-6.
#pragma once

#include "kv_cuda_fixture.h"

namespace kvopt::test {

inline std::vector<double> turned_back(const std::vector<float>& q, int gap,
                                       const std::vector<float>& frequencies) {
  std::vector<double> out(q.begin(), q.end());
  const size_t half = frequencies.size();
  for (size_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(gap) * frequencies[i];
    const double sine = std::sin(static_cast<double>(angle)), cosine = std::cos(double{angle});
    out[i] = q[i] * cosine + q[i + half] * sine;
    out[i + half] = q[i + half] * cosine - q[i] * sine;
  }
  return out;
}

inline void check_attention(Random& random, int64_t most_tokens) {
  LayerShape shape = random_shape(random, most_tokens);
  shape.scores = true;
  Layer layer = empty_layer(random, shape);
  fill_layer(random, layer, random.below(2) == 0);
  for (auto& v : layer.scores) {
    if (!std::isfinite(v)) v = 3;
  }
  const KvStore& s = layer.s;
  const int64_t group = any(random, {1, 2, 3, 4, 7, 8, 8, 12});
  const int64_t segments = s.rows * s.heads;
  const Vectors queries = random_vectors(random, segments * group, s.dim, s.type, 1.5);
  const auto update = static_cast<KvUpdate>(random.below(4));
  const bool turns = random.below(3) == 0;
  std::vector<int32_t> gap;
  for (int64_t i = 0; i < s.rows; ++i) gap.push_back(static_cast<int32_t>(random.below(5000)));
  std::vector<float> frequencies;
  const int64_t rotary = 2 * (1 + random.below(s.dim / 2));
  for (int64_t i = 0; i < rotary / 2; ++i) {
    frequencies.push_back(static_cast<float>(std::pow(1e4, -2.0 * i / rotary)));
  }
  const std::string name = "attention " + name_of(shape) + " group " + std::to_string(group) +
                           " update " + std::to_string(static_cast<int>(update)) +
                           (turns ? " turned" : "");

  const DeviceLayer device(layer);
  const DeviceBuffer<uint8_t> query(bytes_of(queries, s.type));
  const DeviceBuffer<uint8_t> out(query.size());
  const DeviceBuffer<int32_t> device_gap(gap);
  const DeviceBuffer<float> device_frequencies(frequencies);
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.dim));
  const int first = turns ? 1 + static_cast<int>(random.below(20)) : 0;
  const KvAttentionParams p{.store = device.store(),
                            .query_group = group,
                            .query = query.get(),
                            .scale = scale,
                            .update = update,
                            .first = first,
                            .gap = turns ? device_gap.get() : nullptr,
                            .frequencies = turns ? device_frequencies.get() : nullptr,
                            .rotary = turns ? rotary : 0,
                            .out = out.get()};
  const DeviceBuffer<uint8_t> workspace(cuda::kv_attention_decode_workspace(p));
  workspace.poison(), out.poison();
  CHECK_CUDA(cuda::kv_attention_decode(p, workspace.get(), nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto got = out.host();
  const auto got_scores = device.scores();
  const DeviceLayer again(layer);
  KvAttentionParams q = p;
  q.store = again.store();
  workspace.poison(), out.poison();
  CHECK_CUDA(cuda::kv_attention_decode(q, workspace.get(), nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto second = again.scores();
  expect(out.host() == got, name + ": second run differs");
  expect(std::memcmp(second.data(), got_scores.data(), second.size() * sizeof(float)) == 0,
         name + ": scores of the second run differ");
  const bool narrow = s.type != KvType::kFloat32;
  const double unit = unit_roundoff(as_dtype(s.type));
  const double roundoff = narrow ? 3.01 * unit : 4e-6;
  double worst = 0, worst_score = 0;
  std::vector<float> want_scores = layer.scores;
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t head = 0; head < s.heads; ++head) {
      const int n = layer.filled(row, head);
      std::vector<double> total(n, 0.0), largest(n, 0.0);
      double score_slack = 0, factor = 1;
      for (const float f : layer.factors) {
        if (std::isfinite(f)) factor = std::max(factor, std::fabs(static_cast<double>(f)));
      }
      std::vector<std::vector<double>> keys(n), values(n), roundings(n);
      for (int i = 0; i < n; ++i) {
        keys[i] = read_slot(layer, row, head, i, false, &roundings[i]);
        values[i] = read_slot(layer, row, head, i, true);
      }
      for (int64_t g = 0; g < group; ++g) {
        const int64_t q_at = layer.segment(row, head) * group + g;
        const std::vector<double> straight(queries[q_at].begin(), queries[q_at].end());
        const auto turned = turns ? turned_back(queries[q_at], gap[row], frequencies) : straight;
        std::vector<double> weights(n);
        double most = -INFINITY, sum = 0, slack = 0, largest_logit = 0;
        for (int i = 0; i < n; ++i) {
          const bool early = turns && layer.positions[layer.at(row, head, i)] < first;
          const auto& q = early ? turned : straight;
          double logit = 0, rounding = 0, magnitude = 0, subnormal = 0;
          for (int64_t d = 0; d < s.dim; ++d) {
            logit += q[d] * keys[i][d];
            const double product = std::fabs(q[d]) * roundings[i][d];
            rounding += product;
            if (product < 0x1p-6 * factor) subnormal += std::min(product, 0x1p-17 * factor);
            magnitude += std::fabs(q[d] * keys[i][d]);
          }
          magnitude += 2 * rounding;  // |minimum| is at most |key| + |code scale|
          weights[i] = logit * scale;
          most = std::max(most, weights[i]);
          largest_logit = std::max(largest_logit, std::fabs(weights[i]));
          const double sums = 0x1p-22 * (4 + static_cast<double>(s.dim) / 16) * magnitude;
          const double operands =
              narrow ? 0x1.01p-11 * rounding + subnormal + (early ? unit * unit * magnitude : 0)
                     : 0;
          slack = std::max(slack, scale * (sums + operands));
        }
        slack += 0x1p-22 * (8 + 2 * largest_logit);
        for (auto& w : weights) sum += w = std::exp(w - most);
        for (int i = 0; i < n; ++i) {
          weights[i] /= sum;
          total[i] += weights[i];
          largest[i] = std::max(largest[i], weights[i]);
        }
        score_slack = std::max(score_slack, slack);
        for (int64_t d = 0; d < s.dim; ++d) {
          double want = 0, size = 0, values_size = 0;
          for (int i = 0; i < n; ++i) {
            want += weights[i] * values[i][d];
            size += weights[i] * std::fabs(values[i][d]);
            values_size += std::fabs(values[i][d]);
          }
          const double v = load(as_dtype(s.type), got.data(), q_at * s.dim + d);
          const double error =
              std::fabs(v - want) / ((roundoff + 2 * slack) * size + 0x1p-28 * values_size + 1e-7);
          worst = std::isnan(error) ? INFINITY : std::max(worst, error);
        }
      }
      for (int i = 0; i < n; ++i) {
        const int64_t at = layer.at(row, head, i);
        const double had = layer.scores[at];
        const double want = update == KvUpdate::kNone      ? had
                            : update == KvUpdate::kAdd     ? had + total[i]
                            : update == KvUpdate::kReplace ? total[i]
                                                           : std::max(had, largest[i]);
        const double slack = 1e-6 * std::fabs(had) + 2 * score_slack * total[i] + 1e-7;
        const double error = std::fabs(got_scores[at] - want) / slack;
        worst_score = std::isnan(error) ? INFINITY : std::max(worst_score, error);
        want_scores[at] = got_scores[at];
      }
    }
  }
  expect(worst <= 1, name + ": output off by " + std::to_string(worst) + " of what is allowed");
  expect(worst_score <= 1, name + ": scores off by " + std::to_string(worst_score));
  layer.scores = want_scores;
  device.expect_equal(layer, name + " left as it was");
}

}  // namespace kvopt::test
