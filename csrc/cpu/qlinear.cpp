// SPDX-License-Identifier: Apache-2.0
// The rule that chooses the path of a product, in one place.
//
//     path          activations                   weights reach the multiplier as
//     scalar        fp32 (a8: int8)               fp32
//     avx2, avx512  int16 pairs (a8: int8)        int16 pairs, bytes for a8
//     vnni          two int8 planes or int16      bytes where they lie, or int16 pairs
//                   (a8: int8)                    bytes
//     amx bf16      one or two bf16 terms         bf16 integers, one or two terms for code books
//     amx int8      int8                          int8
//
// AMX multiplies 16 x 16 x 64 bytes in 16 cycles, eight times the rate of vpdpbusd, but its operand
// B has to be unpacked to a panel first and its sums leave through memory. For few rows the packed
// bytes are the bound and the VNNI kernels, which take codes where they lie, read them at the
// machine's rate.
#include "cpu/qlinear.h"

#include <cstdio>

#include "cpu/qlinear_a8.h"
#include "cpu/qlinear_amx.h"
#include "cpu/qlinear_layout.h"

namespace kvopt::cpu {
namespace {

// The fewest rows of x for which tiles win, as measured on one core of a Sapphire Rapids class
// processor with weights from memory.
int64_t amx_rows(const QLinearParams& p) { return is_a8(p) ? 9 : p.format.bits == 8 ? 13 : 8; }

struct Path {
  const QLinearKernels* kernels;
  const char* name;
  const char* reason;
};

Path choose(const QLinearParams& p, Isa isa) {
  const bool a8 = is_a8(p);
#if defined(__x86_64__)
  if (isa == Isa::kAmx) {
    if (p.m >= amx_rows(p)) {
      if (a8 && a8_is_whole(p)) {
        return {&kAmxInt8Whole, "amx int8 whole rows",
                "one scale a row and 8 bits: packed bytes are tile operands as they lie"};
      }
      if (a8) return {&kAmxInt8, "amx int8", "int8 activations, enough rows to unpack weights for"};
      return {&kAmxBf16, "amx bf16", "16-bit activations, enough rows to unpack weights for"};
    }
    isa = Isa::kVnni;
  }
  switch (isa) {
    case Isa::kAvx2:
      if (a8) return {&kA8Avx2, "avx2 int8", "int8 activations"};
      return {&kQLinearAvx2, "avx2", "int16 pairs"};
    case Isa::kAvx512:
      if (a8) return {&kA8Avx512, "avx512 int8", "int8 activations"};
      return {&kQLinearAvx512, "avx512", "int16 pairs"};
    case Isa::kVnni:
      if (a8) return {&kA8Vnni, "vnni int8", "int8 activations by vpdpbusd"};
      if (qlinear_layout(p, isa).planes) {
        return {&kQLinearVnni, "vnni", "few rows: two int8 planes by vpdpbusd"};
      }
      return {&kQLinearVnni, "vnni", "int16 pairs by vpdpwssd"};
    case Isa::kScalar:
    case Isa::kAmx:
      break;
  }
#endif
  (void)isa;
  if (a8) return {&kA8Scalar, "scalar int8", "no vector instructions chosen"};
  return {&kQLinearScalar, "scalar", "no vector instructions chosen"};
}

const char* scheme_name(Scheme scheme) {
  switch (scheme) {
    case Scheme::kAsymmetric:
      return "asymmetric";
    case Scheme::kSymmetric:
      return "symmetric";
    case Scheme::kNf4:
      return "nf4";
    case Scheme::kFp4:
      return "fp4";
    case Scheme::kInt8Dynamic:
      return "int8 dynamic";
  }
  return "unknown";
}

}  // namespace

const QLinearKernels& qlinear_kernels(const QLinearParams& p, Isa isa) {
  return *choose(p, isa).kernels;
}

int qlinear_explain(const QLinearParams& p, Isa isa, char* out, int size) {
  const Path path = choose(p, isa);
  return std::snprintf(out, static_cast<size_t>(size),
                       "%s: %s (isa %s, %s %d bits, group %d, %d-bit activations, M=%lld N=%lld "
                       "K=%lld; tiles from M=%lld)",
                       path.name, path.reason, isa_name(isa), scheme_name(p.format.scheme),
                       p.format.bits, p.format.group_size, is_a8(p) ? 8 : 16,
                       static_cast<long long>(p.m), static_cast<long long>(p.n),
                       static_cast<long long>(p.k), static_cast<long long>(amx_rows(p)));
}

}  // namespace kvopt::cpu
