// Decode: one split of one lane at a time. Included inside a namespace and a target region, after the vectors
// and attention_ahead.h.
//
// A split is short enough for all its scores to be kept, so there is no running maximum: first all scores, then the
// softmax weights, then the weighted sum of V. K and V are read once each, in the order in which they lie in their
// pages.

// Scores of kWidth tokens for kQueries queries. A product is summed over D in the lanes of a vector of its own, and the
// lanes of kWidth products are then summed together.
template <class Dot, int kQueries>
HETIS_INLINE void score_tile(const DecodeSplit& split, int token, const typename Dot::Query* query,
                             const Ahead& ahead, float* scores) {
  using Element = typename Dot::Element;
  constexpr int kTokens = kWidth / kQueries;
  const int D = split.D;
  for (int first = 0; first < kWidth; first += kTokens) {
    const char* const* rows = split.rows + token + first;
    Vector product[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) product[i] = zero();
#pragma GCC unroll 4
    for (int d = 0; d < D; d += Dot::kStep) {
      const int offset = d * static_cast<int>(sizeof(Element));
      if (offset % 64 == 0) ahead.fetch(rows, kTokens, offset, 64);
#pragma GCC unroll 2
      for (int p = 0; p < Dot::kParts; ++p) {
        Vector part[kTokens];
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t)
          part[t] = Dot::load_part(reinterpret_cast<const Element*>(rows[t] + offset), D - d, p);
#pragma GCC unroll 8
        for (int m = 0; m < kQueries; ++m) {
          const Vector q = Dot::load_query(query + m * D + d + p * kWidth, D - d);
#pragma GCC unroll 16
          for (int t = 0; t < kTokens; ++t)
            product[m * kTokens + t] = Dot::add_product(part[t], q, product[m * kTokens + t]);
        }
      }
    }
    float sums[kWidth];
    store(sums, sums_of(product));
#pragma GCC unroll 8
    for (int m = 0; m < kQueries; ++m)
      memcpy(scores + m * kSplitTokens + first, sums + m * kTokens, kTokens * sizeof(float));
  }
}

