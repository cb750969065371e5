// SPDX-License-Identifier: Apache-2.0
// The prologue and the int8 x int8 product on CUDA.
//
//   test_qlinear_w8a8_cuda [--seed S]   checks; exit code 1 when one fails
//   test_qlinear_w8a8_cuda --quick      few shapes, for a sanitizer
//
// Four kinds of check:
//   prologue   every element and row scale against the same fp32 arithmetic on the host: equal,
//              but for quotients within 1e-4 of a tie
//   sums       random int8 x and w, scales 1, y in fp32: equal to the exact integer sums, rounded
//              once
//   chains     weights packed and multiplied again and again in one graph: the same bits as one
//              after the other
//   products   prologue and product together against fp64 (qlinear_cuda_fixture.h), with every part
//              of the epilogue, odd alignment, second runs, graphs, special values
#include <cuda_runtime.h>

#include <chrono>
#include <string>

#include "check_cuda.h"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/wquant.h"
#include "qlinear_cuda_fixture.h"

namespace kvopt::test {
namespace {

using cuda::Device;
using cuda::QLinearProblem;

enum class Path { kMatrix, kStream };

size_t workspace_bytes(int64_t m, int64_t k) {
  return static_cast<size_t>(ceil_div(m * mma16::row_pitch(k), 256) * 256 + m * 4);
}

// What the dispatch does with a W8A8 product.
int run_w8a8(const QLinearParams& params, Path path, cudaStream_t stream) {
  if (params.m == 0) return cudaSuccess;
  Device device{};
  if (const int error = cuda::query_device(device); error != cudaSuccess) return error;
  const QLinearProblem p = cuda::make_problem(params);
  if (path == Path::kStream) return cuda::launch_w8a8_gemv(p, device, stream);
  const int64_t pitch = mma16::row_pitch(p.k);
  auto* rows = static_cast<int8_t*>(params.workspace);
  auto* scale = reinterpret_cast<float*>(rows + ceil_div(p.m * pitch, 256) * 256);
  const int error = cuda::launch_prologue_int8(p, rows, pitch, scale, device, stream);
  if (error != cudaSuccess) return error;
  return cuda::launch_w8a8(p, {rows, pitch, scale}, device, stream);
}

Launch launch_of(Path path) {
  return [path](const QLinearParams& p, cudaStream_t s) { return run_w8a8(p, path, s); };
}

bool streams(const Product& product, int64_t m) {
  Device device{};
  CHECK_CUDA(cuda::query_device(device));
  QLinearParams params = product.params(m);
  return m > 0 && cuda::w8a8_gemv_fits(cuda::make_problem(params), device);
}

// --- prologue -----------------------------------------------------------------------------------

struct Rows {
  std::vector<float> value;  // x * input_scale, in fp32
  std::vector<uint8_t> x, scale;
};

Rows random_rows(Random& random, DType dtype, int64_t m, int64_t k, bool scaled) {
  Rows r;
  const size_t bytes = dtype_bytes(dtype);
  r.value.resize(m * k);
  r.x.resize(m * k * bytes);
  if (scaled) r.scale.resize(k * bytes);
  for (int64_t c = 0; scaled && c < k; ++c) {
    store(dtype, r.scale.data(), c, static_cast<float>(0.01 + random.uniform()));
  }
  const int64_t range = dtype == DType::kFloat16 ? 6 : 100;
  for (int64_t row = 0; row < m; ++row) {
    // Sizes from one end of the type to the other, a row of zeros, rows with infinity and NaN.
    const double size = row % 7 == 3 ? 0
                                     : std::exp2(static_cast<double>(random.below(2 * range + 1)) -
                                                 static_cast<double>(range));
    const int64_t special = random.below(k);
    for (int64_t c = 0; c < k; ++c) {
      float v = static_cast<float>(random.normal() * size);
      if (row % 7 == 5 && c == special) v = random.below(2) ? INFINITY : -INFINITY;
      if (row % 7 == 6 && c == special) v = NAN;
      store(dtype, r.x.data(), row * k + c, v);
      v = load(dtype, r.x.data(), row * k + c);
      r.value[row * k + c] = scaled ? v * load(dtype, r.scale.data(), c) : v;
    }
  }
  return r;
}

bool near_tie(float v, float scale) {
  const double level = static_cast<double>(v) / scale;
  return std::fabs(level - std::floor(level) - 0.5) < 1e-4;
}

QLinearProblem prologue_problem(DType dtype, int64_t m, int64_t k, const QuantFormat& format,
                                int32_t bits, const void* x, const void* scale) {
  QLinearParams p{};
  p.m = m;
  p.n = 16;
  p.k = k;
  p.dtype = dtype;
  p.format = format;
  p.x = x;
  p.input_scale = scale;
  p.activation_bits = bits;
  return cuda::make_problem(p);
}

void check_prologue_int8(Random& random, DType dtype, int64_t m, int64_t k, bool scaled,
                         bool misaligned) {
  const std::string name = std::string("prologue int8 ") + name_of(dtype) + " M" +
                           std::to_string(m) + " K" + std::to_string(k) +
                           (scaled ? " scaled" : "") + (misaligned ? " misaligned" : "");
  Device device{};
  CHECK_CUDA(cuda::query_device(device));
  const Rows r = random_rows(random, dtype, m, k, scaled);
  std::vector<uint8_t> shifted(misaligned ? dtype_bytes(dtype) : 0);
  shifted.insert(shifted.end(), r.x.begin(), r.x.end());
  const DeviceBuffer<uint8_t> x(shifted), input_scale(r.scale);
  const QLinearProblem p = prologue_problem(
      dtype, m, k, {8, static_cast<int32_t>(k), Scheme::kInt8Dynamic}, 8,
      x.get() + (misaligned ? dtype_bytes(dtype) : 0), scaled ? input_scale.get() : nullptr);
  const int64_t pitch = mma16::row_pitch(k) + 16 * random.below(2);
  const DeviceBuffer<int8_t> out(m * pitch + 256);
  const DeviceBuffer<float> row_scale(m + 1);
  out.poison();
  row_scale.poison();
  CHECK_CUDA(cuda::launch_prologue_int8(p, out.get(), pitch, row_scale.get(), device, nullptr));
  const auto got = out.host();
  const auto scales = row_scale.host();
  bool values = true, scales_right = true, padding = true;
  for (int64_t row = 0; row < m; ++row) {
    float largest = 0;
    bool finite = true;
    for (int64_t c = 0; c < k; ++c) {
      finite = finite && std::isfinite(r.value[row * k + c]);
      largest = std::fmax(largest, std::fabs(r.value[row * k + c]));
    }
    const float s = largest / 127.0f;
    scales_right = scales_right && (finite ? scales[row] == s : std::isnan(scales[row]));
    for (int64_t c = 0; c < pitch; ++c) {
      const int q = got[row * pitch + c];
      if (c >= k) {
        padding = padding && q == 0;
      } else if (finite) {
        const float v = r.value[row * k + c];
        const int expected = s > 0 ? static_cast<int>(std::nearbyint(v / s)) : 0;
        values = values && (q == expected || (near_tie(v, s) && std::abs(q - expected) == 1)) &&
                 std::abs(q) <= 127;
      }
    }
  }
  for (int i = 0; i < 256; ++i) padding = padding && got[m * pitch + i] == -1;
  expect(values, name + ": values");
  expect(scales_right, name + ": scales");
  expect(padding, name + ": padding");
}

void check_prologue_half(Random& random, DType dtype, int64_t m, int64_t k, int32_t group,
                         int32_t bits, bool scaled, bool misaligned) {
  const std::string name = std::string("prologue half ") + name_of(dtype) + " M" +
                           std::to_string(m) + " K" + std::to_string(k) + " g" +
                           std::to_string(group) + " a" + std::to_string(bits) +
                           (scaled ? " scaled" : "") + (misaligned ? " misaligned" : "");
  Device device{};
  CHECK_CUDA(cuda::query_device(device));
  const Rows r = random_rows(random, dtype, m, k, scaled);
  std::vector<uint8_t> shifted(misaligned ? dtype_bytes(dtype) : 0);
  shifted.insert(shifted.end(), r.x.begin(), r.x.end());
  const DeviceBuffer<uint8_t> x(shifted), input_scale(r.scale);
  const QLinearProblem p = prologue_problem(dtype, m, k, {4, group, Scheme::kAsymmetric}, bits,
                                            x.get() + (misaligned ? dtype_bytes(dtype) : 0),
                                            scaled ? input_scale.get() : nullptr);
  const int64_t pitch = ceil_div(k, 8) * 8 + 8 * random.below(9);
  const DeviceBuffer<uint16_t> out(m * pitch + 128);
  const DeviceBuffer<float> row_scale(m + 1);
  out.poison();
  row_scale.poison();
  CHECK_CUDA(cuda::launch_prologue_half(p, reinterpret_cast<__half*>(out.get()), pitch,
                                        row_scale.get(), device, nullptr));
  const auto got = out.host();
  const auto scales = row_scale.host();
  bool values = true, range = true, padding = true;
  for (int64_t row = 0; row < m; ++row) {
    const float scale = scales[row];
    int exponent = 0;
    float largest = 0;
    for (int64_t c = 0; c < k; ++c) {
      const float v = r.value[row * k + c];
      if (std::isfinite(v)) largest = std::fmax(largest, std::fabs(v));
    }
    // A power of two that leaves the largest finite magnitude inside fp16's normal range.
    range = range && std::frexp(scale, &exponent) == 0.5f &&
            (largest == 0 || (largest / scale < 32768.0f &&
                              (largest / scale >= 16384.0f || scale == 0x1p-126f || scale == 1)));
    for (int64_t begin = 0; begin < k; begin += group) {
      const int64_t end = std::min<int64_t>(begin + group, k);
      float group_largest = 0;
      for (int64_t c = begin; c < end; ++c) {
        const float v = r.value[row * k + c];
        if (std::isfinite(v)) group_largest = std::fmax(group_largest, std::fabs(v));
      }
      const float s = group_largest / 127.0f;
      for (int64_t c = begin; c < end; ++c) {
        const float v = r.value[row * k + c], h = half_value(got[row * pitch + c]);
        const auto expected = [&](double level) {
          const float q = bits == 8 && std::isfinite(v) ? static_cast<float>(level) * s : v;
          return half_value(half_bits(q * (1.0f / scale)));
        };
        const double level = s > 0 ? static_cast<double>(v / s) : 0;
        const bool equal = h == expected(std::nearbyint(level)) || (std::isnan(v) && std::isnan(h));
        const bool tied = bits == 8 && s > 0 && near_tie(v, s) &&
                          (h == expected(std::floor(level)) || h == expected(std::ceil(level)));
        values = values && (equal || tied);
      }
    }
    for (int64_t c = k; c < pitch; ++c) padding = padding && got[row * pitch + c] == 0;
  }
  for (int i = 0; i < 128; ++i) padding = padding && got[m * pitch + i] == 0xFFFF;
  expect(values, name + ": values");
  expect(range, name + ": row scales");
  expect(padding, name + ": padding");
}

// --- exact sums ---------------------------------------------------------------------------------

__global__ void integer_sums(const int8_t* x, const int8_t* w, int64_t m, int64_t n, int64_t k,
                             int64_t pitch, float* y) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= m * n) return;
  int64_t sum = 0;
  for (int64_t c = 0; c < k; ++c) sum += x[i / n * pitch + c] * w[i % n * pitch + c];
  y[i] = static_cast<float>(sum);
}

