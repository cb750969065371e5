// SPDX-License-Identifier: Apache-2.0
// Quantised products through the dispatch, and weight packing, on CUDA against host arithmetic. No
// framework, no test library.
//
//   test_qlinear_cuda [--seed S]   checks; exit code 1 when one fails
//   test_qlinear_cuda --quick      few shapes, for a sanitizer
//   test_qlinear_cuda --bench      times, see bench_qlinear_cuda.h
//
// Cases are those of qlinear_cuda_fixture.h, references and tolerances those of
// qlinear_cuda_reference.h. Every format meets every type of activation, with optional parts drawn
// at random, once as `qlinear` chooses and once on the tiled mma.sync product, which on sm_90 is
// the rare path.
#include <cuda_runtime.h>

#include <chrono>
#include <random>
#include <string>

#include "bench_qlinear_cuda.h"
#include "check_cuda.h"
#include "common/code_book.h"
#include "common/params.h"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/qlinear.h"
#include "cuda/qlinear_plan.h"
#include "cuda/wquant.h"
#include "qlinear_cuda_fixture.h"

namespace kvopt::test {
namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

struct Kind {
  int32_t bits;
  Scheme scheme;
  Zeros zeros;
};
constexpr Kind kKinds[] = {
    {2, Scheme::kAsymmetric, Zeros::kInteger},    {2, Scheme::kAsymmetric, Zeros::kFractional},
    {2, Scheme::kSymmetric, Zeros::kInteger},     {3, Scheme::kAsymmetric, Zeros::kInteger},
    {3, Scheme::kAsymmetric, Zeros::kFractional}, {3, Scheme::kSymmetric, Zeros::kInteger},
    {4, Scheme::kAsymmetric, Zeros::kInteger},    {4, Scheme::kAsymmetric, Zeros::kFractional},
    {4, Scheme::kSymmetric, Zeros::kInteger},     {8, Scheme::kAsymmetric, Zeros::kInteger},
    {8, Scheme::kAsymmetric, Zeros::kFractional}, {8, Scheme::kSymmetric, Zeros::kInteger},
    {4, Scheme::kNf4, Zeros::kInteger},           {4, Scheme::kFp4, Zeros::kInteger},
    {8, Scheme::kInt8Dynamic, Zeros::kInteger}};

int by_dispatch(const QLinearParams& p, cudaStream_t stream) { return cuda::qlinear(p, stream); }

// The mma.sync product whatever the dispatch says, its prologue rows at the start of the workspace.
size_t gemm_workspace(int64_t m, int64_t k) {
  return static_cast<size_t>(m * (ceil_div(k, 8) * 16 + 4));
}
// multiprocessors: what the choice of a tile is made for; every tile is right on every GPU.
int by_gemm(const QLinearParams& p, int multiprocessors, cudaStream_t stream) {
  cuda::Device device{};
  if (const int error = cuda::query_device(device); error != cudaSuccess) return error;
  device.multiprocessors = multiprocessors;
  const cuda::QLinearProblem q = cuda::make_problem(p);
  cuda::HalfRows x{static_cast<const __half*>(p.x), p.k, nullptr};
  if (cuda::needs_prologue(q)) {
    const int64_t pitch = ceil_div(p.k, 8) * 8;
    auto* const rows = static_cast<__half*>(p.workspace);
    auto* const scales = reinterpret_cast<float*>(rows + p.m * pitch);
    const int error = cuda::launch_prologue_half(q, rows, pitch, scales, device, stream);
    if (error != cudaSuccess) return error;
    x = {rows, pitch, scales};
  }
  return cuda::launch_gemm(q, x, device, stream);
}

// The matrix-vector product takes codes as they are.
Tolerance tolerance_of(const QLinearParams& p) {
  cuda::Device device{};
  CHECK_CUDA(cuda::query_device(device));
  return {cuda::plan_qlinear(p, device).fused != cuda::QLinearPath::kGemv, 0};
}

void check_products(Random& random, const Weight& w, DType dtype, const std::vector<int64_t>& ms) {
  const Parts parts = random_parts(random, w);
  const int64_t max_m = ms.back();
  const Product product(random, w, dtype, parts, max_m);
  const std::vector<Reference> reference = product.reference(max_m);
  const bool tiled = dtype != DType::kFloat32 && w.format.scheme != Scheme::kInt8Dynamic;
  for (const int64_t m : ms) {
    RunOptions options;
    options.misaligned = random.below(4) == 0;
    options.workspace = static_cast<size_t>(cuda::qlinear_workspace_bytes(product.params(m)));
    // Where x starts decides whether it is copied first: room for that.
    if (options.misaligned) options.workspace += gemm_workspace(m, w.k) + 1024;
    const auto y = product.run(m, by_dispatch, options);
    product.compare(m, reference, y, tolerance_of(product.params(m)));
    if (m > 0 && random.below(4) == 0) {
      expect(product.run(m, by_dispatch, options) == y, product.name(m) + ": second run differs");
      options.graph = true;
      expect(product.run(m, by_dispatch, options) == y, product.name(m) + ": graph differs");
      options.graph = false;
    }
    if (m > 0 && tiled && random.below(2) == 0) {
      options.workspace = gemm_workspace(m, w.k);
      const int multiprocessors = 1 << random.below(10);
      const Launch tiles = [=](const QLinearParams& p, cudaStream_t stream) {
        return by_gemm(p, multiprocessors, stream);
      };
      const auto tiled_y = product.run(m, tiles, options);
      product.compare(m, reference, tiled_y);
      expect(product.run(m, tiles, options) == tiled_y,
             product.name(m) + ": second run of the tiles differs");
    }
  }
}

// Scales far beyond what weights have, and their neighbours as usual: fp16 (scale * 512) overflows.
// Weights stay below 60000: beyond 65504 there is no fp16 weight to round to.
void check_wide_scales(Random& random, const Kind& kind) {
  const int32_t group = kind.scheme == Scheme::kInt8Dynamic ? 320 : 64;
  Weight w = random_weight(random, 80, 320, {kind.bits, group, kind.scheme}, kind.zeros);
  for (auto& s : w.scale) {
    const float most =
        w.format.has_book() ? 60000.0f : 60000.0f / static_cast<float>(1 << kind.bits);
    if (random.below(8) == 0) {
      s = half_bits(most * static_cast<float>(0.5 + 0.5 * random.uniform()));
    }
  }
  pack_on_host(w);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    check_products(random, w, dtype, {1, 5, 16, 70});
  }
}

