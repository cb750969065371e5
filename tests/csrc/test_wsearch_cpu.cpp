// SPDX-License-Identifier: Apache-2.0
// Tests of csrc/cpu's searches and GPTQ block, without any framework: every instruction set gives
// the same bits, nothing is read or written outside the buffers, results are those of a plain
// double loop.
//
//     test_wsearch_cpu [--seed N]
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check_cpu.h"
#include "cpu/gptq.h"

namespace {

using namespace kvopt;
using namespace kvopt::test;

// `count` values in memory of exactly their size.
template <typename T>
struct Values {
  explicit Values(int64_t count) : buffer(count * static_cast<int64_t>(sizeof(T))) {}
  T* data() const { return reinterpret_cast<T*>(buffer.data); }
  T& operator[](int64_t i) const { return data()[i]; }
  Buffer buffer;
};

template <typename T>
bool same(const Values<T>& a, const Values<T>& b) {
  return std::memcmp(a.buffer.data, b.buffer.data, a.buffer.bytes) == 0;
}

QuantFormat random_format(Random& random, int64_t k) {
  constexpr int kBits[] = {2, 3, 4, 8};
  constexpr int64_t kGroups[] = {16, 32, 48, 128, 144, 0};
  int64_t group;
  do group = kGroups[below(random, 6)];
  while (group > k);
  const Scheme scheme = below(random, 2) ? Scheme::kSymmetric : Scheme::kAsymmetric;
  return {kBits[below(random, 4)], static_cast<int32_t>(group == 0 ? k : group), scheme};
}

std::vector<Isa> available() {
  std::vector<Isa> found;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= best_isa()) found.push_back(isa);
  }
  return found;
}

// The error of what the search chose, and of the range's ends, in double.
double choice_error(const QuantFormat& f, const float* w, const float* h, int64_t count,
                    double scale, double zero) {
  const double top = (1 << f.bits) - 1;
  double error = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double q = std::clamp(std::nearbyint(w[i] / scale) + zero, 0.0, top);
    const double d = scale * (q - zero) - w[i];
    error += (h == nullptr ? 1.0 : h[i]) * d * d;
  }
  return error;
}

void test_search(Random& random) {
  const int64_t n = 1 + below(random, 5), k = 1 + below(random, 300);
  const QuantFormat f = random_format(random, k);
  const SearchGrid grid = {static_cast<int32_t>(below(random, 30)), 0.3};
  const int64_t groups = group_count(f, k);
  const bool weighted = below(random, 2) != 0;
  Values<float> w(n * k), h(k);
  for (int64_t i = 0; i < n * k; ++i) w[i] = normal(random) * (below(random, 50) ? 1.0f : 20.0f);
  for (int64_t i = 0; i < k; ++i) h[i] = std::abs(normal(random));
  const float* importance = weighted ? h.data() : nullptr;
  const std::string name = name_of(f) + " k " + std::to_string(k);

  Values<uint8_t> codes(n * k);
  Values<uint16_t> scale(n * groups), zero(n * groups);
  wsearch<float>({n, k, f, grid, w.data(), importance, codes.data(), scale.data(), zero.data()},
                 candidate_errors<float>(Isa::kScalar), 0, n);
  for (Isa isa : available()) {
    Values<uint8_t> codes2(n * k);
    Values<uint16_t> scale2(n * groups), zero2(n * groups);
    const SearchParams<float> p = {
        n, k, f, grid, w.data(), importance, codes2.data(), scale2.data(), zero2.data()};
    for (int64_t row = 0; row < n; ++row) wsearch(p, candidate_errors<float>(isa), row, row + 1);
    check(same(codes, codes2) && same(scale, scale2) && same(zero, zero2),
          std::string("search on ") + isa_name(isa) + " " + name);
  }

  // No candidate is better, by more than what 300 terms in fp32 may be off: here the nearest zero
  // point, all steps. The scales are the kernel's, as one in 2000 is next to a tie between two
  // fp16.
  const double top = (1 << f.bits) - 1;
  bool best = true;
  for (int64_t i = 0; grid.steps > 0 && i < n * groups; ++i) {
    const int64_t begin = i % groups * f.group_size;
    const int64_t count = std::min<int64_t>(f.group_size, k - begin);
    const float* const values = w.data() + i / groups * k + begin;
    const float* const own = weighted ? importance + begin : nullptr;
    float low = 0, high = 0;
    for (int64_t c = 0; c < count; ++c) {
      low = std::min(low, values[c]);
      high = std::max(high, values[c]);
    }
    const float size = f.has_zeros() ? high - low : 2 * std::max(high, -low);
    const double got =
        choice_error(f, values, own, count, half_to_float(scale[i]), half_to_float(zero[i]));
    for (int step = 0; step <= grid.steps; ++step) {
      const float p = 1.0f - (1.0f - static_cast<float>(grid.smallest)) * static_cast<float>(step) /
                                 static_cast<float>(grid.steps);
      const uint16_t stored = float_to_half(p * (size / static_cast<float>(top)));
      const double s = std::max<double>(half_to_float(stored), 6e-8);
      const double z = f.has_zeros() ? std::clamp(std::nearbyint(-low * p / s), 0.0, top)
                                     : static_cast<double>(symmetric_zero(f));
      best = best && got <= choice_error(f, values, own, count, s, z) * (1 + 5e-5) + 1e-12;
    }
  }
  check(best, "search finds the best " + name);
}

