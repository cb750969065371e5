// SPDX-License-Identifier: Apache-2.0
// y (M, N) = x (M, K) w^T for any number of rows: a tiled product on mma.sync, codes turned into
// fp16 weights in registers. It serves the chips without wgmma and whatever that path refuses.
//
//             K: kWarpsK parts, one for each team of kWarpsN warps, 64 columns at a time
//            ┌───────────┬───────────┬─ ─ ─
//   16 * kTiles rows     │           │           a warp's rows of w, operand A
//            ├───────────┼───────────┼─ ─ ─      the same of the team's next warp ...
//            └───────────┴───────────┴─ ─ ─
//   8 * kFragments rows of x are operand B, in shared memory, for all warps of the team
//
// A team has its own stages in shared memory and its own barrier, so teams do not wait for each
// other until they add their sums at the end, in order. x comes in rows 16 bytes apart in the banks
// (ldmatrix without conflicts); codes pass through shared memory only to be in flight early
// (cp.async, two stages ahead): a lane reads back its own bytes. sm_75 has no cp.async: there the
// next 64 columns wait in registers while these are used. Group parameters are loaded a group
// ahead.
//
// A code becomes fp16(scale * (q - zero)), 13 instructions for the 256 weights a warp multiplies at
// once (code books: 16, four of them loads), and meets all rows of x. (q - zero) is in units of
// 2^-9 and the scale times 2^9; where that leaves fp16 ("wide", 127 and more) the row's sums are
// kept in units of 512 while the group lasts. Few rows of x: two blocks a multiprocessor hide
// latency. More: a warp makes the next step's operands while the tensor cores are busy with this
// one's.
//
// Bytes: codes ceil(M / rows of x) times, x N / rows of w times, from L2 but for the first.
// Per 16 x 16 weights (4 bits, group 128: 136 bytes) and a quarter of a multiprocessor, in cycles:
//             bytes   ceil(M / 8) mma     rest     so: memory up to
//     T4       108       16 each           27       M = 54, then tensor cores
//     A100      41        8                26       M = 40
//     H200      26        6.8              26       nothing hides: bytes, issue and mma meet
// (320, 2039, 4800 GB/s; mma.m16n8k16, which sm_75 makes of two m16n8k8; rest: instructions of a
// warp, 13 of them the codes'. On the H200 mma.sync was measured at 545 TFLOP/s, 0.58 of wgmma.)
// Measured there, sm_80 code, N 28672, K 4096: 26 us at M = 16, 51 at 64, 201 at 256; sm_75 code
// 33, 75, 229 (cuBLAS fp16 60, 62, 95).
// T4, the same product: 62.4 MB are 195 us up to M = 48, the tensor cores need 231 us at M = 64 and
// 923 at 256; fp16 weights take at least 734, 734 and 923. Expected: 0.75 of the memory's rate
// (GDDR6 reads 0.8 of the datasheet, a quarter of the time is spent issuing), 260 us; 0.6 of the
// tensor cores', since two to four warps a quarter and no cp.async hide little: 385 us at M = 64,
// 1540 at 256. Dequantising once for cuBLAS pays from some 1000 rows (qlinear_plan.cu). A block
// takes 18 to 53 of the 64 KB of shared memory, so one to three are resident.
#pragma once

#include <algorithm>

#include "cuda/device/dequant.cuh"
#include "cuda/device/epilogue.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/qlinear_gemm_loader.cuh"
#include "cuda/device/qlinear_gemm_plan.cuh"
#include "cuda/device/qlinear_problem.cuh"

