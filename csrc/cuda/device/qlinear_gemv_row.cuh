// SPDX-License-Identifier: Apache-2.0
// y (1, N) = x (1, K) w^T on sm_90: decoding, bound by memory and, for small weights, by what lies
// between two products.
//
//   K: stages of W units; unit = 128 to 512 columns of 16 rows, 1.5 or 2 KB of codes
//   ┌──────┬──────┬─ ─ ─┬──────┬──────┬─ ─ ─┐
//   │  w0  │  w1  │     │ wW-1 │  w0  │     │   16 rows of w: a tile
//   └──────┴──────┴─ ─ ─┴──────┴──────┴─ ─ ─┘
//    bulk copy ─▶ ring of stages in shared memory ─▶ eight warps ─▶ sums, added in a fixed order
//
// Mathematics. Integer codes go to the int8 tensor cores as unsigned bytes, as they lie: one AND
// makes four of them an operand register, half of what fp16 operands take. x is three or four
// signed bytes of an integer (qlinear_gemv_row_x.cuh), which are as many columns of operand B: with
// one row of x there are eight, so that costs nothing. The sums are exact; they start at the bits
// of 3 * 2^22, so that what comes out is read as fp32 without a conversion, and a segment of 128
// columns inside one group adds
//     scale * (unit * (256 S0 + S1) - zero * sum of x)
// in the lanes of two bytes each. Code books keep fp16: a table of pairs, an entry for each byte of
// codes and lane, rows g and g + 8 in one. A looked-up pair is an operand register as it is: with
// one row of x, columns 0 to 3 of operand B hold x in the first or second place of a pair and zero
// in the other, which tells the two rows apart.
//
// Bytes: N * K * bits / 8 of codes and 2 or 4 per group and row, once. Bound: memory, from some 30
// MB on (4 bits, 28672 x 4096, on an H200: 15.7 us, 3.97 of 4.2 TB/s). Lane-instructions a weight:
// 0.9 with 4 bits, 1.2 with 3, 0.75 with 2, of 3.6 that there are at the full read rate. Code
// books: bound by shared memory, of whose wavefronts a unit takes 120, 64 of them for the table:
// with the copies' writes 1100 of the 1400 cycles that eight units need.
//
// Small weights are bound by what lies between two products; measured there, in cycles: 1000 from
// the end of one to the end of the next one's wait, 1100 (2048 columns) or 1800 (4096) for x to
// come and be staged, 650 for each unit of all warps, 700 for the last sums. So a block takes half
// of a multiprocessor: the next product's block comes early, beside it, and has its ring full of
// codes when x comes. It may read them early because kernels that write weights never call
// let_next_kernel_start(), and settle_weights() behind them (wquant.h) starts when their writes are
// seen. It is let in when a ring's length is left to be asked for; earlier, its copies would only
// take bandwidth from blocks that are not done, and the bubble would find its ring full (gate and
// up of an 8B model 18.4 instead of 15.7 us).
//
// Limits: groups of 128 columns (code books: 64) times a power of two, aligned x that fits in
// shared memory beside a ring, 16-bit activations; qlinear_gemv.cuh takes the rest.
#pragma once

#include "cuda/device/qlinear_gemv_row_multiply.cuh"
#include "cuda/device/wgmma.cuh"

namespace kvopt::cuda {
namespace gemv {

#if __CUDA_ARCH__ >= 900

// Asks for stages of codes and parameters, a ring's length ahead; one thread.
template <typename K>
struct RowFetcher {
  const QLinearProblem& p;
  const RowPlan& plan;
  const unsigned char* codes;  // of the block's first tile of the round
  const unsigned char* meta;
  unsigned char* target;  // of the stage
  uint64_t* full;         // its barrier
  int tiles;              // left from the first of the round
  int turn = 0, slot = 0;
  uint32_t parity = 1;  // of the slot's last use

