// SPDX-License-Identifier: Apache-2.0
// The only definition of kvopt's packed weight layouts. Every pack, unpack and product includes
// this file.
//
// A quantised weight of shape (N, K) is integer codes q in [0, 2^bits) with one scale (and one zero
// point, when asymmetric) per row and group of `group_size` consecutive columns:
//
//     w[n][k] = scale[n][k / group_size] * (q[n][k] - zero[n][k / group_size])     integer schemes
//     w[n][k] = scale[n][k / group_size] * book[q[n][k]]                           code books
//
// Only the asymmetric scheme stores zero points; the symmetric ones mean 2^(bits-1). Scales and
// zero points are fp16; a zero point may be any fp16 value. The last group of a row may be short.
// `group_size == k` is one group per row ("per channel"). bits: 2, 3, 4, 8; code books have 4.
//
// Each device has its own layout, because each kernel wants the bytes of one instruction side by
// side. A code is found by `code_pieces`: one field of a little-endian 32-bit word, or, for 3 bits,
// up to three fields.
//
// CPU, "tile32": 32 rows a tile, so that one 64-byte register holds 16 rows x 4 columns, the shape
// of vpdpbusd. With j = column % 4 a code's byte inside 128 bytes is (r / 16) * 64 + (r % 16) * 4
// + j, and
//   bits 8:  block = 4 columns, 128 bytes: the byte is the code
//   bits 4:  block = 8 columns, 128 bytes: columns 0..3 in low nibbles, 4..7 in high nibbles
//   bits 2:  block = 16 columns, 128 bytes: column 4i + j at bit 2i                   (i = 0..3)
//   bits 3:  block = 32 columns, 384 bytes: two 2-bit blocks with the low two bits of columns 0..15
//            and 16..31, then 128 bytes with the third bit of column 4i + j at bit i  (i = 0..7)
//   meta:    per tile and group: 32 fp16 scales, then (asymmetric only) 32 fp16 zero points.
//
// CUDA, "mma16": 16 rows a tile, in the register order of mma.m16n8k16's (and, per warp, wgmma's) A
// operand, so that a lane's 16-byte load is its operand of several consecutive multiplications.
// Lane = 4 * g + t. Of a 16-column step at column c the lane holds four pairs
//       a0 = q[g][c + 2t], q[g][c + 2t + 1]          a1 = the same of row g + 8
//       a2 = q[g][c + 2t + 8], q[g][c + 2t + 9]      a3 = the same of row g + 8
//   a pair sits 16 bits apart in a word, so that one AND with a mask gives two 16-bit numbers:
//   bits 4:  block = 64 columns, 512 bytes: word lane * 4 + step; pair i at bit 4i
//   bits 8:  block = 32 columns, 512 bytes: word lane * 4 + step * 2 + i / 2; pair i at bit 8(i %
//   2) bits 2:  block = 128 columns, 512 bytes: word lane * 4 + step / 2;
//            pair i at bit 2 (i % 2) + 4 (step % 2) + 8 (i / 2)
//   bits 3:  block = 256 columns, 1536 bytes: three words for each 64 columns; word w of columns
//            64b.. is number j = 3b + w of the lane's twelve, at (j / 4) * 128 + lane * 4 + j % 4.
//            Pair i of step s = 0, 1, 2 sits in word s at bit 3i; of step 3, a0, a1, a3 in words
//            0, 1, 2 at bit 12, and a2 has its bit b in word b at bit 15.
//   meta:    per tile and group: for g = 0..7 {scale[g], scale[g+8]} or, asymmetric,
//            {scale[g], zero[g], scale[g+8], zero[g+8]}.
//
// CUDA, "row major": the layout of kInt8Dynamic, whose operands the tensor cores read from shared
// memory: (N, pitch) signed bytes q - 128, pitch = K rounded up to 16. meta: N fp16 scales.
//
// Padding rows have scale 0; padding columns have code 0 (row major: byte 0) and meet activations
// that the kernels read as 0.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define KVOPT_HOST_DEVICE __host__ __device__
#else
#define KVOPT_HOST_DEVICE
#endif

namespace kvopt {

// The numbers are part of the operators' schemas.
enum class Scheme : int32_t {
  kAsymmetric = 0,
  kSymmetric = 1,
  kNf4 = 2,  // code books of bitsandbytes
  kFp4 = 3,
  kInt8Dynamic = 4,  // symmetric, 8 bits, one group per row, activations int8 per token (W8A8)
};

struct QuantFormat {
  int32_t bits;        // 2, 3, 4 or 8
  int32_t group_size;  // columns per group; k itself for one group per row
  Scheme scheme;

