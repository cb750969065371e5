// SPDX-License-Identifier: Apache-2.0
// Y = X W^T with int8 operands and exact int32 sums on mma.sync, sm_75 and newer.
//
//   X (M, pitch), W (N, pitch)  both with K running fastest, which is what the instruction wants of
//                               both its operands: ldmatrix brings four bytes of K to a lane
//   block   a tile of kM x kN of Y; warps kWarpsM x kWarpsN x kWarpsK, those of the last kind take
//           different 32-column steps of K and add up in shared memory at the end
//   stage   kM + kN rows of kK bytes, 16-byte pieces permuted so that the eight rows that ldmatrix
//           reads at once lie in different banks
//   sm_80   cp.async, kStages stages;  m16n8k32
//   sm_75   global -> registers -> the other of two stages while this one is used; the same
//           multiplication as four m8n8k16
//
// Bytes a block moves: (kM + kN) K for 2 kM kN K operations, 128 per byte at 128 x 128. Bound: for
// M <= 64 the weight's bytes, beyond the tensor cores (624 TOPS on A100, 130 on T4).
// Limits: K <= kMaxColumns, so that sums fit int32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device/copy.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/qlinear_w8a8_epilogue.cuh"

namespace kvopt::cuda::w8a8 {

constexpr int kMaxColumns = 132096;  // * 127 * 128 < 2^31

struct Operands {
  const int8_t* x;
  const int8_t* w;
  int64_t x_pitch, w_pitch;
  int m, n, columns;  // columns: of both, padding to 16 included
};

template <int kM_, int kN_, int kK_, int kWarpsM_, int kWarpsN_, int kWarpsK_>
struct Tile {
  static constexpr int kM = kM_, kN = kN_, kK = kK_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN * kWarpsK;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;  // of a warp
  static constexpr int kBlocksM = kWarpM / 16, kBlocksN = kWarpN / 8;
  static constexpr int kSteps = kK / 32;
  static constexpr int kPieces = kK / 16;  // of a row of a stage
  static constexpr int kLoads = (kM + kN) * kPieces / kThreads;
  static constexpr int kStageBytes = (kM + kN) * kK;
  static constexpr int stages(bool asynchronous) { return asynchronous ? 4 : 2; }
  static constexpr int sum_bytes() { return (kWarpsK - 1) * kM * kN * 4; }
  static constexpr int shared_bytes(bool asynchronous) {
    const int ring = stages(asynchronous) * kStageBytes;
    return ring > sum_bytes() ? ring : sum_bytes();
  }
  static_assert((kM + kN) * kPieces % kThreads == 0 && kSteps % kWarpsK == 0);
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && (kK == 64 || kK == 128));

  // Byte of a 16-byte piece in a stage. Eight rows in a row, same piece: eight different groups of
  // four banks.
  static __device__ __forceinline__ int place(int row, int piece) {
    const int swap = kK == 128 ? row & 7 : (row >> 1) & 3;
    return row * kK + ((piece ^ swap) << 4);
  }
};

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// a: rows g, g + 8 (of x) at bytes 4t.., the same at 16 + 4t..; b: row g of w at 4t.., 16 + 4t..
__device__ __forceinline__ void multiply(int (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const auto part = [](int& c0, int& c1, uint32_t a, uint32_t b) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+r"(c0), "+r"(c1)
        : "r"(a), "r"(b));
  };
  part(c[0], c[1], a[0], b0);
  part(c[2], c[3], a[1], b0);
  part(c[0], c[1], a[2], b1);
  part(c[2], c[3], a[3], b1);
