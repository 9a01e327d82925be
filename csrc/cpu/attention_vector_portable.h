// 4 floats in the vector extension of GCC and Clang: SSE2, NEON or whatever the compiler finds. Included inside a
// namespace.

typedef float Vector __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int kTileRows = 4, kTileColumns = 2;

HETIS_INLINE Vector zero() { return Vector{0, 0, 0, 0}; }
HETIS_INLINE Vector set(float x) { return Vector{x, x, x, x}; }
HETIS_INLINE Vector load(const float* x) {
  Vector v;
  memcpy(&v, x, sizeof v);
  return v;
}
HETIS_INLINE void store(float* x, Vector v) { memcpy(x, &v, sizeof v); }
HETIS_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) { return a * b + sum; }
HETIS_INLINE Vector largest_of(Vector a, Vector b) { return a > b ? a : b; }
HETIS_INLINE bool any_above(Vector v, float limit) {
  return v[0] > limit || v[1] > limit || v[2] > limit || v[3] > limit;
}
HETIS_INLINE float largest_lane(Vector v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
HETIS_INLINE float sum_of_lanes(Vector v) { return (v[0] + v[1]) + (v[2] + v[3]); }

HETIS_INLINE float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
HETIS_INLINE uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

HETIS_INLINE float widen_one(Bf16 x) { return float_of_bits(uint32_t{x.bits} << 16); }
// Moving exponent and fraction into place leaves a float that is 2^112 too small; infinity and NaN need their exponent.
HETIS_INLINE float widen_one(Half16 x) {
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13, sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t scaled = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
  return float_of_bits(sign | ((x.bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : scaled));
}
HETIS_INLINE Bf16 narrow_one(float x, Bf16) {
  const uint32_t bits = bits_of_float(x);
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
// Scaling down by 2^112 rounds what becomes subnormal; for the rest, round to nearest even at bit 13.
HETIS_INLINE Half16 narrow_one(float x, Half16) {
  const uint32_t bits = bits_of_float(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  // below 2^-14, adding 0.5 leaves the subnormal, rounded, in the lowest bits of the sum
  if (magnitude < 0x38800000u)
    return {static_cast<uint16_t>(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u))};
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}

HETIS_INLINE Vector widen(const float* x) { return load(x); }
template <class T>
HETIS_INLINE Vector widen(const T* x) {
  return Vector{widen_one(x[0]), widen_one(x[1]), widen_one(x[2]), widen_one(x[3])};
}
HETIS_INLINE void narrow(float* x, Vector v) { store(x, v); }
template <class T>
HETIS_INLINE void narrow(T* x, Vector v) {
  for (int i = 0; i < 4; ++i) x[i] = narrow_one(v[i], T{});
}

// 2^x for x <= 0. The polynomial is exact at 0, so that a state is merged with itself or with nothing unchanged.
HETIS_INLINE Vector exp2_of(Vector x) {
  typedef int32_t Integers __attribute__((vector_size(16)));
  const Integers is_normal = x >= set(-126.0f);
  const Vector safe = is_normal | (x != x) ? x : zero();
  const Integers whole = __builtin_convertvector(safe - set(0.5f), Integers);  // cuts towards 0, so: to nearest
  const Vector part = safe - __builtin_convertvector(whole, Vector);
  Vector y = set(kExp2[6]);
  for (int i = 5; i >= 0; --i) y = multiply_add(y, part, set(kExp2[i]));
  const Vector power = (Vector)((whole + 127) << 23);
  return x < set(-126.0f) ? zero() : y * power;
}

HETIS_INLINE Vector hide_outside(Vector v, int from, int to) {
  for (int i = 0; i < 4; ++i)
    if (i < from || i >= to) v[i] = -__builtin_inff();
  return v;
}

HETIS_INLINE Vector sums_of(const Vector (&v)[4]) {
  return Vector{sum_of_lanes(v[0]), sum_of_lanes(v[1]), sum_of_lanes(v[2]), sum_of_lanes(v[3])};
}

HETIS_INLINE void transpose(Vector (&v)[4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = x;
    }
}
