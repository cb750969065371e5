// SPDX-License-Identifier: Apache-2.0
// Tests of csrc/cpu's quantisation, packing and conversions, without any framework.
//
//     test_wquant_cpu [--seed N]
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check_cpu.h"
#include "common/code_book.h"
#include "cpu/wquant.h"

namespace {

using namespace kvopt;
using namespace kvopt::test;

// The nearest fp16 value, ties to even, without bit arithmetic.
double nearest_half(double value) {
  if (value == 0.0 || std::isnan(value)) return value;
  if (std::abs(value) >= 65520.0) return std::copysign(HUGE_VAL, value);
  const int exponent = std::max(std::ilogb(value), -14) - 10;
  return std::ldexp(std::nearbyint(std::ldexp(value, -exponent)), exponent);
}

void test_conversions() {
  bool halves = true, ties = true, bfloats = true;
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t bits = static_cast<uint16_t>(h);
    const float value = half_to_float(bits);
    const int exponent = (h >> 10) & 31;
    const int mantissa = h & 1023;
    if (exponent == 31) {
      halves = halves && (mantissa != 0 ? std::isnan(value) : std::isinf(value)) &&
               std::signbit(value) == (h >= 32768);
      if (mantissa != 0) halves = halves && std::isnan(half_to_float(float_to_half(value)));
      if (mantissa == 0) halves = halves && float_to_half(value) == bits;
      continue;
    }
    const double want =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    halves = halves && value == (h >= 32768 ? -want : want) && float_to_half(value) == bits;
    if ((h & 0x7fff) == 0x7bff) continue;
    // Halfway to the next value away from zero, and one fp32 step to either side.
    const float middle = 0.5f * value + 0.5f * half_to_float(static_cast<uint16_t>(h + 1));
    for (float v : {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, 2.0f * middle)}) {
      ties = ties && half_to_float(float_to_half(v)) == nearest_half(v);
    }
  }
  for (float v : {65504.0f, 65519.0f, 65520.0f, 1e30f, 1e-30f, 1e-45f, -65519.99f}) {
    ties = ties && half_to_float(float_to_half(v)) == nearest_half(v);
  }
  for (uint32_t b = 0; b < 0x7f80; ++b) {
    const float low = bfloat16_to_float(static_cast<uint16_t>(b));
    const float middle = float_from_bits((b << 16) | 0x8000u);
    bfloats = bfloats && float_to_bfloat16(low) == b && float_to_bfloat16(middle) == b + (b & 1) &&
              float_to_bfloat16(-middle) == (0x8000 | (b + (b & 1))) &&
              float_to_bfloat16(float_from_bits(float_bits(middle) + 1)) == b + 1 &&
              float_to_bfloat16(float_from_bits(float_bits(middle) - 1)) == b;
  }
  bfloats =
      bfloats && std::isnan(bfloat16_to_float(float_to_bfloat16(float_from_bits(0x7f800001u))));
  check(halves, "fp16 round trip");
  check(ties, "fp32 to fp16 rounding");
  check(bfloats, "bf16 rounding");
}

// The nearest value of a book, ties (in fp32) to the lower; FP4's negative zero is for what is just
// above 0.
int nearest_code(Scheme scheme, float scaled) {
  int order[16];
  for (int i = 0; i < 16; ++i) order[i] = i;
  std::stable_sort(order, order + 16,
                   [&](int a, int b) { return book_value(scheme, a) < book_value(scheme, b); });
  int at = 0;
  while (at < 15) {
    const float middle = (book_value(scheme, order[at]) + book_value(scheme, order[at + 1])) / 2.0f;
    if (!(middle < scaled)) break;
    ++at;
  }
  return order[at];
}

