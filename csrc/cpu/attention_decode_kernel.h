// Decode: one split of one lane at a time. Included inside a namespace and a target region, after the vectors.
//
// A split is short enough for all its scores to be kept, so there is no running maximum: first all scores, then the
// softmax weights, then the weighted sum of V. K and V are read once each, in the order in which they lie in their pages.

// Rows are asked for kTokensAhead tokens early, line by line between the arithmetic: a burst of requests is waited for (it
// costs a third of the bandwidth). Of several passes over the same rows each asks for its share of their lines.
struct Ahead {
  int first, step;  // bytes

  Ahead(int pass, int passes) : first(64 * pass), step(64 * passes) {}
  HETIS_INLINE void fetch(const char* row, int bytes) const {
    for (int i = first; i < bytes; i += step) __builtin_prefetch(row + i);
  }
};

// Scores of kWidth tokens for kQueries queries. A product is summed over D in the lanes of a vector of its own, and the
// lanes of kWidth products are then summed together.
template <class Dot, int kQueries>
HETIS_INLINE void score_tile(const char* const* rows, const typename Dot::Query* query, int D, Ahead ahead, float* scores) {
  using Element = typename Dot::Element;
  constexpr int kTokens = kWidth / kQueries;
  for (int first = 0; first < kWidth; first += kTokens) {
    Vector product[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) product[i] = zero();
    int fetch_at = ahead.first;
    for (int d = 0; d < D; d += Dot::kStep) {
      const int left = D - d, bytes = d * static_cast<int>(sizeof(Element));
      Vector query_part[kQueries];
#pragma GCC unroll 4
      for (int m = 0; m < kQueries; ++m) query_part[m] = Dot::load_query(query + m * D + d, left);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const Vector key_part = Dot::load_row(reinterpret_cast<const Element*>(rows[first + t] + bytes), left);
#pragma GCC unroll 4
        for (int m = 0; m < kQueries; ++m)
          product[m * kTokens + t] = Dot::add_product(key_part, query_part[m], product[m * kTokens + t]);
      }
      if (bytes >= fetch_at) {
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) __builtin_prefetch(rows[first + t + kTokensAhead] + bytes);
        fetch_at += ahead.step;
      }
    }
    float sums[kWidth];
    store(sums, sums_of(product));
#pragma GCC unroll 4
    for (int m = 0; m < kQueries; ++m)
      memcpy(scores + m * kSplitTokens + first, sums + m * kTokens, kTokens * sizeof(float));
  }
}

// Queries go in fours, then a pair, then one.
inline int query_tiles(int M) { return M / 4 + M % 4 / 2 + M % 2; }

template <class Dot>
HETIS_INLINE void score_all(const DecodeSplit& split, const typename Dot::Query* query, float* scores) {
  const int M = split.M, D = split.D, passes = query_tiles(M);
  // the last tile may compute scores of rows behind the last token (V, or of another lane): they are overwritten
  for (int64_t t = 0; t < split.tokens; t += kWidth) {
    const char* const* rows = split.rows + t;
    int m = 0, pass = 0;
    for (; m + 4 <= M; m += 4, ++pass)
      score_tile<Dot, 4>(rows, query + m * D, D, {pass, passes}, scores + m * kSplitTokens + t);
    if (M & 2) {
      score_tile<Dot, 2>(rows, query + m * D, D, {pass++, passes}, scores + m * kSplitTokens + t);
      m += 2;
    }
    if (M & 1) score_tile<Dot, 1>(rows, query + m * D, D, {pass, passes}, scores + m * kSplitTokens + t);
  }
}

// Scores become weights relative to the largest score.
HETIS_INLINE void softmax(float* scores, int64_t tokens, float scale_log2, float* largest, float* total) {
  const int64_t end = (tokens + kWidth - 1) / kWidth * kWidth;
  for (int64_t t = tokens; t < end; ++t) scores[t] = -__builtin_inff();
  Vector best = set(-__builtin_inff());
  for (int64_t t = 0; t < end; t += kWidth) {
    Vector score = load(scores + t) * set(scale_log2);
    if (t + kWidth > tokens) score = hide_outside(score, 0, static_cast<int>(tokens - t));  // the scale may be negative
    store(scores + t, score);
    best = largest_of(best, score);
  }
  *largest = largest_lane(best);
  Vector sum = zero();
  for (int64_t t = 0; t < end; t += kWidth) {
    const Vector weight = exp2_of(load(scores + t) - set(*largest));
    store(scores + t, weight);
    sum += weight;
  }
  *total = sum_of_lanes(sum);
}

// Adds the weighted V rows of some tokens, kColumns vectors of each, for kQueries queries.
template <class Element, int kQueries, int kColumns>
HETIS_INLINE void value_tile(const char* const* rows, int64_t tokens, int column, const float* weights, float* sums, int D,
                             Ahead ahead) {
  const int row_bytes = D * static_cast<int>(sizeof(Element));
  Vector sum[kQueries][kColumns];
#pragma GCC unroll 4
  for (int m = 0; m < kQueries; ++m)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) sum[m][c] = load(sums + m * D + column + c * kWidth);
  for (int64_t t = 0; t < tokens; ++t) {
    const auto* value = reinterpret_cast<const Element*>(rows[t]) + column;
    ahead.fetch(rows[t + kTokensAhead], row_bytes);
    Vector weight[kQueries];
#pragma GCC unroll 4
    for (int m = 0; m < kQueries; ++m) weight[m] = set(weights[m * kSplitTokens + t]);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const Vector part = widen(value + c * kWidth);
#pragma GCC unroll 4
      for (int m = 0; m < kQueries; ++m) sum[m][c] = multiply_add(weight[m], part, sum[m][c]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kQueries; ++m)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) store(sums + m * D + column + c * kWidth, sum[m][c]);
}

