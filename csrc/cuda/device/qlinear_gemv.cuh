// SPDX-License-Identifier: Apache-2.0
// y (M, N) = x (M, K) w^T for M <= 8: a matrix-vector product on the tensor cores.
//
//   K: units of 128 or 256 columns, dealt to the W warps of a block in turn
//   ┌──────┬──────┬─── ─ ─ ───┬──────┬──────┬─── ─ ─
//   │  w0  │  w1  │           │ wW-1 │  w0  │            16 rows of w: a tile, operand A
//   └──────┴──────┴─── ─ ─ ───┴──────┴──────┴─── ─ ─
//   x waits in shared memory and is operand B, 16 x 8: its columns from M on repeat row M-1 and are
//   dropped at the end.
//
// A lane loads 16 bytes of codes = its A operand of four (4 bits) or two (8 bits) multiplications,
// turns codes into (q - z) in registers, multiplies, and folds a group's sum into the row's sum
// with the scale, in fp32. The partial sums of the warps are added in shared memory in a fixed
// order. Blocks stay and walk over the tiles with stride gridDim, the next unit's codes (also the
// next tile's) under way while one is used. On sm_90 a block may arrive before the kernel in front
// is done: it asks for its first codes to come to L2, and waits.
//
// Bytes: N * K * bits / 8 of codes and 2 or 4 per group and row, once. Bound: memory. Some 2.5
// lane-instructions per 4-bit weight, of 3.6 that an H200 can issue at its full read rate.
// Limits: M rows of K must fit in shared memory; else the tiled product takes over.
#pragma once

#include <algorithm>

#include "cuda/device/copy.cuh"
#include "cuda/device/dequant.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/vec.cuh"

namespace kvopt::cuda {
namespace gemv {

constexpr int kMaxThreads = 512;
constexpr int kRowPad = 16;  // elements: 32 bytes, so that four rows of x meet all 32 banks

// How a warp walks along K. A unit is 2 KB of codes (four loads in flight per lane) where the
// registers for the group parameters allow it.
template <int kBits, int kGroupSteps>
struct Walk {
  static constexpr int kColumns = kBits == 4 && kGroupSteps >= 4 ? 256 : 128;
  static constexpr int kSteps = kColumns / kStepColumns;
  static constexpr int kLoads = kColumns * kBits / 256;  // 512 bytes each

  static KVOPT_HOST_DEVICE int units(const QLinearProblem& p) {
    return (p.blocks * kBlockColumns + kColumns - 1) / kColumns;
  }
  static KVOPT_HOST_DEVICE int x_stride(const QLinearProblem& p) {
    return units(p) * kColumns + kRowPad;
  }
  static int shared_bytes(const QLinearProblem& p, int warps) {
    return p.m * x_stride(p) * 2 + 2 * warps * 16 * p.m * 4;
  }
};

// Where a lane reads next: units warp, warp + W, ... of the tiles blockIdx, blockIdx + gridDim, ...
template <int kBits, bool kSymmetric, int kGroupSteps>
struct Cursor {
  using W = Walk<kBits, kGroupSteps>;
  const uint8_t* codes;
  const uint32_t* meta;  // of the tile's first group
  int tile, unit;

