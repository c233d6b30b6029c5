// Which instruction sets this processor and kernel run; asked of the library that needs none.
#pragma once
#include <cstdint>
#include <cstring>

#include "abi.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace trilevel {
namespace {

#if defined(__x86_64__)

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;
};

// what the kernel saves when it switches threads; registers it does not save cannot be used
inline uint64_t saved_registers() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

inline Features features() {
  const auto bit = [](uint32_t word, int index) { return (word >> index & 1) != 0; };
  Features found;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return found;
  const bool has_fma_f16c = bit(c, 12) && bit(c, 28) && bit(c, 29);
  const uint64_t saved = saved_registers();
  const auto saves = [&](uint64_t wanted) { return (saved & wanted) == wanted; };
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const uint32_t subleaves = a, extended = b, tiles = d;
  if (subleaves == 0 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) a = 0;
  found.avx2 = has_fma_f16c && bit(extended, 5) && saves(0x6);
  found.avx512 = found.avx2 && saves(0xe6) && bit(extended, 16) && bit(extended, 17) && bit(extended, 30) && bit(extended, 31);
  found.avx512_bf16 = found.avx512 && bit(a, 5);
  found.amx = found.avx512_bf16 && bit(tiles, 22) && bit(tiles, 24) && saves(0x60000);
  return found;
}

// Linux hands out the tile registers on request only, to a whole process
inline bool tiles_are_granted() {
#if defined(__linux__)
  constexpr long ARCH_GET_XCOMP_PERM = 0x1022, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  uint64_t granted = 0;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 &&
         syscall(SYS_arch_prctl, ARCH_GET_XCOMP_PERM, &granted) == 0 && (granted >> XFEATURE_XTILEDATA & 1) != 0;
#else
  return false;
#endif
}

inline bool runs(const char* isa) {
  const auto named = [&](const char* name) { return std::strcmp(isa, name) == 0; };
  const Features found = features();
  if (named("portable")) return true;
  if (named("avx2")) return found.avx2;
  if (named("avx512")) return found.avx512;
  if (named("avx512_bf16")) return found.avx512_bf16;
  return named("amx") && found.amx && tiles_are_granted();
}

#elif defined(__aarch64__)

// NEON belongs to the baseline
inline bool runs(const char* isa) { return std::strcmp(isa, "neon") == 0 || std::strcmp(isa, "portable") == 0; }

#else

inline bool runs(const char* isa) { return std::strcmp(isa, "portable") == 0; }

#endif

}  // namespace
}  // namespace trilevel

extern "C" int32_t trilevel_supports(const char* isa) { return isa && trilevel::runs(isa); }