// The same where a vector holds pieces of two rows: fewer lanes are left to be summed, by the units that multiply.
// (Zen 4, cycles for 64 bytes of K and V in cache, D = 64, M = 8: 12.3 by single rows, 11.9 by pairs.)
template <class Dot, int kQueries>
HETIS_INLINE void score_pairs(const DecodeSplit& split, int token, const typename Dot::Query* query,
                              const Ahead& ahead, float* scores) {
  using Element = typename Dot::Element;
  constexpr int kSums = 8, kPairs = kQueries == kTileQueries ? kSums / 2 : kSums, kTokens = 2 * kPairs;
  const int D = split.D;
  for (int first = 0; first < kWidth; first += kTokens) {
    const char* const* rows = split.rows + token + first;
    Vector product[kQueries * kPairs];
#pragma GCC unroll 16
    for (int i = 0; i < kQueries * kPairs; ++i) product[i] = zero();
#pragma GCC unroll 8
    for (int d = 0; d < D; d += Dot::kStep / 2) {
      const int offset = d * static_cast<int>(sizeof(Element));
      if (offset % 64 == 0) ahead.fetch(rows, kTokens, offset, 64);
      Vector pair[kPairs];
#pragma GCC unroll 8
      for (int p = 0; p < kPairs; ++p) {
        const char* const* row = rows + p / 4 * 8 + p % 4;
        pair[p] = Dot::load_pair(row[0] + offset, row[4] + offset);
      }
#pragma GCC unroll 4
      for (int m = 0; m < kQueries; ++m) {
        const Vector q = Dot::load_query(query + 2 * (m * D + d), Dot::kStep);
#pragma GCC unroll 8
        for (int p = 0; p < kPairs; ++p)
          product[m * kPairs + p] = Dot::add_product(pair[p], q, product[m * kPairs + p]);
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < kQueries * kPairs; i += kSums) {
      const Vector sums = Dot::sums_of_halves(product + i);
      float* to = scores + i / kPairs * kSplitTokens + first;
      if constexpr (kPairs == kSums)
        store(to, sums);
      else
        Dot::store_halves(to, to + kSplitTokens, sums);
    }
  }
}

// Scores of kWidth tokens for queries m to M.
template <class Dot, int kQueries>
HETIS_INLINE void score_tiles(const DecodeSplit& split, int token, const typename Dot::Query* query, int m,
                              float* scores) {
  for (; m + kQueries <= split.M; m += kQueries) {
    const Ahead ahead(split.D * static_cast<int>(sizeof(typename Dot::Element)), m, split.M);
    const auto* first = query + m * split.D * Dot::kRows;
    if constexpr (Dot::kRows == 2)
      score_pairs<Dot, kQueries>(split, token, first, ahead, scores + m * kSplitTokens);
    else
      score_tile<Dot, kQueries>(split, token, first, ahead, scores + m * kSplitTokens);
  }
  if constexpr (kQueries > 1) score_tiles<Dot, kQueries / 2>(split, token, query, m, scores);
}

template <class Dot>
HETIS_INLINE void score_all(const DecodeSplit& split, const typename Dot::Query* query, float* scores) {
  // the last tile may compute scores of rows behind the last token (V, or of another lane): they are overwritten
  for (int t = 0; t < split.tokens; t += kWidth) score_tiles<Dot, kTileQueries>(split, t, query, 0, scores + t);
}

// Scales a query's scores, makes those behind the last token -inf, and returns the largest.
HETIS_INLINE float scale_scores(float* scores, int tokens, float scale_log2) {
  Vector best = set(-__builtin_inff());
  for (int t = 0; t < tokens; t += kWidth) {
    Vector score = load(scores + t) * set(scale_log2);
    if (t + kWidth > tokens) score = hide_outside(score, 0, tokens - t);
    store(scores + t, score);
    best = largest_of(best, score);
  }
  return largest_lane(best);
}

// Weights 2^(score - largest), which may take the place of the scores, and their sum.
template <class Dot>
HETIS_INLINE float weigh(const float* scores, int tokens, float largest, typename Dot::Weight* weights) {
  Vector sum = zero();
  for (int t = 0; t < tokens; t += kWidth) {
    const Vector weight = exp2_of(load(scores + t) - set(largest));
    Dot::pack_weights(weight, weights + t);
    sum += weight;
  }
  return sum_of_lanes(sum);
}

// Adds the weighted V rows of some tokens, kColumns vectors of each, for kQueries queries.
template <class Dot, int kQueries, int kColumns>
HETIS_INLINE void value_tile(const DecodeSplit& split, int first, int tokens, int column,
                             const typename Dot::Weight* weights, const Ahead& ahead, float* sums) {
  using Element = typename Dot::Element;
  constexpr int kStep = Dot::kValueTokens, kFetchRows = 4;
  constexpr int kTileBytes = kColumns * kWidth * static_cast<int>(sizeof(Element));
  const int D = split.D;
  Vector sum[kQueries][kColumns];
#pragma GCC unroll 8
  for (int m = 0; m < kQueries; ++m)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) sum[m][c] = load(sums + m * D + column + c * kWidth);
  for (int t = 0; t < tokens; t += kStep) {
    const char* const* rows = split.rows + first + t;
    Vector value[kColumns];
    Dot::load_values(rows, tokens - t, column, value);
    if (t % kFetchRows == 0) ahead.fetch(rows, kFetchRows, column * static_cast<int>(sizeof(Element)), kTileBytes);
#pragma GCC unroll 8
    for (int m = 0; m < kQueries; ++m) {
      const Vector weight = Dot::broadcast_weight(weights + m * kSplitTokens + t);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) sum[m][c] = Dot::add_weighted(weight, value[c], sum[m][c]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kQueries; ++m)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) store(sums + m * D + column + c * kWidth, sum[m][c]);
}

// Columns from `column` on, in tiles of kColumns vectors, then of half as many.
template <class Dot, int kQueries, int kColumns>
HETIS_INLINE void value_columns(const DecodeSplit& split, int first, int tokens, int column,
                                const typename Dot::Weight* weights, const Ahead& ahead, float* sums) {
  for (; column + kColumns * kWidth <= split.D; column += kColumns * kWidth)
    value_tile<Dot, kQueries, kColumns>(split, first, tokens, column, weights, ahead, sums);
  if constexpr (kColumns > Dot::kParts)
    value_columns<Dot, kQueries, kColumns / 2>(split, first, tokens, column, weights, ahead, sums);
}

