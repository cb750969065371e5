// SPDX-License-Identifier: Apache-2.0
// Quantised products and weight packing on CUDA against host arithmetic. No framework, no test
// library.
//
//   test_qlinear_cuda [--seed S]   checks; exit code 1 when one fails
//   test_qlinear_cuda --quick      few shapes, for a sanitizer
//   test_qlinear_cuda --bench      times, see bench_qlinear_cuda.h
//
// Each case draws codes, scales and zero points, packs them on the host with quant_format.h's
// address functions (so the layout is checked, not only that pack and unpack agree), and compares
// the product with one in fp64 on scale * (q - zero).
//
// Tolerances. u is the unit roundoff of the activations' type, A = sum |w| |x| (an element's
// condition).
//   fp32: |y - ref| <= 2^-19 A.
//   fp16, bf16, integer zero points: codes minus zero are exact, sums are fp32, so an element is
//     the fp64 result rounded once: |y - ref| <= 1.01 u |ref| + 2^-17 A. (2^-17: fp32 accumulation
//     on tensor cores truncates; some tens of additions of 2^-23 each. The second part also covers
//     results that cancel.)
//   fp16, bf16, fractional zero points: q - zero itself is rounded to the type, as torch rounds a
//     dequantised weight. An element: + 2 u A as worst case. All elements together, each in units
//     of its A: no worse than 1.3 x the error of a product with weights rounded to the type, its
//     result rounded, which is what torch.nn.functional.linear gives at best. (Asked of 4096
//     weights and 1000 results or more: there are few different roundings in a row, so less is
//     noise.)
#include <cuda_runtime.h>

#include <chrono>
#include <random>
#include <string>

#include "bench_qlinear_cuda.h"
#include "check_cuda.h"
#include "common/params.h"
#include "cuda/qlinear.h"
#include "cuda/wquant.h"

namespace kvopt::test {
namespace {

int failures = 0;
int64_t checks = 0;

void expect(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  if (++failures <= 40) std::printf("FAILED %s\n", what.c_str());
}

struct Reference {
  double exact, condition, rounded_weights;
};

// One thread per element of y, fp64. w: exact weights, v: weights rounded to the activations' type.
__global__ void reference_kernel(const double* x, const double* w, const double* v, int64_t m,
                                 int64_t n, int64_t k, Reference* out) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= m * n) return;
  const double* xr = x + i / n * k;
  const double* wr = w + i % n * k;
  const double* vr = v + i % n * k;
  Reference r{0, 0, 0};
  for (int64_t c = 0; c < k; ++c) {
    r.exact += xr[c] * wr[c];
    r.condition += fabs(xr[c] * wr[c]);
    r.rounded_weights += xr[c] * vr[c];
  }
  out[i] = r;
}

enum class Zeros { kInteger, kFractional };

struct Weight {
  int64_t n, k;
  QuantFormat format;
  Zeros zeros;
  std::vector<uint8_t> codes, packed;
  std::vector<uint16_t> scale, zero, meta;

  double value(int64_t row, int64_t column) const {
    const int64_t i = row * group_count(format, k) + column / format.group_size;
    return static_cast<double>(half_value(scale[i])) *
           (codes[row * k + column] - static_cast<double>(half_value(zero[i])));
  }
  std::string name() const {
    return "w" + std::to_string(format.bits) + " g" + std::to_string(format.group_size) +
           (format.symmetric           ? " sym"
            : zeros == Zeros::kInteger ? " asym"
                                       : " asym-fraction") +
           " N" + std::to_string(n) + " K" + std::to_string(k);
  }
};

void pack_on_host(Weight& w) {
  const int64_t groups = group_count(w.format, w.k);
  w.packed.assign(mma16::packed_bytes(w.format, w.n, w.k), 0);
  w.meta.assign(mma16::meta_count(w.format, w.n, w.k), 0);
  for (int64_t row = 0; row < w.n; ++row) {
    for (int64_t column = 0; column < w.k; ++column) {
      const CodeAddress at = mma16::code_address(w.format, w.k, row, column);
      w.packed[at.byte] |= static_cast<uint8_t>(w.codes[row * w.k + column] << at.shift);
    }
    for (int64_t g = 0; g < groups; ++g) {
      w.meta[mma16::scale_index(w.format, w.k, row, g)] = w.scale[row * groups + g];
      if (!w.format.symmetric) {
        w.meta[mma16::zero_index(w.format, w.k, row, g)] = w.zero[row * groups + g];
      }
    }
  }
}

