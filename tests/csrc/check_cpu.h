// SPDX-License-Identifier: Apache-2.0
// What the tests of the CPU kernels share: counting, random numbers, buffers of exactly the
// promised size (for AddressSanitizer) that start as NaN, and weights made through the addresses of
// quant_format.h.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "common/params.h"
#include "cpu/float16.h"
#include "cpu/isa.h"

namespace kvopt::test {

using namespace kvopt::cpu;

inline int passed = 0;
inline int failed = 0;

inline void check(bool ok, const std::string& what) {
  ++(ok ? passed : failed);
  if (!ok && failed <= 40) std::printf("FAILED: %s\n", what.c_str());
}

using Random = std::mt19937_64;

inline float normal(Random& random) { return std::normal_distribution<float>(0.0f, 1.0f)(random); }
inline int64_t below(Random& random, int64_t n) {
  return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

inline const char* dtype_name(DType t) {
  return t == DType::kFloat32 ? "fp32" : t == DType::kFloat16 ? "fp16" : "bf16";
}

// Every weight format with 16-bit activations; the group size is set by the test.
constexpr QuantFormat kFormats[] = {
    {8, 0, Scheme::kSymmetric},  {8, 0, Scheme::kAsymmetric}, {4, 0, Scheme::kSymmetric},
    {4, 0, Scheme::kAsymmetric}, {3, 0, Scheme::kSymmetric},  {3, 0, Scheme::kAsymmetric},
    {2, 0, Scheme::kSymmetric},  {2, 0, Scheme::kAsymmetric}, {4, 0, Scheme::kNf4},
    {4, 0, Scheme::kFp4},
};

inline QuantFormat with_group(QuantFormat f, int64_t group) {
  f.group_size = static_cast<int32_t>(group);
  return f;
}

// A group of 16 to 1024 columns or of a whole row of k.
inline QuantFormat with_random_group(Random& random, QuantFormat f, int64_t k) {
  constexpr int32_t kGroups[] = {16, 32, 48, 64, 128, 256, 1024, 0};
  do {
    f.group_size = kGroups[below(random, 8)];
  } while (f.group_size > k);
  if (f.group_size == 0 || f.scheme == Scheme::kInt8Dynamic) f.group_size = static_cast<int32_t>(k);
  return f;
}

inline std::string name_of(const QuantFormat& f) {
  const std::string kind = f.scheme == Scheme::kNf4   ? "nf4"
                           : f.scheme == Scheme::kFp4 ? "fp4"
                                                      : "int" + std::to_string(f.bits);
  const char* group = f.scheme == Scheme::kSymmetric     ? " sym g"
                      : f.scheme == Scheme::kInt8Dynamic ? " dynamic g"
                                                         : " g";
  return kind + group + std::to_string(f.group_size);
}

// Memory of exactly `size` bytes, 64-byte aligned, filled with a pattern that is a NaN in every
// type.
struct Buffer {
  explicit Buffer(int64_t size) : bytes(static_cast<size_t>(size)) {
    data = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(64)));
    std::memset(data, 0xFF, bytes);
  }
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint16_t* halves() const { return reinterpret_cast<uint16_t*>(data); }
  size_t bytes;
  uint8_t* data;
};

inline float value_at(DType type, const void* data, int64_t i) {
  float value;
  load_floats(type, data, i, 1, &value);
  return value;
}

inline void set_value(DType type, void* data, int64_t i, float value) {
  store_floats(type, &value, 1, data, i);
}

inline int read_code(const QuantFormat& f, int64_t k, const uint8_t* packed, int64_t row,
                     int64_t column) {
  const CodePieces at = tile32::code_pieces(f, k, row, column);
  uint32_t code = 0;
  for (int i = 0; i < at.count; ++i) {
    uint32_t word;
    std::memcpy(&word, packed + at.piece[i].word * 4, 4);
    code |= (word >> at.piece[i].shift & ((1u << at.piece[i].bits) - 1u)) << at.piece[i].from;
  }
  return static_cast<int>(code);
}

// Into a field that still holds 0.
inline void write_code(const QuantFormat& f, int64_t k, uint8_t* packed, int64_t row,
                       int64_t column, int code) {
  const CodePieces at = tile32::code_pieces(f, k, row, column);
  for (int i = 0; i < at.count; ++i) {
    uint32_t word;
    std::memcpy(&word, packed + at.piece[i].word * 4, 4);
    const uint32_t field = static_cast<uint32_t>(code) >> at.piece[i].from;
    word |= (field & ((1u << at.piece[i].bits) - 1u)) << at.piece[i].shift;
    std::memcpy(packed + at.piece[i].word * 4, &word, 4);
  }
}

// A random quantised weight and its exact values.
struct Weight {
  Weight(Random& random, QuantFormat format, int64_t rows, int64_t columns)
      : f(format),
        n(rows),
        k(columns),
        packed(tile32::packed_bytes(f, n, k)),
        meta(tile32::meta_count(f, n, k) * 2),
        codes(static_cast<size_t>(n * k)),
        dense(static_cast<size_t>(n * k)) {
    std::memset(packed.data, 0, packed.bytes);
    std::memset(meta.data, 0, meta.bytes);
    uint16_t* m = meta.halves();
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t group = 0; group < group_count(f, k); ++group) {
        const float scale = 0.01f + 0.0001f * static_cast<float>(below(random, 100));
        m[tile32::scale_index(f, k, row, group)] = float_to_half(scale);
        if (f.has_zeros()) {  // not always whole numbers, as some methods learn them
          const float zero = static_cast<float>(below(random, (1 << f.bits) * 16)) / 16.0f;
          m[tile32::zero_index(f, k, row, group)] = float_to_half(zero);
        }
      }
      for (int64_t column = 0; column < k; ++column) {
        set_code(row, column, static_cast<int>(below(random, 1 << f.bits)));
      }
    }
  }

  // Where the packed field still holds 0.
  void set_code(int64_t row, int64_t column, int code) {
    write_code(f, k, packed.data, row, column, code);
    const size_t at = static_cast<size_t>(row * k + column);
    codes[at] = static_cast<uint8_t>(code);
    const int64_t group = column / f.group_size;
    const double value = f.has_book() ? book_value(f.scheme, code) : code - zero(row, group);
    dense[at] = scale(row, group) * value;
  }

  double scale(int64_t row, int64_t group) const {
    return half_to_float(meta.halves()[tile32::scale_index(f, k, row, group)]);
  }
  double zero(int64_t row, int64_t group) const {
    if (!f.has_zeros()) return symmetric_zero(f);
    return half_to_float(meta.halves()[tile32::zero_index(f, k, row, group)]);
  }

  QuantFormat f;
  int64_t n, k;
  Buffer packed, meta;
  std::vector<uint8_t> codes;
  std::vector<double> dense;
};

}  // namespace kvopt::test
