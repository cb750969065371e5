// SPDX-License-Identifier: Apache-2.0
// y (M, N) = x (M, K) w^T for M <= 8: a matrix-vector product, bound by memory. One row on sm_90
// has a kernel of its own (qlinear_gemv_row.cuh).
//
//   K: units of 128 to 512 columns; each of the W warps of a tile has consecutive ones
//   ┌──────┬──────┬─── ─ ─ ───┬──────┬──────┐
//   │  w0  │  w0  │  w1   w1  │ wW-1 │ wW-1 │            16 rows of w: a tile, operand A
//   └──────┴──────┴─── ─ ─ ───┴──────┴──────┘
//   x waits in shared memory and is operand B, 16 x 8: its columns from M on repeat row M-1 and are
//   dropped at the end.
//
// Mathematics. Codes enter the tensor cores as they are, as subnormal fp16 (dequant.cuh), and a
// segment of at most 128 columns inside one group is folded into the row's sum in fp32:
//     sum += scale * (unit * sum(q v) - zero * unit * sum(v))          x = unit * v
// unit and unit * sum(v) are made once, when x is staged (qlinear_gemv_x.cuh). Code books: dp4a
// makes a table address of any byte of codes in one instruction, and the table, a pair of fp16 for
// each byte, is there once for every lane, so no two lanes meet in a bank.
//
// Bytes: N * K * bits / 8 of codes and 2 or 4 per group and row, once. Bound: memory. About 0.8
// lane-instructions per 4-bit weight, of 3.6 that an H200 can issue at its full read rate; code
// books: a shared-memory load for two weights, close to what that can do. What memory needs is
// bytes in flight: 4 KB a warp, 16 warps a multiprocessor, straight into registers (rings in shared
// memory, filled by cp.async or the bulk copy engine, measured slower, and so did asking for more
// to come to L2 ahead). All blocks together sweep through the weight; a run of its own for every
// warp measured slower. Code is kept short: a block of a short product runs it once, from cold
// instruction caches.
//
// Overlap, sm_90. Between two products lie the drain of the first, the launch, and x, which must
// not be read before the first is done: about 2 us, of 16 for a large weight. So a block arrives
// early and has its registers full of codes and group parameters when x comes. It may, because
// kernels that write weights never call let_next_kernel_start(), and settle_weights() behind them
// (wquant.h) starts when their writes are seen.
//
// The partial sums of the warps are added in shared memory in a fixed order.
// Limits: M rows of K must fit in shared memory; else the tiled product takes over.
#pragma once

#include "cuda/device/dequant.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/qlinear_gemv_plan.cuh"
#include "cuda/device/qlinear_gemv_row.cuh"
#include "cuda/device/qlinear_gemv_x.cuh"

namespace kvopt::cuda {
namespace gemv {

// Whether groups have zero points; rare kinds leave that to run time.
enum Zeros { kWithout, kWith, kEither };

// What a kernel is compiled for.
template <int kBits_, bool kBook_, int kFoldSteps_, Zeros kZeros>
struct Kind {
  static constexpr int kBits = kBits_, kFoldSteps = kFoldSteps_;
  static constexpr bool kBook = kBook_;
  static __device__ __forceinline__ bool has_zeros(const QLinearProblem& p) {
    return kZeros == kEither ? p.format.has_zeros() : kZeros == kWith;
  }
  static constexpr int kUnit = unit_columns(kBits, kFoldSteps);
  static constexpr int kSteps = kUnit / kStepColumns;
  static constexpr int kSegments = kSteps / kFoldSteps;
  static constexpr int kLoads = kUnit * kBits / 256;  // 512 bytes a warp each
};

// Where a warp reads next: the units of its share of a tile, tile after tile.
template <typename K>
struct Cursor {
  const uint8_t* codes;  // of this lane, unit 0
  const uint8_t* meta;   // of this lane, group 0
  int unit, first, end;  // of the tile
  int left;              // units that exist

