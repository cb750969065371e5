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
  // Byte 0: the two codes of pair 0 (of pair 1), byte 1: of pair 2 (of pair 3).
  const uint32_t even = (word & 0x0F0F0F0F) | ((word >> 12) & 0xF0F0F0F0);
  const uint32_t odd = ((word >> 4) & 0x0F0F0F0F) | ((word >> 16) & 0xF0F0F0F0);
  const auto look_up = [table](uint32_t pair) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(table + pair * (4 * kBookCopies)));
    return v;
  };
  a[0] = look_up(__byte_perm(even, 0, 0x4440));
  a[1] = look_up(__byte_perm(odd, 0, 0x4440));
  a[2] = look_up(__byte_perm(even, 0, 0x4441));
  a[3] = look_up(__byte_perm(odd, 0, 0x4441));
}

// Entry b of the table is {book[b & 15], book[b >> 4]}, kBookCopies times. All threads of a block;
// the caller synchronises before use. `values`: room for the book, each value of which is worked
// out once (book_value's arrays live in local memory).
__device__ __forceinline__ void fill_table(uint4* table, float* values, Scheme scheme) {
  if (threadIdx.x < 16) values[threadIdx.x] = book_value(scheme, static_cast<int>(threadIdx.x));
  __syncthreads();
  for (int i = threadIdx.x; i < 256 * kBookCopies / 4; i += blockDim.x) {
    const int b = i / (kBookCopies / 4);
    const __half2 pair = __floats2half2_rn(values[b & 15], values[b >> 4]);
    const uint32_t v = *reinterpret_cast<const uint32_t*>(&pair);
    table[i] = {v, v, v, v};
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
  const uint32_t to_meta;  // from this lane's codes to its parameters of the stage's first group
  const uint32_t table;
  const int group_blocks;
  const int unit_meta;  // bytes of a group's parameters of 16 rows
  Ring codes, x;
  int free_x = -1;          // slot whose multiplications may still be under way
  int group = 0, left = 0;  // blocks of the group from here on
  int first_group = 0;      // kFine: of the stage
  int wide = 0;             // bit 0: some lane's scale is; then two bits for each tile's rows
  uint32_t stage = 0;       // this lane's codes of the warp's first tile, of the newest stage
  uint32_t meta = 0;        // this lane's parameters of the group in force; kFine: of first_group
  RowScale row0[S::kTiles], row8[S::kTiles];
  bool new_group = false;                      // kLate: from the unit prepared last on
  float scale0[S::kTiles], scale8[S::kTiles];  // of the group being summed
  float next_scale0[S::kTiles], next_scale8[S::kTiles];
  float total[S::kTiles][kLate ? S::kRowsX / 2 : 1];  // of the groups before
  Words<kBits> words[S::kTiles];                      // of 64 columns
  uint32_t a[S::kSets][S::kTiles][S::kSteps][4];
  float sum[S::kTiles][S::kRowsX / 2];

  __device__ __forceinline__ Multiplier(const QLinearProblem& problem, const Plan& plan,
                                        const Barriers& barriers, unsigned char* shared, int warp,
                                        int lane)
      : p(problem),
        plan(plan),
        lane(static_cast<int>(keep(lane))),
        tile16(warp / 4 * S::kTiles * 4 + warp % 4),
        barriers(keep(shared_address(&barriers))),
        first_codes(keep(shared_address(shared) + plan.codes + tile16 * kTileBytes + lane * 16)),
        first_rows(keep(static_cast<uint32_t>(swizzled_operand(shared_address(shared))))),
        to_meta(keep((S::kTiles16 - tile16) * kTileBytes + tile16 * plan.meta - lane * 16 +
                     lane / 4 * (problem.format.has_zeros() ? 8 : 4))),
        table(kBook ? keep(shared_address(shared) + plan.book + lane % kBookCopies * 4) : 0),
        group_blocks(problem.group_columns / kBlockColumns),
        unit_meta(problem.format.has_zeros() ? 64 : 32) {}

  __device__ __forceinline__ uint32_t barrier(size_t ring, int slot) const {
    return barriers + static_cast<uint32_t>(ring) + slot * 8;
  }

  // Blocks of the group in force that lie behind `blocks` of it; the last one never ends.
  __device__ __forceinline__ int blocks_left(int blocks) const {
    return group + 1 < p.groups ? group_blocks - blocks : 1 << 30;
  }

  // The parameters in force from the first column of the stage's `part`-th block on.
  __device__ __forceinline__ void enter_block(int stage_index, int part) {
    if (part == 0) meta = stage + to_meta;
    if constexpr (kFine) {
      if (part == 0) first_group = group_of_column(p, stage_index * S::kCodeBlocks * kBlockColumns);
      enter_step(stage_index, part * 4);
    } else if (--left == 0) {
      ++group;
      left = blocks_left(0);
      if (part > 0) meta += unit_meta;
      load_group(meta);
    }
  }

  __device__ __forceinline__ void enter_step(int stage_index, int step) {
    const int now =
        group_of_column(p, stage_index * S::kCodeBlocks * kBlockColumns + step * kStepColumns);
    if (now == group) return;
    group = now;
    load_group(meta + (group - first_group) * unit_meta);
  }

  // Parameters that lie at `source`, and as far apart as the tiles' are.
  __device__ __forceinline__ void load_group(uint32_t source) {
    int flags = 0;
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
      uint32_t v[2];
      __half zero0, scale8, zero8;
      if (p.format.has_zeros()) {
        load_shared<2>(v, source + 4 * t * plan.meta);
        zero0 = high_half(v[0]), scale8 = low_half(v[1]), zero8 = high_half(v[1]);
      } else {
        load_shared<1>(v, source + 4 * t * plan.meta);
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
        const bool wide0 = is_wide(scale0), wide8 = is_wide(scale8);
        row0[t] = make_row_scale(scale0, zero0, wide0);
        row8[t] = make_row_scale(scale8, zero8, wide8);
        flags |= (wide0 ? 2 : 0) << 2 * t | (wide8 ? 4 : 0) << 2 * t;
      }
    }
    if constexpr (!kBook && !kLate) wide = flags | (__any_sync(0xFFFFFFFF, flags != 0) ? 1 : 0);
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
    constexpr uint32_t kPairOf1 = 0x3C003C00;
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool is_wide = (wide >> (2 * t + 1 + i % 2) & 1) != 0;
        set[t][s][i] = mul_pair(set[t][s][i], is_wide ? kPairOf512 : kPairOf1);
      }
    }
  }

  // Loads what the stage's `unit`-th unit needs, if it is the first of its 64 columns.
  __device__ __forceinline__ void look_ahead(int stage_index, int unit) {
    if (unit * S::kSteps % 4 != 0) return;
    const int part = unit * S::kSteps / 4;
    if (part == 0) {
      barrier_wait(barrier(offsetof(Barriers, codes_full), codes.slot), codes.parity);
      stage = first_codes + codes.slot * plan.stage_codes;
    }
    load_words(part);
    enter_block(stage_index, part);
  }

  // Turns the codes of a stage's `unit`-th unit into weights.
  __device__ __forceinline__ void prepare(uint32_t (&set)[S::kTiles][S::kSteps][4], int stage_index,
                                          int unit) {
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      const int step = unit * S::kSteps + s;
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
      if (kFine && !kBook && wide != 0) widen(set, s);
    }
    if (!kFine && !kLate && !kBook && wide != 0) {
#pragma unroll
      for (int s = 0; s < S::kSteps; ++s) widen(set, s);
    }
    if (unit == kUnits - 1) {
      if (!S::kOneRing) {
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier(offsetof(Barriers, codes_empty), codes.slot));
      }
      codes.next(plan.stages_codes);
    }
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
      scale0[t] = next_scale0[t];
      scale8[t] = next_scale8[t];
    }
    new_group = false;
  }

  __device__ __forceinline__ auto& result() {
    if constexpr (kLate) {
      return total;
    } else {
      return sum;
    }
  }

  // Multiplies a stage's `unit`-th unit, and returns when the next one is loaded, if there is one,
  // and its set is free.
  __device__ __forceinline__ void multiply(uint32_t (&set)[S::kTiles][S::kSteps][4],
                                           int stage_index, int unit, int slot_of_codes,
                                           bool more) {
    if (!S::kOneRing && unit % kUnitsX == 0) {
      barrier_wait(barrier(offsetof(Barriers, x_full), x.slot), x.parity);
    }
    const int slot = S::kOneRing ? slot_of_codes : x.slot;
    const int step0 = unit % kUnitsX * S::kSteps;
    const uint64_t rows = swizzled_operand(0) + first_rows - (1 << 16) +
                          static_cast<uint32_t>(slot * (S::kStageX >> 4)) +
                          step0 / 4 * (S::kRowsX * 128 >> 4);
    const bool fresh = kLate && new_group;
    if (fresh) fold();
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
#pragma unroll
      for (int t = 0; t < S::kTiles; ++t) {
        wgmma_f16(sum[t], set[t][s], advance_operand(rows, (step0 % 4 + s) * 32), !fresh || s > 0);
      }
    }
    wgmma_commit();
    if (unit + 1 < kUnits) {
      look_ahead(stage_index, unit + 1);
    } else if (more) {
      look_ahead(stage_index + 1, 0);
    }
    wgmma_wait<S::kSets - 1>();
    if (unit % kUnitsX == S::kSets - 2) {  // the last unit of the stage of x before is done
      if (free_x >= 0) release_x();
      free_x = slot;
    }
    if (!S::kOneRing && unit % kUnitsX == kUnitsX - 1) x.next(plan.stages_x);
  }

  // Stages [begin, end) of K.
  __device__ __forceinline__ void run(int begin, int end) {
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < S::kRowsX / 2; ++i) {
        sum[t][i] = 0;
        if (kLate) total[t][i] = 0;
      }
      if (kLate) scale0[t] = scale8[t] = 0;
    }
    free_x = -1;
    const int column = begin * S::kCodeBlocks * kBlockColumns;
    group = kFine ? -1 : group_of_column(p, column) - 1;
    left = 1;  // the first block enters its group
    look_ahead(begin, 0);
    if constexpr (!kFine) left = blocks_left(begin * S::kCodeBlocks - group * group_blocks);
    int slot = codes.slot;  // of the stage being multiplied
    prepare(a[0], begin, 0);
#pragma unroll 1
    for (int index = begin; index < end; ++index) {
      const bool more = index + 1 < end;
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        multiply(a[unit % S::kSets], index, unit, slot, more);
        if (unit + 1 < kUnits) {
          prepare(a[(unit + 1) % S::kSets], index, unit + 1);
        } else if (more) {
          slot = codes.slot;
          prepare(a[0], index + 1, 0);
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
