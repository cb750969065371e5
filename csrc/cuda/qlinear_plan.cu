// SPDX-License-Identifier: Apache-2.0
// The dispatch, from top to bottom:
//
//   W8A8, few rows                        int8 matrix-vector     qlinear_w8a8_gemv.cu
//   W8A8                                  int8 tensor cores      qlinear_w8a8.cu
//   many rows (thresholds below)          dequantise, cuBLAS     the op layer
//   fp32 activations                      fp32 arithmetic        qlinear_simt.cu
//   few rows, x fits in shared memory     matrix-vector          qlinear_gemv*.cu
//   small weight, up to 64 rows           mma.sync               qlinear_gemm*.cu
//   sm_90, code for sm_90a is here        wgmma                  qlinear_wgmma*.cu
//   else                                  mma.sync
//
// The tiled products take fp16 rows. Where x is not that already (bf16, an input scale, int8
// rounding, rows that do not start on 16 bytes) qlinear_prologue.cu writes them to the workspace,
// with a power of two per row, so bf16 works on sm_75 as well. int8 activations (activation_bits 8)
// never go dense: cuBLAS knows no scale per token and group.
#include <cstdarg>
#include <cstdio>
#include <limits>

#include "cuda/device/qlinear_gemm_plan.cuh"
#include "cuda/qlinear.h"
#include "cuda/qlinear_plan.h"
#include "cuda/wquant.h"