void check_special_values(Random& random, const Weight& w, DType dtype, int64_t m) {
  Parts parts;
  parts.bias = random.below(2) == 0;
  parts.activation_bits = w.format.scheme == Scheme::kInt8Dynamic || random.below(4) == 0 ? 8 : 16;
  Product product(random, w, dtype, parts, m);
  RunOptions options;
  options.workspace = static_cast<size_t>(cuda::qlinear_workspace_bytes(product.params(m)));
  product.check_special_values(random, m, by_dispatch, options);
}

// Packing and a chain of products, each fed by the one before, with nothing but stream order
// between them: launches may overlap (programmatic dependent launch), their results may not.
void check_chain(Random& random, const QuantFormat& format, DType dtype, int64_t m) {
  constexpr int64_t kSize = 1536;
  constexpr int kSteps = 6;
  Weight w = random_weight(random, kSize, kSize, format);
  // Products of about the size of x, so that nothing overflows or vanishes on the way.
  const double size = w.format.has_book() ? 0.04 : 0.06 / (1 << format.bits);
  for (auto& s : w.scale) s = half_bits(static_cast<float>((1 + random.uniform()) * size));
  const size_t bytes = m * kSize * dtype_bytes(dtype);
  std::vector<uint8_t> start(bytes);
  for (int64_t i = 0; i < m * kSize; ++i) {
    store(dtype, start.data(), i, static_cast<float>(random.normal()));
  }
  QLinearParams p{};
  p.m = m;
  p.n = p.k = kSize;
  p.dtype = dtype;
  p.format = w.format;
  p.activation_bits = format.scheme == Scheme::kInt8Dynamic ? 8 : 16;
  const DeviceBuffer<uint8_t> workspace(
      static_cast<size_t>(std::max<int64_t>(cuda::qlinear_workspace_bytes(p), 0)));
  p.workspace = workspace.get();
  const DeviceBuffer<uint8_t> codes(w.codes), packed(w.packed.size());
  const DeviceBuffer<uint16_t> scale(w.scale), zero(w.zero), meta(w.meta.size());
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto run = [&](bool step_by_step) {
    const DeviceBuffer<uint8_t> even(start), odd(bytes);
    odd.poison();
    packed.poison();
    meta.poison();
    CHECK_CUDA(cudaDeviceSynchronize());
    const PackParams pack{kSize,       kSize,      w.format,     codes.get(),
                          scale.get(), zero.get(), packed.get(), meta.get()};
    CHECK_CUDA(cuda::wquant_pack(pack, stream));
    for (int step = 0; step < kSteps; ++step) {
      if (step_by_step) CHECK_CUDA(cudaStreamSynchronize(stream));
      p.x = step % 2 == 0 ? even.get() : odd.get();
      p.y = step % 2 == 0 ? odd.get() : even.get();
      p.packed = packed.get();
      p.meta = meta.get();
      CHECK_CUDA(cuda::qlinear(p, stream));
    }
    CHECK_CUDA(cudaStreamSynchronize(stream));
    return even.host();
  };
  const auto expected = run(true);
  bool same = true;
  for (int i = 0; i < 10; ++i) same = same && run(false) == expected;
  bool finite = true, alive = false;
  for (int64_t i = 0; i < m * kSize; ++i) {
    const float v = load(dtype, expected.data(), i);
    finite = finite && std::isfinite(v);
    alive = alive || std::fabs(v) > 1e-3f;
  }
  const std::string name =
      "chain " + name_of(format) + " " + name_of(dtype) + " M" + std::to_string(m);
  expect(same, name);
  expect(finite && alive, name + ": overflowed or vanished");
  CHECK_CUDA(cudaStreamDestroy(stream));
}

