// SPDX-License-Identifier: Apache-2.0
// W8A8: int8 x int8 with int32 sums, scales per row of x and per row of w. Which kernel:
//
//   M <= 8, K <= 8192                    weights straight to registers   qlinear_w8a8_stream.cu
//   sm_90, whole 16-byte pieces of y     warpgroup instructions          qlinear_w8a8_wgmma.cu
//   else, by how many tiles there are    mma.sync, three tile sizes device/qlinear_w8a8_mma.cuh
//
// One or two rows are faster without a prologue: qlinear_w8a8_gemv.cu.
#include <cuda_runtime_api.h>

#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/qlinear_w8a8_mma.cuh"
#include "cuda/qlinear_w8a8.h"

namespace kvopt::cuda {
namespace {

template <typename Tile>
int launch_tile(const w8a8::Operands& o, const RowsEpilogue& epilogue, const Device& device,
                cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(o.m, Tile::kM)),
                  static_cast<unsigned>(ceil_div(o.n, Tile::kN)));
  return launch_kernel(w8a8::mma_kernel<Tile>, grid, Tile::kThreads,
                       Tile::shared_bytes(device.sm >= 80), device.sm >= 90, stream, o, epilogue);
}

}  // namespace

int launch_w8a8(const QLinearProblem& p, const Int8Rows& x, const Device& device,
                cudaStream_t stream) {
  if (p.k > w8a8::kMaxColumns || p.format.scheme != Scheme::kInt8Dynamic) {
    return cudaErrorInvalidValue;
  }
  const w8a8::Operands o{
      x.x, reinterpret_cast<const int8_t*>(p.packed), x.pitch, mma16::row_pitch(p.k), p.m,
      p.n, static_cast<int>(mma16::row_pitch(p.k))};
  const RowsEpilogue epilogue = make_rows_epilogue(p, x.row_scale);
  if (w8a8::stream_fits(o, device)) return w8a8::launch_stream(o, epilogue, device, stream);
  if (device.sm == 90 && epilogue.words && w8a8::wgmma_is_compiled()) {
    return w8a8::launch_wgmma(o, epilogue, device, stream);
  }
  const auto tiles = [&](int m, int n) { return ceil_div(p.m, m) * ceil_div(p.n, n); };
  if (tiles(128, 128) >= device.multiprocessors && p.m > 64) {
    return launch_tile<w8a8::Tile<128, 128, 64, 2, 4, 1>>(o, epilogue, device, stream);
  }
  if (p.m > 32 && tiles(64, 64) >= device.multiprocessors) {
    return launch_tile<w8a8::Tile<64, 64, 128, 2, 2, 2>>(o, epilogue, device, stream);
  }
  return launch_tile<w8a8::Tile<32, 32, 128, 1, 2, 4>>(o, epilogue, device, stream);
}

}  // namespace kvopt::cuda