// Vectors of a tile's columns: as many as leave registers free.
constexpr int value_tile_columns(int queries) { return kWidth / queries < 8 ? kWidth / queries : 8; }

// Queries m to M, as `score_tiles`.
template <class Dot, int kQueries>
HETIS_INLINE void value_tiles(const DecodeSplit& split, int first, int tokens, int m,
                              const typename Dot::Weight* weights, float* sums) {
  for (; m + kQueries <= split.M; m += kQueries) {
    const Ahead ahead(split.D * static_cast<int>(sizeof(typename Dot::Element)), m, split.M);
    value_columns<Dot, kQueries, value_tile_columns(kQueries)>(split, first, tokens, 0, weights + m * kSplitTokens,
                                                               ahead, sums + m * split.D);
  }
  if constexpr (kQueries > 1) value_tiles<Dot, kQueries / 2>(split, first, tokens, m, weights, sums);
}

template <class Dot>
HETIS_INLINE void add_values(const DecodeSplit& split, const typename Dot::Weight* weights, float* sums) {
  constexpr int kBlock = 32;  // the rows stay in the first cache while all tiles read them
  const int tokens = static_cast<int>(split.tokens);
  for (int t = 0; t < tokens; t += kBlock)
    value_tiles<Dot, kTileQueries>(split, tokens + t, tokens - t < kBlock ? tokens - t : kBlock, 0, weights + t, sums);
}

// kHeadDim is a head_dim known to the compiler, or 0 for any. It saves a third of the instructions.
template <class Dot, int kHeadDim>
void decode_split_of(const DecodeSplit& any) {
  DecodeSplit split = any;
  if (kHeadDim > 0) split.D = kHeadDim;
  const int M = split.M, D = split.D;
  float* scores = split.scratch;
  auto* weights = reinterpret_cast<typename Dot::Weight*>(scores);
  auto* query = reinterpret_cast<typename Dot::Query*>(scores + M * kSplitTokens);
  float* sums = split.part;
  float* largest = sums + M * D;
  float* total = largest + M;
  for (int m = 0; m < M; ++m)
    for (int d = 0; d < D; d += Dot::kParts * kWidth)
      for (int row = 0; row < Dot::kRows; ++row)
        Dot::pack_query(static_cast<const typename Dot::Element*>(split.q) + m * split.q_stride + d,
                        query + (m * D + d) * Dot::kRows + row * kWidth);
  score_all<Dot>(split, query, scores);
  const int tokens = static_cast<int>(split.tokens);
  for (int m = 0; m < M; ++m) largest[m] = scale_scores(scores + m * kSplitTokens, tokens, split.scale_log2);
  for (int m = 0; m < M; ++m) {
    total[m] = weigh<Dot>(scores + m * kSplitTokens, tokens, largest[m], weights + m * kSplitTokens);
    for (int d = 0; d < D; d += kWidth) store(sums + m * D + d, zero());
  }
  add_values<Dot>(split, weights, sums);
}

template <class Dot>
void decode_split(const DecodeSplit& split) {
  if (split.D == 64) return decode_split_of<Dot, 64>(split);
  if (split.D == 80) return decode_split_of<Dot, 80>(split);
  if (split.D == 128) return decode_split_of<Dot, 128>(split);
  decode_split_of<Dot, 0>(split);
}

// Adds up the splits in order, each weighted by exp2(its largest score - the largest of all).
template <class Dot>
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
    Dot::order_columns(sums, D);
    auto* out = static_cast<typename Dot::Element*>(merge.out) + m * merge.out_stride;
    for (int d = 0; d < D; d += kWidth) narrow(out + d, load(sums + d) * shrink);
  }
}

// Nothing but products, in as many independent sums as hide their latency and fit the registers.
template <class Dot>
ProductRun run_products(int64_t rounds) {
  constexpr int kSums = 12;
  const Vector a = set(1e-3f), b = set(1e-3f);
  Vector sum[kSums];
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) sum[i] = set(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = Dot::add_product(a, b, sum[i]);
  Vector total = zero();
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) total += sum[i];
  return {rounds * kSums * kWidth * Dot::kPair, sum_of_lanes(total)};
}
