// SPDX-License-Identifier: Apache-2.0
// Host side of the product on Hopper's warpgroup instructions: whether it can run, the choice of a
// tile, the tensor map of x.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <iterator>

#include "cuda/device/qlinear_wgmma_launch.cuh"

namespace kvopt::cuda {
namespace wgmma {

namespace {

// What a multiprocessor takes for 64 columns, in nanoseconds, measured on an H200 with codes of 4
// bits: with one block, and with as many as fit. reduce: a cluster's common sum; share, other: sums
// that go to another block through memory, and each further block with a part of the same tile.
struct ShapeFacts {
  int rows_x, resident;
  double alone, full, reduce, share, other;
};
constexpr ShapeFacts kShapes[] = {{16, 2, 330, 420, 2000, 900, 670},
                                  {32, 2, 340, 445, 2500, 1800, 700},
                                  {64, 2, 364, 540, 3500, 3100, 830},
                                  {128, 1, 440, 440, 0, 3200, 1080},
                                  {256, 1, 800, 800, 0, 6500, 900}};
constexpr int kShapeCount = static_cast<int>(std::size(kShapes));
constexpr int kRowsW = 128;          // of w, in every shape
constexpr double kDeviceBytes = 31;  // a nanosecond and multiprocessor: 4.1 TB/s of 132
constexpr double kStart = 2000;      // from launch to the first multiplication, and the output
constexpr double kCrowded = 8000;    // clusters of four or eight that wait for multiprocessors
constexpr double kCluster8 = 2800;   // clusters of eight, which start late
constexpr int kMostShared = 4;       // tiles of a block up to which runs may be even

// Nanoseconds of a product in this shape.
double time_of(const QLinearProblem& p, const ShapeFacts& s, int splits, bool even,
               int multiprocessors) {
  const int64_t tiles = ceil_div(p.m, s.rows_x) * ceil_div(p.n, kRowsW);
  const double read = kRowsW * 8.0 * p.format.bits / kDeviceBytes;
  const double full = std::max(s.full, s.resident * read);
  if (even) {
    const int64_t blocks = static_cast<int64_t>(multiprocessors) * s.resident;
    return kStart + full * 4 * static_cast<double>(ceil_div(tiles * p.blocks, 4 * blocks)) +
           s.share + static_cast<double>(ceil_div(blocks, tiles)) * s.other;
  }
  const int64_t each = ceil_div(tiles * splits, multiprocessors);  // of the busiest multiprocessor
  double columns64 = static_cast<double>(each / s.resident) * full +
                     static_cast<double>(each % s.resident) * std::max(s.alone, read);
  // The blocks of a larger cluster are put on few multiprocessors.
  if (splits > 2) columns64 = static_cast<double>(ceil_div(each, s.resident)) * full;
  return kStart + columns64 * static_cast<double>(ceil_div(p.blocks, splits)) +
         (splits > 1 ? s.reduce : 0) + (splits > 2 && each > 1 ? kCrowded : 0) +
         (splits == 8 ? kCluster8 : 0);
}

}  // namespace

Choice best_choice(const QLinearProblem& p, const Device& device) {
  Choice best{3, 1, false};
  double least = 0;
  for (int i = 0; i < kShapeCount; ++i) {
    const ShapeFacts& s = kShapes[i];
    if (has_fine_groups(p) && i != 0 && i != 3) continue;
    // Several tiles of x would make the same codes weights again.
    if (i < 2 && s.rows_x < std::min(p.m, 64)) continue;
    const auto consider = [&](int splits, bool even) {
      const double time = time_of(p, s, splits, even, device.multiprocessors);
      if (least != 0 && time >= least) return;
      least = time;
      best = {i, splits, even};
    };
    // With more rows of x a cluster's common sum costs more than idle multiprocessors.
    const int most = i <= 2 ? kMaxSplits : 1;
    for (int splits = 1; splits <= most && p.blocks >= 4 * splits; splits *= 2) {
      consider(splits, false);
    }
    const int64_t tiles = ceil_div(p.m, s.rows_x) * ceil_div(p.n, kRowsW);
    if (tiles <= kMostShared * static_cast<int64_t>(device.multiprocessors) && p.blocks <= 8192) {
      consider(1, true);
    }
  }
  return best;
}

// The driver's function, without linking the driver.
int encode_x(CUtensorMap& map, const HalfRows& x, int m, int rows) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(function)
               : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(x.pitch), static_cast<cuuint64_t>(m)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(x.pitch) * sizeof(__half)};
  const cuuint32_t box[] = {kBlockColumns, static_cast<cuuint32_t>(rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<__half*>(x.x), sizes, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace wgmma

bool wgmma_fits(const QLinearProblem& p, const Device& device) {
  if (device.sm != 90 || mma16::is_row_major(p.format) || p.m < 1) return false;
  static const bool compiled = wgmma::w4_is_compiled();
  return compiled;
}

int64_t wgmma_partial_bytes(const QLinearProblem& p, const Device& device) {
  const wgmma::Choice choice = wgmma::best_choice(p, device);
  if (!choice.even) return 0;
  const wgmma::ShapeFacts& s = wgmma::kShapes[choice.shape];
  const int64_t blocks = static_cast<int64_t>(device.multiprocessors) * s.resident;
  return blocks * (static_cast<int64_t>(s.rows_x) * wgmma::kRowsW * 4 + 8);
}

int launch_wgmma(const QLinearProblem& p, const HalfRows& x, void* partials, const Device& device,
                 cudaStream_t stream) {
  if (p.format.has_book()) return wgmma::launch_book(p, x, partials, device, stream);
  switch (p.format.bits) {
    case 2:
      return wgmma::launch_w2(p, x, partials, device, stream);
    case 3:
      return wgmma::launch_w3(p, x, partials, device, stream);
    case 4:
      return wgmma::launch_w4(p, x, partials, device, stream);
    default:
      return wgmma::launch_w8(p, x, partials, device, stream);
  }
}

}  // namespace kvopt::cuda
