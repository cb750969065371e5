// SPDX-License-Identifier: Apache-2.0
// y (M, N) = x (M, K) w^T for M <= 8: a matrix-vector product, bound by memory.
//
//   K: units of 128 to 512 columns, dealt to the W warps of a tile in turn
//   ┌──────┬──────┬─── ─ ─ ───┬──────┬──────┬─── ─ ─
//   │  w0  │  w1  │           │ wW-1 │  w0  │            16 rows of w: a tile, operand A
//   └──────┴──────┴─── ─ ─ ───┴──────┴──────┴─── ─ ─
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
// Bytes: N * K * bits / 8 of codes and 2 or 4 per group and row, once. Bound: memory. About 1.2
// lane-instructions per 4-bit weight, of 3.6 that an H200 can issue at its full read rate; code
// books: a shared-memory load for two weights, close to what that can do. What memory needs is
// bytes in flight: two units a warp, 2 KB each, 16 warps a multiprocessor, straight into registers
// (rings in shared memory, filled by cp.async or the bulk copy engine, measured slower). On sm_90 a
// block may arrive before the kernel in front is done: each warp asks for its first unit to come to
// L2, where that kernel's writes arrive too, and waits. Short products are bound by what every
// block does once.
// The partial sums of the warps are added in shared memory in a fixed order.
// Limits: M rows of K must fit in shared memory; else the tiled product takes over.
#pragma once

#include "cuda/device/dequant.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/qlinear_gemv_plan.cuh"
#include "cuda/device/qlinear_gemv_x.cuh"

namespace kvopt::cuda {
namespace gemv {

// What a kernel is compiled for.
template <int kBits_, bool kBook_, int kFoldSteps_>
struct Kind {
  static constexpr int kBits = kBits_, kFoldSteps = kFoldSteps_;
  static constexpr bool kBook = kBook_;
  static constexpr int kUnit = unit_columns(kBits, kFoldSteps);
  static constexpr int kSteps = kUnit / kStepColumns;
  static constexpr int kSegments = kSteps / kFoldSteps;
  static constexpr int kLoads = kUnit * kBits / 256;  // 512 bytes a warp each
};

// Where a warp reads next: its units of its tiles, in that order.
template <typename K>
struct Cursor {
  const uint8_t* codes;  // of this lane
  const uint8_t* meta;
  int tile, unit;

  __device__ __forceinline__ Cursor(const QLinearProblem& p, int first_tile, int member) {
    enter(p, first_tile, member);
  }
  __device__ __forceinline__ void enter(const QLinearProblem& p, int first_tile, int member) {
    const int lane = threadIdx.x % 32;
    tile = first_tile;
    unit = member;
    codes = p.packed + static_cast<int64_t>(tile) * p.tile_bytes +
            (unit * (K::kLoads * 512) + lane * 16);
    const int stride = p.format.has_zeros() ? 64 : 32;
    meta = reinterpret_cast<const uint8_t*>(p.meta) +
           static_cast<int64_t>(tile) * (p.groups * stride) + lane / 4 * (stride / 8);
  }
  __device__ __forceinline__ void advance(const QLinearProblem& p, const Plan& plan, int member) {
    unit += plan.warps;
    codes += plan.warps * (K::kLoads * 512);
    if (unit >= plan.units) enter(p, tile + gridDim.x * plan.groups, member);
  }
};

// A lane's codes and group parameters of a unit.
template <typename K>
struct Unit {
  uint32_t word[K::kLoads * 4];
  uint2 meta[K::kSegments];  // without zero points: .x only

