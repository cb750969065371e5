// SPDX-License-Identifier: Apache-2.0
// Times of the KV kernels: copies of a layer rotate (240 MB together, so nothing survives in L2),
// the calls over all copies are captured in one graph, the graphs of all contenders are replayed in
// turn, and the median replay counts.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>

#include "kv_cuda_fixture.h"

namespace kvopt::test {

__global__ void fill_words(uint32_t* data, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u ^ seed;
    x ^= x >> 16, x *= 0x7FEB352Du, x ^= x >> 15, x *= 0x846CA68Bu, x ^= x >> 16;
    data[i] = x;
  }
}

// fp16 between `low` and `high`.
__global__ void fill_halves(__half* data, int64_t count, uint32_t seed, float low, float high) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u ^ seed;
    x ^= x >> 16, x *= 0x7FEB352Du, x ^= x >> 15, x *= 0x846CA68Bu, x ^= x >> 16;
    data[i] = __float2half_rn(low + (high - low) * static_cast<float>(x >> 8) * 0x1p-24f);
  }
}

struct BenchShape {
  int64_t rows, heads, group, dim, tokens;
};

// A full layer in fp16 with random content, on the device only.
class BenchLayer {
 public:
  BenchLayer(const BenchShape& b, KvCodec codec) {
    const bool integer = kv_code_bits(codec) != 0;
    KvStore& s = store_;
    s.rows = b.rows, s.heads = b.heads, s.dim = b.dim, s.type = KvType::kFloat16, s.codec = codec;
    s.group = integer ? 32 : 1;
    const int64_t residual = integer ? 64 : 0;
    const int64_t packed = codec == KvCodec::kModel ? 0 : (b.tokens - residual) / s.group * s.group;
    const int64_t plain = b.tokens - packed;
    s.packed_slots = packed * b.heads, s.plain_slots = plain * b.heads;
    std::vector<int32_t> segments, lengths, positions;
    for (int64_t row = 0; row < b.rows; ++row) {
      for (int64_t h = 0; h < b.heads; ++h) {
        for (const int64_t v : {h * packed, packed, h * plain, plain}) {
          segments.push_back(static_cast<int32_t>(v));
        }
        lengths.push_back(static_cast<int32_t>(packed));
        lengths.push_back(static_cast<int32_t>(plain));
      }
    }
    positions.resize(b.rows * (s.packed_slots + s.plain_slots));
    for (size_t i = 0; i < positions.size(); ++i) {
      positions[i] = static_cast<int32_t>(i % static_cast<size_t>(b.tokens));
    }
    segments_ = DeviceBuffer<int32_t>(segments);
    lengths_ = DeviceBuffer<int32_t>(lengths);
    positions_ = DeviceBuffer<int32_t>(positions);
    scores_ = DeviceBuffer<float>(std::vector<float>(positions.size(), 1.0f));
    s.segments = segments_.get(), s.lengths = lengths_.get(), s.positions = positions_.get();
    s.scores = scores_.get();
    const int64_t vectors = b.rows * s.packed_slots;
    s.plain_keys = halves(b.rows * s.plain_slots * b.dim, -1, 1);
    s.plain_values = halves(b.rows * s.plain_slots * b.dim, -1, 1);
    s.packed_keys = words(vectors * kv_packed_bytes(codec, s.type, b.dim));
    s.packed_values = words(vectors * kv_packed_bytes(codec, s.type, b.dim));
    if (codec == KvCodec::kFp8) {
      s.key_scale = halves(vectors, 0.001f, 0.002f),
      s.value_scale = halves(vectors, 0.001f, 0.002f);
    } else if (integer) {
      s.key_scale = halves(vectors / s.group * 2 * b.dim, 0.01f, 0.02f);
      s.value_scale = halves(2 * vectors * kv_value_groups(b.dim, s.group), 0.01f, 0.02f);
    }
    bytes_ = (segments.size() + lengths.size()) * 4.0;
    for (const auto& x : buffers_) bytes_ += static_cast<double>(x->size());
    query_ = halves(b.rows * b.heads * b.group * b.dim, -1, 1);
    out_ = DeviceBuffer<uint8_t>(b.rows * b.heads * b.group * b.dim * 2);
    key_ = halves(b.rows * b.heads * b.dim, -1, 1);
    value_ = halves(b.rows * b.heads * b.dim, -1, 1);
    position_ = DeviceBuffer<int32_t>(std::vector<int32_t>(b.rows, static_cast<int32_t>(b.tokens)));
  }

  const KvStore& store() const { return store_; }
  double vector_bytes() const { return bytes_; }  // keys, values, scales