  __device__ __forceinline__ void enter(const QLinearProblem& p, int first_tile) {
    const int lane = threadIdx.x % 32;
    tile = first_tile;
    unit = threadIdx.x / 32;
    codes = p.packed + tile * p.tile_bytes + unit * (W::kLoads * 512) + lane * 16;
    meta = reinterpret_cast<const uint32_t*>(p.meta) +
           (static_cast<int64_t>(tile) * p.groups * 8 + lane / 4) * (kSymmetric ? 1 : 2);
  }
  // Asks for the warp's first two units, 128 bytes a lane, to come to L2. That is allowed before
  // the previous kernel is done, even if it writes these weights: L2 is where its writes arrive.
  __device__ __forceinline__ void prefetch(const QLinearProblem& p, int units) const {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    constexpr int kLines = W::kLoads * 4;
    int later = unit + lane / kLines * warps, where = tile;
    if (later >= units) {
      later = unit;
      where += gridDim.x;
    }
    const int64_t offset = static_cast<int64_t>(later * kLines + lane % kLines) * 128;
    if (lane < 2 * kLines && where < p.tiles && offset < p.tile_bytes) {
      prefetch_l2(p.packed + where * p.tile_bytes + offset);
    }
  }
  __device__ __forceinline__ void advance(const QLinearProblem& p, int units) {
    const int warps = blockDim.x / 32;
    unit += warps;
    codes += warps * (W::kLoads * 512);
    if (unit >= units) enter(p, tile + gridDim.x);
  }
};

// One lane's codes and group parameters of a unit.
template <int kBits, bool kSymmetric, int kGroupSteps>
struct Unit {
  using W = Walk<kBits, kGroupSteps>;
  static constexpr int kLoads = W::kLoads;
  static constexpr int kMetas = W::kSteps / kGroupSteps;
  uint4 codes[kLoads];
  uint2 meta[kMetas];  // symmetric: .x only

  __device__ __forceinline__ void load(const QLinearProblem& p,
                                       const Cursor<kBits, kSymmetric, kGroupSteps>& from) {
    // Loads left in the tile. Predicates rather than a branch: ptxas would hoist the use of the
    // previous unit, and with it the wait for its codes, above a branch, and these loads would
    // start late.
    const int here = from.tile < p.tiles ? p.blocks * (kBits / 4) - from.unit * kLoads : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      codes[i] = i < here ? load_stream(from.codes + i * 512) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kMetas; ++i) {
      const int step = from.unit * W::kSteps + i * kGroupSteps;
      int group;
      if constexpr (kGroupSteps >= 2) {
        group = min(step >> p.group_shift, p.groups - 1);
      } else {
        group = group_of_step(p, step);
      }
      if (here > 0) {
        if constexpr (kSymmetric) {
          meta[i].x = load_4(from.meta + group * 8);
        } else {
          meta[i] = load_8(from.meta + group * 16);
        }
      }
    }
  }

  template <typename T>
  __device__ __forceinline__ void rows(const QLinearProblem& p, int i, RowQuant& row0,
                                       RowQuant& row8) const {
    const __half2 first = *reinterpret_cast<const __half2*>(&meta[i].x);
    if constexpr (kSymmetric) {
      const __half zero = __float2half_rn(p.symmetric_zero);
      row0 = make_row_quant<T>(first.x, zero);
      row8 = make_row_quant<T>(first.y, zero);
    } else {
      const __half2 second = *reinterpret_cast<const __half2*>(&meta[i].y);
      row0 = make_row_quant<T>(first.x, first.y);
      row8 = make_row_quant<T>(second.x, second.y);
    }
  }

  template <typename T>
  __device__ __forceinline__ void dequant(uint32_t (&a)[4], int step, const RowQuant& row0,
                                          const RowQuant& row8) const {
    if constexpr (kBits == 4) {
      const uint4& c = codes[step / 4];
      const uint32_t word = step % 4 == 0 ? c.x : step % 4 == 1 ? c.y : step % 4 == 2 ? c.z : c.w;
      dequant_4bit<T>(a, word, row0, row8);
    } else {
      const uint4& c = codes[step / 2];
      dequant_8bit<T>(a, step % 2 ? c.z : c.x, step % 2 ? c.w : c.y, row0, row8);
    }
  }
};

// sum[4] += the unit's product with x; `x` points at this lane's row and first column of the unit.
template <typename T, int kBits, bool kSymmetric, int kGroupSteps>
__device__ __forceinline__ void multiply(float (&sum)[4], const QLinearProblem& p,
                                         const Unit<kBits, kSymmetric, kGroupSteps>& unit,
                                         const T* x) {
#pragma unroll
  for (int i = 0; i < unit.kMetas; ++i) {
    RowQuant row0, row8;
    unit.template rows<T>(p, i, row0, row8);
    bool rest = false;
    if constexpr (Operand<T>::kSplitZero && !kSymmetric) {
      rest = __any_sync(0xFFFFFFFF, has_rest(row0) || has_rest(row8));
      if (rest) {
        row0.scale *= Operand<T>::kRestScale;
        row8.scale *= Operand<T>::kRestScale;
      }
    }
    constexpr int kChains = kGroupSteps >= 4 ? 2 : 1;  // shortens the chain of dependent mma
    float c[kChains][4] = {};
#pragma unroll
    for (int s = 0; s < kGroupSteps; ++s) {
      const int step = i * kGroupSteps + s;
      const uint2 b = *reinterpret_cast<const uint2*>(x + step * kStepColumns);
      uint32_t a[4];
      unit.template dequant<T>(a, step, row0, row8);
      if constexpr (Operand<T>::kSplitZero && !kSymmetric) {
        if (rest) subtract_rest<T>(a, row0, row8);
      }
      mma_16x8x16(c[s % kChains], a, b, T());
    }
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) {
      sum[0] += c[chain][0] * row0.scale;
      sum[1] += c[chain][1] * row0.scale;
      sum[2] += c[chain][2] * row8.scale;
      sum[3] += c[chain][3] * row8.scale;
    }
  }
}

