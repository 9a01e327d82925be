// Vectors of `linear` for each instruction set, and the choice among them.

#include "dense_linear.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "dense_isa.h"

#if HETIS_X86
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 finds it in its own headers, once per intrinsic
#endif
#endif

namespace hetis {

using c10::BFloat16;
using c10::Half;

#if HETIS_X86

HETIS_TARGET_BEGIN(HETIS_AVX2)
namespace avx2 {

HETIS_INLINE __m128i load_four_halves(const void* x) { return _mm_loadl_epi64(static_cast<const __m128i*>(x)); }
HETIS_INLINE __m128 widen(const float* x) { return _mm_loadu_ps(x); }
HETIS_INLINE __m128 widen(const BFloat16* x) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(load_four_halves(x)), 16));
}
HETIS_INLINE __m128 widen(const Half* x) { return _mm_cvtph_ps(load_four_halves(x)); }

// Round to nearest even, as torch does; a quiet NaN stays one (the carry would turn it into zero or infinity).
HETIS_INLINE __m256i bfloat16_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}

HETIS_INLINE void round_into(__m256 x, float* out) { _mm256_storeu_ps(out, x); }
HETIS_INLINE void round_into(__m256 x, BFloat16* out) {
  const __m256i bits = bfloat16_bits(x);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), halves);
}
HETIS_INLINE void round_into(__m256 x, Half* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#include "dense_linear_tile.h"

// 8 floats: 2 tokens x 4 chains. Weights narrower than float are widened piece by piece.
template <class T>
struct WideLanes {
  using Element = T;
  using Packed = float;
  using Vector = __m256;
  static constexpr int kTokens = 2, kStep = 4, kMaxVectors = 2;

  static HETIS_INLINE Vector zero() { return _mm256_setzero_ps(); }
  static HETIS_INLINE Vector load(const float* x) { return _mm256_loadu_ps(x); }
  static HETIS_INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static HETIS_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
  static HETIS_INLINE Vector broadcast(const T* piece) { return twice(widen(piece)); }
  static HETIS_INLINE Vector broadcast_sums(const float* four) { return twice(widen(four)); }
  static HETIS_INLINE Vector twice(__m128 piece) { return _mm256_set_m128(piece, piece); }
  static HETIS_INLINE Vector join(Vector a, Vector b, Vector c, Vector d) {
    const Vector ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const Vector cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  }
  static HETIS_INLINE void round(Vector x, T* out) { round_into(x, out); }
  static HETIS_INLINE void pack(const T* x, float* piece) { _mm_storeu_ps(piece, widen(x)); }
  static HETIS_INLINE void pack_zeros(float* piece) { _mm_storeu_ps(piece, _mm_setzero_ps()); }
};

}  // namespace avx2
HETIS_TARGET_END

HETIS_TARGET_BEGIN(HETIS_AVX512)
namespace avx512 {

HETIS_INLINE void round_into(__m512 x, float* out) { _mm512_storeu_ps(out, x); }
template <class T>
HETIS_INLINE void round_into(__m512 x, T* out) {
  avx2::round_into(_mm512_castps512_ps256(x), out);
  avx2::round_into(_mm512_extractf32x8_ps(x, 1), out + 8);
}

// Four 16-bit values in each quarter of the vector: one broadcast and one conversion, no shuffle.
HETIS_INLINE __m256i four_halves_everywhere(const void* x) {
  return _mm256_broadcastq_epi64(avx2::load_four_halves(x));
}
HETIS_INLINE __m512 broadcast_piece(const float* x) { return _mm512_broadcast_f32x4(_mm_loadu_ps(x)); }
HETIS_INLINE __m512 broadcast_piece(const BFloat16* x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(four_halves_everywhere(x)), 16));
}
HETIS_INLINE __m512 broadcast_piece(const Half* x) { return _mm512_cvtph_ps(four_halves_everywhere(x)); }

#include "dense_linear_tile.h"

// 16 floats: 4 tokens x 4 chains.
template <class T>
struct WideLanes {
  using Element = T;
  using Packed = float;
  using Vector = __m512;
  static constexpr int kTokens = 4, kStep = 4, kMaxVectors = 4;

  static HETIS_INLINE Vector zero() { return _mm512_setzero_ps(); }
  static HETIS_INLINE Vector load(const float* x) { return _mm512_loadu_ps(x); }
  static HETIS_INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static HETIS_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
  static HETIS_INLINE Vector broadcast(const T* piece) { return broadcast_piece(piece); }
  static HETIS_INLINE Vector broadcast_sums(const float* four) { return broadcast_piece(four); }
  static HETIS_INLINE Vector join(Vector a, Vector b, Vector c, Vector d) {
    const Vector ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const Vector cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }
  static HETIS_INLINE void round(Vector x, T* out) { round_into(x, out); }
  static HETIS_INLINE void pack(const T* x, float* piece) { _mm_storeu_ps(piece, avx2::widen(x)); }
  static HETIS_INLINE void pack_zeros(float* piece) { _mm_storeu_ps(piece, _mm_setzero_ps()); }
};

}  // namespace avx512
HETIS_TARGET_END

HETIS_TARGET_BEGIN(HETIS_AVX512_BF16)
namespace avx512_bf16 {

#include "dense_linear_tile.h"

// 16 sums of products of bfloat16 pairs: 4 tokens x 4 chains x 2 inputs.
struct PairLanes : avx512::WideLanes<BFloat16> {
  using Packed = BFloat16;
  static constexpr int kStep = 8;

  static HETIS_INLINE Vector load(const BFloat16* x) { return _mm512_castsi512_ps(_mm512_loadu_si512(x)); }
  static HETIS_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  static HETIS_INLINE Vector broadcast(const BFloat16* piece) {
    return avx512::broadcast_piece(reinterpret_cast<const float*>(piece));
  }
  static HETIS_INLINE void round(Vector x, BFloat16* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(x));
  }
  static HETIS_INLINE void pack(const BFloat16* x, BFloat16* piece) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(piece), _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  static HETIS_INLINE void pack_zeros(BFloat16* piece) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(piece), _mm_setzero_si128());
  }
};

}  // namespace avx512_bf16
HETIS_TARGET_END

template <class T>
LinearKernel<T> linear_kernel() {
  const Isa isa = dense_isa();
  if constexpr (std::is_same_v<T, BFloat16>)
    if (isa == Isa::avx512_bf16) return avx512_bf16::LinearTile<avx512_bf16::PairLanes>::kernel();
  if (isa >= Isa::avx512) return avx512::LinearTile<avx512::WideLanes<T>>::kernel();
  if (isa == Isa::avx2) return avx2::LinearTile<avx2::WideLanes<T>>::kernel();
  return {};
}

#else

template <class T>
LinearKernel<T> linear_kernel() {
  return {};
}

#endif

template LinearKernel<float> linear_kernel<float>();
template LinearKernel<BFloat16> linear_kernel<BFloat16>();
template LinearKernel<Half> linear_kernel<Half>();

}  // namespace hetis