namespace kvopt::cuda {
namespace {

// Rows of x up to which the matrix-vector product is the fastest, measured on an H200: at 8 it is
// even with the tiles on the largest weights and ahead on small ones, at 16 up to 2.8 times slower.
constexpr int64_t kGemvRows = 8;

// Rows of x from which a dense product on the dequantised weight is faster. Writing the weight in
// 16 bits and reading it again costs the time of 4 bytes a weight; from M rows on that is less than
// 2 M (1 / our rate - 1 / cuBLAS's rate).
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr int64_t kDenseRowsFp32 = 16;        // fp32 arithmetic has no tensor cores
constexpr int64_t kDenseRowsGemmSm90 = 224;   // measured on an H200: even at 256
constexpr int64_t kDenseRowsGemmSm80 = 768;   // by that formula, mma.sync at 3/4 of cuBLAS's rate
constexpr int64_t kDenseRowsGemmSm75 = 1024;  // the same, with a T4's slower memory
// Measured on an H200 up to M = 8192: wgmma reaches 0.95 to 0.99 of cuBLAS on fp16 weights, the
// dense way 0.90 to 0.97.
constexpr int64_t kDenseRowsWgmma = kNever;

// Weights so small that the wgmma product has to split K over clusters, whose common sum costs more
// than mma.sync's slower tiles. Measured on an H200 with 4096 x 4096 and 4 bits, microseconds of
// mma.sync and wgmma: M = 16 8.8 and 11.0, 32 9.7 and 11.6, 64 12.5 and 14.6, 128 20 and 17.7.
constexpr int64_t kGemmRowsSm90 = 64;
constexpr int64_t kGemmWeightsSm90 = int64_t{4096} * 4096;

constexpr int64_t kAlign = 256;
constexpr int64_t align(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

// The fused path.
QLinearPath fused_path(const QLinearProblem& q, const Device& device, const char*& why) {
  if (q.format.scheme == Scheme::kInt8Dynamic) {
    if (w8a8_gemv_fits(q, device)) {
      why = "int8 activations, so few rows that the weight's bytes decide";
      return QLinearPath::kW8A8Gemv;
    }
    why = "int8 activations, enough rows for tiles on the int8 tensor cores";
    return QLinearPath::kW8A8;
  }
  if (q.dtype == DType::kFloat32) {
    why = "fp32 activations, which tensor cores would round";
    return QLinearPath::kSimt;
  }
  if (q.m <= kGemvRows && gemv_fits(q, device)) {
    why = "so few rows that the weight's bytes decide, and x fits in shared memory";
    return QLinearPath::kGemv;
  }
  if (device.sm == 90 && q.m <= kGemmRowsSm90 && int64_t{q.n} * q.k <= kGemmWeightsSm90) {
    why = "enough rows for tiles, and a weight too small for wgmma's";
    return QLinearPath::kGemm;
  }
  if (wgmma_fits(q, device)) {
    why = "enough rows for tiles, and the chip has wgmma";
    return QLinearPath::kWgmma;
  }
  why = device.sm == 90 ? "enough rows for tiles, and no wgmma: no sm_90a code in this build, or "
                          "no GPU to ask for it"
                        : "enough rows for tiles; mma.sync is what the chip has";
  return QLinearPath::kGemm;
}

int64_t dense_rows(QLinearPath fused, const QLinearProblem& q, const Device& device) {
  if (q.activation_bits == 8) return kNever;
  switch (fused) {
    case QLinearPath::kSimt:
      return kDenseRowsFp32;
    case QLinearPath::kWgmma:
      return kDenseRowsWgmma;
    case QLinearPath::kGemm:
      if (device.sm >= 90) return kDenseRowsGemmSm90;
      if (device.sm >= 80) return kDenseRowsGemmSm80;
      // cuBLAS has no bf16 tensor-core product on sm_75.
      return q.dtype == DType::kBFloat16 ? kNever : kDenseRowsGemmSm75;
    default:
      return kNever;
  }
}

}  // namespace

bool is_valid_product(const QLinearParams& p) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() / 2;
  return p.m >= 0 && p.m <= kMax && p.n <= kMax && p.k <= kMax &&
         is_valid_weight(p.format, p.n, p.k) && (!p.swiglu || p.n % 16 == 0) && p.rank >= 0 &&
         p.rank <= kMax && (p.activation_bits == 16 || p.activation_bits == 8);
}

QLinearPlan plan_qlinear(const QLinearParams& p, const Device& device) {
  const QLinearProblem q = make_problem(p);
  QLinearPlan plan{};
  plan.fused = fused_path(q, device, plan.why);
  plan.path = plan.fused;
  if (p.m >= dense_rows(plan.fused, q, device)) {
    plan.path = QLinearPath::kDense;
    plan.why = plan.fused == QLinearPath::kSimt
                   ? "so many fp32 rows that arithmetic decides, which cuBLAS does faster"
                   : "so many rows that arithmetic decides, and cuBLAS's lead pays for the weight";
  }
  int64_t element = 2;
  switch (plan.fused) {
    case QLinearPath::kGemm:
    case QLinearPath::kWgmma:
      plan.prologue = needs_prologue(q);
      plan.pitch = plan.prologue ? ceil_div(p.k, 8) * 8 : p.k;
      break;
    case QLinearPath::kW8A8:
      plan.prologue = true;
      plan.pitch = mma16::row_pitch(p.k);
      element = 1;
      break;
    case QLinearPath::kSimt:
      plan.prologue = p.input_scale != nullptr || q.activation_bits == 8;
      plan.pitch = p.k;
      element = 4;
      break;
    default:
      break;
  }
  const bool scales = plan.prologue && plan.fused != QLinearPath::kSimt;
  plan.scales_at = plan.prologue ? align(p.m * plan.pitch * element) : 0;
  plan.partials_at = plan.scales_at + (scales ? align(p.m * 4) : 0);
  const bool split = plan.fused == QLinearPath::kWgmma;
  plan.workspace_bytes = plan.partials_at + (split ? align(wgmma_partial_bytes(q, device)) : 0);
  return plan;
}

namespace {

struct Chip {
  int capability;
  const char* name;
  int multiprocessors;
  double bytes_per_second, flops, int8_ops, fp32_flops;
};

// Datasheets, of the chip that is most common with the capability.
constexpr Chip kChips[] = {{75, "T4", 40, 320e9, 65e12, 130e12, 8.1e12},
                           {80, "A100", 108, 2039e9, 312e12, 624e12, 19.5e12},
                           {86, "A10", 72, 600e9, 125e12, 250e12, 31e12},
                           {89, "L40S", 142, 864e9, 362e12, 733e12, 92e12},
                           {90, "H200", 132, 4800e9, 989e12, 1979e12, 67e12}};

const Chip& chip_of(int capability) {
  const Chip* best = &kChips[0];
  for (const Chip& c : kChips) {
    if (c.capability <= capability) best = &c;
  }
  return *best;
}

const char* name_of(QLinearPath path) {
  switch (path) {
    case QLinearPath::kGemv:
      return "gemv (matrix-vector on tensor cores)";
    case QLinearPath::kWgmma:
      return "wgmma (tiles, warpgroup instructions)";
    case QLinearPath::kGemm:
      return "gemm (tiles, mma.sync)";
    case QLinearPath::kW8A8Gemv:
      return "w8a8 gemv (int8 matrix-vector)";
    case QLinearPath::kW8A8:
      return "w8a8 (tiles, int8 tensor cores)";
    case QLinearPath::kSimt:
      return "simt (fp32 arithmetic)";
    default:
      return "dense (dequantise, then cuBLAS)";
  }
}

// snprintf that goes on where the last one ended.
class Text {
 public:
  Text(char* out, int size) : out_(out), left_(size) {
    if (left_ > 0) *out_ = 0;
  }
  __attribute__((format(printf, 2, 3))) void add(const char* format, ...) {
    if (left_ <= 0) return;
    va_list arguments;
    va_start(arguments, format);
    const int written = std::vsnprintf(out_, left_, format, arguments);
    va_end(arguments);
    const int used = written < 0 ? 0 : written < left_ ? written : left_ - 1;
    out_ += used;
    left_ -= used;
  }

