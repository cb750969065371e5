// SPDX-License-Identifier: Apache-2.0
// Random quantised products on CUDA, for every test of a product kernel: a weight
// (qlinear_cuda_weight.h), activations and the optional parts of QLinearParams. `Product` runs any
// function of (params, stream), eagerly or from a CUDA graph, with guard bands around y, and
// compares with the reference (qlinear_cuda_reference.h, which has the tolerances).
#pragma once

#include <algorithm>
#include <functional>
#include <string>

#include "check_cuda.h"
#include "common/params.h"
#include "qlinear_cuda_reference.h"
#include "qlinear_cuda_weight.h"

namespace kvopt::test {

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
    Score score(dtype_);
    for (int64_t row = 0; row < m; ++row) {
      const double largest = largest_x(row);
      for (int64_t column = 0; column < columns_; ++column) {
        score.add(element(row, column, reference, tolerance, largest),
                  load(dtype_, y.data(), row * columns_ + column));
      }
    }
    // x * scale is rounded to dtype: u / sqrt(3) for each of K numbers, normal ones (kurtosis 3).
    const double shared =
        parts_.input_scale && m > 0
            ? (parts_.swiglu ? 2 : 1) * unit_roundoff(dtype_) / std::sqrt(double(m * w_.k))
            : 0;
    score.judge(name(m), w_.n * w_.k, tolerance.x_step, shared);
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

  // Row n of w before the activation.
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
    Element e;
    e.exact = r.exact + plain;
    e.typed = r.typed + plain;
    e.condition = r.condition + condition;
    e.ties = r.ties > 0;
    const bool x_rounded = parts_.input_scale || parts_.activation_bits == 8;
    e.bound = product_bound(r, w_.format, w_.zeros, dtype_, w_.k, x_rounded, largest, tolerance) +
              0x1p-24 * static_cast<double>(parts_.rank + 4) * (std::fabs(r.exact) + condition);
    return e;
  }

  Element element(int64_t row, int64_t column, const std::vector<Reference>& reference,
                  const Tolerance& tolerance, double largest) const {
    Element e;
    if (parts_.swiglu) {
      const int64_t n = column / 8 * 16 + column % 8;
      e = swiglu_of(sum(row, n, reference, tolerance, largest),
                    sum(row, n + 8, reference, tolerance, largest));
    } else {
      e = sum(row, column, reference, tolerance, largest);
    }
    if (parts_.residual) {
      const double v = load(dtype_, residual_.data(), row * columns_ + column);
      e.bound += 0x1p-24 * (std::fabs(v) + std::fabs(e.exact) + e.bound);
      e.exact += v;
      e.typed += v;
      e.condition += std::fabs(v);
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
