// SPDX-License-Identifier: Apache-2.0
// Attention of one new query per head over the filled slots of its KV head, straight over packed
// codes, with the probabilities added to the slots' scores.
//
// Bytes: every key and value once for the whole group of query heads. Per slot, D = 128, G = 32:
// 512 in fp16; 64 + 8 (key scales) + 64 + 16 (value scales) in int4. With an update of scores also
// 4 per query head written and read again (mostly in L2), and 8 for the score. Bound: memory in 16
// bits (3.5 TB/s on an H200 at 8 x 32k tokens); packed codes are bound by what a tile does besides
// loading, so their time hardly falls with their width (int4 1.3 times as fast as fp16 there).
//
//   pass 1   blocks take equal runs of the segments' slots (kv_attention_share.cuh), so rows and
//            heads of different lengths load the device evenly; each leaves its largest logit,
//            sum of exponentials and weighted sum of values. On tensor cores for 16-bit models
//            (kv_attention_tiles.cuh), else in fp32 (kv_attention_simple.cuh).
//   pass 2   joins the runs in their order and turns logits into scores (kv_attention_finish.cuh).
//
// The grid depends on capacities, the work on the lengths in device memory: no host decision
// between two steps. Deterministic: nothing is added atomically.
#include <algorithm>
#include <utility>

#include "cuda/device/kv_attention_finish.cuh"
#include "cuda/device/kv_attention_simple.cuh"
#include "cuda/device/kv_attention_tiles.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/kv.h"

namespace kvopt::cuda {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

struct Plan {
  int wave, blocks;
  bool has_bfloat_mma, overlaps;
  int64_t summary_bytes, partial_bytes, logit_bytes;
};

bool aligned_to_16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// 0: the tile kernel does not take the store; else the channels that its instance is made for.
int tile_dim(const KvStore& s, bool has_bfloat_mma) {
  const bool type = s.type == KvType::kFloat16 || (s.type == KvType::kBFloat16 && has_bfloat_mma);
  if (!type || (s.dim != 64 && s.dim != 128 && s.dim != 256)) return 0;
  // A lane counts bytes from its segment in 32 bits.
  if (std::max(s.packed_slots, s.plain_slots) * s.dim * 2 > UINT32_MAX) return 0;
  if (kv_code_bits(s.codec) != 0 && s.group % kUnit != 0) return 0;
  for (const void* data :
       {static_cast<const void*>(s.plain_keys), static_cast<const void*>(s.plain_values),
        static_cast<const void*>(s.packed_keys), static_cast<const void*>(s.packed_values),
        static_cast<const void*>(s.key_scale), static_cast<const void*>(s.value_scale)}) {
    if (!aligned_to_16(data)) return 0;
  }
  return static_cast<int>(s.dim);
}

int make_plan(const KvAttentionParams& p, Plan& plan) {
  int device = 0, multiprocessors = 0, major = 0;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
  for (const auto& [attribute, value] :
       {std::pair{cudaDevAttrMultiProcessorCount, &multiprocessors},
        std::pair{cudaDevAttrComputeCapabilityMajor, &major}}) {
    if (const auto error = cudaDeviceGetAttribute(value, attribute, device); error != cudaSuccess) {
      return error;
    }
  }
  plan.has_bfloat_mma = major >= 8;
  plan.overlaps = major >= 9;
  const KvStore& s = p.store;
  const int64_t segments = s.rows * s.heads;
  plan.wave = multiprocessors * tile_blocks(static_cast<int>(s.dim));
  // find_share: at most `rounds * wave` runs and one more per segment, and none shorter than
  // kSmallestChunk but the last of its segment. Capacities bound the units.
  const int64_t units =
      s.rows * ((s.packed_slots + kUnit - 1) / kUnit + (s.plain_slots + kUnit - 1) / kUnit) +
      2 * segments;
  const int64_t rounds = units > 32 * plan.wave ? 4 : 1;
  plan.blocks =
      static_cast<int>(std::min(rounds * plan.wave + segments, units / kSmallestChunk + segments));
  const int64_t runs = plan.blocks * p.query_group;
  plan.summary_bytes = aligned(runs * static_cast<int64_t>(sizeof(float2)));
  plan.partial_bytes = aligned(runs * s.dim * static_cast<int64_t>(sizeof(float)));
  plan.logit_bytes = p.update == KvUpdate::kNone
                         ? 0
                         : aligned(s.rows * (s.packed_slots + s.plain_slots) * p.query_group *
                                   static_cast<int64_t>(sizeof(float)));
  return cudaSuccess;
}

}  // namespace

int64_t kv_attention_decode_workspace(const KvAttentionParams& p) {
  Plan plan{};
  if (make_plan(p, plan) != cudaSuccess) return 0;
  return plan.summary_bytes + plan.partial_bytes + plan.logit_bytes;
}

int kv_attention_decode(const KvAttentionParams& p, void* workspace, void* stream) {
  const KvStore& s = p.store;
  if (kv_refusal(s) != nullptr || p.query_group > kKvMostQueryGroup) return cudaErrorInvalidValue;
  const bool empty = s.packed_slots + s.plain_slots == 0;
  if (p.update != KvUpdate::kNone && s.scores == nullptr && !empty) return cudaErrorInvalidValue;
  if (s.rows == 0 || s.heads == 0 || p.query_group == 0) return cudaSuccess;
  Plan plan{};
  if (const int error = make_plan(p, plan); error != cudaSuccess) return error;
  auto* base = static_cast<uint8_t*>(workspace);
  const AttentionLaunch launch{
      p,
      {reinterpret_cast<float2*>(base), reinterpret_cast<float*>(base + plan.summary_bytes),
       reinterpret_cast<float*>(base + plan.summary_bytes + plan.partial_bytes)},
      plan.blocks,
      plan.wave};
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(plan.blocks),
                  static_cast<unsigned>((p.query_group + kSimpleHeads - 1) / kSimpleHeads));
  static_assert(kSimpleHeads == kTileHeads);
  const int dim = tile_dim(s, plan.has_bfloat_mma);
  const auto kernel = dim == 64      ? tile_attention_kernel<64>
                      : dim == 128   ? tile_attention_kernel<128>
                      : dim == 256   ? tile_attention_kernel<256>
                      : s.dim <= 128 ? simple_attention_kernel<1>
                                     : simple_attention_kernel<2>;
  kernel<<<grid, kAttentionThreads, 0, cuda_stream>>>(launch);
  if (const auto error = cudaGetLastError(); error != cudaSuccess) return error;
  const int64_t finish_blocks =
      s.rows * s.heads * p.query_group + (p.update == KvUpdate::kNone ? 0 : plan.blocks);
  return launch_kernel(finish_attention_kernel, dim3(static_cast<unsigned>(finish_blocks)),
                       kAttentionThreads, 0, plan.overlaps, cuda_stream, launch);
}

}  // namespace kvopt::cuda