  KvAttentionParams attention(int64_t group, KvUpdate update) const {
    return {.store = store_,
            .query_group = group,
            .query = query_,
            .scale = 0.088388f,
            .update = update,
            .out = out_.get()};
  }
  KvAppendParams append(KvOrder order, bool shared) const {
    return {{.position = position_.get(),
             .position_heads = 1,
             .victim_heads = 1,
             .order = order,
             .first = 4,
             .recent = 64,
             .shared = shared},
            store_,
            key_,
            value_,
            nullptr,
            0.5f};
  }

 private:
  uint16_t* halves(int64_t count, float low, float high) {
    buffers_.push_back(std::make_unique<DeviceBuffer<uint8_t>>(count * 2));
    auto* data = reinterpret_cast<__half*>(buffers_.back()->get());
    fill_halves<<<1024, 256>>>(data, count, 12345u + static_cast<uint32_t>(buffers_.size()), low,
                               high);
    return reinterpret_cast<uint16_t*>(data);
  }
  uint8_t* words(int64_t bytes) {
    buffers_.push_back(std::make_unique<DeviceBuffer<uint8_t>>((bytes + 3) / 4 * 4));
    fill_words<<<1024, 256>>>(reinterpret_cast<uint32_t*>(buffers_.back()->get()), bytes / 4,
                              777u + static_cast<uint32_t>(buffers_.size()));
    return buffers_.back()->get();
  }

  KvStore store_{};
  double bytes_ = 0;
  std::vector<std::unique_ptr<DeviceBuffer<uint8_t>>> buffers_;
  DeviceBuffer<int32_t> segments_, lengths_, positions_, position_;
  DeviceBuffer<float> scores_;
  DeviceBuffer<uint8_t> out_;
  void* query_ = nullptr;
  void* key_ = nullptr;
  void* value_ = nullptr;
};

struct Contender {
  std::string name;
  std::vector<std::function<void(cudaStream_t)>> calls;
  double bytes;  // of one call
  double microseconds = 0;
};

inline void time_contenders(std::vector<Contender>& contenders, int replays = 11) {
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  std::vector<cudaGraphExec_t> graphs;
  for (auto& c : contenders) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (auto& call : c.calls) call(stream);
    CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&executable, graph, 0));
    CHECK_CUDA(cudaGraphDestroy(graph));
    graphs.push_back(executable);
  }
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  std::vector<std::vector<float>> times(contenders.size());
  for (int r = 0; r < replays + 2; ++r) {
    for (size_t i = 0; i < contenders.size(); ++i) {
      CHECK_CUDA(cudaEventRecord(begin, stream));
      CHECK_CUDA(cudaGraphLaunch(graphs[i], stream));
      CHECK_CUDA(cudaEventRecord(end, stream));
      CHECK_CUDA(cudaEventSynchronize(end));
      float milliseconds = 0;
      CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin, end));
      if (r >= 2) times[i].push_back(milliseconds);
    }
  }
  for (size_t i = 0; i < contenders.size(); ++i) {
    std::sort(times[i].begin(), times[i].end());
    contenders[i].microseconds =
        1e3 * times[i][times[i].size() / 2] / static_cast<double>(contenders[i].calls.size());
    CHECK_CUDA(cudaGraphExecDestroy(graphs[i]));
  }
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
  CHECK_CUDA(cudaStreamDestroy(stream));
}