void check_packing(const Weight& w) {
  const int64_t groups = group_count(w.format, w.k);
  const DeviceBuffer<uint8_t> codes(w.codes), packed(w.packed.size()), codes_back(w.codes.size());
  const DeviceBuffer<uint16_t> scale(w.scale), zero(w.zero), meta(w.meta.size());
  const DeviceBuffer<uint16_t> scale_back(w.scale.size()), zero_back(w.zero.size());
  packed.poison();
  meta.poison();
  codes_back.poison();
  scale_back.poison();
  zero_back.poison();
  PackParams p{w.n, w.k, w.format, codes.get(), scale.get(), zero.get(), packed.get(), meta.get()};
  CHECK_CUDA(cuda::wquant_pack(p, nullptr));
  expect(packed.host() == w.packed, w.name() + ": packed codes");
  expect(meta.host() == w.meta, w.name() + ": packed scales and zeros");
  p.codes = codes_back.get();
  p.scale = scale_back.get();
  p.zero = zero_back.get();
  CHECK_CUDA(cuda::wquant_unpack(p, nullptr));
  expect(codes_back.host() == w.codes, w.name() + ": unpacked codes");
  expect(scale_back.host() == w.scale, w.name() + ": unpacked scales");
  expect(zero_back.host() == w.zero, w.name() + ": unpacked zeros");
  for (const DType dtype : kDTypes) {
    const DeviceBuffer<uint8_t> dense(w.n * w.k * dtype_bytes(dtype));
    dense.poison();
    const DequantizeParams d{w.n, w.k, dtype, w.format, packed.get(), meta.get(), dense.get()};
    CHECK_CUDA(cuda::wquant_dequantize(d, nullptr));
    std::vector<uint8_t> expected(dense.size());
    for (int64_t i = 0; i < w.n * w.k; ++i) {
      const int64_t at = i / w.k * groups + i % w.k / w.format.group_size;
      volatile float level = w.format.has_book()
                                 ? book_value(w.format.scheme, w.codes[i])
                                 : static_cast<float>(w.codes[i]) - half_value(w.zero[at]);
      store(dtype, expected.data(), i, half_value(w.scale[at]) * level);
    }
    expect(dense.host() == expected, w.name() + " " + name_of(dtype) + ": dequantised");
  }
}

struct Plain {
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scale, zero;
};