// extreme: all of the largest magnitude, so that sums go as far as they can.
void check_sums(Random& random, int64_t m, int64_t n, int64_t k, bool extreme) {
  const int64_t pitch = mma16::row_pitch(k);
  const auto draw = [&](int64_t rows, int lowest) {
    std::vector<int8_t> v(rows * pitch);
    for (int64_t i = 0; i < rows * pitch; ++i) {
      v[i] = static_cast<int8_t>(i % pitch >= k ? 0
                                 : extreme      ? (lowest < -127 ? -128 : -127)
                                                : lowest + random.below(128 - lowest));
    }
    return v;
  };
  const auto x = draw(m, -127), w = draw(n, -128);
  const DeviceBuffer<int8_t> xd(x), wd(w);
  const DeviceBuffer<uint16_t> scale(std::vector<uint16_t>(n, half_bits(1)));
  const DeviceBuffer<float> row_scale(std::vector<float>(m, 1.0f)), y(m * n + 64), expected(m * n);
  y.poison();
  Device device{};
  CHECK_CUDA(cuda::query_device(device));
  QLinearParams params{};
  params.m = m;
  params.n = n;
  params.k = k;
  params.dtype = DType::kFloat32;
  params.format = {8, static_cast<int32_t>(k), Scheme::kInt8Dynamic};
  params.packed = reinterpret_cast<const uint8_t*>(wd.get());
  params.meta = scale.get();
  params.y = y.get();
  CHECK_CUDA(cuda::launch_w8a8(cuda::make_problem(params), {xd.get(), pitch, row_scale.get()},
                               device, nullptr));
  integer_sums<<<static_cast<unsigned>(ceil_div(m * n, 256)), 256>>>(xd.get(), wd.get(), m, n, k,
                                                                     pitch, expected.get());
  CHECK_CUDA(cudaGetLastError());
  auto got = y.host();
  bool untouched = true;
  for (int i = 0; i < 64; ++i) untouched = untouched && std::isnan(got[m * n + i]);
  got.resize(m * n);
  const std::string name = "sums M" + std::to_string(m) + " N" + std::to_string(n) + " K" +
                           std::to_string(k) + (extreme ? " extreme" : "");
  expect(got == expected.host(), name);
  expect(untouched, name + ": wrote outside y");
}