namespace kvopt::cuda {
namespace gemm {

// A code book's table: {book[b & 15], book[b >> 4]} for a byte b, in copies that lie in different
// banks, so that lanes seldom wait for each other: copy c at (b * kBookCopies + c) * 4.
constexpr int kBookCopies = kBookShared / 1024;

__device__ __forceinline__ void fill_book_copies(uint4* table, Scheme scheme) {
  for (int b = threadIdx.x; b < 256; b += blockDim.x) {
    const __half2 pair = __floats2half2_rn(book_value(scheme, b & 15), book_value(scheme, b >> 4));
    const uint32_t v = *reinterpret_cast<const uint32_t*>(&pair);
#pragma unroll
    for (int i = 0; i < kBookCopies / 4; ++i) {
      table[b * (kBookCopies / 4) + i] = make_uint4(v, v, v, v);
    }
  }
}

// The table's values of byte kByte of a word. `table`: shared address of the lane's copy.
template <int kByte>
__device__ __forceinline__ uint32_t look_up(uint32_t word, uint32_t table) {
  uint32_t v;
  asm("ld.shared.u32 %0, [%1];"
      : "=r"(v)
      : "r"(__dp4a(word, static_cast<uint32_t>(kBookCopies * 4) << 8 * kByte, table)));
  return v;
}

// A row's parameters in its group: {scale * 2^9, -zero * 2^-9}; scale alone for code books and
// where 2^9 of it leaves the range of fp16 ("wide").
using RowPair = __half2;
__device__ __forceinline__ uint32_t scale_of(RowPair row) { return pair_of(__low2half(row)); }
__device__ __forceinline__ uint32_t offset_of(RowPair row) { return pair_of(__high2half(row)); }

// fp16(scale * fp16(book[q])). A byte of a word holds codes of rows g and g + 8 in one column.
// `step` as in raw_operand.
__device__ __forceinline__ void book_operand(uint32_t (&a)[4], const Words<4>& w, int step,
                                             RowPair row0, RowPair row8, uint32_t table) {
  const uint32_t word = w.word[step];
  const uint32_t v0 = look_up<0>(word, table), v1 = look_up<1>(word, table);
  const uint32_t v2 = look_up<2>(word, table), v3 = look_up<3>(word, table);
  a[0] = mul_pair(__byte_perm(v0, v2, 0x5410), scale_of(row0));
  a[1] = mul_pair(__byte_perm(v0, v2, 0x7632), scale_of(row8));
  a[2] = mul_pair(__byte_perm(v1, v3, 0x5410), scale_of(row0));
  a[3] = mul_pair(__byte_perm(v1, v3, 0x7632), scale_of(row8));
}

constexpr float kWide = 127.0f;  // times 2^9 just an fp16 number

template <int kBits, bool kBook, typename S>
struct Sums {
  using St = Stage<S, kBits>;
  float sum[S::kTiles][S::kFragments][4] = {};
  RowPair row0[S::kTiles], row8[S::kTiles];
  GroupWalk<S> walk;
  uint32_t wide = 0;  // bit 2 r, 2 r + 1: row0[r]'s, row8[r]'s sums are in units of 512
  uint32_t coming = 0;
  bool changes = false;

  __device__ __forceinline__ Sums(const QLinearProblem& p, int tile0, int lane, int block)
      : walk(p, tile0, lane, block) {}