  __device__ __forceinline__ Cursor(const QLinearProblem& p, const Plan& plan, int tile, int first,
                                    int have)
      : unit(first), first(first), end(first + have) {
    const int lane = threadIdx.x % 32, stride = K::has_zeros(p) ? 8 : 4;
    codes = p.packed + static_cast<int64_t>(tile) * p.tile_bytes + lane * 16;
    meta = reinterpret_cast<const uint8_t*>(p.meta) +
           (static_cast<int64_t>(tile) * p.groups * 8 + lane / 4) * stride;
    // Not every group has a tile in the last round.
    left = (plan.rounds - (tile + plan.last_tile >= p.tiles)) * have;
  }
  __device__ __forceinline__ void advance(const Plan& plan) {
    --left;
    if (++unit == end) {
      unit = first;
      codes += plan.codes_stride;
      meta += plan.meta_stride;
    }
  }
};

// A lane's codes and group parameters of a unit.
template <typename K>
struct Unit {
  uint32_t word[K::kLoads * 4];
  uint2 meta[K::kSegments];  // without zero points: .x only

  // Predicates rather than a branch: ptxas would hoist the use of the previous
  // unit, and with it the wait for its codes, above a branch, and these loads
  // would start late.
  __device__ __forceinline__ void load(const QLinearProblem& p, const Plan& plan,
                                       const Cursor<K>& from) {
    const uint8_t* const at = from.codes + static_cast<uint32_t>(from.unit) * (K::kLoads * 512);
    // Loads left in the tile.
    const int here =
        from.left > 0 ? p.blocks * (kBlockColumns * K::kBits / 64) / 4 - from.unit * K::kLoads : 0;
#pragma unroll
    for (int i = 0; i < K::kLoads; ++i) {
      const uint4 v = i < here ? load_stream(at + i * 512) : make_uint4(0, 0, 0, 0);
      word[4 * i] = v.x;
      word[4 * i + 1] = v.y;
      word[4 * i + 2] = v.z;
      word[4 * i + 3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < K::kSegments; ++i) {
      const int group = group_of_step(p, plan, from.unit * K::kSteps + i * K::kFoldSteps);
      if (here > 0) {
        if (K::has_zeros(p)) {
          meta[i] = load_8(from.meta + group * 64);
        } else {
          meta[i].x = load_4(from.meta + group * 32);
        }
      }
    }
  }
  __device__ __forceinline__ void operand(uint32_t (&a)[4], int step) const {
    Words<K::kBits> words;
#pragma unroll
    for (int i = 0; i < K::kBits; ++i) words.word[i] = word[step / 4 * K::kBits + i];
    raw_operand<K::kBits>(a, words, step % 4);
  }
  // `table`: of this lane, an entry every 128 bytes.
  __device__ __forceinline__ void book_operand(uint32_t (&a)[4], int step,
                                               const unsigned char* table) const {
    // A byte holds the codes of rows g and g + 8, of one column.
    uint32_t pair[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pair[i] = *reinterpret_cast<const uint32_t*>(table + __dp4a(word[step], 0x80u << 8 * i, 0u));
    }
    a[0] = __byte_perm(pair[0], pair[2], 0x5410);
    a[1] = __byte_perm(pair[0], pair[2], 0x7632);
    a[2] = __byte_perm(pair[1], pair[3], 0x5410);
    a[3] = __byte_perm(pair[1], pair[3], 0x7632);
  }
};

// Sums of a lane: rows g (two) and g + 8 of the tile, rows 2t and 2t + 1 of x.
struct Sums {
  float value[4] = {};
};

// Where a lane reads x and the records.
template <typename K>
struct LaneX {
  const unsigned char* x;
  const unsigned char* record;

