// 8 floats, AVX2 with FMA and F16C. Included inside a namespace and a target region.

using Vector = __m256;
constexpr int kWidth = 8;
// Accumulators of the matrix tile of prefill: they and what they are multiplied by must fit the registers.
constexpr int kTileRows = 6, kTileColumns = 2;

HETIS_INLINE Vector zero() { return _mm256_setzero_ps(); }
HETIS_INLINE Vector set(float x) { return _mm256_set1_ps(x); }
HETIS_INLINE Vector load(const float* x) { return _mm256_loadu_ps(x); }
HETIS_INLINE void store(float* x, Vector v) { _mm256_storeu_ps(x, v); }
HETIS_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
HETIS_INLINE Vector largest_of(Vector a, Vector b) { return _mm256_max_ps(a, b); }

HETIS_INLINE bool any_above(Vector v, float limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(v, set(limit), _CMP_GT_OQ)) != 0;
}
HETIS_INLINE float largest_lane(Vector v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
HETIS_INLINE float sum_of_lanes(Vector v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

// Reads kWidth values of the cache's type.
HETIS_INLINE Vector widen(const float* x) { return load(x); }
HETIS_INLINE Vector widen(const Bf16* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
HETIS_INLINE Vector widen(const Half16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

// Writes kWidth values, rounded to nearest even as torch does; NaN stays NaN.
HETIS_INLINE void narrow(float* x, Vector v) { store(x, v); }
HETIS_INLINE void narrow(Half16* x, Vector v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
HETIS_INLINE void narrow(Bf16* x, Vector v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), packed);
}

// 2^x for x <= 0. The polynomial is exact at 0, so that a state is merged with itself or with nothing unchanged.
HETIS_INLINE Vector exp2_of(Vector x) {
  const Vector is_zero = _mm256_cmp_ps(x, set(-126.0f), _CMP_LT_OQ);  // subnormal results are 0
  const Vector whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector part = _mm256_sub_ps(x, whole);
  Vector y = set(kExp2[6]);
  for (int i = 5; i >= 0; --i) y = multiply_add(y, part, set(kExp2[i]));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
  return _mm256_andnot_ps(is_zero, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power)));
}

// Keeps the lanes [from, to) and puts -inf into the others.
HETIS_INLINE Vector hide_outside(Vector v, int from, int to) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i inside = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(from), lane),
                                             _mm256_cmpgt_epi32(_mm256_set1_epi32(to), lane));
  return _mm256_blendv_ps(set(-__builtin_inff()), v, _mm256_castsi256_ps(inside));
}

// Each half of the result holds the sums of that half of a, b, c and d.
HETIS_INLINE Vector fold_four(Vector a, Vector b, Vector c, Vector d) {
  return _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
}

// Lane i of the result is the sum of the lanes of v[i].
HETIS_INLINE Vector sums_of(const Vector (&v)[8]) {
  const Vector a = fold_four(v[0], v[1], v[2], v[3]), b = fold_four(v[4], v[5], v[6], v[7]);
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// Rows become columns.
HETIS_INLINE void transpose(Vector (&v)[8]) {
  Vector t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    v[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    v[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    v[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}
