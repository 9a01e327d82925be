// Attention on a bfloat16 cache for processors that multiply pairs of bfloat16 (AVX512_BF16).

#include <cstring>

#include "attention_kernels.h"

#if HETIS_X86
#include <immintrin.h>

namespace hetis {
namespace {

HETIS_TARGET_BEGIN(HETIS_AVX512_BF16)
#include "attention_vector_avx512.h"
#include "attention_ahead.h"
#include "attention_decode_kernel.h"
#include "attention_prefill_kernel.h"

// As WideDot (attention_dot.h). The products of pairs are exact and added to a float sum; softmax weights are rounded
// to bfloat16, as on tensor cores, the weights' sum is not.
struct PairDot {
  using Element = Bf16;
  using Query = Bf16;
  using Weight = Bf16;
  using Packed = Bf16;
  static constexpr int kStep = 2 * kWidth, kPair = 2, kParts = 1, kRows = 2, kValueTokens = 2;

  static HETIS_INLINE __m256i load_half(const Bf16* x) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  }
  static HETIS_INLINE __m512i load_pairs(const void* x) { return _mm512_loadu_si512(x); }
  static HETIS_INLINE Vector add_product(Vector a, Vector b, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  static HETIS_INLINE void pack_query(const Bf16* x, Bf16* packed) { memcpy(packed, x, kWidth * sizeof(Bf16)); }
  static HETIS_INLINE Vector load_query(const Bf16* x, int left) { return load_row(x, left); }
  // Of 16 values left the upper half is zero, whatever follows the row.
  static HETIS_INLINE Vector load_row(const Bf16* x, int left) {
    return _mm512_castsi512_ps(left >= kStep ? load_pairs(x) : _mm512_zextsi256_si512(load_half(x)));
  }
  // 16 values of each of two rows.
  static HETIS_INLINE Vector load_pair(const void* a, const void* b) {
    const __m256i low = load_half(static_cast<const Bf16*>(a)), high = load_half(static_cast<const Bf16*>(b));
    return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
  // The sum of each half: of the first vectors v[0] to v[3], lower halves first, then of v[4] to v[7].
  static HETIS_INLINE Vector sums_of_halves(const Vector* v) {
    const Vector a = fold_four(v[0], v[1], v[2], v[3]), b = fold_four(v[4], v[5], v[6], v[7]);
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }

  static HETIS_INLINE void store_halves(float* low, float* high, Vector v) {
    _mm256_storeu_ps(low, _mm512_castps512_ps256(v));
    _mm256_storeu_ps(high, _mm512_extractf32x8_ps(v, 1));
  }

  static HETIS_INLINE void pack_weights(Vector x, Bf16* packed) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), (__m256i)_mm512_cvtneps_pbh(x));
  }
  static HETIS_INLINE Vector broadcast_weight(const Bf16* x) { return broadcast(x); }
  // Pairs of two rows. Unpacking leaves the quarters of 32 columns out of order, see order_columns. A last odd row is
  // paired with itself and the weight 0.
  template <int kColumns>
  static HETIS_INLINE void load_values(const char* const* rows, int left, int column, Vector (&value)[kColumns]) {
    const auto* a = reinterpret_cast<const Bf16*>(rows[0]) + column;
    const auto* b = reinterpret_cast<const Bf16*>(rows[left > 1 ? 1 : 0]) + column;
    if constexpr (kColumns == 1) {
      value[0] = _mm512_castsi512_ps(interleave(a, b));
    } else {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; c += 2) {
        const __m512i first = load_pairs(a + c * kWidth), second = load_pairs(b + c * kWidth);
        value[c] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(first, second));
        value[c + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(first, second));
      }
    }
  }
  static HETIS_INLINE Vector add_weighted(Vector a, Vector b, Vector sum) { return add_product(a, b, sum); }
  static HETIS_INLINE void order_columns(float* sums, int D) {
    const __m512i low_half = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high_half = _mm512_add_epi32(low_half, _mm512_set1_epi32(8));
    for (int d = 0; d + 2 * kWidth <= D; d += 2 * kWidth) {
      const Vector low = load(sums + d), high = load(sums + d + kWidth);
      store(sums + d, _mm512_permutex2var_ps(low, low_half, high));
      store(sums + d + kWidth, _mm512_permutex2var_ps(low, high_half, high));
    }
  }

  static HETIS_INLINE Vector load_packed(const Bf16* x) { return _mm512_castsi512_ps(load_pairs(x)); }
  static HETIS_INLINE void store_packed(Bf16* x, Vector v) { _mm512_storeu_ps(x, v); }
  static HETIS_INLINE Vector broadcast(const Bf16* x) {
    float pair;
    memcpy(&pair, x, sizeof pair);
    return set(pair);
  }
  static HETIS_INLINE void pack_values(const Bf16* const* rows, int column, Bf16* packed) {
    _mm512_storeu_si512(packed, interleave(rows[0] + column, rows[1] + column));
  }
  static HETIS_INLINE __m512i interleave(const Bf16* a, const Bf16* b) {
    const __m512i low = _mm512_cvtepu16_epi32(load_half(a)), high = _mm512_cvtepu16_epi32(load_half(b));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
};
HETIS_TARGET_END

}  // namespace

const AttentionKernels kAvx512Bf16Attention = attention_table<PairDot>();

}  // namespace hetis
#endif