// --- products -----------------------------------------------------------------------------------

void check_products(Random& random, int64_t n, int64_t k, DType dtype,
                    const std::vector<int64_t>& ms) {
  const Weight w = random_weight(random, n, k, {8, static_cast<int32_t>(k), Scheme::kInt8Dynamic});
  for (const bool plain : {true, false}) {
    Parts parts = plain ? Parts{} : random_parts(random, w);
    parts.activation_bits = 8;
    Product product(random, w, dtype, parts, ms.back());
    const auto reference = product.reference(ms.back());
    for (const int64_t m : ms) {
      for (const Path path : {Path::kMatrix, Path::kStream}) {
        if (path == Path::kStream && !streams(product, m)) continue;
        RunOptions options;
        options.workspace = path == Path::kStream ? 0 : workspace_bytes(m, k);
        options.misaligned = random.below(4) == 0;
        const auto y = product.run(m, launch_of(path), options);
        product.compare(m, reference, y);
        if (m > 0 && random.below(3) == 0) {
          const std::string name = product.name(m) + (path == Path::kStream ? " stream" : "");
          expect(product.run(m, launch_of(path), options) == y, name + ": second run differs");
          options.graph = true;
          options.misaligned = false;
          expect(product.run(m, launch_of(path), options) == y, name + ": graph differs");
        }
      }
    }
    const int64_t m = ms[random.below(static_cast<int64_t>(ms.size()))];
    if (m == 0) continue;
    RunOptions options;
    options.workspace = workspace_bytes(m, k);
    const bool stream = streams(product, m) && random.below(2) == 0;
    product.check_special_values(random, m, launch_of(stream ? Path::kStream : Path::kMatrix),
                                 options);
  }
}