 private:
  char* out_;
  int left_;
};

}  // namespace

bool prefers_dense(const QLinearParams& p) {
  Device device{};
  if (!is_valid_product(p) || query_device(device) != cudaSuccess) return false;
  return plan_qlinear(p, device).path == QLinearPath::kDense;
}

int64_t qlinear_workspace_bytes(const QLinearParams& p) {
  Device device{};
  if (!is_valid_product(p) || p.m == 0 || query_device(device) != cudaSuccess) return 0;
  return plan_qlinear(p, device).workspace_bytes;
}

int qlinear_explain(const QLinearParams& p, int capability, int multiprocessors, char* out,
                    int size) {
  Text text(out, size);
  Device device = device_of(
      capability, multiprocessors > 0 ? multiprocessors : chip_of(capability).multiprocessors);
  if (capability == 0) {
    if (const int error = query_device(device); error != cudaSuccess) {
      text.add("no CUDA device: %s", cudaGetErrorString(static_cast<cudaError_t>(error)));
      return error;
    }
  }
  if (!is_valid_product(p)) {
    text.add("no kernel: sizes or format out of range");
    return cudaErrorInvalidValue;
  }
  const QLinearProblem q = make_problem(p);
  const QLinearPlan plan = plan_qlinear(p, device);
  text.add("%s: %s.", name_of(plan.path), plan.why);
  if (plan.path == QLinearPath::kGemm) {
    const gemm::ShapeInfo shape = gemm::choose_shape(q, device);
    text.add(" Tile %d rows of x by %d of w, K over %d warps, %lld blocks on %d multiprocessors.",
             shape.rows_x(), shape.rows_w(), shape.warps_k,
             static_cast<long long>(ceil_div(p.m, shape.rows_x()) * ceil_div(p.n, shape.rows_w())),
             device.multiprocessors);
  }
  if (plan.prologue) {
    text.add(" x is prepared first (%s), %lld bytes of workspace.",
             q.format.scheme == Scheme::kInt8Dynamic ? "int8 with a scale per token"
             : plan.fused == QLinearPath::kSimt      ? "input scale, int8 rounding"
                                                     : "fp16 with a power of two per row",
             static_cast<long long>(plan.workspace_bytes));
  }
  const Chip& chip = chip_of(device.sm);
  const double weight = static_cast<double>(mma16::packed_bytes(p.format, p.n, p.k)) +
                        2.0 * static_cast<double>(mma16::meta_count(p.format, p.n, p.k));
  const double activations = static_cast<double>(dtype_bytes(p.dtype)) *
                             static_cast<double>(p.m * p.k + p.m * (p.swiglu ? p.n / 2 : p.n));
  const double operations =
      2.0 * static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k);
  const bool dynamic = p.format.scheme == Scheme::kInt8Dynamic;
  const double rate = dynamic                      ? chip.int8_ops
                      : p.dtype == DType::kFloat32 ? chip.fp32_flops
                                                   : chip.flops;
  text.add(
      " Bytes: %.3g MB of weight and scales, %.3g MB of activations; %.3g GFLOP. Floor by "
      "the datasheet of the %s: %.3g us for the bytes, %.3g us for the arithmetic; fp16 weights "
      "would "
      "need %.3g us.",
      weight * 1e-6, activations * 1e-6, operations * 1e-9, chip.name,
      (weight + activations) / chip.bytes_per_second * 1e6, operations / rate * 1e6,
      (2.0 * static_cast<double>(p.n * p.k) + activations) / chip.bytes_per_second * 1e6);
  // Why not the others.
  text.add(" Not taken:");
  if (dynamic) {
    text.add(" every path for 16-bit activations, since the format asks for int8 ones");
    if (plan.path == QLinearPath::kW8A8) text.add("; w8a8 gemv (more rows than it holds)");
    text.add(".");
    return cudaSuccess;
  }
  const char* separator = " ";
  const auto other = [&](QLinearPath path, const char* reason) {
    if (plan.path == path) return;
    text.add("%s%s, %s", separator, name_of(path), reason);
    separator = "; ";
  };
  const bool wide = p.dtype == DType::kFloat32;
  other(QLinearPath::kGemv, wide                   ? "it rounds x to 16 bits"
                            : gemv_fits(q, device) ? "slower at so many rows"
                                                   : "more rows, or a longer x, than it holds");
  other(QLinearPath::kWgmma, wide              ? "it rounds x to 16 bits"
                             : device.sm != 90 ? "the chip has none"
                             : plan.path == QLinearPath::kGemm && q.m <= kGemmRowsSm90
                                 ? "the weight is too small, or no code for it in this build"
                             : plan.path == QLinearPath::kGemv
                                 ? "tiles pay from more rows on"
                                 : "no code for it in this build, or slower at so many rows");
  other(QLinearPath::kGemm, wide ? "it rounds x to 16 bits"
                            : plan.path == QLinearPath::kGemv
                                ? "tiles pay from more rows on"
                                : "half the rate of what was chosen at many rows");
  other(QLinearPath::kSimt, wide ? "no tensor cores" : "for fp32 activations only");
  if (plan.path != QLinearPath::kDense) {
    const int64_t from = dense_rows(plan.fused, q, device);
    if (q.activation_bits == 8) {
      other(QLinearPath::kDense, "cuBLAS knows no int8 rounding per token and group");
    } else if (from == kNever) {
      other(QLinearPath::kDense, "it would write and read the weight in 16 bits");
    } else {
      text.add("%s%s, pays from %lld rows on", separator, name_of(QLinearPath::kDense),
               static_cast<long long>(from));
    }
  }
  text.add(".");
  return cudaSuccess;
}

}  // namespace kvopt::cuda
