// Vectors of `linear` for each instruction set, and the choice of one.

#include <type_traits>

#include "dense_isa.h"
#include "dense_linear.h"
#include "dense_vector.h"

namespace hetis {

#if HETIS_X86

HETIS_TARGET_BEGIN(HETIS_AVX2)
namespace avx2 {

#include "dense_linear_tile.h"

// 8 floats: 2 tokens x 4 chains. Weights narrower than float are widened as they are loaded.
template <class T>
struct WideLanes {
  using Element = T;
  using Packed = float;
  using Vector = Floats;
  static constexpr int kTokens = 2, kStep = 4, kMinVectors = 1, kMaxVectors = 2;

  static HETIS_INLINE Vector zero() { return _mm256_setzero_ps(); }
  static HETIS_INLINE Vector load(const float* x) { return _mm256_loadu_ps(x); }
  static HETIS_INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static HETIS_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
  static HETIS_INLINE Vector twice(__m128 piece) { return _mm256_set_m128(piece, piece); }
  static HETIS_INLINE Vector broadcast(const T* piece) { return twice(load_four(piece)); }
  static HETIS_INLINE Vector broadcast_sums(const float* four) { return twice(load_four(four)); }
  static HETIS_INLINE Vector join(Vector a, Vector b, Vector c, Vector d) {
    const Vector ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const Vector cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  }
  static HETIS_INLINE void round(Vector x, T* out) { store(x, out); }
  static HETIS_INLINE void pack(const T* x, float* piece) { _mm_storeu_ps(piece, load_four(x)); }
  static HETIS_INLINE void pack_zeros(float* piece) { _mm_storeu_ps(piece, _mm_setzero_ps()); }
};

}  // namespace avx2
HETIS_TARGET_END

HETIS_TARGET_BEGIN(HETIS_AVX512)
namespace avx512 {

#include "dense_linear_tile.h"

// 16 floats: 4 tokens x 4 chains.
template <class T>
struct WideLanes {
  using Element = T;
  using Packed = float;
  using Vector = Floats;
  static constexpr int kTokens = 4, kStep = 4, kMinVectors = 2, kMaxVectors = 4;

  static HETIS_INLINE Vector zero() { return _mm512_setzero_ps(); }
  static HETIS_INLINE Vector load(const float* x) { return _mm512_loadu_ps(x); }
  static HETIS_INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static HETIS_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
  static HETIS_INLINE Vector broadcast(const T* piece) { return load_four_everywhere(piece); }
  static HETIS_INLINE Vector broadcast_sums(const float* four) { return load_four_everywhere(four); }
  static HETIS_INLINE Vector join(Vector a, Vector b, Vector c, Vector d) {
    const Vector ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const Vector cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }
  static HETIS_INLINE void round(Vector x, T* out) { store(x, out); }
  static HETIS_INLINE void pack(const T* x, float* piece) { _mm_storeu_ps(piece, avx2::load_four(x)); }
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
    return _mm512_castsi512_ps(_mm512_broadcast_i32x4(avx2::load_halves(piece)));
  }
  static HETIS_INLINE void round(Vector x, BFloat16* out) { store(x, out); }
  static HETIS_INLINE void pack(const BFloat16* x, BFloat16* piece) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(piece), avx2::load_halves(x));
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
