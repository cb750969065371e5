// SPDX-License-Identifier: Apache-2.0
// Random quantised products on CUDA and their fp64 reference, for every test of a product kernel.
//
// A weight is drawn as codes, scales and zero points and packed on the host with quant_format.h's
// address functions, so a kernel is checked against the definition of the layout. `Product` adds
// activations and the optional parts of QLinearParams, runs any function of (params, stream),
// eagerly or from a CUDA graph, with guard bands around y, and compares.
//
// Tolerances. u: unit roundoff of y's type; A = sum |w||x|, the element's condition; R = sum
// |scale| (q + |zero|) |x|, the same before zero points cancel. All parts add up, plus the
// epilogue's own.
//   every kernel       1.01 u |y| for the rounding of y; 2^-17 R (fp32 types: 2^-19 R) for fp32
//                      sums, which tensor cores truncate, some tens of additions of 2^-23 each
//   16-bit types       2^-11 A where weights are rounded to fp16, once (codes that stay exact may
//                      ask for less: Tolerance::rounded_weights); 2^-11 A for code books, whose
//                      values are rounded; 2^-11 A for activations that input_scale or int8
//                      rounding takes off the fp16 grid; Tolerance::x_step times the row's largest
//                      |x| times sum |w| for kernels that round x to a grid of their own
//   int8 activations   x / s that lie within 1e-4 of a tie may round either way: s |w| each
// Worst cases say little about many elements, so the 16-bit types also pass a root-mean-square
// test, each error in units of its A: no worse than 1.3 x that of a product in fp64 with weights
// and activations rounded to fp16 and the result rounded, which is what a dense layer gives at
// best. (Asked of 4096 weights and 1000 results or more; there are few different roundings in
// less.)
#pragma once

#include <algorithm>
#include <functional>
#include <string>

#include "check_cuda.h"
#include "common/params.h"

namespace kvopt::test {

inline int failures = 0;
inline int64_t checks = 0;

inline void expect(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  if (++failures <= 40) std::printf("FAILED %s\n", what.c_str());
}

enum class Zeros { kInteger, kFractional };

inline std::string name_of(const QuantFormat& f) {
  static constexpr const char* kNames[] = {" asym", " sym", " nf4", " fp4", " w8a8"};
  return "w" + std::to_string(f.bits) + " g" + std::to_string(f.group_size) +
         kNames[static_cast<int>(f.scheme)];
}

struct Weight {
  int64_t n, k;
  QuantFormat format;
  Zeros zeros;
  std::vector<uint8_t> codes, packed;
  std::vector<uint16_t> scale, zero, meta;