// Rows of x to shared memory, zeros from column k up to the padded width.
template <typename T>
__device__ __forceinline__ void stage_x(T* shared, const QLinearProblem& p, int stride) {
  const T* x = static_cast<const T*>(p.x);
  const int pieces = (stride - kRowPad) / 8;
  for (int row = 0; row < p.m; ++row) {
    for (int i = threadIdx.x; i < pieces; i += blockDim.x) {
      const T* source = x + static_cast<int64_t>(row) * p.k;
      uint4 piece;
      if (p.aligned) {
        piece = i * 8 < p.k ? load_16(source + i * 8) : make_uint4(0, 0, 0, 0);
      } else {
        piece = load_row_8(source, i * 8, p.k);
      }
      *reinterpret_cast<uint4*>(shared + row * stride + i * 8) = piece;
    }
  }
}

template <typename T, int kBits, bool kSymmetric, int kGroupSteps>
__device__ __forceinline__ void run_gemv(const QLinearProblem& p) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  using W = Walk<kBits, kGroupSteps>;
  const int units = W::units(p);
  const int stride = W::x_stride(p);
  T* const x = reinterpret_cast<T*>(shared);
  float* const partial = reinterpret_cast<float*>(x + p.m * stride);

  Unit<kBits, kSymmetric, kGroupSteps> first, second;
  Cursor<kBits, kSymmetric, kGroupSteps> cursor;
  cursor.enter(p, blockIdx.x);
  const auto load_next = [&](auto& unit) {
    unit.load(p, cursor);
    cursor.advance(p, units);
  };
  let_next_kernel_start();
  cursor.prefetch(p, units);
  wait_for_previous_kernel();
  load_next(first);
  stage_x(x, p, stride);
  __syncthreads();

  const T* const lane_x = x + min(lane / 4, p.m - 1) * stride + lane % 4 * 4;
  float sum[4] = {};
  int tile = blockIdx.x, unit = warp, parity = 0;
  int turn = threadIdx.x;  // the warps take turns at adding the partial sums

  // Uses one unit; after a tile's last one adds the warps' sums. True when the block's last tile is
  // done.
  const auto use = [&](const auto& loaded) -> bool {
    multiply<T>(sum, p, loaded, lane_x + unit * W::kColumns);
    unit += warps;
    if (unit < units) return false;
    float* const rows = partial + (parity * warps + warp) * 16 * p.m;
    const int column = lane % 4 * 2;
    if (column < p.m) {
      rows[column * 16 + lane / 4] = sum[0];
      rows[column * 16 + lane / 4 + 8] = sum[2];
    }
    if (column + 1 < p.m) {
      rows[(column + 1) * 16 + lane / 4] = sum[1];
      rows[(column + 1) * 16 + lane / 4 + 8] = sum[3];
    }
    __syncthreads();  // two buffers of partial sums, so one barrier a tile is enough
    for (int i = turn; i < 16 * p.m; i += blockDim.x) {
      const int row = tile * 16 + i % 16;
      const float* const source = partial + parity * warps * 16 * p.m + i;
      float total = 0;
#pragma unroll 4
      for (int w = 0; w < warps; ++w) total += source[w * 16 * p.m];
      if (row < p.n) {
        if (p.bias != nullptr) total += to_float(static_cast<const T*>(p.bias)[row]);
        static_cast<T*>(p.y)[static_cast<int64_t>(i / 16) * p.n + row] = from_float<T>(total);
      }
    }
    sum[0] = sum[1] = sum[2] = sum[3] = 0;
    parity ^= 1;
    turn = turn < 32 ? turn + blockDim.x - 32 : turn - 32;
    unit = warp;
    tile += gridDim.x;
    return tile >= p.tiles;
  };

  while (true) {
    load_next(second);
    if (use(first)) break;
    load_next(first);
    if (use(second)) break;
  }
}

