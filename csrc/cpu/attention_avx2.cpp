// Attention for processors with AVX2, FMA and F16C.

#include <cstring>

#include "attention_kernels.h"

#if HETIS_X86
#include <immintrin.h>

namespace hetis {
namespace {

HETIS_TARGET_BEGIN(HETIS_AVX2)
#include "attention_vector_avx2.h"
#include "attention_dot.h"
#include "attention_ahead.h"
#include "attention_decode_kernel.h"
#include "attention_prefill_kernel.h"

// Decode on a bfloat16 cache. 16 values are widened as 8 pairs: the upper half of a pair is a float once the lower half
// is masked out, and a shift brings up the lower half. That takes half the instructions of widening value by value, but
// leaves queries and sums in the order even, odd.
struct EvenOddDot : WideDot<Bf16> {
  static constexpr int kStep = 2 * kWidth, kParts = 2;

  static HETIS_INLINE Vector load_part(const Bf16* x, int /* left */, int part) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_castsi256_ps(part == 0 ? _mm256_slli_epi32(pairs, 16) : _mm256_and_si256(pairs, upper));
  }
  static HETIS_INLINE void pack_query(const Bf16* x, float* packed) {
    for (int part = 0; part < kParts; ++part) store(packed + part * kWidth, load_part(x, kStep, part));
  }
  template <int kColumns>
  static HETIS_INLINE void load_values(const char* const* rows, int /* rows left */, int column,
                                       Vector (&value)[kColumns]) {
    const auto* row = reinterpret_cast<const Bf16*>(rows[0]) + column;
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) value[c] = load_part(row + c / kParts * kStep, kStep, c % kParts);
  }
  static HETIS_INLINE void order_columns(float* sums, int D) {
    for (int d = 0; d < D; d += kStep) {
      const Vector even = load(sums + d), odd = load(sums + d + kWidth);
      const Vector first = _mm256_unpacklo_ps(even, odd), second = _mm256_unpackhi_ps(even, odd);
      store(sums + d, _mm256_permute2f128_ps(first, second, 0x20));
      store(sums + d + kWidth, _mm256_permute2f128_ps(first, second, 0x31));
    }
  }
};
HETIS_TARGET_END

}  // namespace

const AttentionKernels kAvx2Attention[3] = {attention_table<WideDot<float>>(),
                                            attention_table<EvenOddDot, WideDot<Bf16>>(),
                                            attention_table<WideDot<Half16>>()};

}  // namespace hetis
#endif
