// SPDX-License-Identifier: Apache-2.0
// Random quantised weights for the CUDA product tests, packed on the host with quant_format.h's
// address functions, so that a kernel is checked against the definition of the layout. And how
// checks are counted.
#pragma once

#include <cmath>
#include <string>

#include "check_cuda.h"
#include "common/params.h"

namespace kvopt::test {

inline int failures = 0;
inline int64_t checks = 0;

inline void expect(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  if (++failures <= 40) std::printf("FAILED %s\n", what.c_str());
}

enum class Zeros { kInteger, kFractional };

inline std::string name_of(const QuantFormat& f) {
  static constexpr const char* kNames[] = {" asym", " sym", " nf4", " fp4", " w8a8"};
  return "w" + std::to_string(f.bits) + " g" + std::to_string(f.group_size) +
         kNames[static_cast<int>(f.scheme)];
}

struct Weight {
  int64_t n, k;
  QuantFormat format;
  Zeros zeros;
  std::vector<uint8_t> codes, packed;
  std::vector<uint16_t> scale, zero, meta;

  std::string name() const {
    return name_of(format) + (zeros == Zeros::kFractional ? "-fraction" : "") + " N" +
           std::to_string(n) + " K" + std::to_string(k);
  }
};

// The zero point that plain tensors hold where the packed layout stores none.
inline float implied_zero(const QuantFormat& f) {
  return f.has_book() ? 0.0f : static_cast<float>(symmetric_zero(f));
}

inline void pack_on_host(Weight& w) {
  const int64_t groups = group_count(w.format, w.k);
  w.packed.assign(mma16::packed_bytes(w.format, w.n, w.k), 0);
  w.meta.assign(mma16::meta_count(w.format, w.n, w.k), 0);
  const auto put = [&](int64_t word, int32_t shift, uint32_t field) {
    for (; field != 0; field >>= 1, ++shift) {  // the buffer need not be a multiple of 4 bytes
      w.packed[word * 4 + shift / 8] |= static_cast<uint8_t>((field & 1) << shift % 8);
    }
  };
  for (int64_t row = 0; row < w.n; ++row) {
    for (int64_t column = 0; column < w.k; ++column) {
      const CodePieces at = mma16::code_pieces(w.format, w.k, row, column);
      const uint32_t code = w.codes[row * w.k + column] ^ mma16::stored_flip(w.format);
      for (int i = 0; i < at.count; ++i) {
        const CodePiece& piece = at.piece[i];
        put(piece.word, piece.shift, code >> piece.from & ((1u << piece.bits) - 1));
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      w.meta[mma16::scale_index(w.format, w.k, row, g)] = w.scale[row * groups + g];
      if (w.format.has_zeros()) {
        w.meta[mma16::zero_index(w.format, w.k, row, g)] = w.zero[row * groups + g];
      }
    }
  }
}

// Scales differ by up to 2^10 between groups; one in 50 is zero.
inline Weight random_weight(Random& random, int64_t n, int64_t k, QuantFormat format,
                            Zeros zeros = Zeros::kInteger) {
  Weight w{n, k, format, format.has_zeros() ? zeros : Zeros::kInteger, {}, {}, {}, {}, {}};
  const int64_t groups = group_count(format, k);
  w.codes.resize(n * k);
  for (auto& c : w.codes) c = static_cast<uint8_t>(random.below(1 << format.bits));
  w.scale.resize(n * groups);
  w.zero.resize(n * groups);
  const float largest = format.has_book() ? 64.0f : static_cast<float>(1 << (8 - format.bits));
  for (int64_t i = 0; i < n * groups; ++i) {
    const float s =
        random.below(50) == 0
            ? 0.0f
            : static_cast<float>((0.5 + random.uniform()) * largest *
                                 std::exp2(-7.0 - static_cast<double>(random.below(10))));
    w.scale[i] = half_bits(s);
    float zero = implied_zero(format);
    if (format.has_zeros()) {
      const double z = random.uniform() * ((1 << format.bits) - 1);
      zero = static_cast<float>(zeros == Zeros::kInteger ? std::rint(z) : z);
    }
    w.zero[i] = half_bits(zero);
  }
  pack_on_host(w);
  return w;
}

}  // namespace kvopt::test