void test_books(Random& random) {
  for (Scheme scheme : {Scheme::kNf4, Scheme::kFp4}) {
    bool same = true;
    const auto compare = [&](float v) {
      same = same && choose_code(scheme, v) == nearest_code(scheme, v);
    };
    for (int i = 0; i < 100000; ++i)
      compare(2.0f * static_cast<float>(below(random, 1 << 24)) / (1 << 24) - 1.0f);
    for (int i = 0; i < 15; ++i) {
      const float bound = book_bound(scheme, i);
      for (float v : {std::nextafter(bound, -2.0f), bound, std::nextafter(bound, 2.0f)}) compare(v);
    }
    bool fixed = true;
    for (int code = 0; code < 16; ++code) {
      const float value = book_value(scheme, code);
      fixed = fixed && book_value(scheme, choose_code(scheme, value)) == value;
    }
    check(same, "choice of codes");
    check(fixed, "a book's values keep their value");
  }
}

// params.h, word by word.
void rtn_of_group(const QuantFormat& f, const std::vector<float>& w, std::vector<int>* codes,
                  double* scale_out, double* zero_out) {
  const float q = static_cast<float>((1 << f.bits) - 1);
  float low = 0, high = 0;
  for (float v : w) {
    low = std::min(low, v);
    high = std::max(high, v);
  }
  const float largest = std::max(-low, high);
  float scale = f.has_book()    ? largest
                : f.has_zeros() ? (high - low) / q
                : f.bits == 8   ? largest / 127
                                : 2 * largest / q;
  scale = std::max(static_cast<float>(nearest_half(scale)), 0x1p-24f);
  const float zero = f.has_book()    ? 0.0f
                     : f.has_zeros() ? std::clamp(std::nearbyint(-low / scale), 0.0f, q)
                                     : static_cast<float>(1 << (f.bits - 1));
  codes->clear();
  const float reciprocal = 1.0f / std::max(largest, 1e-38f);
  for (float v : w) {
    codes->push_back(f.has_book()
                         ? nearest_code(f.scheme, v * reciprocal)
                         : static_cast<int>(std::clamp(std::nearbyint(v / scale) + zero, 0.0f, q)));
  }
  *scale_out = scale;
  *zero_out = zero;
}