  std::string name() const {
    return name_of(format) + (zeros == Zeros::kFractional ? "-fraction" : "") + " N" +
           std::to_string(n) + " K" + std::to_string(k);
  }
};

// The zero point that plain tensors hold where the packed layout stores none.
inline float implied_zero(const QuantFormat& f) {
  return f.has_book() ? 0.0f : static_cast<float>(symmetric_zero(f));
}

inline void pack_on_host(Weight& w) {
  const int64_t groups = group_count(w.format, w.k);
  w.packed.assign(mma16::packed_bytes(w.format, w.n, w.k), 0);
  w.meta.assign(mma16::meta_count(w.format, w.n, w.k), 0);
  const auto put = [&](int64_t word, int32_t shift, uint32_t field) {
    for (; field != 0; field >>= 1, ++shift) {  // the buffer need not be a multiple of 4 bytes
      w.packed[word * 4 + shift / 8] |= static_cast<uint8_t>((field & 1) << shift % 8);
    }
  };
  for (int64_t row = 0; row < w.n; ++row) {
    for (int64_t column = 0; column < w.k; ++column) {
      const CodePieces at = mma16::code_pieces(w.format, w.k, row, column);
      const uint32_t code = w.codes[row * w.k + column] ^ mma16::stored_flip(w.format);
      for (int i = 0; i < at.count; ++i) {
        const CodePiece& piece = at.piece[i];
        put(piece.word, piece.shift, code >> piece.from & ((1u << piece.bits) - 1));
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      w.meta[mma16::scale_index(w.format, w.k, row, g)] = w.scale[row * groups + g];
      if (w.format.has_zeros()) {
        w.meta[mma16::zero_index(w.format, w.k, row, g)] = w.zero[row * groups + g];
      }
    }
  }
}

// Scales differ by up to 2^10 between groups; one in 50 is zero.
inline Weight random_weight(Random& random, int64_t n, int64_t k, QuantFormat format,
                            Zeros zeros = Zeros::kInteger) {
  Weight w{n, k, format, format.has_zeros() ? zeros : Zeros::kInteger, {}, {}, {}, {}, {}};
  const int64_t groups = group_count(format, k);
  w.codes.resize(n * k);
  for (auto& c : w.codes) c = static_cast<uint8_t>(random.below(1 << format.bits));
  w.scale.resize(n * groups);
  w.zero.resize(n * groups);
  const float largest = format.has_book() ? 64.0f : static_cast<float>(1 << (8 - format.bits));
  for (int64_t i = 0; i < n * groups; ++i) {
    const float s =
        random.below(50) == 0
            ? 0.0f
            : static_cast<float>((0.5 + random.uniform()) * largest *
                                 std::exp2(-7.0 - static_cast<double>(random.below(10))));
    w.scale[i] = half_bits(s);
    float zero = implied_zero(format);
    if (format.has_zeros()) {
      const double z = random.uniform() * ((1 << format.bits) - 1);
      zero = static_cast<float>(zeros == Zeros::kInteger ? std::rint(z) : z);
    }
    w.zero[i] = half_bits(zero);
  }
  pack_on_host(w);
  return w;
}

struct Reference {
  double exact;      // the product
  double condition;  // A
  double raw;        // R
  double typed;      // with weights and activations rounded to fp16
  double ties;       // sum of |w| times the step of activations that may round either way
  double weights;    // sum |w|
};

struct ReferenceInput {
  const double *x, *typed_x, *tie;  // (M, K)
  const uint8_t* codes;
  const uint16_t *scale, *zero;
  int64_t m, n, k;
  QuantFormat format;
};

// One thread per element of the product, fp64.
__global__ void reference_kernel(const ReferenceInput p, Reference* out) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= p.m * p.n) return;
  const int64_t row = i % p.n, groups = group_count(p.format, p.k), first = i / p.n * p.k;
  Reference r{};
  for (int64_t c = 0; c < p.k; ++c) {
    const int64_t at = row * groups + c / p.format.group_size;
    const int code = p.codes[row * p.k + c];
    const double scale = __half2float(__ushort_as_half(p.scale[at]));
    const double zero = __half2float(__ushort_as_half(p.zero[at]));
    const double level = p.format.has_book() ? book_value(p.format.scheme, code) : code - zero;
    const double w = scale * level, x = p.x[first + c];
    r.exact += x * w;
    r.condition += fabs(x * w);
    r.raw += p.format.has_book() ? fabs(x * w) : fabs(x * scale) * (code + fabs(zero));
    r.typed += p.typed_x[first + c] * __half2float(__float2half_rn(static_cast<float>(w)));
    r.ties += p.tie[first + c] * fabs(w);
    r.weights += fabs(w);
  }
  out[i] = r;
}

// The optional parts of a product.
struct Parts {
  bool bias = false;
  bool input_scale = false;
  bool residual = false;
  bool residual_is_y = false;
  bool addend = false;
  bool swiglu = false;  // the weight needs N % 16 == 0
  int64_t rank = 0;
  int32_t activation_bits = 16;

  std::string name() const {
    return std::string(bias ? " bias" : "") + (input_scale ? " input_scale" : "") +
           (residual ? residual_is_y ? " residual=y" : " residual" : "") +
           (addend ? " addend" : "") + (swiglu ? " swiglu" : "") +
           (rank > 0 ? " rank" + std::to_string(rank) : "") + (activation_bits == 8 ? " a8" : "");
  }
};

