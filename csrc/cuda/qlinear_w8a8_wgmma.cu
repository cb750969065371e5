// SPDX-License-Identifier: Apache-2.0
// W8A8 on sm_90a: tensor maps, choice of the tile, launches.
//
// Cycles of a tile, as measured: so many per 128 columns of K, and some to finish it, times how
// often the tiles fill the chip, and some once, to start. Two blocks that share the columns have
// half of them to multiply and 4000 cycles more to add up. No choice is faster than the weight
// arrives. The smallest sum wins, of equal ones the smaller tile, which leaves less to do at the
// end.
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda/device/qlinear_w8a8_wgmma.cuh"
#include "cuda/qlinear_w8a8.h"

namespace kvopt::cuda::w8a8 {
namespace {

// The driver's function, found at run time: no link to libcuda.
PFN_cuTensorMapEncodeTiled_v12000 find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &result);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) function = nullptr;
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

// (rows, columns) bytes, `pitch` apart, in boxes of box_rows x 128.
bool make_map(CUtensorMap& map, const int8_t* data, int64_t rows, int64_t columns, int64_t pitch,
              int box_rows) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encode();
  if (encode == nullptr) return false;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(pitch)};
  const cuuint32_t box[2] = {kStageColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t step[2] = {1, 1};
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t*>(data), size, stride,
                box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename T>
int launch_tile(const Operands& o, const RowsEpilogue& epilogue, const Device& device, int split,
                cudaStream_t stream) {
  TileOrder order{};
  order.x_rows = std::min<int>(T::kRows, static_cast<int>(ceil_div(o.m, 8)) * 8);
  CUtensorMap x_map, w_map;
  if (!make_map(x_map, o.x, o.m, o.columns, o.x_pitch, order.x_rows) ||
      !make_map(w_map, o.w, o.n, o.columns, o.w_pitch, T::kColumns)) {
    return cudaErrorNotSupported;
  }
  order.columns = o.columns;
  order.row_tiles = static_cast<int>(ceil_div(o.m, T::kRows));
  order.column_tiles = static_cast<int>(ceil_div(o.n, T::kColumns));
  order.band = std::min(order.row_tiles, 16);
  order.split = split;
  const int64_t tiles = int64_t{order.row_tiles} * order.column_tiles;
  // Split blocks stay for one tile only.
  const int64_t clusters = split > 1 ? tiles : std::min<int64_t>(tiles, device.multiprocessors);
  cudaError_t error = cudaFuncSetAttribute(
      wgmma_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(split);
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * split));
  config.blockDim = dim3(T::kThreads);
  config.dynamicSmemBytes = T::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = split > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, wgmma_kernel<T>, x_map, w_map, order, epilogue);
}

struct Choice {
  int tile, split;
  double cycles;
};

Choice choose(const Operands& o, const Device& device) {
  struct Cost {
    int rows, columns;
    double step, finish, start;
  };
  constexpr Cost kCosts[] = {{128, 256, 1150, 3000, 5300}, {128, 128, 640, 2000, 0},
                             {64, 128, 440, 2000, 0},      {128, 64, 430, 1500, 0},
                             {64, 64, 310, 1500, 0},       {64, 32, 270, 1000, 0}};
  constexpr double kBytesOfCycle = 2300;  // 4.1 TB/s
  const int64_t steps = ceil_div(o.columns, kStageColumns);
  const double least = static_cast<double>(o.n) * o.columns / kBytesOfCycle;
  Choice best{0, 1, 0};
  for (int tile = 0; tile < 6; ++tile) {
    const Cost& c = kCosts[tile];
    const int64_t tiles = ceil_div(o.m, c.rows) * ceil_div(o.n, c.columns);
    for (int split = 1; split <= (c.columns == 256 ? 1 : 2); ++split) {
      if (split > 1 && (tiles * split > device.multiprocessors || steps < 4 * split)) break;
      const int64_t turns = ceil_div(tiles * split, device.multiprocessors);
      const double turn =
          static_cast<double>(ceil_div(steps, split)) * c.step + c.finish + (split > 1 ? 4000 : 0);
      const double cycles = std::max(least, static_cast<double>(turns) * turn + c.start);
      if (best.cycles == 0 || cycles <= best.cycles) best = {tile, split, cycles};
    }
  }
  return best;
}

}  // namespace

// Whether the code that will run on this GPU has the instructions: without them the kernel is empty
// and has no barriers.
bool wgmma_is_compiled() {
  static const bool compiled = [] {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, wgmma_kernel<WarpgroupTile<2, 256, 4>>) ==
               cudaSuccess &&
           attributes.sharedSizeBytes > 0;
  }();
  return compiled;
}

int launch_wgmma(const Operands& o, const RowsEpilogue& epilogue, const Device& device,
                 cudaStream_t stream) {
  const Choice choice = choose(o, device);
  const auto launch = [&](auto tile) {
    return launch_tile<decltype(tile)>(o, epilogue, device, choice.split, stream);
  };
  switch (choice.tile) {
    case 0:
      return launch(WarpgroupTile<2, 256, 4>());
    case 1:
      return launch(WarpgroupTile<2, 128, 6>());
    case 2:
      return launch(WarpgroupTile<1, 128, 8>());
    case 3:
      return launch(WarpgroupTile<2, 64, 8>());
    case 4:
      return launch(WarpgroupTile<1, 64, 12>());
    default:
      return launch(WarpgroupTile<1, 32, 16>());
  }
}

}  // namespace kvopt::cuda::w8a8
