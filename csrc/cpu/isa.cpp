// SPDX-License-Identifier: Apache-2.0
// Detection asks three questions, and a "no" to any of them rules an instruction set out: does the
// processor have every extension that the kernel file is compiled with (cpuid leaves 1 and 7), may
// programs use xgetbv (OSXSAVE), and does the operating system save the registers that the set
// needs (XCR0: xmm and ymm for AVX2; also masks and both halves of the zmm registers for AVX-512;
// also tile configuration and tile data for AMX). Tile data is 8 KB of state a thread, so Linux
// hands it out to a process that asks (arch_prctl, once, valid for all threads) and may refuse.
#include "cpu/isa.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace kvopt::cpu {
namespace {

constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kVnni, Isa::kAmx};

#if defined(__x86_64__)

constexpr uint32_t bit(int position) { return 1u << position; }

// Extended control register 0. The instruction is spelt in assembly because its intrinsic needs a
// compiler flag.
uint64_t xcr0() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Asks the operating system for tile registers.
bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  uint32_t eax = 0;
  uint32_t ebx = 0;
  uint32_t ecx = 0;
  uint32_t edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Isa::kScalar;
  constexpr uint32_t kLeaf1 = bit(12) | bit(27) | bit(28) | bit(29);  // FMA, OSXSAVE, AVX, F16C
  if ((ecx & kLeaf1) != kLeaf1) return Isa::kScalar;
  const uint64_t saved = xcr0();
  if ((saved & 0x06) != 0x06) return Isa::kScalar;  // xmm, ymm
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Isa::kScalar;
  if ((ebx & bit(5)) == 0) return Isa::kScalar;                             // AVX2
  constexpr uint32_t kAvx512Parts = bit(16) | bit(17) | bit(30) | bit(31);  // F, DQ, BW, VL
  if ((saved & 0xe6) != 0xe6 || (ebx & kAvx512Parts) != kAvx512Parts) return Isa::kAvx2;
  if ((ecx & bit(11)) == 0) return Isa::kAvx512;               // AVX512_VNNI
  constexpr uint32_t kAmxParts = bit(22) | bit(24) | bit(25);  // BF16, TILE, INT8
  constexpr uint64_t kTileState = (1u << 17) | (1u << 18);
  if ((edx & kAmxParts) != kAmxParts || (saved & kTileState) != kTileState) return Isa::kVnni;
  return tiles_permitted() ? Isa::kAmx : Isa::kVnni;
}

#else

Isa detect() { return Isa::kScalar; }

#endif

// The names up to and including `last`, for messages.
std::string names_up_to(Isa last) {
  std::string names;
  for (Isa isa : kAllIsas) {
    if (isa > last) break;
    if (!names.empty()) names += ", ";
    names += isa_name(isa);
  }
  return names;
}

Isa select() {
  const char* wanted = std::getenv("KVOPT_ISA");
  const Isa best = best_isa();
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : kAllIsas) {
    if (std::string(wanted) != isa_name(isa)) continue;
    if (isa <= best) return isa;
    throw std::runtime_error("KVOPT_ISA=" + std::string(wanted) +
                             ": this processor (or its operating system) lacks it; it offers " +
                             names_up_to(best));
  }
  throw std::runtime_error("KVOPT_ISA=" + std::string(wanted) +
                           ": unknown instruction set; expected one of " + names_up_to(Isa::kAmx));
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa selected_isa() {
  static const Isa isa = select();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kVnni:
      return "vnni";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

}  // namespace kvopt::cpu
