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

// 8 outputs. Weights narrower than float are widened as they are loaded: of a pair of bfloat16, the first input is
// shifted up for part 0, and the second one is where it must be for part 1.
template <class T>
struct WideLanes {
  using Element = T;
  using Vector = Floats;
  static constexpr int kWidth = 8, kParts = kInputs<T>, kMaxSums = 12;
  static constexpr int kWholeSums = 8;     // with 4 vectors of weights: 3 tokens x 4 are too many for 16 registers
  static constexpr int kStripSteps = 128;  // 5 to 10 % faster than 512 for 4 to 6 tokens, two tiles

  static HETIS_INLINE Vector zero() { return _mm256_setzero_ps(); }
  static HETIS_INLINE Vector load(const T* group, int v, int part) {
    if constexpr (kParts == 1) return floats(group + v * kWidth);
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 2 * v * kWidth));
    return _mm256_castsi256_ps(part == 0 ? _mm256_slli_epi32(pairs, 16)
                                         : _mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
  }
  static HETIS_INLINE Vector floats(const T* x) { return avx2::load(x); }
  static HETIS_INLINE Vector kept(const float* sums) { return _mm256_load_ps(sums); }
  static HETIS_INLINE void keep(Vector sum, float* sums) { _mm256_store_ps(sums, sum); }
  static HETIS_INLINE Vector broadcast(const float* unit) { return _mm256_broadcast_ss(unit); }
  static HETIS_INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static HETIS_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
  static HETIS_INLINE void round(Vector x, T* out) { store(x, out); }
  static HETIS_INLINE __m128 units(const T* x) { return load_four(x); }
};

}  // namespace avx2
HETIS_TARGET_END

HETIS_TARGET_BEGIN(HETIS_AVX512)
namespace avx512 {

#include "dense_linear_tile.h"

// 16 outputs.
template <class T>
struct WideLanes {
  using Element = T;
  using Vector = Floats;
  static constexpr int kWidth = 16, kParts = kInputs<T>, kMaxSums = 24, kWholeSums = 24;
  static constexpr int kStripSteps = 512;  // 128: 2 % slower for 16 and for many tokens

  static HETIS_INLINE Vector zero() { return _mm512_setzero_ps(); }
  static HETIS_INLINE Vector load(const T* group, int v, int part) {
    if constexpr (kParts == 1) return floats(group + v * kWidth);
    const __m512i pairs = _mm512_loadu_si512(group + 2 * v * kWidth);
    return _mm512_castsi512_ps(part == 0 ? _mm512_slli_epi32(pairs, 16)
                                         : _mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
  }
  static HETIS_INLINE Vector floats(const T* x) { return avx512::load(x); }
  static HETIS_INLINE Vector kept(const float* sums) { return _mm512_load_ps(sums); }
  static HETIS_INLINE void keep(Vector sum, float* sums) { _mm512_store_ps(sums, sum); }
  static HETIS_INLINE Vector broadcast(const float* unit) { return _mm512_set1_ps(*unit); }
  static HETIS_INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static HETIS_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
  static HETIS_INLINE void round(Vector x, T* out) { store(x, out); }
  static HETIS_INLINE __m128 units(const T* x) { return avx2::load_four(x); }
};

}  // namespace avx512
HETIS_TARGET_END

HETIS_TARGET_BEGIN(HETIS_AVX512_BF16)
namespace avx512_bf16 {

#include "dense_linear_tile.h"

// 16 outputs; a unit of x is a pair of inputs, and one instruction adds both products.
struct PairLanes : avx512::WideLanes<BFloat16> {
  static constexpr int kParts = 1;

  static HETIS_INLINE Vector load(const BFloat16* group, int v, int /*part*/) {
    return _mm512_castsi512_ps(_mm512_loadu_si512(group + 2 * v * kWidth));
  }
  static HETIS_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  static HETIS_INLINE void round(Vector x, BFloat16* out) { store(x, out); }
  static HETIS_INLINE __m128 units(const BFloat16* x) { return _mm_castsi128_ps(avx2::load_halves(x)); }
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