  __device__ __forceinline__ RowFetcher(const QLinearProblem& p, const RowPlan& plan,
                                        unsigned char* ring, uint64_t* full)
      : p(p), plan(plan), target(ring), full(full) {
    const int tile = blockIdx.x << (kRowLogWarps - plan.warps_log2);
    tiles = p.tiles - tile;
    codes = p.packed + tile * p.tile_bytes;
    meta = reinterpret_cast<const unsigned char*>(p.meta) +
           static_cast<int64_t>(tile) * p.groups * K::kStride;
  }
  __device__ __forceinline__ void issue() {
    const int side = kRowWarps >> plan.warps_log2;
    const bool last = turn == plan.turns - 1;
    const int code_bytes = last ? plan.last_codes : plan.turn_codes;
    const int meta_bytes = last ? plan.last_meta : plan.turn_meta;
    const unsigned char* from = codes + static_cast<int64_t>(turn) * plan.turn_codes;
    const unsigned char* from_meta =
        meta + (((turn << plan.warps_log2) * K::kSegments) >> plan.group_shift) * K::kStride;
    const int count = min(side, tiles);
    if (count > 0) {
      barrier_expect(full, count * (code_bytes + meta_bytes));
      unsigned char* to = target;
      unsigned char* to_meta = target + kRowWarps * K::kUnitBytes;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        copy_bulk(to, from, code_bytes, full, kEvictFirst);
        copy_bulk(to_meta, from_meta, meta_bytes, full, kEvictFirst);
        to += plan.turn_codes;
        to_meta += (K::kSegments * K::kStride) << plan.warps_log2;
        from += p.tile_bytes;
        from_meta += p.groups * K::kStride;
      }
    } else {
      barrier_arrive(full);
    }
    if (last) {
      turn = -1;
      codes += plan.round_codes;
      meta += plan.round_meta;
      tiles -= static_cast<int>(gridDim.x) * side;
    }
    ++turn;
    target += plan.stage_bytes;
    ++full;
    if (++slot == plan.stages) {
      target -= plan.stages * plan.stage_bytes;
      full -= plan.stages;
      slot = 0;
      parity ^= 1;
    }
  }
};

#endif

// The sums of `slots` rounds from `first` on with all that an epilogue may hold, or of a row with
// infinities or NaN, out of the way of those that are stored as they are.
template <int kBits>
__device__ __forceinline__ void finish_rounds(const QLinearProblem& p, const RowPlan& plan,
                                              const float* partial, int first, int slots,
                                              bool special) {
  const int warps = 1 << plan.warps_log2, side_log2 = kRowLogWarps - plan.warps_log2;
#pragma unroll 1
  for (int i = threadIdx.x; i < slots << (side_log2 + 3); i += kRowWarps * 32) {
    const int which = i / 8;
    const int tile = (((first + (which >> side_log2)) * gridDim.x + blockIdx.x) << side_log2) +
                     (which & ((1 << side_log2) - 1));
    if (tile >= p.tiles) continue;
    const int n = tile * 16 + i % 8;
    float value[2] = {0, 0};
#pragma unroll 1
    for (int j = 0; j < 2; ++j) {
      if (special) {
        value[j] = special_sum<kBits>(p, 0, n + 8 * j);
        continue;
      }
#pragma unroll 1
      for (int w = 0; w < warps; ++w) value[j] += partial[(which * warps + w) * 16 + i % 8 + 8 * j];
    }
    finish_pair(p.epilogue, 0, n, value[0], value[1]);
  }
}

template <typename K>
__global__ void __launch_bounds__((kRowWarps + 1) * 32, 2)
    qlinear_gemv_row_kernel(const __grid_constant__ QLinearProblem p,
                            const __grid_constant__ RowPlan plan) {
#if __CUDA_ARCH__ >= 900
  constexpr int kThreads = kRowWarps * 32;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t full[2 * kRowStages];  // and as many that say a stage is empty
  __shared__ uint32_t special;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == kRowWarps) {
    if (lane < plan.stages) {
      barrier_init(&full[lane], 1);
      barrier_init(&full[kRowStages + lane], kRowWarps);
      barrier_init_fence();
    }
    __syncwarp();
    if (lane == 0) special = 0;
    RowFetcher<K> fetcher(p, plan, shared + plan.ring_at, full);
    if (lane == 0) {
#pragma unroll 1
      for (int i = 0; i < plan.stages; ++i) fetcher.issue();
    }
    __syncthreads();
    if (lane == 0) {
      wait_for_previous_kernel();
      const int all = plan.rounds * plan.turns;
      bool open = false;
#pragma unroll 1
      for (int i = plan.stages; i < all; ++i) {
        if (!open && i + plan.stages >= all) {  // a ring's length is yet to be asked for
          open = true;
          let_next_kernel_start();
        }
        barrier_wait(fetcher.full + kRowStages, fetcher.parity);
        fetcher.issue();
      }
      if (!open) let_next_kernel_start();
    }
    return;
  }
  if constexpr (K::kBook) {
    // Entry b of a lane: {book[b & 15], book[b >> 4]} at b * 128 + lane * 4. Each lane has looked
    // up one code.
    const float mine = book_value(p.format.scheme, lane & 15);
    auto* const words = reinterpret_cast<uint32_t*>(shared);
#pragma unroll 4
    for (int i = warp; i < 256; i += kRowWarps) {
      words[i * 32 + lane] =
          pack_halves(__shfl_sync(0xFFFFFFFF, mine, i & 15), __shfl_sync(0xFFFFFFFF, mine, i >> 4));
    }
  }
  const int warps = 1 << plan.warps_log2, side = kRowWarps >> plan.warps_log2;
  const int ring_bytes = plan.stages * plan.stage_bytes;
  const int member = warp & (warps - 1), group = warp >> plan.warps_log2;
  const int g = lane / 4, t = lane % 4;
  const uint32_t base = shared_address(shared), ring = base + plan.ring_at;
  constexpr int kUnitX = K::kUnitX, kUnitRecords = K::kSegments * K::kRecord;
  RowLane<K> from;
  from.codes = ring + warp * K::kUnitBytes + lane * 16;
  from.meta =
      ring + kRowWarps * K::kUnitBytes +
      (group * warps * K::kSegments + ((member * K::kSegments) >> plan.group_shift)) * K::kStride +
      g * (K::kStride / 8);
  from.x = base + plan.x_at + member * kUnitX + (K::kBook ? 0 : min(g % 4, K::kPlanes - 1) * 64) +
           t * 16;
  from.records = base + plan.record_at + member * kUnitRecords + (K::kBook ? 0 : t % 2 * 16);
  from.table = base + lane * 4;
  from.select = g % 4 == 0 ? 0x4410 : g % 4 == 1 ? 0x1044 : g % 4 == 2 ? 0x4432 : 0x3244;
  // Kept in registers; ptxas would rather work them out again for every unit.
  asm volatile("" : "+r"(from.codes), "+r"(from.meta), "+r"(from.x), "+r"(from.records));
  if constexpr (K::kBook) asm volatile("" : "+r"(from.table), "+r"(from.select));
  RowStager<K> stager(p);
  __syncthreads();
  wait_for_previous_kernel();
  unsigned char* const x = shared + plan.x_at;
  unsigned char* const records = shared + plan.record_at;
  if (p.input_scale != nullptr) {
    stager.template run<RowInput::kScaled>(x, records, &special, p, plan);
  } else if (p.dtype == DType::kFloat16) {
    stager.template run<RowInput::kHalf>(x, records, &special, p, plan);
  } else {
    stager.template run<RowInput::kBFloat>(x, records, &special, p, plan);
  }
  named_barrier(1, kThreads);