template <typename T, int kBits, bool kSymmetric, int kGroupSteps>
__global__ void __launch_bounds__(kMaxThreads, 1) qlinear_gemv_kernel(const QLinearProblem p) {
#if __CUDA_ARCH__ >= 800
  constexpr bool kCompiled = true;
#else
  constexpr bool kCompiled = !Operand<T>::kNeedsSm80;
#endif
  if constexpr (kCompiled) run_gemv<T, kBits, kSymmetric, kGroupSteps>(p);
}

// Warps per block: 16 when there are few tiles, so that a short launch has all its codes in flight
// at once; eight when there are many, for then blocks are what fills a multiprocessor. Blocks per
// multiprocessor: as many as registers, threads and shared memory allow, and no more than there are
// tiles.
template <typename T, int kBits, bool kSymmetric, int kGroupSteps>
int launch(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  const auto kernel = qlinear_gemv_kernel<T, kBits, kSymmetric, kGroupSteps>;
  static const int registers = [&] {
    cudaFuncAttributes attributes{};
    const bool known = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
    return known ? (attributes.numRegs + 7) / 8 * 8 : 128;
  }();
  const int wanted = p.tiles <= device.multiprocessors ? 16 : 8;
  const int warps = std::min({wanted, Walk<kBits, kGroupSteps>::units(p), kMaxThreads / 32});
  const int bytes = Walk<kBits, kGroupSteps>::shared_bytes(p, warps);
  const int max_threads = device.sm == 75 ? 1024 : device.sm == 80 || device.sm == 90 ? 2048 : 1536;
  const int resident =
      std::max(1, std::min({65536 / (registers * warps * 32), max_threads / (warps * 32),
                            device.multiprocessor_shared / (bytes + 1024)}));
  const int grid = std::min(p.tiles, device.multiprocessors * resident);
  return launch_kernel(kernel, dim3(grid), warps * 32, bytes, device.sm >= 90, stream, p);
}

template <typename T, int kBits, bool kSymmetric>
int launch_for_group(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  if (p.group_shift >= 3) return launch<T, kBits, kSymmetric, 8>(p, device, stream);
  if (p.group_shift == 2) return launch<T, kBits, kSymmetric, 4>(p, device, stream);
  if (p.group_shift == 1) return launch<T, kBits, kSymmetric, 2>(p, device, stream);
  return launch<T, kBits, kSymmetric, 1>(p, device, stream);
}

}  // namespace gemv

template <typename T>
int launch_gemv(const QLinearProblem& p, int bits, const Device& device, cudaStream_t stream) {
  if (bits == 4) {
    return p.symmetric ? gemv::launch_for_group<T, 4, true>(p, device, stream)
                       : gemv::launch_for_group<T, 4, false>(p, device, stream);
  }
  return p.symmetric ? gemv::launch_for_group<T, 8, true>(p, device, stream)
                     : gemv::launch_for_group<T, 8, false>(p, device, stream);
}

}  // namespace kvopt::cuda