// Attention per codec, with and without scores, and the append behind it.
inline void bench_decode(const BenchShape& b) {
  std::printf("B %ld, heads %ld x %ld, D %ld, %ld tokens\n", long(b.rows), long(b.heads),
              long(b.group), long(b.dim), long(b.tokens));
  double plain = 0;
  for (const KvCodec codec :
       {KvCodec::kModel, KvCodec::kFp8, KvCodec::kInt8, KvCodec::kInt4, KvCodec::kInt2}) {
    std::vector<std::unique_ptr<BenchLayer>> layers;
    layers.push_back(std::make_unique<BenchLayer>(b, codec));
    const double bytes = layers[0]->vector_bytes();
    while (bytes * static_cast<double>(layers.size()) < 240e6 && layers.size() < 48) {
      layers.push_back(std::make_unique<BenchLayer>(b, codec));
    }
    const DeviceBuffer<uint8_t> workspace(
        cuda::kv_attention_decode_workspace(layers[0]->attention(b.group, KvUpdate::kAdd)));
    const DeviceBuffer<uint8_t> small(4 * b.rows);
    std::vector<Contender> contenders(4);
    contenders[0] = {"attention", {}, bytes};
    contenders[1] = {"with scores", {}, bytes};
    contenders[2] = {"append", {}, 0};
    contenders[3] = {"append shared", {}, 0};
    const size_t times = std::max<size_t>(1, 20 / layers.size());
    for (size_t i = 0; i < times * layers.size(); ++i) {
      const BenchLayer& layer = *layers[i % layers.size()];
      contenders[0].calls.push_back([&](cudaStream_t stream) {
        CHECK_CUDA(cuda::kv_attention_decode(layer.attention(b.group, KvUpdate::kNone),
                                             workspace.get(), stream));
      });
      contenders[1].calls.push_back([&](cudaStream_t stream) {
        CHECK_CUDA(cuda::kv_attention_decode(layer.attention(b.group, KvUpdate::kAdd),
                                             workspace.get(), stream));
      });
      contenders[2].calls.push_back([&](cudaStream_t stream) {
        CHECK_CUDA(
            cuda::kv_evict_append(layer.append(KvOrder::kLowestScore, false), nullptr, stream));
      });
      contenders[3].calls.push_back([&](cudaStream_t stream) {
        CHECK_CUDA(
            cuda::kv_evict_append(layer.append(KvOrder::kLowestScore, true), small.get(), stream));
      });
    }
    time_contenders(contenders);
    if (codec == KvCodec::kModel) plain = contenders[0].microseconds;
    std::printf(
        "  %-5s %7.1f us %5.0f GB/s x%.2f | scores %7.1f us +%.1f%% x%.2f | append %.1f, "
        "shared %.1f\n",
        name_of(codec), contenders[0].microseconds, bytes / contenders[0].microseconds * 1e-3,
        plain / contenders[0].microseconds, contenders[1].microseconds,
        100 * (contenders[1].microseconds / contenders[0].microseconds - 1),
        plain / contenders[1].microseconds, contenders[2].microseconds, contenders[3].microseconds);
  }
}

// Scores of a prompt: H2O (every query) or SnapKV (the last 32).
inline void bench_select(const BenchShape& b, int64_t queries) {
  const int64_t query_heads = b.rows * b.heads * b.group;
  const DeviceBuffer<uint16_t> query(query_heads * queries * b.dim);
  const DeviceBuffer<uint16_t> key(b.rows * b.heads * b.tokens * b.dim);
  fill_halves<<<1024, 256>>>(reinterpret_cast<__half*>(query.get()),
                             static_cast<int64_t>(query.size()), 5, -1, 1);
  fill_halves<<<1024, 256>>>(reinterpret_cast<__half*>(key.get()), static_cast<int64_t>(key.size()),
                             6, -1, 1);
  std::vector<int32_t> key_positions(b.rows * b.tokens), query_positions(b.rows * queries);
  for (size_t i = 0; i < key_positions.size(); ++i) {
    key_positions[i] = static_cast<int32_t>(static_cast<int64_t>(i) % b.tokens);
  }
  for (size_t i = 0; i < query_positions.size(); ++i) {
    query_positions[i] =
        static_cast<int32_t>(b.tokens - queries + static_cast<int64_t>(i) % queries);
  }
  const DeviceBuffer<int32_t> device_keys(key_positions), device_queries(query_positions);
  const DeviceBuffer<float> scores(b.rows * b.heads * b.tokens);
  const KvSelectParams p{.rows = b.rows,
                         .heads = b.heads,
                         .query_group = b.group,
                         .queries = queries,
                         .keys = b.tokens,
                         .dim = b.dim,
                         .type = KvType::kFloat16,
                         .query = query.get(),
                         .key = key.get(),
                         .query_positions = device_queries.get(),
                         .key_positions = device_keys.get(),
                         .position_heads = 1,
                         .scale = 0.088388f,
                         .scale_double = 0.088388,
                         .maximum = false,
                         .scores = scores.get()};
  const DeviceBuffer<uint8_t> workspace(cuda::kv_select_scores_workspace(p));
  std::vector<Contender> contenders(1);
  for (int i = 0; i < 5; ++i) {
    contenders[0].calls.push_back([&](cudaStream_t stream) {
      CHECK_CUDA(cuda::kv_select_scores(p, workspace.get(), stream));
    });
  }
  time_contenders(contenders, 5);
  const double pairs = static_cast<double>(queries) *
                       (static_cast<double>(b.tokens) - 0.5 * static_cast<double>(queries));
  const double operations = 4.0 * static_cast<double>(query_heads * b.dim) * pairs;
  std::printf(
      "  scores of %ld keys by %ld queries, B %ld, heads %ld x %ld: %.1f us, %.0f TFLOP/s\n",
      long(b.tokens), long(queries), long(b.rows), long(b.heads), long(b.group),
      contenders[0].microseconds, operations / contenders[0].microseconds * 1e-6);
}

}  // namespace kvopt::test