// The rule of common/params.h, line by line.
Plain rtn_on_host(const std::vector<uint8_t>& weight, int64_t n, int64_t k, const QuantFormat& f,
                  DType dtype) {
  const int64_t groups = group_count(f, k);
  Plain out;
  out.codes.resize(n * k);
  out.scale.resize(n * groups);
  out.zero.resize(n * groups);
  const float q_max = static_cast<float>((1 << f.bits) - 1);
  for (int64_t i = 0; i < n * groups; ++i) {
    const int64_t row = i / groups, begin = i % groups * f.group_size;
    const int64_t end = std::min<int64_t>(begin + f.group_size, k);
    float lo = 0, hi = 0;
    for (int64_t c = begin; c < end; ++c) {
      lo = std::fmin(lo, load(dtype, weight.data(), row * k + c));
      hi = std::fmax(hi, load(dtype, weight.data(), row * k + c));
    }
    const float largest = std::fmax(-lo, hi);
    float scale = (hi - lo) / q_max;
    if (f.has_book()) {
      scale = largest;
    } else if (!f.has_zeros()) {
      scale = f.bits == 8 ? largest / 127.0f : 2.0f * largest / q_max;
    }
    scale = std::fmax(half_value(half_bits(scale)), 0x1p-24f);
    out.scale[i] = half_bits(scale);
    float zero = implied_zero(f);
    if (f.has_zeros()) zero = std::fmin(std::fmax(std::rint((0.0f - lo) / scale), 0.0f), q_max);
    out.zero[i] = half_bits(zero);
    volatile float reciprocal = 1.0f / std::fmax(largest, 1e-38f);
    for (int64_t c = begin; c < end; ++c) {
      const float w = load(dtype, weight.data(), row * k + c);
      if (f.has_book()) {
        volatile float scaled = w * reciprocal;
        out.codes[row * k + c] = static_cast<uint8_t>(choose_code(f.scheme, scaled));
      } else {
        const float v = std::rint(w / scale) + zero;
        out.codes[row * k + c] = static_cast<uint8_t>(std::fmin(std::fmax(v, 0.0f), q_max));
      }
    }
  }
  return out;
}

void check_rtn(Random& random, int64_t n, int64_t k, const QuantFormat& format, DType dtype) {
  std::vector<uint8_t> weight(n * k * dtype_bytes(dtype));
  for (int64_t row = 0; row < n; ++row) {
    const int64_t kind = random.below(8);  // ordinary rows, one-sided rows, zeros, subnormal rows
    const double size = kind == 3 ? 1e-7 : std::exp2(static_cast<double>(random.below(8)) - 6);
    for (int64_t c = 0; c < k; ++c) {
      double v = random.normal() * size;
      if (kind == 1) v = std::fabs(v);
      if (kind == 2) v = 0;
      store(dtype, weight.data(), row * k + c, static_cast<float>(v));
    }
  }
  const Plain expected = rtn_on_host(weight, n, k, format, dtype);
  const DeviceBuffer<uint8_t> input(weight), codes(expected.codes.size());
  const DeviceBuffer<uint16_t> scale(expected.scale.size()), zero(expected.zero.size());
  codes.poison();
  scale.poison();
  zero.poison();
  const RtnParams p{n, k, dtype, format, input.get(), codes.get(), scale.get(), zero.get()};
  CHECK_CUDA(cuda::wquant_rtn(p, nullptr));
  const std::string name = "rtn " + name_of(format) + " " + name_of(dtype) + " N" +
                           std::to_string(n) + " K" + std::to_string(k);
  expect(scale.host() == expected.scale, name + ": scales");
  expect(zero.host() == expected.zero, name + ": zeros");
  expect(codes.host() == expected.codes, name + ": codes");
}

// Every answer names a path and fits; chips that are not here can be asked about.
void check_explain() {
  for (const int capability : {0, 75, 80, 86, 89, 90}) {
    for (const Kind& kind : kKinds) {
      for (const DType dtype : kDTypes) {
        for (const int64_t m : {1, 7, 16, 64, 300, 5000}) {
          QLinearParams p{};
          p.m = m;
          p.n = p.k = 4096;
          p.dtype = dtype;
          p.format = {kind.bits, kind.scheme == Scheme::kInt8Dynamic ? 4096 : 128, kind.scheme};
          p.activation_bits = kind.scheme == Scheme::kInt8Dynamic ? 8 : 16;
          char text[2048];
          const int error = cuda::qlinear_explain(p, capability, 40, text, sizeof(text));
          const std::string answer = text;
          expect(error == 0 && answer.find("Floor by the datasheet") != std::string::npos &&
                     answer.back() == '.',
                 "explain: " + answer);
        }
      }
    }
  }
  char text[8];
  QLinearParams p{};
  p.m = p.n = p.k = 64;
  p.format = {4, 64, Scheme::kAsymmetric};
  p.activation_bits = 16;
  cuda::qlinear_explain(p, 75, 40, text, sizeof(text));
  expect(std::string(text).size() == 7, "explain: cut short");
}