void test_wquant_case(Random& random, const QuantFormat& f, int64_t n, int64_t k, DType type) {
  const std::string name =
      name_of(f) + " N=" + std::to_string(n) + " K=" + std::to_string(k) + " " + dtype_name(type);
  const int64_t groups = group_count(f, k);
  Buffer weight(n * k * dtype_bytes(type)), codes(n * k), scale(n * groups * 2),
      zero(n * groups * 2);
  const float size = std::ldexp(1.0f, static_cast<int>(below(random, 30)) - 24);
  for (int64_t i = 0; i < n * k; ++i) {
    const float positive =
        i / k % 3 == 1 ? 3.0f : 0.0f;     // some rows have no zero inside their range
    const bool nothing = i / k % 7 == 6;  // some rows are all zero
    set_value(type, weight.data, i, nothing ? 0.0f : size * (normal(random) + positive));
  }
  uint16_t* scales = scale.halves();
  uint16_t* zeros = zero.halves();
  for (int64_t row = 0; row < n; row += 32) {
    wquant_rtn({n, k, type, f, weight.data, codes.data, scales, zeros}, row, std::min(row + 32, n));
  }
  bool rtn = true;
  for (int64_t i = 0; i < n * groups; ++i) {
    const int64_t begin = i % groups * f.group_size;
    const int64_t end = std::min<int64_t>(begin + f.group_size, k);
    std::vector<float> w;
    for (int64_t c = begin; c < end; ++c) {
      w.push_back(value_at(type, weight.data, i / groups * k + c));
    }
    std::vector<int> want;
    double want_scale, want_zero;
    rtn_of_group(f, w, &want, &want_scale, &want_zero);
    rtn = rtn && half_to_float(scales[i]) == want_scale && half_to_float(zeros[i]) == want_zero;
    for (int64_t c = begin; c < end; ++c) {
      rtn = rtn && codes.data[i / groups * k + c] == want[c - begin];
    }
  }
  check(rtn, "rtn " + name);

  Buffer packed(tile32::packed_bytes(f, n, k)), meta(tile32::meta_count(f, n, k) * 2);
  uint16_t* metas = meta.halves();
  if (f.has_zeros()) {
    for (int64_t i = 0; i < n * groups; ++i) zeros[i] = float_to_half(normal(random) + 7.0f);
  }
  for (int64_t row = 0; row < n; row += 32) {
    wquant_pack({n, k, f, codes.data, scales, zeros, packed.data, metas}, row,
                std::min(row + 32, n));
  }
  Buffer wanted(static_cast<int64_t>(packed.bytes)), wanted_meta(static_cast<int64_t>(meta.bytes));
  std::memset(wanted.data, 0, wanted.bytes);
  std::memset(wanted_meta.data, 0, wanted_meta.bytes);
  uint16_t* wanted_metas = wanted_meta.halves();
  Buffer dense(n * k * dtype_bytes(type)), wanted_dense(n * k * dtype_bytes(type));
  for (int64_t i = 0; i < n * k; ++i) {
    write_code(f, k, wanted.data, i / k, i % k, codes.data[i]);
    const int64_t group = i / k * groups + i % k / f.group_size;
    const float value = f.has_book()
                            ? book_value(f.scheme, codes.data[i])
                            : static_cast<float>(codes.data[i]) - half_to_float(zeros[group]);
    set_value(type, wanted_dense.data, i, half_to_float(scales[group]) * value);
  }
  for (int64_t i = 0; i < n * groups; ++i) {
    wanted_metas[tile32::scale_index(f, k, i / groups, i % groups)] = scales[i];
    if (f.has_zeros()) wanted_metas[tile32::zero_index(f, k, i / groups, i % groups)] = zeros[i];
  }
  check(std::memcmp(packed.data, wanted.data, packed.bytes) == 0 &&
            std::memcmp(meta.data, wanted_meta.data, meta.bytes) == 0,
        "pack " + name);

  Buffer codes2(n * k), scale2(n * groups * 2), zero2(n * groups * 2);
  wquant_unpack({n, k, f, codes2.data, scale2.halves(), zero2.halves(), packed.data, metas}, 0, n);
  check(std::memcmp(codes.data, codes2.data, codes.bytes) == 0 &&
            std::memcmp(scale.data, scale2.data, scale.bytes) == 0 &&
            std::memcmp(zero.data, zero2.data, zero.bytes) == 0,
        "unpack " + name);
  wquant_dequantize({n, k, type, f, packed.data, metas, dense.data}, 0, n);
  check(std::memcmp(dense.data, wanted_dense.data, dense.bytes) == 0, "dequantize " + name);
}

void test_wquant(Random& random) {
  for (const QuantFormat& format : kFormats) {
    for (int group : {16, 32, 48, 64, 128, 1024, 0}) {
      for (int64_t k : {1, 5, 17, 100, 704, 1040}) {
        if (group > k) continue;
        for (int64_t n : {1, 31, 32, 65}) {
          const QuantFormat f = with_group(format, group == 0 ? k : group);
          for (DType type : kDTypes) test_wquant_case(random, f, n, k, type);
        }
      }
    }
  }
  test_wquant_case(random, {8, 1040, Scheme::kInt8Dynamic}, 65, 1040, DType::kFloat32);
  // Large enough for huge pages.
  test_wquant_case(random, {8, 64, Scheme::kSymmetric}, 1000, 2113, DType::kBFloat16);
}

}  // namespace

int main(int count, char** arguments) {
  uint64_t seed = std::random_device{}();
  if (count == 3 && std::string(arguments[1]) == "--seed") {
    seed = std::strtoull(arguments[2], nullptr, 10);
  } else if (count != 1) {
    std::fprintf(stderr, "test_wquant_cpu [--seed N]\n");
    return 2;
  }
  std::printf("test_wquant_cpu: seed %llu\n", static_cast<unsigned long long>(seed));
  Random random(seed);
  test_conversions();
  test_books(random);
  test_wquant(random);
  std::printf("test_wquant_cpu: %d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
