// SPDX-License-Identifier: Apache-2.0
// Which tile the warpgroup product takes, and its launch. The rule is `best_choice`: from what a
// block of each shape takes for 64 columns, the time of each division of the work; the least wins.
#pragma once

#include <algorithm>

#include "cuda/device/qlinear_wgmma.cuh"

namespace kvopt::cuda::wgmma {

// Small M: two blocks a multiprocessor, 256 columns a stage, for bytes in flight. Large M: one
// block, all registers.
template <int kBits>
inline constexpr int kDeep = kBits == 8 ? 2 : 4;  // blocks of 64 columns in a stage of codes
template <int kBits>
inline constexpr int kShallow = kBits == 3 ? 4 : 2;
template <int kBits, bool>
using Rows16 = Shape<16, 1, 4, 2, kDeep<kBits>, kDeep<kBits>, 2>;
template <int kBits, bool>
using Rows32 = Shape<32, 1, 4, 2, kDeep<kBits>, kDeep<kBits>, 2>;
template <int kBits, bool kBook>
using Rows64 = Shape<64, 1, 4, 2, kBook ? 2 : kDeep<kBits>, 2, 2>;  // a book has a table too
template <int kBits, bool>
using Rows128 = Shape<128, 1, 4, 2, kDeep<kBits>, 1, 1>;
template <int kBits, bool>
using Rows256 = Shape<256, 1, 2, 2, kShallow<kBits>, 1, 1>;

struct Choice {
  int shape;   // 0.. in the order above
  int splits;  // blocks of a cluster
  bool even;   // see Plan
};

// Groups that end within 64 columns: two shapes serve them all.
inline bool has_fine_groups(const QLinearProblem& p) {
  return p.groups > 1 && p.group_columns % kBlockColumns != 0;
}

Choice best_choice(const QLinearProblem& p, const Device& device);

inline int round_up(int64_t value, int unit) {
  return static_cast<int>(ceil_div(value, unit) * unit);
}

// Shared memory goes to stages, as many columns of codes as of x.
template <int kBits, bool kBook, typename S>
Plan make_plan(const QLinearProblem& p, const Device& device, int splits) {
  Plan plan{};
  plan.tiles_x = static_cast<int>(ceil_div(p.m, S::kRowsX));
  plan.tiles_w = static_cast<int>(ceil_div(p.tiles, S::kTiles16));
  // A wave of blocks reads band * kRowsX rows of x and multiprocessors / band * kRowsW rows of w.
  plan.band = std::min(plan.tiles_x, 2048 / S::kRowsX);
  plan.splits = splits;
  plan.stages = static_cast<int>(ceil_div(p.blocks, S::kCodeBlocks));
  const Epilogue& e = p.epilogue;
  plan.staged = splits == 1 && e.is_plain() && e.dtype != DType::kFloat32 && p.n % 8 == 0 &&
                reinterpret_cast<uintptr_t>(e.y) % 16 == 0;
  constexpr int kColumns = S::kCodeBlocks * kBlockColumns;
  const int g = p.group_columns;
  const int groups = std::min(p.groups, kColumns % g == 0   ? kColumns / g
                                        : g % kColumns == 0 ? 1
                                                            : (kColumns - 1) / g + 2);
  plan.meta = groups * (p.format.has_zeros() ? 64 : 32);
  plan.stage_codes = round_up(S::kTiles16 * (tile_stage_bytes<kBits, S>() + plan.meta), 128);
  const int out = plan.staged ? S::kRowsX * S::kPitchOut : S::kSliceX * S::kPitchSums * 4;
  const int book = kBook ? 1024 * kBookCopies + 64 : 0;  // and the book itself
  const int budget = (S::kResident == 1 ? device.block_shared
                                        : device.multiprocessor_shared / S::kResident - 1024) -
                     static_cast<int>(sizeof(Barriers)) - 1024 - (splits > 1 ? 0 : out) - book;
  constexpr int kPerCodes = S::kCodeBlocks / S::kBlocksX;
  const int unit = plan.stage_codes + kPerCodes * S::kStageX;
  plan.stages_codes = std::min(budget / unit, kMaxStages);
  plan.stages_x = std::min(plan.stages_codes * kPerCodes, kMaxStages);
  if (!S::kOneRing) {
    int left = budget - plan.stages_codes * plan.stage_codes - plan.stages_x * S::kStageX;
    if (left >= plan.stage_codes && plan.stages_codes < kMaxStages) {
      ++plan.stages_codes;
      left -= plan.stage_codes;
    }
    plan.stages_x += std::min(left / S::kStageX, kMaxStages - plan.stages_x);
  }
  plan.codes = plan.stages_x * S::kStageX;
  const int stages = plan.codes + plan.stages_codes * plan.stage_codes;
  plan.out =
      splits > 1 ? 0 : stages;  // a cluster does one tile: its sums lie where the stages were
  plan.book = std::max(stages, plan.out + out);
  plan.bytes = 1024 + plan.book + book;
  return plan;
}

// Fills a tensor map of x, boxes of 64 columns and `rows` rows.
int encode_x(CUtensorMap& map, const HalfRows& x, int m, int rows);

template <int kBits, bool kBook, bool kFine, typename S>
int launch_shape(const QLinearProblem& p, const HalfRows& x, const Choice& choice, void* partials,
                 const Device& device, cudaStream_t stream) {
  const int splits = choice.splits;
  Plan plan = make_plan<kBits, kBook, S>(p, device, splits);
  if (plan.stages_codes < 2 || plan.stages_x < 2) return cudaErrorInvalidConfiguration;
  CUtensorMap map;
  if (const int error = encode_x(map, x, p.m, S::kRowsX); error != cudaSuccess) return error;
  QLinearProblem q = p;
  q.epilogue.row_scale = x.row_scale;
  const auto kernel = qlinear_wgmma_kernel<kBits, kBook, kFine, S>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.bytes);
      error != cudaSuccess) {
    return error;
  }
  const int64_t work = static_cast<int64_t>(plan.tiles_x) * plan.tiles_w;
  const int64_t places = device.multiprocessors * S::kResident;
  unsigned blocks = static_cast<unsigned>(splits > 1 ? work * splits : std::min(work, places));
  if (choice.even && partials != nullptr) {
    plan.even = true;
    blocks = static_cast<unsigned>(std::min(work * plan.stages, places));
    plan.partials = static_cast<float4*>(partials);
    plan.published =
        reinterpret_cast<uint64_t*>(plan.partials + places * (S::kRowsX * S::kRowsW / 4));
  }
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = splits;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  // A cluster does one tile: its barriers count the copying warps, which would be a tile ahead.
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = plan.bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = splits > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, map, q, plan);
}