Weight random_weight(Random& random, int64_t n, int64_t k, QuantFormat format, Zeros zeros) {
  Weight w{n, k, format, zeros, {}, {}, {}, {}, {}};
  const int64_t groups = group_count(format, k);
  w.codes.resize(n * k);
  for (auto& c : w.codes) c = static_cast<uint8_t>(random.below(1 << format.bits));
  w.scale.resize(n * groups);
  w.zero.resize(n * groups);
  const float largest = 1 << (8 - format.bits);
  for (int64_t i = 0; i < n * groups; ++i) {
    // Scales differ by up to 2^10 between groups; one in 50 is zero.
    const float s =
        random.below(50) == 0
            ? 0.0f
            : static_cast<float>((0.5 + random.uniform()) * largest *
                                 std::exp2(-7.0 - static_cast<double>(random.below(10))));
    w.scale[i] = half_bits(s);
    if (format.symmetric) {
      w.zero[i] = half_bits(static_cast<float>(symmetric_zero(format)));
    } else {
      const double z = random.uniform() * ((1 << format.bits) - 1);
      w.zero[i] = half_bits(static_cast<float>(zeros == Zeros::kInteger ? std::rint(z) : z));
    }
  }
  pack_on_host(w);
  return w;
}

// y = qlinear(x), run twice eagerly and once from a graph, with guard bands around y and odd
// alignment on request.
class Product {
 public:
  Product(Random& random, const Weight& w, DType dtype, int64_t max_m)
      : w_(w), dtype_(dtype), bytes_(dtype_bytes(dtype)), packed_(w.packed), meta_(w.meta) {
    bias_host_.resize(w.n * bytes_);
    for (int64_t i = 0; i < w.n; ++i) {
      store(dtype, bias_host_.data(), i, static_cast<float>(random.normal()));
    }
    bias_ = DeviceBuffer<uint8_t>(bias_host_);
    x_host_.resize(max_m * w.k * bytes_);
    for (int64_t i = 0; i < max_m * w.k; ++i) {
      store(dtype, x_host_.data(), i, static_cast<float>(random.normal() + 0.25));
    }
    std::vector<double> exact(w.n * w.k), typed(w.n * w.k);
    for (int64_t i = 0; i < w.n * w.k; ++i) {
      exact[i] = w.value(i / w.k, i % w.k);
      typed[i] = rounded(dtype, exact[i]);
    }
    exact_ = DeviceBuffer<double>(exact);
    typed_ = DeviceBuffer<double>(typed);
  }

  void set(int64_t row, int64_t column, float v) {
    store(dtype_, x_host_.data(), row * w_.k + column, v);
  }

  std::vector<Reference> reference(int64_t m) const {
    std::vector<double> x(m * w_.k);
    for (int64_t i = 0; i < m * w_.k; ++i) x[i] = load(dtype_, x_host_.data(), i);
    const DeviceBuffer<double> xd(x);
    const DeviceBuffer<Reference> out(m * w_.n);
    reference_kernel<<<static_cast<unsigned>(ceil_div(m * w_.n, 256)), 256>>>(
        xd.get(), exact_.get(), typed_.get(), m, w_.n, w_.k, out.get());
    CHECK_CUDA(cudaGetLastError());
    return out.host();
  }

