// SPDX-License-Identifier: Apache-2.0
// The operators on one layer of the KV cache on CUDA, as common/kv_store.h states them. Every
// function launches on the given stream and returns a cudaError; nothing waits for the host,
// allocates, or depends on a length on the host, so all of them can be captured in a graph.
//
// What the kernels take, beyond what kv_store.h says: float32, float16, bfloat16; D a multiple of 4
// up to 256; groups up to 128, of integer codecs a power of two from 4 on. kv_refusal says what is
// wrong.
#pragma once

#include "common/kv_store.h"

namespace kvopt::cuda {

constexpr int64_t kKvMostQueryGroup = 128;  // query heads per KV head of the decode attention

// Null if the kernels can work on the store, else what they cannot take.
const char* kv_refusal(const KvStore& store);
const char* kv_refusal(KvType type, int64_t dim);

// Bytes of workspace, 256-byte aligned on CUDA; depends on sizes and the current device only.
int64_t kv_select_scores_workspace(const KvSelectParams& p);
int64_t kv_evict_append_workspace(const KvAppendParams& p);
int64_t kv_merge_evict_workspace(const KvMergeEvictParams& p);
int64_t kv_attention_decode_workspace(const KvAttentionParams& p);

int kv_select_scores(const KvSelectParams& p, void* workspace, void* stream);
int kv_quant_pack(const KvPackParams& p, void* stream);
int kv_quant_unpack(const KvUnpackParams& p, void* stream);
int kv_evict_append(const KvAppendParams& p, void* workspace, void* stream);
int kv_attention_decode(const KvAttentionParams& p, void* workspace, void* stream);
int kv_merge_evict(const KvMergeEvictParams& p, void* workspace, void* stream);
int kv_merge_pair(const KvMergeParams& p, void* stream);

}  // namespace kvopt::cuda