  auto* const partial = reinterpret_cast<float*>(shared + plan.partial_at);
  const uint32_t full_at = shared_address(full);
  const int mine = plan.segments - member * K::kSegments;
  uint32_t at = 0, barrier = full_at, parity = 0;
#pragma unroll 1
  for (int first = 0; first < plan.rounds; first += plan.slots) {
    const int slots = min(plan.slots, plan.rounds - first);
#pragma unroll 1
    for (int round = 0; round < slots; ++round) {
      float sum0 = 0, sum8 = 0;
      int left = mine;
      uint32_t x_at = 0, records_at = 0;
#pragma unroll 1
      for (int turn = 0; turn < plan.turns; ++turn) {
        barrier_wait(barrier, parity);
        if (left > 0) {
          multiply_unit<K>(sum0, sum8, from, at, x_at, records_at, left, plan.group_shift);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier + kRowStages * 8);
        x_at += kUnitX << plan.warps_log2;
        records_at += kUnitRecords << plan.warps_log2;
        left -= K::kSegments << plan.warps_log2;
        at += plan.stage_bytes;
        barrier += 8;
        if (at == static_cast<uint32_t>(ring_bytes)) {
          at = 0;
          barrier = full_at;
          parity ^= 1;
        }
      }
      sum0 += __shfl_xor_sync(0xFFFFFFFF, sum0, 1);
      sum8 += __shfl_xor_sync(0xFFFFFFFF, sum8, 1);
      if (t == 0) {
        float* const target = partial + (round * kRowWarps + warp) * 16 + g;
        target[0] = sum0;
        target[8] = sum8;
      }
    }
    named_barrier(1, kThreads);
    if (plan.plain && special == 0) {
      const int side_log2 = kRowLogWarps - plan.warps_log2;
#pragma unroll 1
      for (int i = threadIdx.x; i < slots << (side_log2 + 4); i += kThreads) {
        const int which = i / 16;
        const int tile = (((first + (which >> side_log2)) * gridDim.x + blockIdx.x) << side_log2) +
                         (which & (side - 1));
        const int n = tile * 16 + i % 16;
        if (n >= p.n) continue;
        const float* const source = partial + which * warps * 16 + i % 16;
        float value =
            p.epilogue.bias == nullptr ? 0.0f : load_float(p.epilogue.bias, n, p.epilogue.dtype);
#pragma unroll
        for (int w = 0; w < kRowWarps; ++w) {
          if (w < warps) value += source[w * 16];
        }
        store_float(p.epilogue.y, n, value, p.epilogue.dtype);
      }
    } else {
      finish_rounds<K::kBits>(p, plan, partial, first, slots, special != 0);
    }
    if (first + plan.slots < plan.rounds) named_barrier(1, kThreads);
  }
#endif
}

// Whether the code that will run on this GPU is not that of an older one.
template <typename K>
bool row_is_compiled() {
  static const bool compiled = [] {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, qlinear_gemv_row_kernel<K>) == cudaSuccess &&
           attributes.sharedSizeBytes > kRowStages * sizeof(uint64_t);
  }();
  return compiled;
}

// False: another kernel must do it.
template <typename K>
bool launch_row(const QLinearProblem& p, const Device& device, cudaStream_t stream, int& error) {
  if (!row_fits<K>(p, device) || !row_is_compiled<K>()) return false;
  const RowPlan plan = make_row_plan<K>(p, device);
  if (plan.stages == 0) return false;
  error = launch_kernel(qlinear_gemv_row_kernel<K>, dim3(plan.grid), (kRowWarps + 1) * 32,
                        plan.shared_bytes, true, stream, p, plan);
  return true;
}

}  // namespace gemv
}  // namespace kvopt::cuda