inline Parts random_parts(Random& random, const Weight& w) {
  Parts p;
  const auto sometimes = [&](int64_t odds) { return random.below(odds) == 0; };
  p.bias = sometimes(2);
  p.input_scale = sometimes(4);
  p.residual = sometimes(3);
  p.residual_is_y = p.residual && sometimes(2);
  p.addend = sometimes(6);
  p.swiglu = w.n % 16 == 0 && sometimes(3);
  p.rank = sometimes(4) ? 1 + random.below(33) : 0;
  p.activation_bits = w.format.scheme == Scheme::kInt8Dynamic || sometimes(4) ? 8 : 16;
  return p;
}

struct Tolerance {
  bool rounded_weights = true;  // false: codes enter the sums exactly
  double x_step = 0;            // |rounding of x| <= x_step * largest |x| of the row
};

using Launch = std::function<int(const QLinearParams&, cudaStream_t)>;

struct RunOptions {
  bool misaligned = false;  // x starts one element past an aligned address
  bool graph = false;
  size_t workspace = 0;  // bytes given to the launch, poisoned
};

class Product {
 public:
  Product(Random& random, const Weight& w, DType dtype, const Parts& parts, int64_t max_m)
      : w_(w),
        dtype_(dtype),
        parts_(parts),
        bytes_(dtype_bytes(dtype)),
        columns_(parts.swiglu ? w.n / 2 : w.n),
        packed_(w.packed),
        meta_(w.meta),
        codes_(w.codes),
        scale_(w.scale),
        zero_(w.zero) {
    // Rows of x of very different size, as far as the type goes.
    const int64_t range = dtype == DType::kFloat16 ? 3 : 20;
    x_ = fill(random, max_m * w.k, 0.25);
    for (int64_t row = 0; row < max_m; ++row) {
      const double size = std::exp2(static_cast<double>(random.below(2 * range + 1) - range));
      for (int64_t c = 0; c < w.k; ++c) {
        const int64_t i = row * w.k + c;
        store(dtype, x_.data(), i, static_cast<float>(load(dtype, x_.data(), i) * size));
      }
    }
    if (parts.bias) bias_ = fill(random, w.n);
    if (parts.addend) addend_ = fill(random, max_m * w.n);
    if (parts.residual) residual_ = fill(random, max_m * columns_);
    if (parts.rank > 0) {
      low_rank_x_ = fill(random, max_m * parts.rank);
      low_rank_w_ = fill(random, w.n * parts.rank);
    }
    if (parts.input_scale) {
      input_scale_.resize(w.k * bytes_);
      for (int64_t i = 0; i < w.k; ++i) {
        store(dtype, input_scale_.data(), i, static_cast<float>(0.25 + random.uniform()));
      }
    }
    for (const auto* part : {&bias_, &input_scale_, &addend_, &low_rank_x_, &low_rank_w_}) {
      on_device_.emplace_back(*part);
    }
  }

  std::string name(int64_t m) const {
    return w_.name() + " " + test::name_of(dtype_) + " M" + std::to_string(m) + parts_.name();
  }
  void set_x(int64_t row, int64_t column, float v) {
    store(dtype_, x_.data(), row * w_.k + column, v);
  }

  // Parameters without x, y, workspace and residual.
  QLinearParams params(int64_t m) const {
    const auto at = [&](int i) -> const void* {
      return on_device_[i].size() == 0 ? nullptr : on_device_[i].get();
    };
    QLinearParams p{};
    p.m = m;
    p.n = w_.n;
    p.k = w_.k;
    p.dtype = dtype_;
    p.format = w_.format;
    p.packed = packed_.get();
    p.meta = meta_.get();
    p.activation_bits = parts_.activation_bits;
    p.swiglu = parts_.swiglu;
    p.bias = at(0);
    p.input_scale = at(1);
    p.addend = at(2);
    p.low_rank_x = at(3);
    p.low_rank_w = at(4);
    p.rank = parts_.rank;
    return p;
  }