  __device__ __forceinline__ LaneX(const unsigned char* x_rows, const unsigned char* records,
                                   const QLinearProblem& p, const Plan& plan) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    x = x_rows + min(g, p.m - 1) * plan.x_pitch + t * 8;
    record = records + min(t, plan.row_pairs - 1) * plan.record_pitch;
  }
};

// sums += the segment's product. `meta`: the group's parameters of rows g and g
// + 8.
template <typename K>
__device__ __forceinline__ void fold(Sums& sums, const float (&c)[2][4], int first_step,
                                     const LaneX<K>& lane, int segment, uint2 meta,
                                     const QLinearProblem& p) {
  float scale0, scale8, zero0 = p.zero, zero8 = p.zero;
  if (K::has_zeros(p)) {
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&meta.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&meta.y));
    scale0 = low.x;
    zero0 = low.y;
    scale8 = high.x;
    zero8 = high.y;
  } else {
    const float2 scales = __half22float2(*reinterpret_cast<const __half2*>(&meta.x));
    scale0 = scales.x;
    scale8 = scales.y;
  }
  {
    const float4 record = *reinterpret_cast<const float4*>(lane.record + segment * 16);
    float total[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (K::kBook) {
        total[j] = c[0][j] + c[1][j];
      } else {
        const float even = 1.0f / raw_factor<K::kBits>(first_step, j >= 2);
        const float odd = 1.0f / raw_factor<K::kBits>(first_step + 1, j >= 2);
        total[j] = K::kFoldSteps == 1 ? c[0][j] * even
                   : even == odd      ? (c[0][j] + c[1][j]) * even
                                      : c[0][j] * even + c[1][j] * odd;
      }
    }
    if constexpr (K::kBook) {
      sums.value[0] += scale0 * (total[0] * record.x);
      sums.value[1] += scale0 * (total[1] * record.z);
      sums.value[2] += scale8 * (total[2] * record.x);
      sums.value[3] += scale8 * (total[3] * record.z);
    } else {
      sums.value[0] += scale0 * (total[0] * record.x - zero0 * record.y);
      sums.value[1] += scale0 * (total[1] * record.z - zero0 * record.w);
      sums.value[2] += scale8 * (total[2] * record.x - zero8 * record.y);
      sums.value[3] += scale8 * (total[3] * record.z - zero8 * record.w);
    }
  }
}

// `first_step_of_unit`: the unit's first step in the warp's part of x.
template <typename K>
__device__ __forceinline__ void multiply(Sums& sums, const Unit<K>& unit, int first_step_of_unit,
                                         const LaneX<K>& lane, const unsigned char* table,
                                         const QLinearProblem& p) {
#pragma unroll
  for (int first = 0; first < K::kSteps; first += K::kFoldSteps) {
    float c[2][4] = {};  // two chains; with 2 bits they differ in the factor
#pragma unroll
    for (int s = 0; s < K::kFoldSteps; ++s) {
      const int step = first + s;
      uint32_t a[4];
      if constexpr (K::kBook) {
        unit.book_operand(a, step, table);
      } else {
        unit.operand(a, step);
      }
      const uint2 b = *reinterpret_cast<const uint2*>(lane.x + (first_step_of_unit + step) * 32);
      mma_16x8x16(c[s % 2], a, b);
    }
    fold<K>(sums, c, first, lane, first_step_of_unit / K::kFoldSteps + first / K::kFoldSteps,
            unit.meta[first / K::kFoldSteps], p);
  }
}

// Entry b of a lane: {book[b & 15], book[b >> 4]} at b * 128 + lane * 4.
__device__ __forceinline__ void fill_wide_book(unsigned char* table, Scheme scheme) {
  __shared__ uint32_t narrow[256];
  fill_book(narrow, scheme);
  __syncthreads();
  auto* const words = reinterpret_cast<uint32_t*>(table);
  for (int i = threadIdx.x; i < 256 * 32; i += blockDim.x) words[i] = narrow[i / 32];
}

