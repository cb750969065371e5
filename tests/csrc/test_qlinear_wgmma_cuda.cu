// SPDX-License-Identifier: Apache-2.0
// The product on warpgroup instructions against fp64, called directly: every scheme, group size,
// number of rows, tail of N and K, part of the epilogue; determinism, graph replay, special values.
// `--quick`: a few products, for compute-sanitizer. Needs a GPU with sm_90a code in this program.
#include <algorithm>
#include <iterator>

#include "cuda/device/qlinear_problem.cuh"
#include "qlinear_cuda_fixture.h"

namespace kvopt::test {
namespace {

int64_t pitch_of(int64_t k) { return ceil_div(k, 8) * 8; }

// Prepared rows, their scales, partial sums.
size_t scales_at(const QLinearParams& p) {
  return static_cast<size_t>(ceil_div(p.m * pitch_of(p.k) * 2, 256) * 256);
}
size_t partials_at(const QLinearParams& p) {
  return scales_at(p) + static_cast<size_t>(ceil_div(p.m * 4, 256) * 256);
}
size_t workspace_bytes(const QLinearParams& p) {
  cuda::Device device{};
  if (cuda::query_device(device) != 0) return 0;
  return partials_at(p) +
         static_cast<size_t>(cuda::wgmma_partial_bytes(cuda::make_problem(p), device));
}

int launch(const QLinearParams& params, cudaStream_t stream) {
  cuda::Device device{};
  if (const int error = cuda::query_device(device); error != 0) return error;
  const cuda::QLinearProblem p = cuda::make_problem(params);
  expect(cuda::wgmma_fits(p, device), "the kernel refuses a product");
  auto* const workspace = static_cast<uint8_t*>(params.workspace);
  cuda::HalfRows x{static_cast<const __half*>(params.x), params.k, nullptr};
  if (cuda::needs_prologue(p)) {
    auto* const half = static_cast<__half*>(params.workspace);
    x.x = half;
    x.pitch = pitch_of(params.k);
    auto* const scale = reinterpret_cast<float*>(workspace + scales_at(params));
    x.row_scale = scale;
    if (const int error = cuda::launch_prologue_half(p, half, x.pitch, scale, device, stream)) {
      return error;
    }
  }
  return cuda::launch_wgmma(p, x, workspace + partials_at(params), device, stream);
}

RunOptions options_of(const Product& product, int64_t m, bool graph = false) {
  RunOptions options;
  options.workspace = workspace_bytes(product.params(m));
  options.graph = graph;
  return options;
}

void check(Random& random, const Weight& w, DType dtype, const Parts& parts,
           const std::vector<int64_t>& ms) {
  const int64_t most = *std::max_element(ms.begin(), ms.end());
  const Product product(random, w, dtype, parts, most);
  const auto reference = product.reference(most);
  for (const int64_t m : ms) {
    const auto y = product.run(m, launch, options_of(product, m));
    product.compare(m, reference, y);
  }
}

constexpr QuantFormat kFormats[] = {
    {4, 128, Scheme::kAsymmetric}, {4, 64, Scheme::kSymmetric},  {8, 128, Scheme::kAsymmetric},
    {8, 64, Scheme::kSymmetric},   {2, 64, Scheme::kAsymmetric}, {2, 128, Scheme::kSymmetric},
    {3, 128, Scheme::kAsymmetric}, {3, 64, Scheme::kSymmetric},  {4, 64, Scheme::kNf4},
    {4, 128, Scheme::kFp4},
};

void check_groups(Random& random) {
  for (const QuantFormat base : kFormats) {
    for (const int64_t group : {16, 32, 48, 64, 96, 128, 192, 256, 320, 1024}) {
      const int64_t k = 16 * (20 + random.below(60)) + random.below(2) * 8 * random.below(2);
      QuantFormat f = base;
      f.group_size = static_cast<int32_t>(std::min(group, k));
      const Weight w = random_weight(random, 96 + random.below(120), k, f,
                                     random.below(2) ? Zeros::kInteger : Zeros::kFractional);
      check(random, w, random.below(2) ? DType::kFloat16 : DType::kBFloat16, {},
            {1 + random.below(16), 17 + random.below(100), 128 + random.below(200)});
    }
  }
}

void check_rows(Random& random, bool quick) {
  std::vector<int64_t> ms;
  for (int64_t m = 1; m <= 17; ++m) ms.push_back(m);
  for (const int64_t m : {31, 33, 64, 100, 128, 200, 256, 257, 300, 1000}) ms.push_back(m);
  if (quick) ms = {9, 16, 40, 130};
  for (const QuantFormat& f : kFormats) {
    if (quick && f.bits != 4) continue;
    const Weight w = random_weight(random, 277, 520, f);
    check(random, w, DType::kFloat16, {}, ms);
    const Weight per_row = random_weight(random, 264, 384, {f.bits, 384, f.scheme});
    check(random, per_row, DType::kBFloat16, {}, quick ? ms : std::vector<int64_t>{9, 64, 300});
  }
}

void check_tails(Random& random) {
  for (const QuantFormat& f : kFormats) {
    for (const int64_t k : {16, 32, 48, 64, 80, 136, 250, 264, 1000, 1048}) {
      for (const int64_t n : {1, 15, 130, 512}) {
        QuantFormat g = f;
        g.group_size = static_cast<int32_t>(std::min<int64_t>(g.group_size, k));
        const Weight w = random_weight(random, n, k, g);
        check(random, w, DType::kFloat16, {}, {9, 65, 270});
      }
    }
  }
}

// Large enough that K is split over clusters, that blocks take several tiles, or that they share
// tiles evenly.
void check_large(Random& random) {
  for (const QuantFormat& f : {kFormats[0], kFormats[3], kFormats[7], kFormats[8]}) {
    const Weight deep = random_weight(random, 304, 4096, f);
    check(random, deep, DType::kFloat16, {}, {9, 32, 64, 128, 256});
    const Weight wide = random_weight(random, 20000, 256, f);
    check(random, wide, DType::kBFloat16, {}, {12, 64, 200, 600});
  }
  const Weight even = random_weight(random, 2600, 8208, kFormats[0]);
  check(random, even, DType::kFloat16, {}, {24, 64, 100, 200});
}

void check_parts(Random& random, int count) {
  for (int i = 0; i < count; ++i) {
    const QuantFormat f = kFormats[random.below(std::size(kFormats))];
    const int64_t n = random.below(2) ? 16 * (1 + random.below(30)) : 1 + random.below(400);
    const Weight w = random_weight(random, n, 16 * (4 + random.below(60)), f);
    const Parts parts = random_parts(random, w);
    check(random, w, random.below(2) ? DType::kFloat16 : DType::kBFloat16, parts,
          {1 + random.below(20), 20 + random.below(300)});
  }
}

void check_repeatable(Random& random) {
  for (const int64_t m : {16, 100, 256}) {
    const bool even = m == 100;
    const Weight w = random_weight(random, even ? 2600 : 1000, even ? 8208 : 2048, kFormats[0]);
    const Product product(random, w, DType::kFloat16, {}, m);
    const auto first = product.run(m, launch, options_of(product, m));
    for (int i = 0; i < 5; ++i) {
      const auto again = product.run(m, launch, options_of(product, m, i % 2 == 1));
      expect(again == first, product.name(m) + ": results differ between runs");
    }
  }
}

void check_special_values(Random& random) {
  for (const QuantFormat& f : kFormats) {
    const Weight w = random_weight(random, 200, 600, f);
    for (const int64_t m : {9, 70, 300}) {
      Product product(random, w, random.below(2) ? DType::kFloat16 : DType::kBFloat16, {}, m);
      product.check_special_values(random, m, launch, options_of(product, m));
    }
  }
}

// Scales of 128 and more leave the range in which one multiplication makes a weight.
void check_wide_scales(Random& random) {
  for (const QuantFormat& f : kFormats) {
    Weight w = random_weight(random, 144, 384, f);
    for (auto& s : w.scale) {
      // The weight itself must stay within fp16.
      const double most = f.has_book() ? 60000 : 65000 / ((1 << f.bits) - 1);
      if (random.below(4) == 0) s = half_bits(static_cast<float>(most * random.uniform()));
    }
    pack_on_host(w);
    check(random, w, DType::kBFloat16, {}, {16, 129});
  }
}

}  // namespace
}  // namespace kvopt::test

int main(int argc, char** argv) {
  using namespace kvopt::test;
  const bool quick = argc > 1 && std::string(argv[1]) == "--quick";
  uint64_t seed = 20261121;
  if (const char* s = std::getenv("KVOPT_TEST_SEED")) seed = std::strtoull(s, nullptr, 10);
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  Random random(seed);
  check_rows(random, quick);
  check_parts(random, quick ? 4 : 120);
  if (!quick) {
    check_groups(random);
    check_tails(random);
    check_large(random);
    check_repeatable(random);
    check_special_values(random);
    check_wide_scales(random);
  }
  std::printf("%lld checks, %d failures\n", static_cast<long long>(checks), failures);
  return failures == 0 ? 0 : 1;
}