  // The bytes of y; checks that nothing around y, x or the workspace was written.
  std::vector<uint8_t> run(int64_t m, const Launch& launch, const RunOptions& options = {}) const {
    const size_t shift = options.misaligned ? bytes_ : 0;
    std::vector<uint8_t> shifted(shift + m * w_.k * bytes_);
    std::memcpy(shifted.data() + shift, x_.data(), m * w_.k * bytes_);
    const DeviceBuffer<uint8_t> x(shifted);
    const size_t guard = 256, size = m * columns_ * bytes_;
    const DeviceBuffer<uint8_t> y(size + 2 * guard), work(options.workspace + guard);
    y.poison();
    work.poison();
    QLinearParams p = params(m);
    p.x = x.get() + shift;
    p.y = y.get() + guard;
    p.workspace = options.workspace > 0 ? work.get() : nullptr;
    DeviceBuffer<uint8_t> residual;
    if (parts_.residual) {
      const std::vector<uint8_t> part(residual_.begin(), residual_.begin() + size);
      residual = DeviceBuffer<uint8_t>(part);
      p.residual = residual.get();
      if (parts_.residual_is_y && size > 0) {
        CHECK_CUDA(cudaMemcpy(p.y, part.data(), size, cudaMemcpyHostToDevice));
        p.residual = p.y;
      }
    }
    const auto start = [&](cudaStream_t on) {
      const int error = launch(p, on);
      if (error == 0) return;
      std::fprintf(stderr, "%s: %s\n", name(m).c_str(),
                   cudaGetErrorString(static_cast<cudaError_t>(error)));
      std::exit(2);
    };
    cudaStream_t stream;
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK_CUDA(cudaDeviceSynchronize());
    if (options.graph) {
      cudaGraph_t captured;
      cudaGraphExec_t executable;
      CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      start(stream);
      CHECK_CUDA(cudaStreamEndCapture(stream, &captured));
      CHECK_CUDA(cudaGraphInstantiate(&executable, captured, 0));
      CHECK_CUDA(cudaGraphLaunch(executable, stream));
      CHECK_CUDA(cudaStreamSynchronize(stream));
      CHECK_CUDA(cudaGraphExecDestroy(executable));
      CHECK_CUDA(cudaGraphDestroy(captured));
    } else {
      start(stream);
      CHECK_CUDA(cudaStreamSynchronize(stream));
    }
    CHECK_CUDA(cudaGetLastError());
    CHECK_CUDA(cudaStreamDestroy(stream));
    const std::vector<uint8_t> all = y.host(), scratch = work.host();
    bool untouched = true;
    for (size_t i = 0; i < guard; ++i) {
      untouched = untouched && all[i] == 0xFF && all[guard + size + i] == 0xFF &&
                  scratch[options.workspace + i] == 0xFF;
    }
    expect(untouched, name(m) + ": wrote outside y or the workspace");
    expect(x.host() == shifted, name(m) + ": wrote to x");
    return {all.begin() + guard, all.begin() + guard + size};
  }

  std::vector<Reference> reference(int64_t m) const {
    std::vector<double> x(m * w_.k), typed(m * w_.k), tie(m * w_.k);
    for (int64_t row = 0; row < m; ++row) prepare_row(row, x, typed, tie);
    const DeviceBuffer<double> xd(x), typed_d(typed), tie_d(tie);
    const DeviceBuffer<Reference> out(m * w_.n);
    const ReferenceInput input{xd.get(),     typed_d.get(), tie_d.get(), codes_.get(),
                               scale_.get(), zero_.get(),   m,           w_.n,
                               w_.k,         w_.format};
    if (m > 0) {
      reference_kernel<<<static_cast<unsigned>(ceil_div(m * w_.n, 256)), 256>>>(input, out.get());
    }
    CHECK_CUDA(cudaGetLastError());
    return out.host();
  }