// All that an epilogue may hold, out of the way of those that hold nothing.
inline __device__ __noinline__ void finish_any(const Epilogue& e, int m, int n, float value0,
                                               float value8) {
  finish_pair(e, m, n, value0, value8);
}

__device__ __forceinline__ void finish(const Epilogue& e, int m, int n, float value0,
                                       float value8) {
  if (!only_stores(e)) {
    finish_any(e, m, n, value0, value8);
    return;
  }
  const int64_t at = static_cast<int64_t>(m) * e.n + n;
  if (n < e.n) store_float(e.y, at, value0, e.dtype);
  if (n + 8 < e.n) store_float(e.y, at + 8, value8, e.dtype);
}

// The outputs of the rows that `marked` names: what is not finite in them
// decides, the rest adds nothing to it.
template <int kBits>
__device__ __forceinline__ void finish_special(const QLinearProblem& p, const Plan& plan,
                                               uint32_t marked) {
#pragma unroll 1
  for (int m = 0; m < p.m; ++m) {
    if ((marked >> m & 1) == 0) continue;
#pragma unroll 1
    for (int tile = blockIdx.x * plan.groups; tile < p.tiles; tile += gridDim.x * plan.groups) {
#pragma unroll 1
      for (int i = threadIdx.x; i < plan.groups * 8; i += blockDim.x) {
        const int n = (tile + i / 8) * 16 + i % 8;
        if (tile + i / 8 >= p.tiles) continue;
        float value[2];
#pragma unroll 1
        for (int j = 0; j < 2; ++j) value[j] = special_sum<kBits>(p, m, n + 8 * j);
        finish(p.epilogue, m, n, value[0], value[1]);
      }
    }
  }
}

// Adds the warps' sums of `slots` rounds, the first of them at tile `first`,
// and finishes them. Sums: [slot][group][warp][row of x][row of the tile].
template <typename K>
__device__ __forceinline__ void add_partials(const QLinearProblem& p, const Plan& plan,
                                             const float* partial, uint32_t marked, int first,
                                             int slots) {
  const int outputs = slots * plan.groups * p.m * 8;
  const int tile_stride = gridDim.x * plan.groups, tile_floats = 16 * p.m;
#pragma unroll 1
  for (int i = threadIdx.x; i < outputs; i += blockDim.x) {
    const int g = i % 8;
    const int which = divide(i / 8, plan.rows_reciprocal), m = i / 8 - which * p.m;
    if (marked >> m & 1) continue;
    const int slot = divide(which, plan.groups_reciprocal);
    const int tile = first + slot * tile_stride + which - slot * plan.groups;
    if (tile >= p.tiles) continue;
    const float* source = partial + which * plan.warps * tile_floats + m * 16 + g;
    float value0 = 0, value8 = 0;
#pragma unroll 4
    for (int w = 0; w < plan.warps; ++w) {
      value0 += source[w * tile_floats];
      value8 += source[w * tile_floats + 8];
    }
    if constexpr (!K::kBook) {
      value0 *= kRawUnit;
      value8 *= kRawUnit;
    }
    finish(p.epilogue, m, tile * 16 + g, value0, value8);
  }
}