  std::vector<uint8_t> run(int64_t m, bool bias, bool misaligned, bool graph,
                           const std::string& name) const {
    const size_t shift = misaligned ? bytes_ : 0;
    std::vector<uint8_t> shifted(shift + m * w_.k * bytes_);
    std::memcpy(shifted.data() + shift, x_host_.data(), m * w_.k * bytes_);
    const DeviceBuffer<uint8_t> x(shifted);
    const size_t guard = 256, size = m * w_.n * bytes_;
    const DeviceBuffer<uint8_t> y(size + 2 * guard);
    y.poison();
    QLinearParams p{};
    p.m = m;
    p.n = w_.n;
    p.k = w_.k;
    p.dtype = dtype_;
    p.format = w_.format;
    p.x = x.get() + shift;
    p.packed = packed_.get();
    p.meta = meta_.get();
    p.bias = bias ? bias_.get() : nullptr;
    p.y = y.get() + guard;
    cudaStream_t stream;
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK_CUDA(cudaDeviceSynchronize());
    if (graph) {
      cudaGraph_t captured;
      cudaGraphExec_t executable;
      CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      CHECK_CUDA(cuda::qlinear(p, stream));
      CHECK_CUDA(cudaStreamEndCapture(stream, &captured));
      CHECK_CUDA(cudaGraphInstantiate(&executable, captured, 0));
      CHECK_CUDA(cudaGraphLaunch(executable, stream));
      CHECK_CUDA(cudaStreamSynchronize(stream));
      CHECK_CUDA(cudaGraphExecDestroy(executable));
      CHECK_CUDA(cudaGraphDestroy(captured));
    } else {
      CHECK_CUDA(cuda::qlinear(p, stream));
      CHECK_CUDA(cudaStreamSynchronize(stream));
    }
    CHECK_CUDA(cudaStreamDestroy(stream));
    const std::vector<uint8_t> all = y.host();
    bool untouched = true;
    for (size_t i = 0; i < guard; ++i) {
      untouched = untouched && all[i] == 0xFF && all[guard + size + i] == 0xFF;
    }
    expect(untouched, name + ": wrote outside y");
    return {all.begin() + guard, all.begin() + guard + size};
  }

  double bias(int64_t n) const { return load(dtype_, bias_host_.data(), n); }

 private:
  const Weight& w_;
  DType dtype_;
  size_t bytes_;
  DeviceBuffer<uint8_t> packed_;
  DeviceBuffer<uint16_t> meta_;
  DeviceBuffer<uint8_t> bias_;
  std::vector<uint8_t> bias_host_, x_host_;
  DeviceBuffer<double> exact_, typed_;
};

void compare(const Weight& w, DType dtype, int64_t m, bool bias, const Product& product,
             const std::vector<Reference>& reference, const std::vector<uint8_t>& y,
             const std::string& name) {
  const double u = unit_roundoff(dtype);
  const bool fraction = !w.format.symmetric && w.zeros == Zeros::kFractional;
  double error2 = 0, typed2 = 0;
  double worst = 0;
  for (int64_t i = 0; i < m * w.n; ++i) {
    const double b = bias ? product.bias(i % w.n) : 0;
    const double exact = reference[i].exact + b, condition = reference[i].condition + std::fabs(b);
    const double got = load(dtype, y.data(), i);
    double bound = 1.01 * u * std::fabs(exact) + 0x1p-17 * condition + 1e-7;
    if (dtype == DType::kFloat32) {
      bound = 0x1p-19 * condition;
    } else if (fraction) {
      bound += 2 * u * condition;
    }
    const double error = std::fabs(got - exact);
    if (!(error <= bound)) worst = std::isnan(error) ? 1e30 : std::fmax(worst, error / bound);
    if (condition == 0) continue;
    error2 += error * error / (condition * condition);
    const double typed = rounded(dtype, reference[i].rounded_weights + b) - exact;
    typed2 += typed * typed / (condition * condition);
  }
  expect(worst == 0, name + ": element at " + std::to_string(worst) + " x its bound");
  if (fraction && dtype != DType::kFloat32 && w.n * w.k >= 4096 && m * w.n >= 1000) {
    const double allowed = 1.3 * std::sqrt(typed2);
    expect(std::sqrt(error2) <= allowed, name + ": error " +
                                             std::to_string(std::sqrt(error2) / allowed) +
                                             " x that of rounded weights");
  }
}

void check_products(Random& random, const Weight& w, DType dtype, const std::vector<int64_t>& ms) {
  const int64_t max_m = ms.back();
  const Product product(random, w, dtype, max_m);
  const std::vector<Reference> reference = product.reference(max_m);
  for (const int64_t m : ms) {
    const bool bias = random.below(2) == 0, misaligned = random.below(4) == 0;
    const std::string name = w.name() + " " + name_of(dtype) + " M" + std::to_string(m) +
                             (bias ? " bias" : "") + (misaligned ? " misaligned" : "");
    const auto y = product.run(m, bias, misaligned, false, name);
    compare(w, dtype, m, bias, product, reference, y, name);
    if (random.below(4) == 0) {
      expect(product.run(m, bias, misaligned, false, name) == y, name + ": second run differs");
      if (m > 0) expect(product.run(m, bias, false, true, name) == y, name + ": graph differs");
    }
  }
}