template <int kBits, bool kBook>
int launch_format(const QLinearProblem& p, const HalfRows& x, void* partials, const Device& device,
                  cudaStream_t stream) {
  const Choice choice = best_choice(p, device);
  const auto launch = [&]<bool kFine, typename S>(S) {
    return launch_shape<kBits, kBook, kFine, S>(p, x, choice, partials, device, stream);
  };
  if (has_fine_groups(p)) {
    return choice.shape == 0 ? launch.template operator()<true>(Rows16<kBits, kBook>())
                             : launch.template operator()<true>(Rows128<kBits, kBook>());
  }
  switch (choice.shape) {
    case 0:
      return launch.template operator()<false>(Rows16<kBits, kBook>());
    case 1:
      return launch.template operator()<false>(Rows32<kBits, kBook>());
    case 2:
      return launch.template operator()<false>(Rows64<kBits, kBook>());
    case 3:
      return launch.template operator()<false>(Rows128<kBits, kBook>());
    default:
      return launch.template operator()<false>(Rows256<kBits, kBook>());
  }
}

// Whether the code that will run on this GPU has the instructions.
template <int kBits, bool kBook>
bool is_compiled() {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes,
                               qlinear_wgmma_kernel<kBits, kBook, false, Rows16<kBits, kBook>>) ==
             cudaSuccess &&
         attributes.sharedSizeBytes >= sizeof(Barriers);
}

// One file each, so that they compile side by side.
int launch_w2(const QLinearProblem& p, const HalfRows& x, void* partials, const Device& device,
              cudaStream_t stream);
int launch_w3(const QLinearProblem& p, const HalfRows& x, void* partials, const Device& device,
              cudaStream_t stream);
int launch_w4(const QLinearProblem& p, const HalfRows& x, void* partials, const Device& device,
              cudaStream_t stream);
int launch_w8(const QLinearProblem& p, const HalfRows& x, void* partials, const Device& device,
              cudaStream_t stream);
int launch_book(const QLinearProblem& p, const HalfRows& x, void* partials, const Device& device,
                cudaStream_t stream);
bool w4_is_compiled();

}  // namespace kvopt::cuda::wgmma
