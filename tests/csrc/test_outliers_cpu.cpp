// SPDX-License-Identifier: Apache-2.0
// Tests of csrc/cpu/outliers, without any framework: the columns found, what is left of the scale,
// and the product against a plain double loop; split at random places as threads would.
//
//     test_outliers_cpu [--seed N]
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "check_cpu.h"
#include "cpu/outliers.h"

namespace {

using namespace kvopt;
using namespace kvopt::test;

// Calls work(begin, end) for a random split of [0, count), in a random order.
template <typename Work>
void in_parts(Random& random, int64_t count, const Work& work) {
  const int64_t middle = below(random, count + 1);
  const bool first = below(random, 2) != 0;
  if (first) work(int64_t{0}, middle);
  work(middle, count);
  if (!first) work(int64_t{0}, middle);
}

void test_outliers(Random& random) {
  const int64_t m = 1 + below(random, 80), n = 1 + below(random, 100), k = 1 + below(random, 200);
  const DType dtype = kDTypes[below(random, 3)];
  const Weight w(random, {8, static_cast<int32_t>(k), Scheme::kInt8Dynamic}, n, k);
  const int64_t size = dtype_bytes(dtype);
  Buffer x(m * k * size), input_scale(k * size), inlier_scale(k * size), part(m * n * size);
  Buffer bitmap(bitmap_words(k) * 4), columns(k * 4);
  const bool scaled = below(random, 2) != 0;
  const double often = below(random, 4) == 0 ? 1.0 : 0.02;
  for (int64_t i = 0; i < m * k; ++i) {
    const bool large = static_cast<double>(below(random, 1000)) < 1000 * often;
    set_value(dtype, x.data, i, large ? 20.0f * normal(random) : 0.5f * normal(random));
  }
  for (int64_t i = 0; i < k; ++i) {
    set_value(dtype, input_scale.data, i, 0.5f + 0.01f * static_cast<float>(below(random, 100)));
  }

  OutlierParams p{};
  p.m = m;
  p.n = n;
  p.k = k;
  p.dtype = dtype;
  p.format = w.f;
  p.threshold = 6.0f;
  p.x = x.data;
  p.input_scale = scaled ? input_scale.data : nullptr;
  p.packed = w.packed.data;
  p.meta = w.meta.halves();
  p.inlier_scale = inlier_scale.data;
  p.columns = reinterpret_cast<int32_t*>(columns.data);
  p.bitmap = reinterpret_cast<uint32_t*>(bitmap.data);
  p.part = part.data;

  const auto scale_of = [&](int64_t column) {
    return scaled ? value_at(dtype, input_scale.data, column) : 1.0f;
  };
  std::vector<int32_t> expected;
  for (int64_t column = 0; column < k; ++column) {
    bool outside = false;
    for (int64_t row = 0; row < m; ++row) {
      const float v = value_at(dtype, x.data, row * k + column) * scale_of(column);
      outside |= std::fabs(v) >= p.threshold;
    }
    if (outside) expected.push_back(static_cast<int32_t>(column));
  }

  in_parts(random, bitmap_words(k), [&](int64_t a, int64_t b) { outliers_mark(p, a, b); });
  const int64_t count = outliers_collect(p);
  const std::string name = std::string(dtype_name(dtype)) + " m " + std::to_string(m) + " n " +
                           std::to_string(n) + " k " + std::to_string(k) + " outliers " +
                           std::to_string(expected.size());
  const bool found = count == static_cast<int64_t>(expected.size()) &&
                     std::equal(expected.begin(), expected.end(), p.columns);
  check(found, "columns: " + name);
  if (!found) return;

  outliers_scale(p);
  bool kept = true;
  for (int64_t column = 0; column < k; ++column) {
    const bool outside = std::binary_search(expected.begin(), expected.end(), column);
    kept &= value_at(dtype, inlier_scale.data, column) == (outside ? 0.0f : scale_of(column));
  }
  check(kept, "inlier scale: " + name);

  Buffer gathered(m * count * 4);
  auto* const values = reinterpret_cast<float*>(gathered.data);
  in_parts(random, m, [&](int64_t a, int64_t b) { outliers_gather(p, count, values, a, b); });
  in_parts(random, ceil_div(n, tile32::kRows),
           [&](int64_t a, int64_t b) { outliers_multiply(p, count, values, a, b); });
  const double unit = dtype == DType::kFloat32   ? 0x1p-24
                      : dtype == DType::kFloat16 ? 0x1p-11
                                                 : 0x1p-8;
  bool right = true;
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0, magnitude = 0;
      for (const int32_t column : expected) {
        const float v = value_at(dtype, x.data, row * k + column) * scale_of(column);
        const double product = v * w.dense[static_cast<size_t>(i * k + column)];
        sum += product;
        magnitude += std::fabs(product);
      }
      const double got = value_at(dtype, part.data, row * n + i);
      const double allowed = 1.01 * unit * std::fabs(sum) + 2e-6 * magnitude + 0x1p-25;
      right = right && std::fabs(got - sum) <= allowed;  // the last for subnormal fp16
    }
  }
  check(right, "product: " + name);
}

}  // namespace

int main(int count, char** arguments) {
  uint64_t seed = std::random_device{}();
  if (count == 3 && std::string(arguments[1]) == "--seed") {
    seed = std::strtoull(arguments[2], nullptr, 10);
  } else if (count != 1) {
    std::fprintf(stderr, "test_outliers_cpu [--seed N]\n");
    return 2;
  }
  std::printf("test_outliers_cpu: seed %llu\n", static_cast<unsigned long long>(seed));
  Random random(seed);
  for (int i = 0; i < 300; ++i) test_outliers(random);
  std::printf("test_outliers_cpu: %d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
