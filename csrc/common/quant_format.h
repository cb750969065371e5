// SPDX-License-Identifier: Apache-2.0
// The only definition of kvopt's packed weight layouts. Every pack, unpack and product includes
// this file.
//
// A quantised weight of shape (N, K) is integer codes q in [0, 2^bits) with one scale (and one zero
// point, when asymmetric) per row and group of `group_size` consecutive columns:
//
//     w[n][k] = scale[n][k / group_size] * (q[n][k] - zero[n][k / group_size])
//
// Symmetric formats store no zero point; it is 2^(bits-1). Scales and zero points are fp16; a zero
// point may be any fp16 value. The last group of a row may be short. `group_size == k` is one group
// per row ("per channel").
//
// Two layouts exist, one per device, because each kernel wants the bytes of one instruction side by
// side:
//
// CPU, "tile32": 32 rows a tile, so that one 64-byte register holds 16 rows x 4 columns, the shape
// of vpdpbusd.
//   bits 4:  block = 8 columns, 128 bytes.   byte (r / 16) * 64 + (r % 16) * 4 + j   holds
//            q[r][8b + j] in its low nibble and q[r][8b + 4 + j] in its high nibble      (j = 0..3,
//            b = block)
//   bits 8:  block = 4 columns, 128 bytes.   the same byte holds q[r][4b + j]
//   meta:    per tile and group: 32 fp16 scales, then (asymmetric only) 32 fp16 zero points.
//
// CUDA, "mma16": 16 rows a tile, in the fragment order of mma.m16n8k16's A operand, so that a
// lane's 16-byte load is
//   its operand of four (4-bit) or two (8-bit) consecutive multiplications. Lane = 4 * g + t. A
//   16-column step j at columns c = 16 j + 4 t gives the lane the eight values
//       a0 a1 = q[g][c], q[g][c+1]      a2 a3 = q[g+8][c], q[g+8][c+1]
//       a4 a5 = q[g][c+2], q[g][c+3]    a6 a7 = q[g+8][c+2], q[g+8][c+3]
//   (a permutation of the columns inside a step, shared by both operands, so the sum is unchanged
//   and the lane reads four consecutive activations). bits 4:  block = 64 columns, 512 bytes: lane
//   * 16 + step * 4 is one little-endian word; a[2p] sits at bit 4p and
//            a[2p + 1] at bit 16 + 4p, so (word >> 4p) & 0x000F000F is a pair.
//   bits 8:  block = 32 columns, 512 bytes: lane * 16 + step * 8 + i is a[i].
//   K is padded to 64 columns in both.
//   meta:    per tile and group: for g = 0..7 {scale[g], scale[g+8]} or, asymmetric,
//            {scale[g], zero[g], scale[g+8], zero[g+8]}.
//
// Padding rows have scale 0; padding columns have code 0 and meet activations that the kernels read
// as 0.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define KVOPT_HOST_DEVICE __host__ __device__
#else
#define KVOPT_HOST_DEVICE
#endif

namespace kvopt {

struct QuantFormat {
  int32_t bits;        // 4 or 8
  int32_t group_size;  // columns per group; k itself for one group per row
  bool symmetric;      // no stored zero point
};

KVOPT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

KVOPT_HOST_DEVICE constexpr int64_t group_count(const QuantFormat& f, int64_t k) {
  return ceil_div(k, f.group_size);
}

KVOPT_HOST_DEVICE constexpr int32_t symmetric_zero(const QuantFormat& f) {
  return 1 << (f.bits - 1);
}

// Where one code lives: byte offset in the packed buffer and right shift inside that byte (0 or 4).
struct CodeAddress {
  int64_t byte;
  int32_t shift;
};

namespace tile32 {  // CPU

constexpr int64_t kRows = 32;
constexpr int64_t kBlockBytes = 128;

constexpr int64_t block_columns(const QuantFormat& f) { return f.bits == 4 ? 8 : 4; }

constexpr int64_t tile_bytes(const QuantFormat& f, int64_t k) {
  return ceil_div(k, block_columns(f)) * kBlockBytes;
}

constexpr int64_t packed_bytes(const QuantFormat& f, int64_t n, int64_t k) {
  return ceil_div(n, kRows) * tile_bytes(f, k);
}

constexpr CodeAddress code_address(const QuantFormat& f, int64_t k, int64_t row, int64_t column) {
  const int64_t columns = block_columns(f);
  const int64_t r = row % kRows;
  const int64_t c = column % columns;
  const int64_t base = (row / kRows) * tile_bytes(f, k) + (column / columns) * kBlockBytes;
  return {base + (r / 16) * 64 + (r % 16) * 4 + c % 4, static_cast<int32_t>(c / 4) * 4};
}

// fp16 values per (tile, group): 32 scales and, asymmetric, 32 zero points.
constexpr int64_t meta_stride(const QuantFormat& f) { return f.symmetric ? 32 : 64; }

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

namespace mma16 {  // CUDA

constexpr int64_t kRows = 16;
constexpr int64_t kPadColumns = 64;
constexpr int64_t kBlockBytes = 512;

KVOPT_HOST_DEVICE constexpr int64_t block_columns(const QuantFormat& f) {
  return f.bits == 4 ? 64 : 32;
}

KVOPT_HOST_DEVICE constexpr int64_t tile_bytes(const QuantFormat& f, int64_t k) {
  return ceil_div(k, kPadColumns) * (kPadColumns / block_columns(f)) * kBlockBytes;
}

KVOPT_HOST_DEVICE constexpr int64_t packed_bytes(const QuantFormat& f, int64_t n, int64_t k) {
  return ceil_div(n, kRows) * tile_bytes(f, k);
}

KVOPT_HOST_DEVICE constexpr CodeAddress code_address(const QuantFormat& f, int64_t k, int64_t row,
                                                     int64_t column) {
  const int64_t columns = block_columns(f);
  const int64_t base = (row / kRows) * tile_bytes(f, k) + (column / columns) * kBlockBytes;
  const int64_t r = row % kRows;
  const int64_t step = (column % columns) / 16;
  const int64_t lane = (r % 8) * 4 + (column % 16) / 4;
  const int64_t i = (column % 2) + (r / 8) * 2 + ((column % 4) / 2) * 4;  // index into a0..a7
  if (f.bits == 4) {
    const int64_t nibble = i / 2 + (i % 2) * 4;
    return {base + lane * 16 + step * 4 + nibble / 2, static_cast<int32_t>(nibble % 2) * 4};
  }
  return {base + lane * 16 + step * 8 + i, 0};
}

// fp16 values per (tile, group).
KVOPT_HOST_DEVICE constexpr int64_t meta_stride(const QuantFormat& f) {
  return f.symmetric ? 16 : 32;
}

KVOPT_HOST_DEVICE constexpr int64_t meta_count(const QuantFormat& f, int64_t n, int64_t k) {
  return ceil_div(n, kRows) * group_count(f, k) * meta_stride(f);
}

KVOPT_HOST_DEVICE constexpr int64_t scale_index(const QuantFormat& f, int64_t k, int64_t row,
                                                int64_t group) {
  const int64_t base = ((row / kRows) * group_count(f, k) + group) * meta_stride(f);
  const int64_t r = row % kRows;
  return f.symmetric ? base + (r % 8) * 2 + r / 8 : base + (r % 8) * 4 + (r / 8) * 2;
}

KVOPT_HOST_DEVICE constexpr int64_t zero_index(const QuantFormat& f, int64_t k, int64_t row,
                                               int64_t group) {
  return scale_index(f, k, row, group) + 1;  // asymmetric only
}

}  // namespace mma16

}  // namespace kvopt