  __device__ __forceinline__ void load(const QLinearProblem& p, const Plan& plan,
                                       const Cursor<K>& from) {
    // Loads left in the tile. Predicates rather than a branch: ptxas would hoist the use of the
    // previous unit, and with it the wait for its codes, above a branch, and these loads would
    // start late.
    const int here =
        from.tile < p.tiles ? p.blocks * kBlockColumns * K::kBits / 256 - from.unit * K::kLoads : 0;
#pragma unroll
    for (int i = 0; i < K::kLoads; ++i) {
      const uint4 v = i < here ? load_stream(from.codes + i * 512) : make_uint4(0, 0, 0, 0);
      word[4 * i] = v.x;
      word[4 * i + 1] = v.y;
      word[4 * i + 2] = v.z;
      word[4 * i + 3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < K::kSegments; ++i) {
      const int group = group_of_step(p, plan, from.unit * K::kSteps + i * K::kFoldSteps);
      if (here > 0) {
        if (!K::kBook && p.format.has_zeros()) {
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

// Where a lane reads its share of x and of the records.
template <typename K>
struct LaneX {
  const unsigned char* x;
  const unsigned char* record;

  __device__ __forceinline__ LaneX(const unsigned char* x_share, const unsigned char* records,
                                   const QLinearProblem& p, const Plan& plan) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    x = x_share + min(g, p.m - 1) * plan.x_pitch + t * 8;
    record = records + min(t, plan.row_pairs - 1) * plan.record_pitch;
  }
};

// sums += the segment's product. `meta`: the group's parameters of rows g and g + 8.
template <typename K>
__device__ __forceinline__ void fold(Sums& sums, const float (&c)[2][4], int first_step,
                                     const LaneX<K>& lane, int segment, uint2 meta,
                                     const QLinearProblem& p) {
  float scale0, scale8, zero0 = p.zero, zero8 = p.zero;
  if (!K::kBook && p.format.has_zeros()) {
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

// `part_step`: the unit's first step in the warp's part of x.
template <typename K>
__device__ __forceinline__ void multiply(Sums& sums, const Unit<K>& unit, int part_step,
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
      const uint2 b = *reinterpret_cast<const uint2*>(lane.x + (part_step + step) * 32);
      mma_16x8x16(c[s % 2], a, b);
    }
    fold<K>(sums, c, first, lane, part_step / K::kFoldSteps + first / K::kFoldSteps,
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

// Adds the warps' sums of `slots` rounds, the first of them at tile `first`, and finishes them.
template <typename K>
__device__ __forceinline__ void add_partials(const QLinearProblem& p, const Plan& plan,
                                             const float* partial, const uint32_t& special,
                                             int first, int slots, bool last) {
  __syncthreads();
  // Outputs [slot][group][row of x][row pair of the tile].
  const int outputs = slots * plan.groups * p.m * 8;
  const int tile_stride = gridDim.x * plan.groups, tile_floats = 16 * p.m;
#pragma unroll 1
  for (int i = threadIdx.x; i < outputs; i += blockDim.x) {
    const int g = i % 8;
    int m = 0, which = i / 8;
    if (p.m > 1) {
      m = which % p.m;
      which /= p.m;
    }
    int tile = first + which * tile_stride;
    if (plan.groups > 1) {
      tile = first + which / plan.groups * tile_stride + which % plan.groups;
      if (tile >= p.tiles) continue;
    }
    const float* source = partial + which * plan.warps * tile_floats + m * 16 + g;
    float value0 = 0, value8 = 0;
#pragma unroll 8
    for (int w = 0; w < plan.warps; ++w) {
      value0 += source[w * tile_floats];
      value8 += source[w * tile_floats + 8];
    }
    if constexpr (!K::kBook) {
      value0 *= kRawUnit;
      value8 *= kRawUnit;
    }
    if (__builtin_expect(special >> m & 1, 0)) {
      value0 += special_sum<K::kBits>(p, m, tile * 16 + g);
      value8 += special_sum<K::kBits>(p, m, tile * 16 + g + 8);
    }
    finish_pair(p.epilogue, m, tile * 16 + g, value0, value8);
  }
  if (!last) __syncthreads();
}

template <typename K>
__global__ void __launch_bounds__(kMaxThreads, 1)
    qlinear_gemv_kernel(const __grid_constant__ QLinearProblem p,
                        const __grid_constant__ Plan plan) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint32_t special;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int member = warp, group = 0;
  if (plan.groups > 1) {
    member = warp % plan.warps;
    group = warp / plan.warps;
  }
  const int tile_stride = gridDim.x * plan.groups, block_first = blockIdx.x * plan.groups;

  let_next_kernel_start();
  Cursor<K> cursor(p, block_first + group, member);
  {
    // 128 bytes a lane: kLoads * 4 lines a unit.
    Cursor<K> ahead = cursor;
    for (int i = 0; i < plan.prefetch; ++i) {
      const int offset = ahead.unit * (K::kLoads * 512) + lane * 128;
      if (lane < K::kLoads * 4 && ahead.tile < p.tiles && offset < p.tile_bytes) {
        prefetch_l2(ahead.codes + lane * (128 - 16));
      }
      ahead.advance(p, plan, member);
    }
  }
  if (threadIdx.x == 0) special = 0;
  if constexpr (K::kBook) fill_wide_book(shared, p.format.scheme);
  __syncthreads();
  unsigned char* const x = shared + plan.x_at + warp * plan.x_share;
  unsigned char* const records = shared + plan.record_at + warp * plan.record_share;
  auto* const absmax = reinterpret_cast<uint32_t*>(shared + plan.absmax_at);
  const LaneX<K> lane_x(x, records, p, plan);
  wait_for_previous_kernel();

  Unit<K> first_unit, second_unit;
  const auto load_next = [&](Unit<K>& unit) {
    unit.load(p, plan, cursor);
    cursor.advance(p, plan, member);
  };
  load_next(first_unit);
  if (!plan.direct_x) copy_x<K::kUnit>(x, p, plan, member);
  if (p.activation_bits == 8) {
    for (int i = threadIdx.x; i < p.groups * p.m; i += blockDim.x) absmax[i] = 0;
    __syncthreads();
    find_absmax<K::kUnit>(absmax, x, p, plan, member);
    __syncthreads();
  }
  stage_x<K::kUnit, K::kFoldSteps>(x, records, absmax, &special, p, plan, member);
  __syncwarp();

  const unsigned char* const table = shared + lane * 4;
  auto* const partial = reinterpret_cast<float*>(shared + plan.partial_at);
  const int tile_floats = 16 * p.m;  // of one warp
  Sums sums;
  int unit = member, part_step = 0, slot = 0, block_tile = block_first;

  // Uses one unit; after a tile's last one stores the warp's sums, and when these have filled
  // their place adds the warps' sums. True when the block's last tile is done.
  const auto use = [&](const Unit<K>& loaded) -> bool {
    multiply<K>(sums, loaded, part_step, lane_x, table, p);
    unit += plan.warps;
    part_step += K::kSteps;
    if (unit < plan.units) return false;
    unit = member;
    part_step = 0;
    // Partial sums: [slot][group][member][row of x][row of the tile].
    float* const target = partial + (slot * plan.block_warps() + warp) * tile_floats + lane / 4;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int m = lane % 4 * 2 + j;
      if (m < p.m) {
        target[m * 16] = sums.value[j];
        target[m * 16 + 8] = sums.value[2 + j];
      }
    }
    sums = {};
    ++slot;
    const bool last = block_tile + tile_stride >= p.tiles;
    if (slot == plan.slots || last) {
      add_partials<K>(p, plan, partial, special, block_tile - (slot - 1) * tile_stride, slot, last);
      slot = 0;
    }
    block_tile += tile_stride;
    return last;
  };

  while (true) {
    load_next(second_unit);
    if (use(first_unit)) break;
    load_next(first_unit);
    if (use(second_unit)) break;
  }
}

template <typename K>
int launch(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  const Plan plan = make_plan(p, device);
  return launch_kernel(qlinear_gemv_kernel<K>, dim3(plan.grid), plan.block_warps() * 32,
                       plan.shared_bytes, device.sm >= 90, stream, p, plan);
}

// One translation unit for each, so that they compile side by side.
template <int kBits, bool kBook>
int launch_bits(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  switch (fold_steps(p)) {
    case 8:
      return launch<Kind<kBits, kBook, 8>>(p, device, stream);
    case 4:
      return launch<Kind<kBits, kBook, 4>>(p, device, stream);
    case 2:
      return launch<Kind<kBits, kBook, 2>>(p, device, stream);
    default:
      return launch<Kind<kBits, kBook, 1>>(p, device, stream);
  }
}

}  // namespace gemv
}  // namespace kvopt::cuda