  KVOPT_HOST_DEVICE constexpr bool has_zeros() const { return scheme == Scheme::kAsymmetric; }
  KVOPT_HOST_DEVICE constexpr bool has_book() const {
    return scheme == Scheme::kNf4 || scheme == Scheme::kFp4;
  }
};

// bitsandbytes' types (QLoRA, appendix E; its FP4 is a tree of its own, not OCP's E2M1).
KVOPT_HOST_DEVICE constexpr float book_value(Scheme scheme, int32_t code) {
  constexpr float kNf4[16] = {-1.0f,
                              -0.6961928009986877f,
                              -0.5250730514526367f,
                              -0.39491748809814453f,
                              -0.28444138169288635f,
                              -0.18477343022823334f,
                              -0.09105003625154495f,
                              0.0f,
                              0.07958029955625534f,
                              0.16093020141124725f,
                              0.24611230194568634f,
                              0.33791524171829224f,
                              0.44070982933044434f,
                              0.5626170039176941f,
                              0.7229568362236023f,
                              1.0f};
  constexpr float kFp4[8] = {0.0f, 0.005208333333f, 0.66666667f, 1.0f, 0.33333333f,
                             0.5f, 0.16666667f,     0.25f};
  if (scheme == Scheme::kNf4) return kNf4[code];
  return code < 8 ? kFp4[code] : -kFp4[code - 8];
}

KVOPT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

KVOPT_HOST_DEVICE constexpr int64_t group_count(const QuantFormat& f, int64_t k) {
  return ceil_div(k, f.group_size);
}

KVOPT_HOST_DEVICE constexpr int32_t symmetric_zero(const QuantFormat& f) {
  return 1 << (f.bits - 1);
}

// Bits [from, from + bits) of a code sit at `shift` of the 32-bit little-endian word `word` of the
// packed buffer.
struct CodePiece {
  int64_t word;
  int32_t shift;
  int32_t bits;
  int32_t from;
};

struct CodePieces {
  int32_t count;
  CodePiece piece[3];
};

namespace tile32 {  // CPU

constexpr int64_t kRows = 32;

constexpr int64_t block_columns(const QuantFormat& f) { return f.bits == 3 ? 32 : 32 / f.bits; }
constexpr int64_t block_bytes(const QuantFormat& f) { return f.bits == 3 ? 384 : 128; }

constexpr int64_t tile_bytes(const QuantFormat& f, int64_t k) {
  return ceil_div(k, block_columns(f)) * block_bytes(f);
}

constexpr int64_t packed_bytes(const QuantFormat& f, int64_t n, int64_t k) {
  return ceil_div(n, kRows) * tile_bytes(f, k);
}

constexpr CodePieces code_pieces(const QuantFormat& f, int64_t k, int64_t row, int64_t column) {
  const int64_t r = row % kRows;
  const int64_t c = column % block_columns(f);
  const int64_t base =
      ((row / kRows) * tile_bytes(f, k) + (column / block_columns(f)) * block_bytes(f)) / 4 +
      (r / 16) * 16 + r % 16;
  const int32_t byte = static_cast<int32_t>(c % 4) * 8;
  const int32_t i = static_cast<int32_t>(c / 4);
  if (f.bits == 3) {
    return {2, {{base + i / 4 * 32, byte + 2 * (i % 4), 2, 0}, {base + 64, byte + i, 1, 2}, {}}};
  }
  return {1, {{base, byte + f.bits * i, f.bits, 0}, {}, {}}};
}

// fp16 values per (tile, group): 32 scales and, asymmetric, 32 zero points.
constexpr int64_t meta_stride(const QuantFormat& f) { return f.has_zeros() ? 64 : 32; }

constexpr int64_t meta_count(const QuantFormat& f, int64_t n, int64_t k) {
  return ceil_div(n, kRows) * group_count(f, k) * meta_stride(f);
}

constexpr int64_t scale_index(const QuantFormat& f, int64_t k, int64_t row, int64_t group) {
  return ((row / kRows) * group_count(f, k) + group) * meta_stride(f) + row % kRows;
}

constexpr int64_t zero_index(const QuantFormat& f, int64_t k, int64_t row, int64_t group) {
  return scale_index(f, k, row, group) + 32;  // asymmetric only
}

}  // namespace tile32

namespace mma16 {  // CUDA; for kInt8Dynamic: row major

constexpr int64_t kRows = 16;
constexpr int64_t kRowPitch = 16;  // row major: a row's bytes are a multiple of this

KVOPT_HOST_DEVICE constexpr bool is_row_major(const QuantFormat& f) {
  return f.scheme == Scheme::kInt8Dynamic;
}

KVOPT_HOST_DEVICE constexpr int64_t row_pitch(int64_t k) {
  return ceil_div(k, kRowPitch) * kRowPitch;
}

KVOPT_HOST_DEVICE constexpr int64_t block_columns(int32_t bits) {
  return bits == 2 ? 128 : bits == 3 ? 256 : bits == 4 ? 64 : 32;
}
KVOPT_HOST_DEVICE constexpr int64_t block_bytes(int32_t bits) { return bits == 3 ? 1536 : 512; }

// K is padded to whole blocks, and to 64 columns for 8 bits.
KVOPT_HOST_DEVICE constexpr int64_t pad_columns(int32_t bits) {
  return bits == 8 ? 64 : block_columns(bits);
}

KVOPT_HOST_DEVICE constexpr int64_t tile_bytes(const QuantFormat& f, int64_t k) {
  const int64_t pad = pad_columns(f.bits);
  return ceil_div(k, pad) * (pad / block_columns(f.bits)) * block_bytes(f.bits);
}

KVOPT_HOST_DEVICE constexpr int64_t packed_bytes(const QuantFormat& f, int64_t n, int64_t k) {
  if (is_row_major(f)) return n * row_pitch(k);
  return ceil_div(n, kRows) * tile_bytes(f, k);
}

// Row major stores q ^ 0x80: the field holds the code with its highest bit flipped.
KVOPT_HOST_DEVICE constexpr uint32_t stored_flip(const QuantFormat& f) {
  return is_row_major(f) ? 0x80 : 0;
}

KVOPT_HOST_DEVICE constexpr CodePieces code_pieces(const QuantFormat& f, int64_t k, int64_t row,
                                                   int64_t column) {
  if (is_row_major(f)) {
    const int64_t byte = row * row_pitch(k) + column;
    return {1, {{byte / 4, static_cast<int32_t>(byte % 4) * 8, 8, 0}, {}, {}}};
  }
  const int64_t columns = block_columns(f.bits);
  const int64_t base =
      ((row / kRows) * tile_bytes(f, k) + (column / columns) * block_bytes(f.bits)) / 4;
  const int64_t r = row % kRows;
  const int64_t step = (column % columns) / 16;
  const int64_t lane = (r % 8) * 4 + (column % 8) / 2;
  const int32_t i = static_cast<int32_t>(r / 8 + (column % 16) / 8 * 2);  // of a0..a3
  const int32_t half = static_cast<int32_t>(column % 2) * 16;
  if (f.bits == 8)
    return {1, {{base + lane * 4 + step * 2 + i / 2, 8 * (i % 2) + half, 8, 0}, {}, {}}};
  if (f.bits == 4) return {1, {{base + lane * 4 + step, 4 * i + half, 4, 0}, {}, {}}};
  if (f.bits == 2) {
    const int32_t shift = 2 * (i % 2) + 4 * static_cast<int32_t>(step % 2) + 8 * (i / 2);
    return {1, {{base + lane * 4 + step / 2, shift + half, 2, 0}, {}, {}}};
  }
  const int64_t first =
      step / 4 * 3;  // number of the 64 columns' first word among the lane's twelve
  const auto word = [&](int64_t w) {
    return base + (first + w) / 4 * 128 + lane * 4 + (first + w) % 4;
  };
  if (step % 4 < 3) return {1, {{word(step % 4), 3 * i + half, 3, 0}, {}, {}}};
  if (i == 2) {
    return {3,
            {{word(0), 15 + half, 1, 0}, {word(1), 15 + half, 1, 1}, {word(2), 15 + half, 1, 2}}};
  }
  return {1, {{word(i == 3 ? 2 : i), 12 + half, 3, 0}, {}, {}}};
}

// fp16 values per (tile, group).
KVOPT_HOST_DEVICE constexpr int64_t meta_stride(const QuantFormat& f) {
  return f.has_zeros() ? 32 : 16;
}

KVOPT_HOST_DEVICE constexpr int64_t meta_count(const QuantFormat& f, int64_t n, int64_t k) {
  if (is_row_major(f)) return n;
  return ceil_div(n, kRows) * group_count(f, k) * meta_stride(f);
}

KVOPT_HOST_DEVICE constexpr int64_t scale_index(const QuantFormat& f, int64_t k, int64_t row,
                                                int64_t group) {
  if (is_row_major(f)) return row;
  const int64_t base = ((row / kRows) * group_count(f, k) + group) * meta_stride(f);
  const int64_t r = row % kRows;
  return f.has_zeros() ? base + (r % 8) * 4 + (r / 8) * 2 : base + (r % 8) * 2 + r / 8;
}

KVOPT_HOST_DEVICE constexpr int64_t zero_index(const QuantFormat& f, int64_t k, int64_t row,
                                               int64_t group) {
  return scale_index(f, k, row, group) + 1;  // asymmetric only
}

}  // namespace mma16

}  // namespace kvopt