int64_t pick(Random& random, const std::vector<int64_t>& from) {
  return from[random.below(static_cast<int64_t>(from.size()))];
}

void check_kind(Random& random, const Kind& kind, bool quick) {
  struct Size {
    int64_t n, k;
  };
  const std::vector<Size> sizes =
      quick ? std::vector<Size>{{17, 65}, {48, 704}, {130, 333}}
            : std::vector<Size>{{1, 1},     {1, 16},    {15, 17},   {16, 64},
                                {17, 65},   {33, 100},  {48, 704},  {130, 333},
                                {257, 192}, {72, 1032}, {520, 456}, {208, 264}};
  const size_t only = static_cast<size_t>(random.below(static_cast<int64_t>(sizes.size())));
  for (const Size& size : sizes) {
    if (quick && &size != &sizes[only]) continue;
    const int64_t group =
        kind.scheme == Scheme::kInt8Dynamic ? size.k : pick(random, {16, 32, 48, 64, 128, size.k});
    if (group == size.k && size.k < 16 && kind.scheme != Scheme::kInt8Dynamic && size.k != 1)
      continue;
    const QuantFormat format{kind.bits, static_cast<int32_t>(group), kind.scheme};
    const Weight w = random_weight(random, size.n, size.k, format, kind.zeros);
    check_packing(w);
    for (const DType dtype : kDTypes) {
      if (kind.zeros == Zeros::kInteger) check_rtn(random, size.n, size.k, format, dtype);
      std::vector<int64_t> ms = {0, 1 + random.below(8), 1 + random.below(17),
                                 18 + random.below(60)};
      if (!quick) ms.push_back(80 + random.below(200));
      check_products(random, w, dtype, ms);
      check_special_values(random, w, dtype, 1 + random.below(8));
      check_special_values(random, w, dtype, 9 + random.below(80));
    }
  }
  if (quick) return;
  check_wide_scales(random, kind);
  // M from 1 to 17, one weight.
  std::vector<int64_t> all;
  for (int64_t m = 1; m <= 17; ++m) all.push_back(m);
  const int64_t group = kind.scheme == Scheme::kInt8Dynamic ? 528 : 64;
  const Weight w = random_weight(random, 272, 528,
                                 {kind.bits, static_cast<int32_t>(group), kind.scheme}, kind.zeros);
  for (const DType dtype : kDTypes) check_products(random, w, dtype, all);
  // Enough rows of w and of x that every tile shape gets its turn, or enough columns that x
  // outgrows shared memory.
  const Size large =
      std::vector<Size>{{2050, 200}, {4112, 136}, {16390, 72}, {48, 20000}}[random.below(4)];
  const int64_t large_group =
      kind.scheme == Scheme::kInt8Dynamic ? large.k : pick(random, {16, 64, large.k});
  const Weight big =
      random_weight(random, large.n, large.k,
                    {kind.bits, static_cast<int32_t>(large_group), kind.scheme}, kind.zeros);
  for (const DType dtype : kDTypes) check_products(random, big, dtype, {1, 7, 16, 32, 64, 256});
}

void check_all(uint64_t seed, bool quick) {
  Random random(seed);
  check_explain();
  for (const Kind& kind : kKinds) check_kind(random, kind, quick);
  if (quick) return;
  for (const Kind& kind : kKinds) {
    if (kind.zeros == Zeros::kFractional) continue;
    const int32_t group = kind.scheme == Scheme::kInt8Dynamic ? 1536 : 128;
    for (const DType dtype : kDTypes) {
      for (const int64_t m : {1, 3, 16, 50}) {
        check_chain(random, {kind.bits, group, kind.scheme}, dtype, m);
      }
    }
  }
}

}  // namespace
}  // namespace kvopt::test

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  uint64_t seed = std::random_device{}();
  bool quick = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--seed" && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (argument == "--quick") {
      quick = true;
    } else if (argument == "--bench") {
      return kvopt::test::bench();
    } else {
      std::fprintf(stderr, "usage: %s [--seed S] [--quick] [--bench]\n", argv[0]);
      return 2;
    }
  }
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  const auto begin = std::chrono::steady_clock::now();
  kvopt::test::check_all(seed, quick);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  std::printf("%lld checks, %d failures, %.1f s\n", static_cast<long long>(kvopt::test::checks),
              kvopt::test::failures, seconds.count());
  return kvopt::test::failures == 0 ? 0 : 1;
}