  // The next group's parameters, for `operand`. What they change for the sums waits in `coming`.
  __device__ __forceinline__ void enter() {
    walk.enter(row0, row8);
    const __half one = __ushort_as_half(0x3C00), up = __ushort_as_half(0x6000);  // 1, 2^9
    const __half down = __ushort_as_half(0x9800);                                // -2^-9
    uint32_t now = 0;
    if constexpr (!kBook) {
      __half2 largest = __habs2(row0[0]);
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
        largest = __hmax2(largest, __habs2(row0[r]));
        largest = __hmax2(largest, __habs2(row8[r]));
      }
      changes = __any_sync(0xFFFFFFFF, __low2float(largest) >= kWide || wide != 0);
      if (changes) {
#pragma unroll
        for (int r = 0; r < S::kTiles; ++r) {
          now |= fabsf(__low2float(row0[r])) >= kWide ? 1u << 2 * r : 0;
          now |= fabsf(__low2float(row8[r])) >= kWide ? 2u << 2 * r : 0;
        }
        coming = now;
      }
    }
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
      row0[r] = __hmul2(row0[r], __halves2half2(kBook || now >> 2 * r & 1 ? one : up, down));
      row8[r] = __hmul2(row8[r], __halves2half2(kBook || now >> 2 * r & 2 ? one : up, down));
    }
  }
  static __device__ __forceinline__ float unit_ratio(uint32_t from, uint32_t to) {
    return from == to ? 1.0f : from != 0 ? 512.0f : 1.0f / 512.0f;
  }
  // Brings the sums to the units that enter() asked for.
  __device__ __forceinline__ void change_units() {
    if constexpr (!kBook) {
      if (!changes) return;
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
        const float ratio0 = unit_ratio(wide >> 2 * r & 1, coming >> 2 * r & 1);
        const float ratio8 = unit_ratio(wide >> 2 * r & 2, coming >> 2 * r & 2);
#pragma unroll
        for (int f = 0; f < S::kFragments; ++f) {
          sum[r][f][0] *= ratio0;
          sum[r][f][1] *= ratio0;
          sum[r][f][2] *= ratio8;
          sum[r][f][3] *= ratio8;
        }
      }
      wide = coming;
      changes = false;
    }
  }
  // Back to units of 1, when all columns are in.
  __device__ __forceinline__ void settle() {
    changes = wide != 0;
    coming = 0;
    change_units();
  }

  __device__ __forceinline__ void operand(uint32_t (&a)[4], const Words<kBits>& words, int step,
                                          int r, uint32_t table) const {
    if constexpr (kBook) {
      book_operand(a, words, step, row0[r], row8[r], table);
    } else {
      const RowScale first{offset_of(row0[r]), scale_of(row0[r])};
      const RowScale second{offset_of(row8[r]), scale_of(row8[r])};
      weights_operand<kBits>(a, words, step, first, second, false);
    }
  }

  static constexpr int kAtOnce = S::kFragments < 4 ? S::kFragments : 4;  // fragments of a turn
  static constexpr int kTurns = S::kFragments / kAtOnce;                 // of a step
  uint2 b[2][kAtOnce];
  uint32_t a[S::kAhead ? 2 : 1][S::kTiles][4];

  // `x`: this lane's address for load_fragments in the stage.
  __device__ __forceinline__ void load(uint32_t x, int turn) {
    const int step = turn / kTurns, first = turn % kTurns * kAtOnce;
#pragma unroll
    for (int f = 0; f < kAtOnce; f += 2) {
      load_fragments(b[turn % 2][f], b[turn % 2][f + 1],
                     x + ((first + f) * 8 * St::kStrideX + step * kStepColumns) * 2);
    }
  }
  // The operands of a step of the 64 columns that begin at `column`.
  __device__ __forceinline__ void prepare(const Words<kBits> (&words)[S::kTiles], int column,
                                          int step, uint32_t table) {
    if ((S::kManyGroups || step == 0) && walk.enters(column + step * kStepColumns)) {
      enter();
      if (!S::kAhead) change_units();
    }
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
      operand(a[S::kAhead ? step % 2 : 0][r], words[r], step, r, table);
    }
  }
  __device__ __forceinline__ void multiply(int turn) {
    const int step = turn / kTurns;
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
      for (int f = 0; f < kAtOnce; ++f) {
        mma_16x8x16(sum[r][turn % kTurns * kAtOnce + f], a[S::kAhead ? step % 2 : 0][r],
                    b[turn % 2][f]);
      }
    }
  }

  // Adds all columns from block `begin` to `end`. arrive(words) waits for the next 64 columns and
  // returns where x is.
  template <typename Arrive>
  __device__ __forceinline__ void add(int begin, int end, uint32_t table, Arrive arrive) {
    Words<kBits> words[S::kTiles];
    if constexpr (S::kAhead) {
      // While the tensor cores work on one turn, the fragments of the next are loaded, and in the
      // first turn of a step the next step's operands are made.
      uint32_t x = arrive(words);
      load(x, 0);
      prepare(words, begin * kBlockColumns, 0, table);
      change_units();
      for (int block = begin; block < end; ++block) {
#pragma unroll
        for (int turn = 0; turn < 4 * kTurns; ++turn) {
          if (turn + 1 < 4 * kTurns) {
            load(x, turn + 1);
            if (turn % kTurns == 0 && turn / kTurns < 3) {
              prepare(words, block * kBlockColumns, turn / kTurns + 1, table);
            }
          } else {
            x = arrive(words);
            load(x, 0);
            prepare(words, (block + 1) * kBlockColumns, 0, table);
          }
          multiply(turn);
        }
        change_units();
      }
    } else {
      for (int block = begin; block < end; ++block) {
        const uint32_t x = arrive(words);
        load(x, 0);
#pragma unroll
        for (int turn = 0; turn < 4 * kTurns; ++turn) {
          if (turn + 1 < 4 * kTurns) load(x, turn + 1);
          if (turn % kTurns == 0) prepare(words, block * kBlockColumns, turn / kTurns, table);
          multiply(turn);
        }
      }
    }
  }
};

