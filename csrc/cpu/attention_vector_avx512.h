// 16 floats, AVX-512. Included inside a namespace and a target region; see attention_vector_avx2.h for what each does.

using Vector = __m512;
constexpr int kWidth = 16;
constexpr int kTileRows = 6, kTileColumns = 4;

HETIS_INLINE Vector zero() { return _mm512_setzero_ps(); }
HETIS_INLINE Vector set(float x) { return _mm512_set1_ps(x); }
HETIS_INLINE Vector load(const float* x) { return _mm512_loadu_ps(x); }
HETIS_INLINE void store(float* x, Vector v) { _mm512_storeu_ps(x, v); }
HETIS_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
HETIS_INLINE Vector largest_of(Vector a, Vector b) { return _mm512_max_ps(a, b); }
HETIS_INLINE bool any_above(Vector v, float limit) { return _mm512_cmp_ps_mask(v, set(limit), _CMP_GT_OQ) != 0; }
HETIS_INLINE float largest_lane(Vector v) { return _mm512_reduce_max_ps(v); }
HETIS_INLINE float sum_of_lanes(Vector v) { return _mm512_reduce_add_ps(v); }

HETIS_INLINE Vector widen(const float* x) { return load(x); }
HETIS_INLINE Vector widen(const Bf16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
HETIS_INLINE Vector widen(const Half16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

HETIS_INLINE void narrow(float* x, Vector v) { store(x, v); }
HETIS_INLINE void narrow(Half16* x, Vector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
HETIS_INLINE void narrow(Bf16* x, Vector v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtepi32_epi16(kept));
}

// 2^x for x <= 0. The polynomial is exact at 0, so that a state is merged with itself or with nothing unchanged.
HETIS_INLINE Vector exp2_of(Vector x) {
  x = _mm512_max_ps(set(-200.0f), x);  // not -inf, which has no fraction; the second operand survives if it is NaN
  const Vector whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector part = _mm512_sub_ps(x, whole);
  Vector y = set(kExp2[6]);
  for (int i = 5; i >= 0; --i) y = multiply_add(y, part, set(kExp2[i]));
  return _mm512_scalef_ps(y, whole);
}

// Keeps the lanes [from, to) and puts -inf into the others.
HETIS_INLINE Vector hide_outside(Vector v, int from, int to) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 inside =
      _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(from)) & _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(to));
  return _mm512_mask_mov_ps(set(-__builtin_inff()), inside, v);
}

// a + b, c + d, ... folded pairwise: each quarter of the result holds one sum of each operand's quarter.
HETIS_INLINE Vector fold_four(Vector a, Vector b, Vector c, Vector d) {
  const Vector ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vector cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

// Lane i of the result is the sum of the lanes of v[i].
HETIS_INLINE Vector sums_of(const Vector (&v)[16]) {
  const Vector a = fold_four(v[0], v[1], v[2], v[3]), b = fold_four(v[4], v[5], v[6], v[7]);
  const Vector c = fold_four(v[8], v[9], v[10], v[11]), d = fold_four(v[12], v[13], v[14], v[15]);
  const Vector ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const Vector cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

// Rows become columns.
HETIS_INLINE void transpose(Vector (&v)[16]) {
  Vector t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    v[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    v[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    v[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vector low = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x44), high = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xee);
    const Vector low2 = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x44);
    const Vector high2 = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xee);
    t[i] = _mm512_shuffle_f32x4(low, low2, 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(low, low2, 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(high, high2, 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}
