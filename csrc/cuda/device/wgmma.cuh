// SPDX-License-Identifier: Apache-2.0
// Hopper's asynchronous machinery: warpgroup multiplications, bulk copies, the barriers that count
// them.
//
//   D (64 x N, fp32 or int32) += A (64 x K) * B (K x N), 128 threads, K = 16 fp16 or 32 int8
//   (PTX ISA, "Asynchronous warpgroup-level matrix instructions")
//
// Warp w of the warpgroup holds rows 16 w .. 16 w + 15 of D and, where A comes from registers, of
// A. Lane = 4 g + t:
//     d[4 j], d[4 j + 1]      D[g][8 j + 2 t, + 1]       d[4 j + 2], d[4 j + 3]   the same of row
//                                                                                 g + 8
//     a[0..3], fp16           A[g][2t, +1], A[g + 8][2t, +1], A[g][2t + 8, + 9], A[g + 8][2t + 8,
//                             + 9]
//     a[0..3], int8           the same with four columns for each pair: 4t.., 4t + 16..
//
// B, and A where it comes from shared memory, is K-major in rows of 128 bytes (64 fp16, 128 int8)
// with the 128-byte swizzle: 16-byte piece p of row r lies at piece p ^ (r % 8) of it; the first
// row starts at a multiple of 1024 bytes. That is what a bulk tensor copy with a box of 128 bytes
// writes. The k-th multiplication within a row starts 32 k bytes further.
//
// Order: wgmma_fence() before the first multiplication that follows writes of d or a by ordinary
// instructions; then multiplications; wgmma_commit(); wgmma_wait<n>() until at most n groups are
// under way. Neither d nor a may be touched before their group is done.
#pragma once

#include <cstdint>

#include "cuda/device/copy.cuh"

// The instructions belong to sm_90a alone: code for sm_90 and for later chips has none of them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KVOPT_HAS_WGMMA 1
#else
#define KVOPT_HAS_WGMMA 0
#endif

namespace kvopt::cuda {

// A matrix of 128-byte rows in shared memory, as the instruction names it: rows of eight are
// `kEightRows` bytes apart.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t address) {
  constexpr uint64_t kEightRows = 1024, kSwizzle128 = 1;
  return (static_cast<uint64_t>(address & 0x3FFFF) >> 4) | 1ull << 16 | (kEightRows >> 4) << 32 |
         kSwizzle128 << 62;
}

// The operand `bytes` (a multiple of 16) further on.
__device__ __forceinline__ uint64_t advance_operand(uint64_t operand, int bytes) {
  return operand + static_cast<uint64_t>(bytes >> 4);
}