  // The reference may hold more rows than m.
  void compare(int64_t m, const std::vector<Reference>& reference, const std::vector<uint8_t>& y,
               const Tolerance& tolerance = {}) const {
    const double u = unit_roundoff(dtype_);
    double worst = 0, error2 = 0, typed2 = 0;
    int64_t counted = 0;
    for (int64_t row = 0; row < m; ++row) {
      const double largest = largest_x(row);
      for (int64_t column = 0; column < columns_; ++column) {
        const Element e = element(row, column, reference, tolerance, largest);
        const double got = load(dtype_, y.data(), row * columns_ + column);
        if (dtype_ == DType::kFloat16 && std::fabs(e.exact) + e.bound > 65000) {
          if (std::isnan(got))
            worst = 1e30;  // close to overflow: infinite or finite, both are right
          continue;
        }
        const double error = std::fabs(got - e.exact);
        const double bound = e.bound + 1.01 * u * (std::fabs(e.exact) + e.bound) +
                             (dtype_ == DType::kFloat16 ? 0x1p-25 : 1e-30);
        if (!(error <= bound)) worst = std::isnan(error) ? 1e30 : std::fmax(worst, error / bound);
        if (e.condition == 0) continue;
        const double typed = rounded(dtype_, e.typed) - e.exact;
        error2 += error * error / (e.condition * e.condition);
        typed2 += typed * typed / (e.condition * e.condition);
        ++counted;
      }
    }
    expect(worst == 0, name(m) + ": element at " + std::to_string(worst) + " x its bound");
    const bool many = w_.n * w_.k >= 4096 && counted >= 1000 && !parts_.swiglu;
    if (dtype_ != DType::kFloat32 && many && tolerance.x_step == 0 &&
        parts_.activation_bits == 16) {
      const double n = static_cast<double>(counted);
      const double allowed = 1.3 * std::sqrt(typed2 / n) + 0x1p-21;
      expect(std::sqrt(error2 / n) <= allowed, name(m) + ": error " +
                                                   std::to_string(std::sqrt(error2 / n) / allowed) +
                                                   " x that of weights rounded to fp16");
    }
  }

  // An infinity or NaN in a row of x shows in all of that row, and nowhere else.
  void check_special_values(Random& random, int64_t m, const Launch& launch,
                            const RunOptions& options = {}) {
    const auto clean = run(m, launch, options);
    const int64_t inf_row = random.below(m), nan_row = random.below(m);
    set_x(inf_row, random.below(w_.k), random.below(2) ? INFINITY : -INFINITY);
    if (nan_row != inf_row) set_x(nan_row, random.below(w_.k), NAN);
    const auto y = run(m, launch, options);
    bool same = true;
    for (int64_t i = 0; i < m * columns_; ++i) {
      const int64_t row = i / columns_;
      if (row == inf_row || row == nan_row) {
        // SwiGLU closes its gate on -inf: 0 times a finite number.
        same = same && (parts_.swiglu || !std::isfinite(load(dtype_, y.data(), i)));
      } else {
        same = same && std::memcmp(&y[i * bytes_], &clean[i * bytes_], bytes_) == 0;
      }
    }
    expect(same, name(m) + ": special values");
  }

 private:
  struct Element {
    double exact, bound, condition, typed;
  };

  std::vector<uint8_t> fill(Random& random, int64_t count, double mean = 0) const {
    std::vector<uint8_t> out(count * bytes_);
    for (int64_t i = 0; i < count; ++i) {
      store(dtype_, out.data(), i, static_cast<float>(random.normal() + mean));
    }
    return out;
  }

  double scaled_x(int64_t row, int64_t column) const {
    double v = load(dtype_, x_.data(), row * w_.k + column);
    if (parts_.input_scale) v *= load(dtype_, input_scale_.data(), column);
    return v;
  }
  double largest_x(int64_t row) const {
    double largest = 0;
    for (int64_t c = 0; c < w_.k; ++c) largest = std::fmax(largest, std::fabs(scaled_x(row, c)));
    return largest;
  }

