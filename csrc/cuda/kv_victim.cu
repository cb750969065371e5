// SPDX-License-Identifier: Apache-2.0
// What all heads of a row evict together, by the sum of their scores. One block per row, which
// leaves at once unless a segment is full; 4 bytes per head and slot, and a position per slot.
#include "cuda/device/kv_victim.cuh"

namespace kvopt::cuda {
namespace {

constexpr int kSharedThreads = 1024;

__global__ void __launch_bounds__(kSharedThreads)
    common_victim_kernel(KvVictimRule rule, KvStore s, const float* more_scores, int32_t* common) {
  const int64_t row = blockIdx.x;
  const int32_t newest = rule.position[row];
  __shared__ KvSegment segments[32];
  __shared__ int count, full;
  if (threadIdx.x == 0) {
    count = INT32_MAX;
    full = 0;
  }
  __syncthreads();
  for (int head = threadIdx.x; head < s.heads; head += kSharedThreads) {
    const KvSegment g = load_segment(s, row * s.heads + head);
    if (head < 32) segments[head] = g;
    atomicMin(&count, g.filled());
    if (is_full(s, g)) atomicOr(&full, 1);
  }
  __syncthreads();
  const int n = count;
  const int given = rule.victim == nullptr ? -1 : rule.victim[row];
  if (newest < 0 || full == 0 || n == 0 || (given >= 0 && given < n)) {
    if (threadIdx.x == 0) common[row] = -1;
    return;
  }
  Key best = kNoKey;
  for (int index = threadIdx.x; index < n; index += kSharedThreads) {
    const int32_t position = s.positions[slot_place(s, row, segments[0], index)];
    float total = 0;
    if (rule.order == KvOrder::kLowestScore && s.scores != nullptr) {
      for (int first = 0; first < s.heads; first += 8) {
        float score[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // all of them under way before the first is added
          const int head = first + i;
          score[i] = 0;
          if (head >= s.heads) continue;
          const KvSegment g = head < 32 ? segments[head] : load_segment(s, row * s.heads + head);
          const int64_t place = slot_place(s, row, g, index);
          score[i] = s.scores[place];
          if (more_scores != nullptr) score[i] = __fadd_rn(score[i], more_scores[place]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (first + i < s.heads) total = __fadd_rn(total, score[i]);
        }
      }
    }
    const Key key = key_of(rule, segments[0].capacity(), newest, position, total, index);
    if (before(key, best)) best = key;
  }
  best = block_smallest(best);
  if (threadIdx.x == 0) common[row] = index_of(best);
}

}  // namespace

void find_common_victims(const KvVictimRule& rule, const KvStore& s, const float* more_scores,
                         int32_t* common, cudaStream_t stream) {
  common_victim_kernel<<<static_cast<unsigned>(s.rows), kSharedThreads, 0, stream>>>(
      rule, s, more_scores, common);
}

}  // namespace kvopt::cuda