#if KVOPT_HAS_WGMMA

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads and writes of these registers across this point.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin_registers(uint32_t (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin_registers(int32_t (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// wgmma_f16(d, a, b, accumulate): A from registers; wgmma_f16(d, a_operand, b, accumulate): from
// shared memory; wgmma_s8 likewise. N is twice the length of d. accumulate false: d = A * B.
#define KVOPT_TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define KVOPT_REGISTERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define KVOPT_REGISTERS_16 KVOPT_TEN() "%10,%11,%12,%13,%14,%15"
#define KVOPT_REGISTERS_32 KVOPT_TEN() KVOPT_TEN(1) KVOPT_TEN(2) "%30,%31"
#define KVOPT_REGISTERS_48 \
  KVOPT_TEN() KVOPT_TEN(1) KVOPT_TEN(2) KVOPT_TEN(3) "%40,%41,%42,%43,%44,%45,%46,%47"
#define KVOPT_TENS_5 KVOPT_TEN() KVOPT_TEN(1) KVOPT_TEN(2) KVOPT_TEN(3) KVOPT_TEN(4) KVOPT_TEN(5)
#define KVOPT_REGISTERS_64 KVOPT_TENS_5 "%60,%61,%62,%63"
#define KVOPT_TENS_8 KVOPT_TENS_5 KVOPT_TEN(6) KVOPT_TEN(7) KVOPT_TEN(8)
#define KVOPT_REGISTERS_96 KVOPT_TENS_8 "%90,%91,%92,%93,%94,%95"
#define KVOPT_REGISTERS_128 \
  KVOPT_TENS_8 KVOPT_TEN(9) KVOPT_TEN(10) KVOPT_TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127"

#define KVOPT_D4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define KVOPT_D8(c, i) KVOPT_D4(c, i), KVOPT_D4(c, i + 4)
#define KVOPT_D16(c, i) KVOPT_D8(c, i), KVOPT_D8(c, i + 8)
#define KVOPT_D32(c, i) KVOPT_D16(c, i), KVOPT_D16(c, i + 16)
#define KVOPT_OPERANDS_8(c) KVOPT_D8(c, 0)
#define KVOPT_OPERANDS_16(c) KVOPT_D16(c, 0)
#define KVOPT_OPERANDS_32(c) KVOPT_D32(c, 0)
#define KVOPT_OPERANDS_48(c) KVOPT_D32(c, 0), KVOPT_D16(c, 32)
#define KVOPT_OPERANDS_64(c) KVOPT_D32(c, 0), KVOPT_D32(c, 32)
#define KVOPT_OPERANDS_96(c) KVOPT_D32(c, 0), KVOPT_D32(c, 32), KVOPT_D32(c, 64)
#define KVOPT_OPERANDS_128(c) KVOPT_D32(c, 0), KVOPT_D32(c, 32), KVOPT_D32(c, 64), KVOPT_D32(c, 96)

// count: registers of d; n: 2 * count; r0..r5: count, count + 1, ...
#define KVOPT_WGMMA(count, n, r0, r1, r2, r3, r4, r5)                                              \
  __device__ __forceinline__ void wgmma_f16(float (&d)[count], const uint32_t (&a)[4], uint64_t b, \
                                            bool accumulate) {                                     \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #r5 ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
                 "k16.f32.f16.f16 {" KVOPT_REGISTERS_##count "}, {%" #r0 ",%" #r1 ",%" #r2         \
                                                             ",%" #r3 "}, %" #r4 ", p, 1, 1, 0;}"  \
                 : KVOPT_OPERANDS_##count("+f")                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                             \
                   "r"(static_cast<int>(accumulate)));                                             \
  }                                                                                                \
  __device__ __forceinline__ void wgmma_f16(float (&d)[count], uint64_t a, uint64_t b,             \
                                            bool accumulate) {                                     \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #r2 ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
                 "k16.f32.f16.f16 {" KVOPT_REGISTERS_##count "}, %" #r0 ", %" #r1                  \
                                                             ", p, 1, 1, 0, 0;}"                   \
                 : KVOPT_OPERANDS_##count("+f")                                                    \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                             \
  }                                                                                                \
  __device__ __forceinline__ void wgmma_s8(int32_t (&d)[count], const uint32_t (&a)[4],            \
                                           uint64_t b, bool accumulate) {                          \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #r5 ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
                 "k32.s32.s8.s8 {" KVOPT_REGISTERS_##count "}, {%" #r0 ",%" #r1 ",%" #r2 ",%" #r3  \
                                                           "}, %" #r4 ", p;}"                      \
                 : KVOPT_OPERANDS_##count("+r")                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                             \
                   "r"(static_cast<int>(accumulate)));                                             \
  }                                                                                                \
  __device__ __forceinline__ void wgmma_s8(int32_t (&d)[count], uint64_t a, uint64_t b,            \
                                           bool accumulate) {                                      \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #r2 ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
                 "k32.s32.s8.s8 {" KVOPT_REGISTERS_##count "}, %" #r0 ", %" #r1 ", p;}"            \
                 : KVOPT_OPERANDS_##count("+r")                                                    \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                             \
  }

KVOPT_WGMMA(8, 16, 8, 9, 10, 11, 12, 13)
KVOPT_WGMMA(16, 32, 16, 17, 18, 19, 20, 21)
KVOPT_WGMMA(32, 64, 32, 33, 34, 35, 36, 37)
KVOPT_WGMMA(48, 96, 48, 49, 50, 51, 52, 53)
KVOPT_WGMMA(64, 128, 64, 65, 66, 67, 68, 69)
KVOPT_WGMMA(96, 192, 96, 97, 98, 99, 100, 101)
KVOPT_WGMMA(128, 256, 128, 129, 130, 131, 132, 133)

#undef KVOPT_WGMMA

// Registers of the calling warpgroup, at the expense of the others of its block.
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif  // KVOPT_HAS_WGMMA

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

// --- barriers in shared memory ------------------------------------------------------------------
// A phase ends when `count` threads have arrived and all announced bytes have come. Waiting names
// the phase by its parity: 0 for the first. A barrier no phase of which has ended yet answers
// parity 1 at once.
//
// compute-sanitizer's racecheck does not see that a bulk copy into a stage comes after those who
// read it have arrived at the stage's empty barrier: it reports a hazard of these reads and the
// copy for the smallest ring with a full and an empty barrier, as it does for one that does not
// wait for the empty one.

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// After initialisation, before other threads, blocks of the cluster or copies use the barriers
// (then synchronise the threads).
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arriving and waiting also by the barrier's address in shared memory.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  barrier_arrive(shared_address(barrier));
}

// Arrives and announces bytes that copies will bring.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred p;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra.uni done;\n"
      "bra.uni again;\n"
      "done: }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  barrier_wait(shared_address(barrier), parity);
}

// Among `threads` (a multiple of 32) of a block; `id` 1..15, 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Ordinary writes of shared memory by this thread come before later reads by copies and wgmma (then
// synchronise).
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- bulk copies --------------------------------------------------------------------------------

// How long L2 should keep what a copy reads (the 64-bit policies that createpolicy makes for all of
// an access).
constexpr uint64_t kEvictFirst = 0x12F0000000000000, kEvictLast = 0x14F0000000000000,
                   kEvictNormal = 0x1000000000000000;

// `bytes` a multiple of 16, both addresses on 16 bytes; completes on the barrier.
__device__ __forceinline__ void copy_bulk(void* target, const void* source, uint32_t bytes,
                                          uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], "
      "%2, [%3], %4;" ::"r"(shared_address(target)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// A box of a two-dimensional tensor map; out-of-range elements arrive as zeros. `target` on 128
// bytes, 1024 with the 128-byte swizzle. (column, row) of the box's first element.
__device__ __forceinline__ void copy_box(void* target, const void* map, int column, int row,
                                         uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_"
      "hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(target)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Into L2 only.
__device__ __forceinline__ void prefetch_bulk(const void* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

// Shared to global memory; completes in bulk groups of the issuing thread.
__device__ __forceinline__ void store_bulk(void* target, const void* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target),
               "r"(shared_address(source)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void store_bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until the shared memory of all but kPending of this thread's groups may be overwritten.
template <int kPending>
__device__ __forceinline__ void store_bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// --- clusters -----------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster; orders their shared-memory accesses.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The same, when no write needs to be seen by others: what was read has been used.
__device__ __forceinline__ void cluster_sync_readers() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The address at which this block finds block `rank`'s copy of a shared variable.
__device__ __forceinline__ uint32_t address_in_block(uint32_t shared, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}
__device__ __forceinline__ uint32_t address_in_block(const void* pointer, uint32_t rank) {
  return address_in_block(shared_address(pointer), rank);
}

__device__ __forceinline__ float4 load_cluster_4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

#endif

}  // namespace kvopt::cuda
