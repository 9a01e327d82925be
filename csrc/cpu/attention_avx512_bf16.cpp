// Attention on a bfloat16 cache for processors that multiply pairs of bfloat16 (AVX512_BF16).

#include <cstring>

#include "attention_kernels.h"

#if HETIS_X86
#include <immintrin.h>

namespace hetis {
namespace {

HETIS_TARGET_BEGIN(HETIS_AVX512_BF16)
#include "attention_vector_avx512.h"
#include "attention_decode_kernel.h"
#include "attention_prefill_kernel.h"

// As WideDot (attention_dot.h). The products of pairs are exact and added to a float sum; scores differ from those in
// float by the order of additions only. Prefill rounds its softmax weights to bfloat16, which decode does not.
struct PairDot {
  using Element = Bf16;
  using Query = Bf16;
  using Packed = Bf16;
  static constexpr int kStep = 2 * kWidth, kPair = 2;

  // Of 16 values left the upper half is zero, whatever follows the row.
  static HETIS_INLINE Vector load_row(const Bf16* x, int left) {
    if (left >= kStep) return load_packed(x);
    return _mm512_castsi512_ps(_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
  }
  static HETIS_INLINE Vector load_query(const Bf16* x, int left) { return load_row(x, left); }
  static HETIS_INLINE Vector load_packed(const Bf16* x) { return _mm512_loadu_ps(x); }
  static HETIS_INLINE void store_packed(Bf16* x, Vector v) { _mm512_storeu_ps(x, v); }
  static HETIS_INLINE Vector broadcast(const Bf16* x) {
    float pair;
    memcpy(&pair, x, sizeof pair);
    return set(pair);
  }
  static HETIS_INLINE Vector add_product(Vector a, Vector b, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  static HETIS_INLINE void pack_query(const Bf16* x, Bf16* packed) { memcpy(packed, x, kWidth * sizeof(Bf16)); }
  static HETIS_INLINE void pack_weights(Vector x, Bf16* packed) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), (__m256i)_mm512_cvtneps_pbh(x));
  }
  static HETIS_INLINE void pack_values(const Bf16* const* rows, int column, Bf16* packed) {
    const __m512i low = widened(rows[0] + column), high = widened(rows[1] + column);
    _mm512_storeu_si512(packed, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static HETIS_INLINE __m512i widened(const Bf16* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
};
HETIS_TARGET_END

}  // namespace

const AttentionKernels kAvx512Bf16Attention = attention_table<PairDot>();

}  // namespace hetis
#endif