// Four neighbours of y, which has a multiple of four columns, with nothing but a bias to add.
__device__ __forceinline__ void store_four(const Epilogue& e, int m, int n, float4 v) {
  v.x = before_activation(e, m, n, v.x);
  v.y = before_activation(e, m, n + 1, v.y);
  v.z = before_activation(e, m, n + 2, v.z);
  v.w = before_activation(e, m, n + 3, v.w);
  uint2 pairs;
  if (e.dtype == DType::kFloat16) {
    const __half2 low = __floats2half2_rn(v.x, v.y), high = __floats2half2_rn(v.z, v.w);
    pairs = make_uint2(*reinterpret_cast<const uint32_t*>(&low),
                       *reinterpret_cast<const uint32_t*>(&high));
  } else {
    const __nv_bfloat162 low = __floats2bfloat162_rn(v.x, v.y);
    const __nv_bfloat162 high = __floats2bfloat162_rn(v.z, v.w);
    pairs = make_uint2(*reinterpret_cast<const uint32_t*>(&low),
                       *reinterpret_cast<const uint32_t*>(&high));
  }
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(e.y) + static_cast<int64_t>(m) * e.n + n) =
      pairs;
}

// kSlice rows of x at a time: sums to shared memory as [warp_k][row of x][row of w], then added,
// finished and stored.
template <typename S, typename St>
__device__ __forceinline__ void finish(const QLinearProblem& p,
                                       const float (&sum)[S::kTiles][S::kFragments][4], float* out,
                                       int row0, int tile0, int warp_n, int warp_k, int lane) {
  const Epilogue& e = p.epilogue;
  const int first_row_w = blockIdx.y * S::kRowsW;
  const int slot = tile0 - static_cast<int>(blockIdx.y) * (S::kWarpsN * S::kTiles);
  const auto totals = [&](int row_x, int row_w) {
    float4 v = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < S::kWarpsK; ++w) {
      const float4 part =
          *reinterpret_cast<const float4*>(out + (w * St::kSlice + row_x) * St::kStrideOut + row_w);
      v.x += part.x;
      v.y += part.y;
      v.z += part.z;
      v.w += part.w;
    }
    return v;
  };
  const auto total = [&](int row_x, int row_w) {
    float v = 0;
#pragma unroll
    for (int w = 0; w < S::kWarpsK; ++w) {
      v += out[(w * St::kSlice + row_x) * St::kStrideOut + row_w];
    }
    return v;
  };