// --- chains -------------------------------------------------------------------------------------

// One graph packs other codes into the same weight and multiplies, again and again. Products read
// weights before they wait for the kernel in front, which must have settled them.
void check_chain(Random& random, int64_t m, int64_t n, int64_t k, Path path) {
  constexpr int kTurns = 6;
  const QuantFormat format{8, static_cast<int32_t>(k), Scheme::kInt8Dynamic};
  std::vector<uint16_t> x(m * k);
  for (auto& v : x) v = half_bits(static_cast<float>(random.normal()));
  const DeviceBuffer<uint16_t> xd(x), meta(n);
  const DeviceBuffer<uint8_t> packed(mma16::packed_bytes(format, n, k));
  const DeviceBuffer<uint8_t> workspace(workspace_bytes(m, k));
  std::vector<DeviceBuffer<uint8_t>> codes;
  std::vector<DeviceBuffer<uint16_t>> scale, zero, y;
  for (int i = 0; i < kTurns; ++i) {
    const Weight w = random_weight(random, n, k, format);
    codes.emplace_back(w.codes);
    scale.emplace_back(w.scale);
    zero.emplace_back(w.zero);
    y.emplace_back(m * n);
  }
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto turn = [&](int i, bool wait) {
    PackParams pack{};
    pack.n = n;
    pack.k = k;
    pack.format = format;
    pack.codes = codes[i].get();
    pack.scale = scale[i].get();
    pack.zero = zero[i].get();
    pack.packed = packed.get();
    pack.meta = meta.get();
    CHECK_CUDA(cuda::wquant_pack(pack, stream));
    if (wait) CHECK_CUDA(cudaStreamSynchronize(stream));
    QLinearParams p{};
    p.m = m;
    p.n = n;
    p.k = k;
    p.dtype = DType::kFloat16;
    p.format = format;
    p.x = xd.get();
    p.packed = packed.get();
    p.meta = meta.get();
    p.y = y[i].get();
    p.workspace = workspace.get();
    p.activation_bits = 8;
    for (int again = 0; again < 2; ++again) CHECK_CUDA(run_w8a8(p, path, stream));
  };
  CHECK_CUDA(cudaDeviceSynchronize());
  std::vector<std::vector<uint16_t>> expected;
  for (int i = 0; i < kTurns; ++i) turn(i, true);
  CHECK_CUDA(cudaStreamSynchronize(stream));
  for (const auto& buffer : y) {
    expected.push_back(buffer.host());
    buffer.poison();
  }
  cudaGraph_t captured;
  cudaGraphExec_t graph;
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kTurns; ++i) turn(i, false);
  CHECK_CUDA(cudaStreamEndCapture(stream, &captured));
  CHECK_CUDA(cudaGraphInstantiate(&graph, captured, 0));
  bool equal = true;
  for (int replay = 0; replay < 3; ++replay) {
    CHECK_CUDA(cudaGraphLaunch(graph, stream));
    CHECK_CUDA(cudaStreamSynchronize(stream));
    for (int i = 0; i < kTurns; ++i) {
      equal = equal && y[i].host() == expected[i];
      y[i].poison();
    }
  }
  CHECK_CUDA(cudaGraphExecDestroy(graph));
  CHECK_CUDA(cudaGraphDestroy(captured));
  CHECK_CUDA(cudaStreamDestroy(stream));
  expect(equal,
         "chain M" + std::to_string(m) + " N" + std::to_string(n) + " K" + std::to_string(k));
}

