// Instruction sets of the dense operations: chosen once at run time, compiled side by side in one file.
//
// HETIS_TARGET_BEGIN(...) ... HETIS_TARGET_END compiles the code between them for one instruction set, so that no file
// needs flags of its own. Templates and inline functions that intrinsics are inlined into must be between them;
// standard headers must not be (the linker might keep their AVX-512 copy for all callers).
#pragma once

#if defined(__x86_64__)
#define HETIS_X86 1
#else
#define HETIS_X86 0
#endif

#define HETIS_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define HETIS_TARGET_BEGIN(features) \
  HETIS_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define HETIS_TARGET_END _Pragma("clang attribute pop")
#else
#define HETIS_TARGET_BEGIN(features) _Pragma("GCC push_options") HETIS_PRAGMA(GCC target(features))
#define HETIS_TARGET_END _Pragma("GCC pop_options")
#endif

#define HETIS_AVX2 "avx2,fma,f16c"
#define HETIS_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define HETIS_AVX512_BF16 "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"

#define HETIS_INLINE inline __attribute__((always_inline))

namespace hetis {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// Instruction set of this processor, or the limit of `limit_dense_isa` if that is lower.
Isa dense_isa();

// Whether the processor has matrix units for bfloat16 (AMX), which only oneDNN uses here.
bool has_amx();

}  // namespace hetis
