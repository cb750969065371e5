// SPDX-License-Identifier: Apache-2.0
// The warpgroup product's inner loop: codes from shared memory to registers, to weights, to the
// tensor cores. While these multiply kSets - 1 sets of A registers, the next set is made.
//
// A scale is applied to the weights (13 instructions for 8 weights a lane), or, where a thread has
// few sums (kLate), to the sums of its group: 9 instructions and kRowsX / 2 more for each group.
#pragma once

#include <cstddef>

#include "cuda/device/dequant.cuh"
#include "cuda/device/qlinear_wgmma_plan.cuh"
#include "cuda/device/wgmma.cuh"

namespace kvopt::cuda::wgmma {

#if KVOPT_HAS_WGMMA

// Pairs of a code book's values from a table of pairs; see fill_table.
__device__ __forceinline__ void book_operand(uint32_t (&a)[4], uint32_t word, uint32_t table) {
  // Bytes 0 and 1: the two codes of pairs 0 and 2; of pairs 1 and 3.
  const uint32_t even = (word & 0x0F0F) | ((word >> 12) & 0xF0F0);
  const uint32_t odd = ((word >> 4) & 0x0F0F) | ((word >> 16) & 0xF0F0);
  constexpr int kShift = 6;  // log2(4 * kBookCopies)
  const auto look_up = [table](uint32_t offset) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(table + offset));
    return v;
  };
  a[0] = look_up((even & 0xFF) << kShift);
  a[1] = look_up((odd & 0xFF) << kShift);
  a[2] = look_up((even >> 8) << kShift);
  a[3] = look_up((odd >> 8) << kShift);
}