  // Row `row` of x as QLinearParams defines it. The fp16 version is scaled to the row's size.
  void prepare_row(int64_t row, std::vector<double>& x, std::vector<double>& typed,
                   std::vector<double>& tie) const {
    const int64_t group = std::min<int64_t>(w_.format.group_size, w_.k);
    const double largest = largest_x(row);
    const double unit = largest > 0 && std::isfinite(largest) ? std::exp2(std::ilogb(largest)) : 1;
    for (int64_t begin = 0; begin < w_.k; begin += group) {
      const int64_t end = std::min(begin + group, w_.k);
      double step = 0;
      for (int64_t c = begin; c < end; ++c) step = std::fmax(step, std::fabs(scaled_x(row, c)));
      step /= 127;
      for (int64_t c = begin; c < end; ++c) {
        const int64_t i = row * w_.k + c;
        x[i] = scaled_x(row, c);
        tie[i] = 0;
        if (parts_.activation_bits == 8 && step > 0) {
          const double level = x[i] / step;
          if (std::fabs(level - std::floor(level) - 0.5) < 1e-4) tie[i] = step;
          x[i] = std::nearbyint(level) * step;
        }
        typed[i] = rounded(DType::kFloat16, x[i] / unit) * unit;
      }
    }
  }

  // Row n of w before the activation: exact value, bound, condition and the typed product's.
  Element sum(int64_t m, int64_t n, const std::vector<Reference>& reference,
              const Tolerance& tolerance, double largest) const {
    const Reference& r = reference[m * w_.n + n];
    double plain = 0, condition = 0;
    const auto add = [&](double v) {
      plain += v;
      condition += std::fabs(v);
    };
    if (parts_.bias) add(load(dtype_, bias_.data(), n));
    if (parts_.addend) add(load(dtype_, addend_.data(), m * w_.n + n));
    for (int64_t i = 0; i < parts_.rank; ++i) {
      add(static_cast<double>(load(dtype_, low_rank_x_.data(), m * parts_.rank + i)) *
          load(dtype_, low_rank_w_.data(), n * parts_.rank + i));
    }
    const bool wide = dtype_ == DType::kFloat32, dynamic = w_.format.scheme == Scheme::kInt8Dynamic;
    Element e{r.exact + plain, 0, r.condition + condition, r.typed + plain};
    e.bound = (wide || dynamic ? 0x1p-19 : 0x1p-17) * r.raw + 0x1p-19 * condition + r.ties;
    if (!wide && !dynamic) {
      const int roundings = tolerance.rounded_weights + w_.format.has_book() +
                            (parts_.input_scale || parts_.activation_bits == 8);
      e.bound += roundings * 0x1.02p-11 * r.condition + tolerance.x_step * largest * r.weights;
    }
    return e;
  }

  Element element(int64_t row, int64_t column, const std::vector<Reference>& reference,
                  const Tolerance& tolerance, double largest) const {
    Element e;
    if (parts_.swiglu) {
      const int64_t n = column / 8 * 16 + column % 8;
      const Element gate = sum(row, n, reference, tolerance, largest);
      const Element up = sum(row, n + 8, reference, tolerance, largest);
      const auto silu = [](double v) { return v / (1 + std::exp(-v)); };
      // |silu'| < 1.1; the device's exponential adds 2^-20 relative for each unit of its argument.
      const double slack = 1.1 * gate.bound + (0x1p-20 * std::fabs(gate.exact) + 0x1p-21) *
                                                  std::fabs(silu(gate.exact));
      e.exact = silu(gate.exact) * up.exact;
      e.typed = silu(gate.typed) * up.typed;
      e.bound = std::fabs(silu(gate.exact)) * up.bound + slack * (std::fabs(up.exact) + up.bound);
      e.condition = gate.condition * up.condition;
    } else {
      e = sum(row, column, reference, tolerance, largest);
    }
    if (parts_.residual) {
      const double v = load(dtype_, residual_.data(), row * columns_ + column);
      e.exact += v;
      e.typed += v;
      e.condition += std::fabs(v);
      e.bound += 0x1p-23 * std::fabs(v);
    }
    return e;
  }

  const Weight& w_;
  DType dtype_;
  Parts parts_;
  size_t bytes_;
  int64_t columns_;  // of y
  DeviceBuffer<uint8_t> packed_;
  DeviceBuffer<uint16_t> meta_;
  DeviceBuffer<uint8_t> codes_;
  DeviceBuffer<uint16_t> scale_, zero_;
  std::vector<uint8_t> x_, bias_, input_scale_, addend_, low_rank_x_, low_rank_w_, residual_;
  std::vector<DeviceBuffer<uint8_t>> on_device_;
};

}  // namespace kvopt::test
