#include "dense_isa.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <string>

#include <torch/library.h>

#if HETIS_X86
#include <cpuid.h>
#endif

namespace hetis {
namespace {

const std::array<std::string, 4> kNames = {"portable", "avx2", "avx512", "avx512_bf16"};

Isa detect() {
#if HETIS_X86
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Isa::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::portable;
#endif
}

std::atomic<Isa> limit{Isa::avx512_bf16};

// For tests and benchmarks, which run every path that the machine has. Returns the instruction set in use.
std::string limit_dense_isa(const std::string& name) {
  const auto* found = std::find(kNames.begin(), kNames.end(), name);
  TORCH_CHECK_VALUE(found != kNames.end(), "unknown instruction set ", name,
                    "; choose portable, avx2, avx512 or avx512_bf16");
  limit = static_cast<Isa>(found - kNames.begin());
  return kNames[static_cast<size_t>(dense_isa())];
}

}  // namespace

Isa dense_isa() {
  static const Isa detected = detect();
  return std::min(detected, limit.load(std::memory_order_relaxed));
}

bool has_amx() {
#if HETIS_X86
  // CPUID leaf 7, EDX bit 22 (AMX-BF16); __builtin_cpu_supports knows it only in newer compilers
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 22 & 1) != 0;
#else
  return false;
#endif
}

}  // namespace hetis

TORCH_LIBRARY_FRAGMENT(hetis, m) { m.def("limit_dense_isa(str name) -> str", &hetis::limit_dense_isa); }