// Entry b of the table is {book[b & 15], book[b >> 4]}, kBookCopies times. All threads of a block;
// the caller synchronises before use. `values`: room for the book, each value of which is worked
// out once (book_value's arrays live in local memory).
__device__ __forceinline__ void fill_table(uint32_t* table, float* values, Scheme scheme) {
  if (threadIdx.x < 16) values[threadIdx.x] = book_value(scheme, static_cast<int>(threadIdx.x));
  __syncthreads();
  for (int i = threadIdx.x; i < 256 * kBookCopies; i += blockDim.x) {
    const int b = i / kBookCopies;
    const __half2 pair = __floats2half2_rn(values[b & 15], values[b >> 4]);
    table[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// A value that the compiler keeps instead of working it out again.
__device__ __forceinline__ uint32_t keep(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}

template <int kWords>
__device__ __forceinline__ void load_shared(uint32_t* v, uint32_t address) {
  if constexpr (kWords == 4) {
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];"
                 : "=r"(v[0]), "=r"(v[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v[0]) : "r"(address) : "memory");
  }
}

__device__ __forceinline__ __half low_half(uint32_t v) {
  return __ushort_as_half(static_cast<unsigned short>(v & 0xFFFF));
}
__device__ __forceinline__ __half high_half(uint32_t v) {
  return __ushort_as_half(static_cast<unsigned short>(v >> 16));
}

__host__ __device__ constexpr int log2_of(int power) {
  int e = 0;
  for (; power > 1; power /= 2) ++e;
  return e;
}

// raw operands -> (q - zero) * 2^-9.
template <int kBits>
__device__ __forceinline__ void levels_operand(uint32_t (&a)[4], const Words<kBits>& w, int step,
                                               const RowScale& row0, const RowScale& row8) {
  raw_operand<kBits>(a, w, step);
  // 2^15 / factor as a pair.
  const uint32_t low =
      static_cast<uint32_t>(0x7800 - 0x400 * log2_of(raw_factor<kBits>(step, false))) * 0x00010001u;
  const uint32_t high =
      static_cast<uint32_t>(0x7800 - 0x400 * log2_of(raw_factor<kBits>(step, true))) * 0x00010001u;
  a[0] = fma_pair(a[0], low, row0.offset);
  a[1] = fma_pair(a[1], high, row8.offset);
  a[2] = fma_pair(a[2], low, row0.offset);
  a[3] = fma_pair(a[3], high, row8.offset);
}

// One warpgroup that multiplies. kFine: groups may end within a block of 64 columns. All of a stage
// of codes is unrolled, so that what is known of a unit (16 * kSteps columns) is a constant.
template <int kBits, bool kBook, bool kFine, typename S>
struct Multiplier {
  static constexpr int kUnits = S::kCodeBlocks * 4 / S::kSteps;
  static constexpr int kUnitsX = S::kBlocksX * 4 / S::kSteps;
  static constexpr int kTileBytes = tile_stage_bytes<kBits, S>();
  // Few sums: scales meet the sums of a group instead of its weights, which stay q - zero or
  // book[q].
  static constexpr bool kLate = !kFine && S::kRowsX <= 32;
  static_assert(kUnits % S::kSets == 0 && kUnits % kUnitsX == 0 && kUnitsX > S::kSets - 2);

  const QLinearProblem& p;
  const Plan& plan;
  const int lane,
      tile16;               // the first of this warp's tiles of 16 rows, which are 4 apart
  const uint32_t barriers;  // addresses in shared memory
  const uint32_t first_codes, first_rows;
  const uint32_t table;
  const int group_blocks;
  Ring codes, x;
  int free_x = -1;           // slot whose multiplications may still be under way
  int group = -1, left = 0;  // blocks of the group from here on
  int in_stage = 0;          // the group's place among those of the stage
  int first_group = 0;       // kFine: of the stage
  bool wide = false;
  uint32_t stage = 0;  // this lane's codes of the warp's first tile
  RowScale row0[S::kTiles], row8[S::kTiles];
  uint32_t wide0[S::kTiles], wide8[S::kTiles];
  bool new_group = false;                      // kLate: from the unit prepared last on
  float scale0[S::kTiles], scale8[S::kTiles];  // of the group being summed
  float next_scale0[S::kTiles], next_scale8[S::kTiles];
  float total[S::kTiles][kLate ? S::kRowsX / 2 : 1];  // of the groups before
  Words<kBits> words[S::kTiles];
  uint32_t a[S::kSets][S::kTiles][S::kSteps][4];
  float sum[S::kTiles][S::kRowsX / 2];

  __device__ __forceinline__ Multiplier(const QLinearProblem& problem, const Plan& plan,
                                        const Barriers& barriers, unsigned char* shared, int warp,
                                        int lane)
      : p(problem),
        plan(plan),
        lane(lane),
        tile16(warp / 4 * S::kTiles * 4 + warp % 4),
        barriers(keep(shared_address(&barriers))),
        first_codes(keep(shared_address(shared) + plan.codes + tile16 * kTileBytes + lane * 16)),
        first_rows(keep(static_cast<uint32_t>(swizzled_operand(shared_address(shared))))),
        table(kBook ? keep(shared_address(shared) + plan.book + lane % kBookCopies * 4) : 0),
        group_blocks(problem.group_columns / kBlockColumns) {}

  __device__ __forceinline__ uint32_t barrier(size_t ring, int slot) const {
    return barriers + static_cast<uint32_t>(ring) + slot * 8;
  }

  // The parameters in force from the first column of the stage's `part`-th block on.
  __device__ __forceinline__ void enter_block(int stage_index, int part, bool first) {
    if constexpr (kFine) {
      if (part == 0) first_group = group_of_column(p, stage_index * S::kCodeBlocks * kBlockColumns);
      enter_step(stage_index, part * 4);
    } else {
      if (part == 0) in_stage = 0;
      if (part == 0 && first) {
        group = group_of_column(p, stage_index * S::kCodeBlocks * kBlockColumns);
        left = (group + 1) * group_blocks - stage_index * S::kCodeBlocks;
        load_group(0);
      } else if (--left == 0 && group + 1 < p.groups) {
        ++group;
        left = group_blocks;
        if (part > 0) ++in_stage;
        load_group(in_stage);
      }
    }
  }

  __device__ __forceinline__ void enter_step(int stage_index, int step) {
    const int now =
        group_of_column(p, stage_index * S::kCodeBlocks * kBlockColumns + step * kStepColumns);
    if (now == group) return;
    group = now;
    load_group(group - first_group);
  }

  // Parameters of the `index`-th group that a stage touches.
  __device__ __forceinline__ void load_group(int index) {
    bool any = false;
    const uint32_t first = stage - tile16 * kTileBytes - lane * 16 + S::kTiles16 * kTileBytes;
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
      const uint32_t meta = first + (tile16 + 4 * t) * plan.meta;
      uint32_t v[2];
      __half zero0, scale8, zero8;
      if (p.format.has_zeros()) {
        load_shared<2>(v, meta + index * 64 + lane / 4 * 8);
        zero0 = high_half(v[0]), scale8 = low_half(v[1]), zero8 = high_half(v[1]);
      } else {
        load_shared<1>(v, meta + index * 32 + lane / 4 * 4);
        scale8 = high_half(v[0]);
        zero0 = zero8 = __float2half(p.zero);
      }
      const __half scale0 = low_half(v[0]);
      if constexpr (kLate) {
        if (!kBook) row0[t] = make_row_scale(scale0, zero0, false);
        if (!kBook) row8[t] = make_row_scale(scale8, zero8, false);
        next_scale0[t] = __half2float(scale0) * (kBook ? 1.0f : 512.0f);
        next_scale8[t] = __half2float(scale8) * (kBook ? 1.0f : 512.0f);
        new_group = true;
      } else if constexpr (kBook) {
        row0[t].scale = pair_of(scale0);
        row8[t].scale = pair_of(scale8);
      } else {
        const bool wide_row0 = is_wide(scale0), wide_row8 = is_wide(scale8);
        row0[t] = make_row_scale(scale0, zero0, wide_row0);
        row8[t] = make_row_scale(scale8, zero8, wide_row8);
        wide0[t] = wide_row0 ? kPairOf512 : 0x3C003C00;
        wide8[t] = wide_row8 ? kPairOf512 : 0x3C003C00;
        any = any || wide_row0 || wide_row8;
      }
    }
    if constexpr (!kBook && !kLate) wide = __any_sync(0xFFFFFFFF, any);
  }

  __device__ __forceinline__ void load_words(int part) {
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
      const uint32_t tile = stage + 4 * t * kTileBytes;
      uint32_t* const w = words[t].word;
      if constexpr (kBits == 4 || kBits == 8) {
#pragma unroll
        for (int i = 0; i < kBits / 4; ++i) {
          load_shared<4>(w + 4 * i, tile + (part * (kBits / 4) + i) * 512);
        }
      } else if constexpr (kBits == 2) {
        load_shared<2>(w, tile + part / 2 * 512 + part % 2 * 8);
      } else {
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          const int j = part * 3 + i;
          load_shared<1>(w + i, tile + j / 4 * 512 + j % 4 * 4);
        }
      }
    }
  }

  // The factor that make_row_scale leaves out of scales of 127 and more; such weights are rare.
  __device__ __forceinline__ void widen(uint32_t (&set)[S::kTiles][S::kSteps][4], int s) {
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        set[t][s][i] = mul_pair(set[t][s][i], i % 2 ? wide8[t] : wide0[t]);
      }
    }
  }

  // Turns the codes of a stage's `unit`-th unit into weights. first: of this block's share of K.
  __device__ __forceinline__ void prepare(uint32_t (&set)[S::kTiles][S::kSteps][4], int stage_index,
                                          int unit, bool first) {
    const int step0 = unit * S::kSteps;
    if (step0 % 4 == 0) {
      load_words(step0 / 4);
      enter_block(stage_index, step0 / 4, first);
    }
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      const int step = step0 + s;
      if (kFine && step % 4 != 0) enter_step(stage_index, step);
#pragma unroll
      for (int t = 0; t < S::kTiles; ++t) {
        uint32_t (&v)[4] = set[t][s];
        if constexpr (kBook) {
          book_operand(v, words[t].word[step % 4], table);
          if (kLate) continue;
          v[0] = mul_pair(v[0], row0[t].scale);
          v[1] = mul_pair(v[1], row8[t].scale);
          v[2] = mul_pair(v[2], row0[t].scale);
          v[3] = mul_pair(v[3], row8[t].scale);
        } else if constexpr (kLate) {
          levels_operand<kBits>(v, words[t], step % 4, row0[t], row8[t]);
        } else {
          weights_operand<kBits>(v, words[t], step % 4, row0[t], row8[t], false);
        }
      }
      if (kFine && !kBook && wide) widen(set, s);
    }
    if (!kFine && !kBook && wide) {
#pragma unroll
      for (int s = 0; s < S::kSteps; ++s) widen(set, s);
    }
    if (!S::kOneRing && unit == kUnits - 1) {
      __syncwarp();
      if (lane == 0) barrier_arrive(barrier(offsetof(Barriers, codes_empty), codes.slot));
    }
  }

  __device__ __forceinline__ void open_stage() {
    barrier_wait(barrier(offsetof(Barriers, codes_full), codes.slot), codes.parity);
    stage = first_codes + codes.slot * plan.stage_codes;
  }

  __device__ __forceinline__ void release_x() {
    if (lane == 0) {
      barrier_arrive(barrier(
          S::kOneRing ? offsetof(Barriers, codes_empty) : offsetof(Barriers, x_empty), free_x));
    }
  }

  // Ends a group: its sums, times its scales, join the others.
  __device__ __forceinline__ void fold() {
    wgmma_wait<0>();
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
      pin_registers(sum[t]);
#pragma unroll
      for (int i = 0; i < S::kRowsX / 2; ++i) {
        total[t][i] = fmaf(sum[t][i], i % 4 < 2 ? scale0[t] : scale8[t], total[t][i]);
      }
    }
  }

  __device__ __forceinline__ auto& result() {
    if constexpr (kLate) {
      return total;
    } else {
      return sum;
    }
  }

  // Multiplies a unit, and returns when the set of the next one is free.
  __device__ __forceinline__ void multiply(uint32_t (&set)[S::kTiles][S::kSteps][4], int unit,
                                           bool first_stage) {
    const bool first = first_stage && unit == 0;
    if (!S::kOneRing && unit % kUnitsX == 0) {
      barrier_wait(barrier(offsetof(Barriers, x_full), x.slot), x.parity);
    }
    const int slot = S::kOneRing ? codes.slot : x.slot;
    const int step0 = unit % kUnitsX * S::kSteps;
    const uint64_t rows = swizzled_operand(0) + first_rows - (1 << 16) +
                          static_cast<uint32_t>(slot * (S::kStageX >> 4)) +
                          step0 / 4 * (S::kRowsX * 128 >> 4);
    bool fresh = first;
    if (kLate && new_group) {
      if (!first) fold();
#pragma unroll
      for (int t = 0; t < S::kTiles; ++t) {
        scale0[t] = next_scale0[t];
        scale8[t] = next_scale8[t];
      }
      fresh = true;
      new_group = false;
    }
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTiles; ++t) {
        wgmma_f16(sum[t], set[t][s], advance_operand(rows, (step0 % 4 + s) * 32), !fresh || s > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<S::kSets - 1>();
    if (unit % kUnitsX == S::kSets - 2) {  // the last unit of the stage of x before is done
      if (unit >= kUnitsX || !first_stage) release_x();
      free_x = slot;
    }
    if (!S::kOneRing && unit % kUnitsX == kUnitsX - 1) x.next(plan.stages_x);
  }

  // Stages [begin, end) of K.
  __device__ __forceinline__ void run(int begin, int end) {
    group = -1;
    if constexpr (kLate) {
#pragma unroll
      for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < S::kRowsX / 2; ++i) total[t][i] = 0;
      }
    }
    open_stage();
    prepare(a[0], begin, 0, true);
#pragma unroll 1
    for (int index = begin; index < end; ++index) {
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        multiply(a[unit % S::kSets], unit, index == begin);
        if (unit + 1 < kUnits) {
          prepare(a[(unit + 1) % S::kSets], index, unit + 1, false);
        } else {
          codes.next(plan.stages_codes);
          if (index + 1 < end) {
            open_stage();
            prepare(a[0], index + 1, 0, false);
          }
        }
      }
    }
    if constexpr (kLate) {
      fold();
    } else {
      wgmma_wait<0>();
#pragma unroll
      for (int t = 0; t < S::kTiles; ++t) pin_registers(sum[t]);
    }
    release_x();
  }
};

#endif  // KVOPT_HAS_WGMMA

}  // namespace kvopt::cuda::wgmma
