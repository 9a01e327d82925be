// How rows of the cache are multiplied in float; PairDot (attention_avx512_bf16.cpp) is the same for pairs of bfloat16.
// Included inside a namespace and a target region, after the vectors.
//
// Decode scores read rows of K as they are, kStep values at a time, which become kParts vectors; load_row and load_part
// are told how many values of the row are left. Prefill packs its operands: kPair neighbours along the summed dimension
// lie side by side, so that one `broadcast` of kPair values, times kPair values of each of kWidth columns, adds to
// kWidth sums.

template <class T>
struct WideDot {
  using Element = T;
  using Query = float;   // of decode
  using Weight = float;  // of decode
  using Packed = float;  // of prefill
  static constexpr int kStep = kWidth, kPair = 1, kParts = 1, kRows = 1, kValueTokens = 1;

  // Decode: scores
  static HETIS_INLINE void pack_query(const T* x, float* packed) { store(packed, widen(x)); }
  static HETIS_INLINE Vector load_query(const float* x, int /* values left */) { return load(x); }
  static HETIS_INLINE Vector load_row(const T* x, int) { return widen(x); }
  static HETIS_INLINE Vector load_part(const T* x, int left, int /* part */) { return load_row(x, left); }
  static HETIS_INLINE Vector add_product(Vector a, Vector b, Vector sum) { return multiply_add(a, b, sum); }

  // Decode: weighted sums of V, kValueTokens rows at a time
  static HETIS_INLINE void pack_weights(Vector x, float* packed) { store(packed, x); }
  static HETIS_INLINE Vector broadcast_weight(const float* x) { return set(*x); }
  template <int kColumns>
  static HETIS_INLINE void load_values(const char* const* rows, int /* rows left */, int column,
                                       Vector (&value)[kColumns]) {
    const T* row = reinterpret_cast<const T*>(rows[0]) + column;
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) value[c] = widen(row + c * kWidth);
  }
  static HETIS_INLINE Vector add_weighted(Vector a, Vector b, Vector sum) { return multiply_add(a, b, sum); }
  // Puts the columns of a sum of values into their order.
  static HETIS_INLINE void order_columns(float*, int) {}

  // Prefill
  static HETIS_INLINE Vector load_packed(const float* x) { return load(x); }
  static HETIS_INLINE void store_packed(float* x, Vector v) { store(x, v); }
  static HETIS_INLINE Vector broadcast(const float* x) { return set(*x); }
  // kWidth columns of kPair rows of V
  static HETIS_INLINE void pack_values(const T* const* rows, int column, float* packed) {
    store(packed, widen(rows[0] + column));
  }
};