// Columns from `column` on, in tiles of kColumns vectors, then of half as many.
template <class Element, int kQueries, int kColumns>
HETIS_INLINE void value_columns(const char* const* rows, int64_t tokens, int column, const float* weights, float* sums, int D,
                                int& pass, int passes) {
  for (; column + kColumns * kWidth <= D; column += kColumns * kWidth, ++pass)
    value_tile<Element, kQueries, kColumns>(rows, tokens, column, weights, sums, D, {pass, passes});
  if constexpr (kColumns > 1)
    value_columns<Element, kQueries, kColumns / 2>(rows, tokens, column, weights, sums, D, pass, passes);
}

// Vectors of a tile's columns: as many as leave registers free.
constexpr int value_tile_columns(int queries) { return queries == 1 ? kWidth / 2 : kWidth / queries; }

inline int column_tiles(int D, int queries) {
  int tiles = 0, left = D / kWidth;
  for (int columns = value_tile_columns(queries); columns > 0; left %= columns, columns /= 2) tiles += left / columns;
  return tiles;
}

template <class Element>
HETIS_INLINE void add_values(const DecodeSplit& split, const float* weights, float* sums) {
  constexpr int64_t kBlock = 64;  // few enough for the rows to stay in the first cache while all tiles read them
  const int M = split.M, D = split.D;
  const int passes = M / 4 * column_tiles(D, 4) + M % 4 / 2 * column_tiles(D, 2) + M % 2 * column_tiles(D, 1);
  const char* const* values = split.rows + split.tokens;
  for (int64_t t = 0; t < split.tokens; t += kBlock) {
    const int64_t count = split.tokens - t < kBlock ? split.tokens - t : kBlock;
    const char* const* rows = values + t;
    const float* weight = weights + t;
    int m = 0, pass = 0;
    for (; m + 4 <= M; m += 4)
      value_columns<Element, 4, value_tile_columns(4)>(rows, count, 0, weight + m * kSplitTokens, sums + m * D, D, pass, passes);
    if (M & 2) {
      value_columns<Element, 2, value_tile_columns(2)>(rows, count, 0, weight + m * kSplitTokens, sums + m * D, D, pass, passes);
      m += 2;
    }
    if (M & 1)
      value_columns<Element, 1, value_tile_columns(1)>(rows, count, 0, weight + m * kSplitTokens, sums + m * D, D, pass, passes);
  }
}

template <class Dot>
void decode_split(const DecodeSplit& split) {
  const int M = split.M, D = split.D;
  float* scores = split.scratch;
  float* sums = split.part;
  float* largest = sums + M * D;
  float* total = largest + M;
  auto* query = reinterpret_cast<typename Dot::Query*>(scores + M * kSplitTokens);
  for (int m = 0; m < M; ++m)
    for (int d = 0; d < D; d += kWidth)
      Dot::pack_query(static_cast<const typename Dot::Element*>(split.q) + m * split.q_stride + d, query + m * D + d);
  score_all<Dot>(split, query, scores);
  for (int m = 0; m < M; ++m) {
    softmax(scores + m * kSplitTokens, split.tokens, split.scale_log2, largest + m, total + m);
    for (int d = 0; d < D; d += kWidth) store(sums + m * D + d, zero());
  }
  add_values<typename Dot::Element>(split, scores, sums);
}

// Adds up the splits in order, each weighted by exp2(its largest score - the largest of all).
template <class Element>
void decode_merge(const DecodeMerge& merge) {
  const int M = merge.M, D = merge.D;
  const int64_t part_floats = decode_part_floats(M, D);
  for (int m = 0; m < M; ++m) {
    const float* largest = merge.parts + M * D + m;
    float best = -__builtin_inff();
    for (int64_t i = 0; i < merge.num_parts; ++i)
      best = largest[i * part_floats] > best ? largest[i * part_floats] : best;
    float sums[kMaxHeadDim] = {}, total = 0.0f;
    for (int64_t i = 0; i < merge.num_parts; ++i) {
      const float* part = merge.parts + i * part_floats + m * D;
      const Vector weight = exp2_of(set(largest[i * part_floats] - best));
      total += weight[0] * largest[i * part_floats + M];
      for (int d = 0; d < D; d += kWidth) store(sums + d, multiply_add(weight, load(part + d), load(sums + d)));
    }
    const Vector shrink = set(total == 0.0f ? 0.0f : 1.0f / total);
    auto* out = static_cast<Element*>(merge.out) + m * merge.out_stride;
    for (int d = 0; d < D; d += kWidth) narrow(out + d, load(sums + d) * shrink);
    merge.lse2[m] = best + __builtin_log2f(total);
  }
}