void test_hqq(Random& random) {
  const int64_t n = 1 + below(random, 3), k = 1 + below(random, 200);
  QuantFormat f = random_format(random, k);
  f.scheme = Scheme::kAsymmetric;
  const int64_t groups = group_count(f, k);
  Values<float> w(n * k);
  for (int64_t i = 0; i < n * k; ++i) w[i] = normal(random);
  Values<uint8_t> codes(n * k);
  Values<uint16_t> scale(n * groups), zero(n * groups);
  wsearch_hqq({n, k, f, 20, 10.0f, 1.01f, 0.7f, w.data(), codes.data(), scale.data(), zero.data()},
              0, n);
  const double top = (1 << f.bits) - 1;
  bool right = true;
  for (int64_t i = 0; i < n * k; ++i) {
    const int64_t group = i / k * groups + i % k / f.group_size;
    const double position = w[i] / half_to_float(scale[group]) + half_to_float(zero[group]);
    right = right && std::abs(std::clamp(position, 0.0, top) - codes[i]) <= 0.5001;
  }
  check(right, "hqq " + name_of(f) + " k " + std::to_string(k));
}

template <typename T>
void test_block(Random& random) {
  const int64_t n = 1 + below(random, 3), k = 1 + below(random, 400);
  const QuantFormat f = random_format(random, k);
  const int64_t g = f.group_size;
  const int64_t begin = below(random, group_count(f, k)) * g;
  int64_t end = std::min(k, begin + kGptqBlock);
  if (g <= kGptqBlock && end < k) end = begin + kGptqBlock / g * g;
  const bool given = below(random, 3) == 0;
  const int64_t size = end - begin, groups = given ? 0 : gptq_groups(begin, end, g);
  Values<T> w(n * k), u(k * k), errors(n * size);
  for (int64_t i = 0; i < n * k; ++i) w[i] = static_cast<T>(normal(random));
  for (int64_t i = 0; i < k * k; ++i) {
    u[i] = i / k == i % k ? T(0.5) + std::abs(static_cast<T>(normal(random)))
                          : static_cast<T>(normal(random) * 0.05f);
  }
  Values<uint8_t> codes(n * size);
  Values<uint16_t> scale(n * groups), zero(n * groups), own_scale(n * size), own_zero(n * size);
  for (int64_t i = 0; i < n * size; ++i) {
    own_scale[i] = float_to_half(0.1f + std::abs(normal(random)));
    own_zero[i] = float_to_half(static_cast<float>(below(random, 1 << f.bits)));
  }
  const SearchGrid grid = {static_cast<int32_t>(below(random, 6)), 0.5};
  gptq_block<T>(
      {n, k, begin, end, f, grid, w.data(), u.data(), nullptr, given ? own_scale.data() : nullptr,
       given ? own_zero.data() : nullptr, codes.data(), errors.data(),
       given ? nullptr : scale.data(), given ? nullptr : zero.data()},
      candidate_errors<T>(selected_isa()), 0, n);

  // With the scales it chose, each column's code and error follow from the errors before it.
  bool right = true;
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t i = 0; i < size; ++i) {
      double value = static_cast<double>(w[row * k + begin + i]);
      for (int64_t j = 0; j < i; ++j) {
        value -= static_cast<double>(errors[row * size + j]) *
                 static_cast<double>(u[(begin + j) * k + begin + i]);
      }
      const double s =
          half_to_float(given ? own_scale[row * size + i] : scale[row * groups + i / g]);
      const double z = half_to_float(given ? own_zero[row * size + i] : zero[row * groups + i / g]);
      const double position =
          std::clamp(value / s + z, 0.0, static_cast<double>((1 << f.bits) - 1));
      const double error = (value - s * (codes[row * size + i] - z)) /
                           static_cast<double>(u[(begin + i) * k + begin + i]);
      right = right && std::abs(position - codes[row * size + i]) < 0.501 &&
              std::abs(error - static_cast<double>(errors[row * size + i])) < 1e-3 * (1 + s);
    }
  }
  check(right, "gptq block " + name_of(f) + " k " + std::to_string(k) + " columns " +
                   std::to_string(begin) + ".." + std::to_string(end));
}

}  // namespace

int main(int count, char** arguments) {
  uint64_t seed = std::random_device{}();
  if (count == 3 && std::string(arguments[1]) == "--seed") {
    seed = std::strtoull(arguments[2], nullptr, 10);
  } else if (count != 1) {
    std::fprintf(stderr, "test_wsearch_cpu [--seed N]\n");
    return 2;
  }
  std::printf("test_wsearch_cpu: seed %llu\n", static_cast<unsigned long long>(seed));
  Random random(seed);
  for (int i = 0; i < 200; ++i) {
    test_search(random);
    test_hqq(random);
    test_block<float>(random);
    test_block<double>(random);
  }
  std::printf("test_wsearch_cpu: %d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
