// Vectors of floats, and their conversions from and to the three dtypes, for each instruction set.
//
// `Floats` is a compiler vector, so that + - * / and comparisons work on it everywhere; each namespace adds
//   load(const T*) -> Floats, store(Floats, T*), rounded<T>(Floats): the value rounded to T.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#include "dense_isa.h"

#if HETIS_X86
#include <immintrin.h>
#endif

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own headers, once per intrinsic
#pragma GCC diagnostic ignored "-Wpsabi"                // all functions that pass vectors are inlined
#endif

namespace hetis {

using c10::BFloat16;
using c10::Half;

namespace portable {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

template <class T>
HETIS_INLINE Floats load(const T* x) {
  return Floats{static_cast<float>(x[0]), static_cast<float>(x[1]), static_cast<float>(x[2]), static_cast<float>(x[3])};
}
template <class T>
HETIS_INLINE void store(Floats x, T* out) {
  for (int i = 0; i < 4; ++i) out[i] = static_cast<T>(x[i]);
}
template <class T>
HETIS_INLINE Floats rounded(Floats x) {
  T narrow[4];
  store(x, narrow);
  return load(narrow);
}

}  // namespace portable

#if HETIS_X86

HETIS_TARGET_BEGIN(HETIS_AVX2)
namespace avx2 {

typedef __m256 Floats;
typedef int32_t Ints __attribute__((vector_size(32)));

// Four values, for the pieces of `linear`.
HETIS_INLINE __m128i load_four_halves(const void* x) { return _mm_loadl_epi64(static_cast<const __m128i*>(x)); }
HETIS_INLINE __m128 load_four(const float* x) { return _mm_loadu_ps(x); }
HETIS_INLINE __m128 load_four(const BFloat16* x) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(load_four_halves(x)), 16));
}
HETIS_INLINE __m128 load_four(const Half* x) { return _mm_cvtph_ps(load_four_halves(x)); }

HETIS_INLINE __m128i load_halves(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
HETIS_INLINE Floats load(const float* x) { return _mm256_loadu_ps(x); }
HETIS_INLINE Floats load(const BFloat16* x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(x)), 16));
}
HETIS_INLINE Floats load(const Half* x) { return _mm256_cvtph_ps(load_halves(x)); }

// Rounds to nearest even, as torch does; any NaN becomes a quiet NaN (the carry could turn it into zero or infinity).
HETIS_INLINE __m256i bfloat16_bits(Floats x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
HETIS_INLINE __m128i halves_of(Floats x, const Half*) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
HETIS_INLINE __m128i halves_of(Floats x, const BFloat16*) {
  const __m256i bits = bfloat16_bits(x);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
HETIS_INLINE void store(Floats x, float* out) { _mm256_storeu_ps(out, x); }
template <class T>
HETIS_INLINE void store(Floats x, T* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), halves_of(x, out));
}
template <class T>
HETIS_INLINE Floats rounded(Floats x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  alignas(16) T narrow[8];
  store(x, narrow);
  return load(narrow);
}

}  // namespace avx2
HETIS_TARGET_END

HETIS_TARGET_BEGIN(HETIS_AVX512)
namespace avx512 {

typedef __m512 Floats;
typedef int32_t Ints __attribute__((vector_size(64)));

HETIS_INLINE __m256i load_halves(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
HETIS_INLINE Floats widened(__m256i halves, const BFloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
HETIS_INLINE Floats widened(__m256i halves, const Half*) { return _mm512_cvtph_ps(halves); }
HETIS_INLINE Floats load(const float* x) { return _mm512_loadu_ps(x); }
template <class T>
HETIS_INLINE Floats load(const T* x) {
  return widened(load_halves(x), x);
}

// Four values in each quarter of the vector: one broadcast, at most one conversion, no shuffle.
HETIS_INLINE Floats load_four_everywhere(const float* x) { return _mm512_broadcast_f32x4(_mm_loadu_ps(x)); }
template <class T>
HETIS_INLINE Floats load_four_everywhere(const T* x) {
  return widened(_mm256_broadcastq_epi64(avx2::load_four_halves(x)), x);
}

HETIS_INLINE __m256i halves_of(Floats x, const Half*) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
HETIS_INLINE __m256i halves_of(Floats x, const BFloat16*) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
HETIS_INLINE void store(Floats x, float* out) { _mm512_storeu_ps(out, x); }
template <class T>
HETIS_INLINE void store(Floats x, T* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves_of(x, out));
}
template <class T>
HETIS_INLINE Floats rounded(Floats x) {
  if constexpr (sizeof(T) == sizeof(float))
    return x;
  else
    return widened(halves_of(x, static_cast<const T*>(nullptr)), static_cast<const T*>(nullptr));
}

}  // namespace avx512
HETIS_TARGET_END

// bfloat16 only, rounded by one instruction instead of seven (denormals become zero: far below any activation).
HETIS_TARGET_BEGIN(HETIS_AVX512_BF16)
namespace avx512_bf16 {

using avx512::Floats;
using avx512::Ints;
using avx512::load;

HETIS_INLINE __m256i halves_of(Floats x) { return (__m256i)_mm512_cvtneps_pbh(x); }
HETIS_INLINE void store(Floats x, BFloat16* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves_of(x));
}
template <class T>
HETIS_INLINE Floats rounded(Floats x) {
  return avx512::widened(halves_of(x), static_cast<const T*>(nullptr));
}

}  // namespace avx512_bf16
HETIS_TARGET_END

#endif  // HETIS_X86

}  // namespace hetis