// An infinity or NaN in a row of x shows in that row as it does in fp64, and nowhere else.
void check_special_values(Random& random, const Weight& w, DType dtype, int64_t m) {
  Product product(random, w, dtype, m);
  const std::string name =
      w.name() + " " + name_of(dtype) + " M" + std::to_string(m) + " special values";
  const auto clean = product.run(m, true, false, false, name);
  const int64_t inf_row = random.below(m), nan_row = random.below(m);
  product.set(inf_row, random.below(w.k), random.below(2) ? INFINITY : -INFINITY);
  if (nan_row != inf_row) product.set(nan_row, random.below(w.k), NAN);
  const auto reference = product.reference(m);
  const auto y = product.run(m, true, false, false, name);
  bool same = true;
  for (int64_t i = 0; i < m * w.n; ++i) {
    const int64_t row = i / w.n;
    const double got = load(dtype, y.data(), i), exact = reference[i].exact;
    if (row == inf_row || row == nan_row) {
      same = same && (std::isnan(exact) ? std::isnan(got) : got == exact);
    } else {
      same = same && std::memcmp(&y[i * dtype_bytes(dtype)], &clean[i * dtype_bytes(dtype)],
                                 dtype_bytes(dtype)) == 0;
    }
  }
  expect(same, name);
}

// Packing and a chain of products, each fed by the one before, with nothing but stream order
// between them: launches may overlap (programmatic dependent launch), their results may not.
void check_chain(Random& random, DType dtype, int64_t m) {
  constexpr int64_t kSize = 1536;
  constexpr int kSteps = 6;
  Weight w = random_weight(random, kSize, kSize, {4, 128, false}, Zeros::kInteger);
  for (auto& s : w.scale) s = half_bits(static_cast<float>(0.002 + 0.002 * random.uniform()));
  const size_t bytes = m * kSize * dtype_bytes(dtype);
  std::vector<uint8_t> start(bytes);
  for (int64_t i = 0; i < m * kSize; ++i) {
    store(dtype, start.data(), i, static_cast<float>(random.normal()));
  }
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
      QLinearParams p{};
      p.m = m;
      p.n = p.k = kSize;
      p.dtype = dtype;
      p.format = w.format;
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
  for (int i = 0; i < 20; ++i) same = same && run(false) == expected;
  expect(same, std::string("chain ") + name_of(dtype) + " M" + std::to_string(m));
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
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const DeviceBuffer<uint8_t> dense(w.n * w.k * dtype_bytes(dtype));
    dense.poison();
    const DequantizeParams d{w.n, w.k, dtype, w.format, packed.get(), meta.get(), dense.get()};
    CHECK_CUDA(cuda::wquant_dequantize(d, nullptr));
    std::vector<uint8_t> expected(dense.size());
    for (int64_t i = 0; i < w.n * w.k; ++i) {
      const int64_t at = i / w.k * groups + i % w.k / w.format.group_size;
      volatile float difference = static_cast<float>(w.codes[i]) - half_value(w.zero[at]);
      store(dtype, expected.data(), i, half_value(w.scale[at]) * difference);
    }
    expect(dense.host() == expected, w.name() + " " + name_of(dtype) + ": dequantised");
  }
}

