// SPDX-License-Identifier: Apache-2.0
// The long loop of eviction: what each slot's token is worth, as integers that order as priorities
// do, and the smallest of them. Plain loops that compilers vectorise; the including file is
// compiled for one instruction set, everything has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/kv_store.h"

namespace kvopt::cpu {

constexpr int64_t kKvKeyBlock = 256;
constexpr int32_t kKvNoKey = INT32_MAX;  // of a protected slot; larger than +infinity's

// Slots with low <= position <= high are open.
struct KvKeyRule {
  KvOrder order;
  bool age;
  int32_t newest, low, high;
};

// keys[0 .. count), count <= kKvKeyBlock, and the smallest of them.
using KvKeys = int32_t (*)(const KvKeyRule& rule, const int32_t* positions, const float* scores,
                           int64_t count, int32_t* keys);
int32_t kv_keys_avx2(const KvKeyRule& rule, const int32_t* positions, const float* scores,
                     int64_t count, int32_t* keys);
int32_t kv_keys_avx512(const KvKeyRule& rule, const int32_t* positions, const float* scores,
                       int64_t count, int32_t* keys);

namespace {

// An integer that orders as the float does; -0 is 0, NaN is +infinity.
inline int32_t ordered_bits(float x) {
  x += 0.0f;
  int32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const int32_t magnitude = bits & 0x7fffffff;
  const int32_t key = bits < 0 ? -magnitude : magnitude;
  return magnitude > 0x7f800000 ? 0x7f800000 : key;
}

template <typename Key>
inline int32_t block_keys(const KvKeyRule& rule, const int32_t* __restrict positions, int64_t count,
                          int32_t* __restrict keys, Key key_at) {
  const int32_t low = rule.low, high = rule.high;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t key = key_at(i);
    const bool open = (positions[i] >= low) & (positions[i] <= high);
    keys[i] = open ? key : kKvNoKey;
  }
  int32_t smallest = kKvNoKey;  // a loop of its own: together, gcc vectorises neither
  for (int64_t i = 0; i < count; ++i) smallest = keys[i] < smallest ? keys[i] : smallest;
  return smallest;
}

inline int32_t all_keys(const KvKeyRule& rule, const int32_t* positions, const float* scores,
                        int64_t count, int32_t* keys) {
  if (rule.order == KvOrder::kOldest) {
    return block_keys(rule, positions, count, keys, [=](int64_t i) { return positions[i]; });
  }
  if (!rule.age) {
    return block_keys(rule, positions, count, keys,
                      [=](int64_t i) { return ordered_bits(scores[i]); });
  }
  const int32_t newest = rule.newest;
  return block_keys(rule, positions, count, keys, [=](int64_t i) {
    const int32_t age = newest - positions[i];
    return ordered_bits(scores[i] / static_cast<float>(age > 1 ? age : 1));
  });
}

}  // namespace
}  // namespace kvopt::cpu