template <typename K>
__global__ void __launch_bounds__(kWarps * 32, 1)
    qlinear_gemv_kernel(const __grid_constant__ QLinearProblem p,
                        const __grid_constant__ Plan plan) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint32_t special;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = divide(warp, plan.warps_reciprocal), member = warp - group * plan.warps;
  const int first = member * plan.turns, have = min(plan.turns, plan.units - first);
  const int tile = blockIdx.x * plan.groups + group, tile_stride = gridDim.x * plan.groups;

  Cursor<K> cursor(p, plan, tile, first, have);
  Unit<K> ring[kDepth];
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    ring[i].load(p, plan, cursor);
    cursor.advance(plan);
  }
  if (threadIdx.x == 0) special = 0;
  auto* const absmax = reinterpret_cast<uint32_t*>(shared + plan.absmax_at);
  if (p.activation_bits == 8) {
    for (int i = threadIdx.x; i < p.groups * p.m; i += blockDim.x) absmax[i] = 0;
  }
  if constexpr (K::kBook) fill_wide_book(shared, p.format.scheme);
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();

  unsigned char* const x = shared + plan.x_at;
  unsigned char* const records = shared + plan.record_at;
  stage_x<K::kFoldSteps>(x, records, absmax, &special, p, plan, plan.units * K::kUnit);
  __syncthreads();

  const LaneX<K> lane_x(x, records, p, plan);
  const unsigned char* const table = shared + lane * 4;
  auto* const partial = reinterpret_cast<float*>(shared + plan.partial_at);
  const int tile_floats = 16 * p.m;
  const uint32_t marked = special;
  Sums sums;
  int unit = first;
  float* target = partial;
  // Uses one unit; a tile's last one leaves the warp's sums in their place.
  const auto use = [&](const Unit<K>& loaded) {
    multiply<K>(sums, loaded, unit * K::kSteps, lane_x, table, p);
    if (++unit < first + have) return;
    unit = first;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int m = lane % 4 * 2 + j;
      if (m < p.m) {
        target[m * 16] = sums.value[j];
        target[m * 16 + 8] = sums.value[2 + j];
      }
    }
    sums = {};
    target += plan.block_warps() * tile_floats;
  };
  for (int round = 0; round < plan.rounds; round += plan.slots) {
    const int slots = min(plan.slots, plan.rounds - round), count = slots * have;
    target = partial + warp * tile_floats + lane / 4;
#pragma unroll 1
    for (int i = 0; i < count; i += kDepth) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        if (i + d >= count) continue;
        use(ring[d]);
        ring[d].load(p, plan, cursor);
        cursor.advance(plan);
      }
    }
    __syncthreads();
    add_partials<K>(p, plan, partial, marked, blockIdx.x * plan.groups + round * tile_stride,
                    slots);
    if (round + plan.slots < plan.rounds) __syncthreads();
  }
  if (__builtin_expect(marked != 0, 0)) finish_special<K::kBits>(p, plan, marked);
}

template <typename K>
int launch(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  const Plan plan = make_plan(p, device);
  return launch_kernel(qlinear_gemv_kernel<K>, dim3(plan.grid), plan.block_warps() * 32,
                       plan.shared_bytes, device.sm >= 90, stream, p, plan);
}

template <int kBits, bool kBook, Zeros kZeros>
int launch_kind(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  if (fold_steps(p) == 4) return launch<Kind<kBits, kBook, 4, kZeros>>(p, device, stream);
  return launch<Kind<kBits, kBook, 8, kZeros>>(p, device, stream);
}

// One translation unit for each, so that they compile side by side.
template <int kBits, bool kBook>
int launch_bits(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  int error = cudaSuccess;
  if (p.format.has_zeros()) {
    if constexpr (!kBook) {
      if (launch_row<RowKind<kBits, kBook, true>>(p, device, stream, error)) return error;
    }
  } else if (launch_row<RowKind<kBits, kBook, false>>(p, device, stream, error)) {
    return error;
  }
  constexpr Zeros kRare = kBook ? kWithout : kEither;
  switch (fold_steps(p)) {
    case 1:
      return launch<Kind<kBits, kBook, 1, kRare>>(p, device, stream);
    case 2:
      return launch<Kind<kBits, kBook, 2, kRare>>(p, device, stream);
    default:
      if constexpr (!kBook) {
        if (p.format.has_zeros()) return launch_kind<kBits, kBook, kWith>(p, device, stream);
      }
      return launch_kind<kBits, kBook, kWithout>(p, device, stream);
  }
}

}  // namespace gemv
}  // namespace kvopt::cuda