// The rule of common/params.h, line by line.
void check_rtn(Random& random, int64_t n, int64_t k, QuantFormat format, DType dtype) {
  const int64_t groups = group_count(format, k);
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
  std::vector<uint8_t> codes(n * k);
  std::vector<uint16_t> scales(n * groups), zeros(n * groups);
  const float q_max = static_cast<float>((1 << format.bits) - 1);
  for (int64_t i = 0; i < n * groups; ++i) {
    const int64_t row = i / groups, begin = i % groups * format.group_size;
    const int64_t end = std::min<int64_t>(begin + format.group_size, k);
    float lo = 0, hi = 0;
    for (int64_t c = begin; c < end; ++c) {
      lo = std::fmin(lo, load(dtype, weight.data(), row * k + c));
      hi = std::fmax(hi, load(dtype, weight.data(), row * k + c));
    }
    const float largest = std::fmax(-lo, hi);
    float scale = format.symmetric ? (format.bits == 8 ? largest / 127.0f : 2.0f * largest / q_max)
                                   : (hi - lo) / q_max;
    scale = std::fmax(half_value(half_bits(scale)), 0x1p-24f);
    scales[i] = half_bits(scale);
    float zero = static_cast<float>(symmetric_zero(format));
    if (!format.symmetric) zero = std::fmin(std::fmax(std::rint((0.0f - lo) / scale), 0.0f), q_max);
    zeros[i] = half_bits(zero);
    for (int64_t c = begin; c < end; ++c) {
      const float v = std::rint(load(dtype, weight.data(), row * k + c) / scale) + zero;
      codes[row * k + c] = static_cast<uint8_t>(std::fmin(std::fmax(v, 0.0f), q_max));
    }
  }
  const DeviceBuffer<uint8_t> input(weight), out_codes(codes.size());
  const DeviceBuffer<uint16_t> out_scale(scales.size()), out_zero(zeros.size());
  out_codes.poison();
  out_scale.poison();
  out_zero.poison();
  const RtnParams p{
      n, k, dtype, format, input.get(), out_codes.get(), out_scale.get(), out_zero.get()};
  CHECK_CUDA(cuda::wquant_rtn(p, nullptr));
  const std::string name = std::string("rtn w") + std::to_string(format.bits) + " g" +
                           std::to_string(format.group_size) +
                           (format.symmetric ? " sym " : " asym ") + name_of(dtype) + " N" +
                           std::to_string(n) + " K" + std::to_string(k);
  expect(out_scale.host() == scales, name + ": scales");
  expect(out_zero.host() == zeros, name + ": zeros");
  expect(out_codes.host() == codes, name + ": codes");
}

void check_all(uint64_t seed, bool quick) {
  Random random(seed);
  struct Size {
    int64_t n, k;
  };
  std::vector<Size> sizes = {{1, 1},    {1, 16},    {15, 17},   {16, 64},   {17, 65},  {33, 100},
                             {40, 704}, {130, 333}, {257, 192}, {72, 1032}, {520, 456}};
  std::vector<int64_t> ms = {0};
  for (int64_t m = 1; m <= 17; ++m) ms.push_back(m);
  for (const int64_t m : {31, 33, 64, 100, 257}) ms.push_back(m);
  if (quick) {
    sizes = {{17, 65}, {40, 704}, {130, 333}};
    ms = {1, 3, 8, 9, 17, 33, 65};
  }
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const int64_t m : {1, 3, 16, 50}) {
      if (!quick) check_chain(random, dtype, m);
    }
  }
  for (const Size size : sizes) {
    for (const int bits : {4, 8}) {
      for (const int64_t group :
           {int64_t{16}, int64_t{32}, int64_t{48}, int64_t{64}, int64_t{128}, size.k}) {
        for (const int kind : {0, 1, 2}) {
          if (quick && random.below(3) != 0) continue;
          if (group == size.k && size.k <= 128 && size.k % 16 == 0 && size.k != 16) continue;
          const QuantFormat format{bits, static_cast<int32_t>(group), kind == 0};
          const Zeros zeros = kind == 2 ? Zeros::kFractional : Zeros::kInteger;
          const Weight w = random_weight(random, size.n, size.k, format, zeros);
          check_packing(w);
          for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
            if (kind != 2) check_rtn(random, size.n, size.k, format, dtype);
            check_products(random, w, dtype, ms);
            check_special_values(random, w, dtype, 1 + random.below(8));
            check_special_values(random, w, dtype, 9 + random.below(80));
          }
        }
      }
    }
  }
  if (quick) return;
  // Enough rows of w and of x that every tile shape gets its turn, and enough columns that x
  // outgrows shared memory.
  for (const Size size :
       {Size{2050, 200}, Size{4100, 136}, Size{16390, 72}, Size{28700, 136}, Size{48, 20000}}) {
    for (const int bits : {4, 8}) {
      const int64_t kind = random.below(3);
      const int64_t group = random.below(2) == 0 ? 64 : random.below(2) == 0 ? 16 : size.k;
      const QuantFormat format{bits, static_cast<int32_t>(group), kind == 0};
      const Weight w = random_weight(random, size.n, size.k, format,
                                     kind == 2 ? Zeros::kFractional : Zeros::kInteger);
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        check_products(random, w, dtype, {1, 7, 16, 32, 64, 128, 256});
      }
    }
  }
}

}  // namespace
}  // namespace kvopt::test

int main(int argc, char** argv) {
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