#pragma unroll
  for (int slice = 0; slice < S::kRowsX / St::kSlice; ++slice) {
    __syncthreads();
#pragma unroll
    for (int f = 0; f < St::kSlice / 8; ++f) {
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
        if (slot + r < warp_n * S::kTiles) continue;  // the warp before has this tile
        const float* const c = sum[r][slice * (St::kSlice / 8) + f];
        float* const target = out + (warp_k * St::kSlice + f * 8 + lane % 4 * 2) * St::kStrideOut +
                              (slot + r) * 16 + lane / 4;
        target[0] = c[0];
        target[St::kStrideOut] = c[1];
        target[8] = c[2];
        target[St::kStrideOut + 8] = c[3];
      }
    }
    __syncthreads();
    const int first = row0 + slice * St::kSlice;
    if (e.swiglu) {
      constexpr int kPairs = S::kRowsW / 2;
      for (int i = threadIdx.x; i < St::kSlice * kPairs; i += S::kThreads) {
        const int row_x = i / kPairs, row_w = i % kPairs / 8 * 16 + i % 8;
        if (first + row_x >= p.m || first_row_w + row_w >= p.n) continue;
        finish_pair(e, first + row_x, first_row_w + row_w, total(row_x, row_w),
                    total(row_x, row_w + 8));
      }
    } else if (e.is_plain() && p.n % 4 == 0 && e.dtype != DType::kFloat32 &&
               reinterpret_cast<uintptr_t>(e.y) % 8 == 0) {
      constexpr int kQuads = S::kRowsW / 4;
      for (int i = threadIdx.x; i < St::kSlice * kQuads; i += S::kThreads) {
        const int row_x = i / kQuads, row_w = i % kQuads * 4;
        const int m = first + row_x, n = first_row_w + row_w;
        if (m >= p.m || n >= p.n) continue;
        store_four(e, m, n, totals(row_x, row_w));
      }
    } else {
      for (int i = threadIdx.x; i < St::kSlice * S::kRowsW; i += S::kThreads) {
        const int row_x = i / S::kRowsW, row_w = i % S::kRowsW;
        const int m = first + row_x, n = first_row_w + row_w;
        if (m >= p.m || n >= p.n) continue;
        store_output(e, m, n, before_activation(e, m, n, total(row_x, row_w)));
      }
    }
  }
}

template <int kBits, bool kBook, typename S>
__device__ __forceinline__ void run_gemm(const QLinearProblem& p, const HalfRows& x) {
  using St = Stage<S, kBits>;
#ifdef __CUDA_ARCH__
  constexpr int kStageBytes = St::bytes(__CUDA_ARCH__ / 10),
                kStages = St::count(__CUDA_ARCH__ / 10);
#else
  constexpr int kStageBytes = 0, kStages = 2;
#endif
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp % S::kWarpsN, team = warp / S::kWarpsN;
  // Blocks that share rows of w are neighbours, so the second finds the codes in L2.
  const int row0 = blockIdx.x * S::kRowsX;
  // A warp whose last tiles would be past the end begins earlier.
  const int tile0 =
      min(static_cast<int>(blockIdx.y * S::kWarpsN + warp_n) * S::kTiles, p.tiles - S::kTiles);
  const int part = (p.blocks + S::kWarpsK - 1) / S::kWarpsK;
  const int begin = team * part, end = min(p.blocks, begin + part);

  if constexpr (kBook) {
    fill_book_copies(reinterpret_cast<uint4*>(shared), p.format.scheme);
    __syncthreads();
  }
  Loader<kBits, S> loader(p, x, row0, tile0, warp_n, begin, end);
  Sums<kBits, kBook, S> sums(p, tile0, lane, begin);
  unsigned char* const stages = shared + (kBook ? kBookShared : 0);
  unsigned char* const ring = stages + team * (kStages * kStageBytes);
  const uint32_t x_at = ((lane / 16 * 8 + lane % 8) * St::kStrideX + lane / 8 % 2 * 8) * 2;
  const uint32_t copy = shared_address(shared) + lane % kBookCopies * 4;  // of a code book's table
  wait_for_previous_kernel();

  if (begin < end) {
    sums.walk.load();
    unsigned char* next = ring;  // stage
#if __CUDA_ARCH__ >= 800
    for (int s = 0; s < kStages - 1; ++s) {
      loader.fetch(ring + s * kStageBytes);
      copy_async_commit();
    }
    unsigned char* free = ring + (kStages - 1) * kStageBytes;
#else
    loader.fetch();
#endif
    sums.add(begin, end, copy, [&](Words<kBits>(&words)[S::kTiles]) {
      unsigned char* const stage = next;
#if __CUDA_ARCH__ >= 800
      copy_async_wait<kStages - 2>();
      team_barrier<S>(team);  // these columns are here, and nobody still reads those before
      loader.fetch(free);
      copy_async_commit();
      loader.words(words, stage);
      free = stage;
#else
      loader.words(words);
      loader.store_x(stage);
      team_barrier<S>(team);
      loader.fetch();
#endif
      next = stage == ring + (kStages - 1) * kStageBytes ? ring : stage + kStageBytes;
      return shared_address(stage) + x_at;
    });
  }
#if __CUDA_ARCH__ >= 800
  copy_async_wait<0>();
#endif
  let_next_kernel_start();
  sums.settle();
  finish<S, St>(p, sums.sum, reinterpret_cast<float*>(stages), row0, tile0, warp_n, team, lane);
}

