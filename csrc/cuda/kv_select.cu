// SPDX-License-Identifier: Apache-2.0
// Scores of a prompt's keys: the column sums (or maxima) of the softmax over its queries, without
// the matrix of q x n probabilities ever being there.
//
//   pass 1   per query the log-sum-exp over the keys it sees, online, tile by tile
//   pass 2   the logits again, tile by tile, this time along the queries: sum of 2^(logit - lse)
//
//                 keys                     keys
//             +----------+             +---+---+---+
//     queries | -> -> -> | lse         | | | | | | |
//             | -> -> -> | lse         | v | v | v |   over all queries, and over the
//             +----------+             +---+---+---+   query heads of the KV head's group
//                                       score per key
//
// Operations: 4 q n D per query head (half of it where the mask is causal: tiles that no query
// sees are left out), what attention itself does; bytes: O((q + n) D) per tile row. Bound by the
// matrix units, which wait for each tile's loads (138 TFLOP/s on an H200 at 16k x 16k). Memory: 4
// bytes per query and head, and 8 per split of the keys, which pass 1 makes only when there are too
// few tiles of queries to fill the device.
#include <algorithm>

#include "cuda/device/kv_select_fma.cuh"
#include "cuda/device/kv_select_mma.cuh"
#include "cuda/device/kv_select_pass.cuh"
#include "cuda/kv.h"

namespace kvopt::cuda {
namespace {

constexpr int kMostSplits = 64;
constexpr int kTileKeys = 64;  // kY of every tile class

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

int64_t query_count(const KvSelectParams& p) {
  return p.rows * p.heads * p.query_group * p.queries;
}

int split_count(const KvSelectParams& p) {
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t blocks = p.rows * p.heads * p.query_group * ((p.queries + 63) / 64);
  const int64_t wanted = (4 * multiprocessors + blocks - 1) / std::max<int64_t>(blocks, 1);
  const int64_t tiles = (p.keys + kTileKeys - 1) / kTileKeys;
  return static_cast<int>(std::max<int64_t>(1, std::min({wanted, tiles, int64_t{kMostSplits}})));
}

template <typename Tile>
int launch(const SelectLaunch& a, cudaStream_t stream) {
  const KvSelectParams& p = a.p;
  const auto shared = static_cast<int>(Tile::shared_bytes(p.dim));
  if (shared > 48 * 1024) {
    for (const void* kernel : {reinterpret_cast<const void*>(normaliser_kernel<Tile>),
                               reinterpret_cast<const void*>(score_kernel<Tile>)}) {
      const auto error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
      if (error != cudaSuccess) return error;
    }
  }
  const int64_t query_heads = p.rows * p.heads * p.query_group;
  const dim3 first(static_cast<unsigned>((p.queries + Tile::kX - 1) / Tile::kX),
                   static_cast<unsigned>(a.splits), static_cast<unsigned>(query_heads));
  normaliser_kernel<Tile><<<first, Tile::kThreads, shared, stream>>>(a);
  join_normalisers_kernel<<<static_cast<unsigned>((query_count(p) + 127) / 128), 128, 0, stream>>>(
      a);
  const dim3 second(static_cast<unsigned>((p.keys + Tile::kX - 1) / Tile::kX),
                    static_cast<unsigned>(p.rows * p.heads));
  score_kernel<Tile><<<second, Tile::kThreads, shared, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

int64_t kv_select_scores_workspace(const KvSelectParams& p) {
  const int64_t count = query_count(p);
  return aligned(count * static_cast<int64_t>(sizeof(float))) +
         split_count(p) * count * static_cast<int64_t>(sizeof(float2));
}

int kv_select_scores(const KvSelectParams& p, void* workspace, void* stream) {
  if (kv_refusal(p.type, p.dim) != nullptr) return cudaErrorInvalidValue;
  if (p.rows * p.heads * p.query_group > 65535) return cudaErrorInvalidValue;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t keys = p.rows * p.heads * p.keys;
  if (keys == 0) return cudaSuccess;
  if (query_count(p) == 0) return cudaMemsetAsync(p.scores, 0, keys * sizeof(float), cuda_stream);
  auto* base = static_cast<uint8_t*>(workspace);
  const int64_t normaliser_bytes = aligned(query_count(p) * static_cast<int64_t>(sizeof(float)));
  const SelectLaunch a{p, split_count(p), reinterpret_cast<float2*>(base + normaliser_bytes),
                       reinterpret_cast<float*>(base)};
  int device = 0, major = 0, shared = 0;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const bool whole_pieces = p.dim % 8 == 0 && reinterpret_cast<uintptr_t>(p.query) % 16 == 0 &&
                            reinterpret_cast<uintptr_t>(p.key) % 16 == 0;
  if (whole_pieces && MmaTile<false>::shared_bytes(p.dim) + 1024 <= shared) {
    if (p.type == KvType::kFloat16) return launch<MmaTile<false>>(a, cuda_stream);
    if (p.type == KvType::kBFloat16 && major >= 8) return launch<MmaTile<true>>(a, cuda_stream);
  }
  return launch<FmaTile>(a, cuda_stream);
}

}  // namespace kvopt::cuda