int run(uint64_t seed, bool quick) {
  Random random(seed);
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  const std::vector<int64_t> ks =
      quick ? std::vector<int64_t>{5, 136}
            : std::vector<int64_t>{1, 5, 16, 64, 200, 1024, 4096, 4097, 8200, 33000};
  for (const int64_t k : ks) {
    const int64_t m = quick ? 8 : 29;
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      check_prologue_int8(random, dtype, m, k, random.below(2) == 0, random.below(3) == 0);
      if (dtype == DType::kFloat32) continue;
      for (const int32_t group : {16, 32, 48, 64, 128, 256, 1024, static_cast<int>(k)}) {
        for (const int32_t bits : {16, 8}) {
          if (quick && group > 48 && group != k) continue;
          check_prologue_half(random, dtype, m, k, group, bits, random.below(2) == 0,
                              random.below(3) == 0);
        }
      }
    }
  }
  const std::vector<int64_t> all = {1,  2,  3,  4,  5,  6,  7,  8,   9,   10,  11,  12,
                                    13, 14, 15, 16, 17, 33, 64, 127, 256, 300, 1000};
  const std::vector<int64_t> some = {1, 2, 3, 7, 8, 9, 16, 17, 40, 65, 130};
  if (quick) {
    for (const int64_t m : {5, 40, 130}) check_sums(random, m, 136, 272, false);
    check_products(random, 144, 272, DType::kBFloat16, {1, 9, 65});
    check_products(random, 33, 100, DType::kFloat16, {3, 20});
    check_chain(random, 2, 256, 256, Path::kStream);
    check_chain(random, 20, 256, 256, Path::kMatrix);
  } else {
    // Around 48 KB of shared memory, from where on it must be asked for; before larger ones are.
    for (const int64_t m : {8, 16}) {
      for (const int64_t k : {2048, 2800, 4600, 5100, 5600, 6100})
        check_sums(random, m, 64, k, false);
    }
    for (const int64_t m : all) {
      check_sums(random, m, 1 + random.below(700), 1 + random.below(1000), false);
      check_sums(random, m, 16 * (1 + random.below(60)), 128 * (1 + random.below(8)), false);
    }
    for (const int64_t m : {12, 256, 400}) check_sums(random, m, 8192, 4096, false);
    check_sums(random, 2048, 4352, 512, false);
    check_sums(random, 1, 8, 132000, true);
    check_sums(random, 130, 300, 132000, true);
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      for (const int64_t k : {5, 16, 100, 129, 1000, 4096}) {
        const auto& ms = k < 1000 ? all : some;
        check_products(random, 1 + random.below(300), k, dtype, ms);
        check_products(random, 16 * (1 + random.below(30)), k, dtype, ms);
      }
      check_products(random, 4096, 512, dtype, {0, 1, 4, 9, 64, 130, 300, 700});
      check_products(random, 24, 28672, dtype, {1, 2, 8, 16, 100});
    }
    for (const int64_t m : {1, 2, 5, 64, 300}) {
      check_chain(random, m, 4096, 1024, Path::kMatrix);
      check_chain(random, m, 2048, 2048, m <= 2 ? Path::kStream : Path::kMatrix);
    }
  }
  std::printf("%lld checks, %d failed\n", static_cast<long long>(checks), failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace kvopt::test

int main(int argc, char** argv) {
  uint64_t seed =
      static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  bool quick = false;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::strcmp(argv[i], "--quick") == 0) {
      quick = true;
    } else {
      std::fprintf(stderr, "usage: %s [--seed S] [--quick]\n", argv[0]);
      return 2;
    }
  }
  return kvopt::test::run(seed, quick);
}