#endif
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, 2) mma_kernel(Operands o, RowsEpilogue epilogue) {
  extern __shared__ __align__(128) uint8_t shared[];
#if __CUDA_ARCH__ >= 800
  constexpr int kStages = T::stages(true);
#else
  constexpr int kStages = T::stages(false);
#endif
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_k = warp / (T::kWarpsM * T::kWarpsN);
  const int warp_m = warp / T::kWarpsN % T::kWarpsM * T::kWarpM;
  const int warp_n = warp % T::kWarpsN * T::kWarpN;
  const int first_m = static_cast<int>(blockIdx.x) * T::kM;
  const int first_n = static_cast<int>(blockIdx.y) * T::kN;
  const int count = (o.columns + T::kK - 1) / T::kK;
  wait_for_previous_kernel();

  // The pieces of a stage this thread brings: row and column do not change but for the stage's K.
  const int8_t* source[T::kLoads];
  int column[T::kLoads], target[T::kLoads];
#pragma unroll
  for (int i = 0; i < T::kLoads; ++i) {
    const int index = i * T::kThreads + static_cast<int>(threadIdx.x);
    const int row = index / T::kPieces, piece = index % T::kPieces;
    const bool of_x = row < T::kM;
    const int r = of_x ? first_m + row : first_n + row - T::kM;
    const bool exists = r < (of_x ? o.m : o.n);
    column[i] = exists ? piece * 16 : o.columns;
    source[i] = of_x ? o.x + (exists ? r * o.x_pitch : 0) : o.w + (exists ? r * o.w_pitch : 0);
    target[i] = T::place(row, piece);
  }
  int sum[T::kBlocksM][T::kBlocksN][4] = {};
  const auto use = [&](int stage) {
    const uint32_t base = shared_address(shared + stage * T::kStageBytes);
#pragma unroll
    for (int s = 0; s < T::kSteps; s += T::kWarpsK) {
      const int piece = 2 * (s + warp_k);
      uint32_t a[T::kBlocksM][4], b[T::kBlocksN / 2][4];
#pragma unroll
      for (int i = 0; i < T::kBlocksM; ++i) {
        load_matrices(a[i], base + T::place(warp_m + 16 * i + lane % 16, piece + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < T::kBlocksN / 2; ++j) {
        load_matrices(b[j], base + T::place(T::kM + warp_n + 16 * j + lane % 8 + lane / 16 * 8,
                                            piece + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < T::kBlocksM; ++i) {
#pragma unroll
        for (int j = 0; j < T::kBlocksN; ++j) {
          multiply(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  };

#if __CUDA_ARCH__ >= 800
  const auto bring = [&](int block) {
    if (block < count) {
      uint8_t* stage = shared + block % kStages * T::kStageBytes;
#pragma unroll
      for (int i = 0; i < T::kLoads; ++i) {
        const int c = column[i] + block * T::kK;
        const bool inside = c < o.columns;
        copy_async_16(stage + target[i], source[i] + (inside ? c : 0), inside ? 16 : 0);
      }
    }
    copy_async_commit();
  };
  for (int block = 0; block < kStages - 1; ++block) bring(block);
  for (int block = 0; block < count; ++block) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this stage has come, and the one before is free
    bring(block + kStages - 1);
    use(block % kStages);
  }
  copy_async_wait<0>();
#else
  uint4 held[T::kLoads];
  const auto fetch = [&](int block) {
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
      const int c = column[i] + block * T::kK;
      held[i] = c < o.columns ? load_16(source[i] + c) : make_uint4(0, 0, 0, 0);
    }
  };
  const auto put = [&](int stage) {
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
      *reinterpret_cast<uint4*>(shared + stage * T::kStageBytes + target[i]) = held[i];
    }
  };
  fetch(0);
  put(0);
  __syncthreads();
  for (int block = 0; block < count; ++block) {
    if (block + 1 < count) fetch(block + 1);
    use(block % kStages);
    if (block + 1 < count) put((block + 1) % kStages);
    __syncthreads();
  }
#endif
  let_next_kernel_start();

  if constexpr (T::kWarpsK > 1) {  // exact sums: any order gives the same
    int* parts = reinterpret_cast<int*>(shared);
    constexpr int kOfWarp = T::kBlocksM * T::kBlocksN * 4 * 32;
    constexpr int kOfLayer = kOfWarp * T::kWarpsM * T::kWarpsN;
    const int place = warp % (T::kWarpsM * T::kWarpsN) * kOfWarp + lane;
    __syncthreads();
    if (warp_k > 0) {
#pragma unroll
      for (int i = 0; i < T::kBlocksM * T::kBlocksN * 4; ++i) {
        parts[(warp_k - 1) * kOfLayer + place + 32 * i] =
            sum[i / 4 / T::kBlocksN][i / 4 % T::kBlocksN][i % 4];
      }
    }
    __syncthreads();
    if (warp_k > 0) return;
    for (int layer = 0; layer < T::kWarpsK - 1; ++layer) {
#pragma unroll
      for (int i = 0; i < T::kBlocksM * T::kBlocksN * 4; ++i) {
        sum[i / 4 / T::kBlocksN][i / 4 % T::kBlocksN][i % 4] +=
            parts[layer * kOfLayer + place + 32 * i];
      }
    }
  }
  const int first = first_n + warp_n;
  ColumnRegisters<T::kBlocksN> columns;
  if (epilogue.words) columns.load(epilogue, first);
#pragma unroll
  for (int i = 0; i < T::kBlocksM; ++i) {
    const int row = first_m + warp_m + 16 * i + lane / 4;
    const auto sums = [&](int j, int half) {
      return make_int2(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
    };
    if (epilogue.words) {
      finish_rows<T::kBlocksN>(epilogue, columns, RowScales(epilogue, row), row, first, sums);
    } else {
      finish_rows_slowly<T::kBlocksN>(epilogue, row, first, sums);
    }
  }
}

}  // namespace kvopt::cuda::w8a8