template <int kBits, bool kBook, typename S>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    qlinear_gemm_kernel(const QLinearProblem p, const HalfRows x) {
#if __CUDA_ARCH__ >= 800
  constexpr bool kCompiled = S::kSm80;
#else
  constexpr bool kCompiled = S::kSm75;
#endif
  if constexpr (kCompiled && S::kFragments <= most_fragments(kBook))
    run_gemm<kBits, kBook, S>(p, x);
}

template <int kBits, bool kBook, typename S>
constexpr int shared_bytes(int sm) {
  return Stage<S, kBits>::shared_bytes(sm) + (kBook ? kBookShared : 0);
}

template <int kBits, bool kBook, typename S>
int launch(const QLinearProblem& p, const HalfRows& x, const Device& device, cudaStream_t stream) {
  const dim3 grid((p.m + S::kRowsX - 1) / S::kRowsX, (p.n + S::kRowsW - 1) / S::kRowsW);
  return launch_kernel(qlinear_gemm_kernel<kBits, kBook, S>, grid, S::kThreads,
                       shared_bytes<kBits, kBook, S>(device.sm), device.sm >= 90, stream, p, x);
}

template <int kBits, bool kBook, int kIndex>
int launch_index(int index, const QLinearProblem& p, const HalfRows& x, const Device& device,
                 cudaStream_t stream) {
  if constexpr (kIndex < kShapeCount) {
    constexpr ShapeInfo s = kShapes[kIndex];
    using S = Shape<s.fragments, s.tiles, s.warps_n, s.warps_k, s.sm75, s.sm80, s.many_groups>;
    constexpr QuantFormat kFormat{kBits, 64, kBook ? Scheme::kNf4 : Scheme::kSymmetric};
    static_assert(s.shared_bytes(kFormat, 75) == shared_bytes<kBits, kBook, S>(75) &&
                  s.shared_bytes(kFormat, 80) == shared_bytes<kBits, kBook, S>(80));
    return index == kIndex ? launch<kBits, kBook, S>(p, x, device, stream)
                           : launch_index<kBits, kBook, kIndex + 1>(index, p, x, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace gemm

// One format's kernels.
template <int kBits, bool kBook>
int launch_gemm_format(const QLinearProblem& p, const HalfRows& x, const Device& device,
                       cudaStream_t stream) {
  const int index = gemm::choose_shape_index(p, device);
  return gemm::launch_index<kBits, kBook, 0>(index, p, x, device, stream);
}

extern template int launch_gemm_format<2, false>(const QLinearProblem&, const HalfRows&,
                                                 const Device&, cudaStream_t);
extern template int launch_gemm_format<3, false>(const QLinearProblem&, const HalfRows&,
                                                 const Device&, cudaStream_t);
extern template int launch_gemm_format<4, false>(const QLinearProblem&, const HalfRows&,
                                                 const Device&, cudaStream_t);
extern template int launch_gemm_format<8, false>(const QLinearProblem&, const HalfRows&,
                                                 const Device&, cudaStream_t);
extern template int launch_gemm_format<4, true>(const QLinearProblem&, const HalfRows&,
                                                const Device&, cudaStream_t);

}  // namespace kvopt::cuda
