// Decode: one split of one lane at a time. Included inside a namespace and a target region, after the vectors.
//
// A split is short enough for all its scores to be kept, so there is no running maximum: first all scores, then the
// softmax weights, then the weighted sum of V. K and V are read once each, in the order in which they lie in their
// pages.

// Fetches rows before they are used, row by row between the arithmetic: memory is fastest when asked for consecutive
// lines, and requests are dropped when too many wait. Hence, too, everything is asked for twice: the second request
// costs little if the first was heard. Long before, one line of each small page of the operating system is touched, so
// that its address has been translated by then. (One Zen 5 core, pages of 4 KiB in random order, GB/s: 15 without any
// of this, 19 with bursts, 24 row by row, 27 with the touch, 32 with the second request; a plain sum over memory in
// order: 43.)
//
// Where instructions are short nothing is touched, which only misleads the processor's own prefetcher, and requests
// come at most kBytesAhead before, as what waits must fit a first cache that two hardware threads may share. (Zen 3,
// two threads, bfloat16, D = 128, M = 2, GB/s in order and shuffled: 13.4 and 12.3 with the rules of above, 18.7 and
// 12.8 without any requests, 19.8 and 15.1 asked for once, 19.4 and 16.6 asked for twice, 17.4 and 15.0 with a third of
// the distance; with the touch 1 to 4 less; one request for two lines 12.4 and 11.5.)
class Ahead {
 public:
  // Of several passes over the rows from `first` on, each fetches its share.
  HETIS_INLINE Ahead(const DecodeSplit& split, int first, int row_bytes, int pass, int passes)
      : rows_(split.rows), row_(first + pass), row_bytes_(row_bytes), passes_(passes), due_(passes - 1 - pass) {
    const int rows = kBytesAhead / row_bytes;
    ahead_ = kShortOfInstructions && rows < kTokensAhead ? rows : kTokensAhead;
  }

  // To be called once for so many rows of the pass.
  HETIS_INLINE void step(int rows) {
    for (due_ += rows; due_ >= passes_; due_ -= passes_, row_ += passes_) {
      if (!kShortOfInstructions && row_ % kTouchRows == 0)
        __builtin_prefetch(rows_[row_ + kTokensAhead + kTouchAhead]);
      fetch(rows_[row_ + ahead_]);
      fetch(rows_[row_ + ahead_ / 2]);
    }
  }

 private:
  static constexpr int kBytesAhead = 12 * 1024;

  HETIS_INLINE void fetch(const char* row) const {
    for (int i = 0; i < row_bytes_; i += 64) {
      __builtin_prefetch(row + i, 0, 0);  // read once: no place in the outer caches
      asm volatile("" ::: "memory");      // keeps the compiler from gathering the requests
    }
  }

  const char* const* rows_;
  int row_, row_bytes_, passes_, due_, ahead_;
};

// Scores of kWidth tokens for kQueries queries. A product is summed over D in the lanes of a vector of its own, and the
// lanes of kWidth products are then summed together. Where instructions are short kTokens rows share each load of the
// queries, and their sums keep the multipliers busy.
template <class Dot, int kQueries>
HETIS_INLINE void score_tile(const DecodeSplit& split, int token, const typename Dot::Query* query, int pass,
                             int passes, float* scores) {
  using Element = typename Dot::Element;
  constexpr int kTokens = kWidth / kQueries, kRows = kShortOfInstructions ? kTokens : 1;
  const int D = split.D;
  Ahead ahead(split, token, D * static_cast<int>(sizeof(Element)), pass, passes);
  for (int first = 0; first < kWidth; first += kTokens) {
    Vector product[kWidth];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; t += kRows) {
      const char* const* rows = split.rows + token + first + t;
      Vector sum[kRows][kQueries];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < kQueries; ++m) sum[r][m] = zero();
      for (int d = 0; d < D; d += Dot::kStep) {
#pragma GCC unroll 2
        for (int p = 0; p < Dot::kParts; ++p) {
          Vector part[kRows];
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r)
            part[r] = Dot::load_part(reinterpret_cast<const Element*>(rows[r]) + d, D - d, p);
#pragma GCC unroll 4
          for (int m = 0; m < kQueries; ++m) {
            const Vector q = Dot::load_query(query + m * D + d + p * kWidth, D - d);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) sum[r][m] = Dot::add_product(part[r], q, sum[r][m]);
          }
        }
      }
      ahead.step(kRows);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < kQueries; ++m) product[m * kTokens + t + r] = sum[r][m];
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
  for (int t = 0; t < split.tokens; t += kWidth) {
    int m = 0, pass = 0;
    for (; m + 4 <= M; m += 4, ++pass)
      score_tile<Dot, 4>(split, t, query + m * D, pass, passes, scores + m * kSplitTokens + t);
    if (M & 2) {
      score_tile<Dot, 2>(split, t, query + m * D, pass++, passes, scores + m * kSplitTokens + t);
      m += 2;
    }
    if (M & 1) score_tile<Dot, 1>(split, t, query + m * D, pass, passes, scores + m * kSplitTokens + t);
  }
}

// Weights relative to the largest score, which may take the place of the scores.
template <class Dot>
HETIS_INLINE void softmax(float* scores, int tokens, float scale_log2, typename Dot::Weight* weights, float* largest,
                          float* total) {
  const int end = (tokens + kWidth - 1) / kWidth * kWidth;
  Vector best = set(-__builtin_inff());
  for (int t = 0; t < end; t += kWidth) {
    Vector score = load(scores + t) * set(scale_log2);
    if (t + kWidth > tokens) score = hide_outside(score, 0, tokens - t);
    store(scores + t, score);
    best = largest_of(best, score);
  }
  *largest = largest_lane(best);
  Vector sum = zero();
  for (int t = 0; t < end; t += kWidth) {
    const Vector weight = exp2_of(load(scores + t) - set(*largest));
    Dot::pack_weights(weight, weights + t);
    sum += weight;
  }
  *total = sum_of_lanes(sum);
}

// Adds the weighted V rows of some tokens, kColumns vectors of each, for kQueries queries.
template <class Dot, int kQueries, int kColumns>
HETIS_INLINE void value_tile(const DecodeSplit& split, int first, int tokens, int column,
                             const typename Dot::Weight* weights, float* sums, int pass, int passes) {
  constexpr int kStep = Dot::kValueTokens;
  const int D = split.D;
  Ahead ahead(split, first, D * static_cast<int>(sizeof(typename Dot::Element)), pass, passes);
  Vector sum[kQueries][kColumns];
#pragma GCC unroll 4
  for (int m = 0; m < kQueries; ++m)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) sum[m][c] = load(sums + m * D + column + c * kWidth);
  for (int t = 0; t < tokens; t += kStep) {
    Vector value[kColumns];
    Dot::load_values(split.rows + first + t, tokens - t, column, value);
    ahead.step(kStep);
#pragma GCC unroll 4
    for (int m = 0; m < kQueries; ++m) {
      const Vector weight = Dot::broadcast_weight(weights + m * kSplitTokens + t);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) sum[m][c] = Dot::add_weighted(weight, value[c], sum[m][c]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kQueries; ++m)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) store(sums + m * D + column + c * kWidth, sum[m][c]);
}

// Columns from `column` on, in tiles of kColumns vectors, then of half as many.
template <class Dot, int kQueries, int kColumns>
HETIS_INLINE void value_columns(const DecodeSplit& split, int first, int tokens, int column,
                                const typename Dot::Weight* weights, float* sums, int& pass, int passes) {
  for (; column + kColumns * kWidth <= split.D; column += kColumns * kWidth, ++pass)
    value_tile<Dot, kQueries, kColumns>(split, first, tokens, column, weights, sums, pass, passes);
  if constexpr (kColumns > Dot::kParts)
    value_columns<Dot, kQueries, kColumns / 2>(split, first, tokens, column, weights, sums, pass, passes);
}

// Vectors of a tile's columns: as many as leave registers free.
constexpr int value_tile_columns(int queries) { return kWidth / queries < 8 ? kWidth / queries : 8; }

inline int column_tiles(int D, int queries) {
  int tiles = 0, left = D / kWidth;
  for (int columns = value_tile_columns(queries); columns > 0; left %= columns, columns /= 2) tiles += left / columns;
  return tiles;
}

template <class Dot>
HETIS_INLINE void add_values(const DecodeSplit& split, const typename Dot::Weight* weights, float* sums) {
  constexpr int kBlock = 16;  // the rows stay in the first cache while all tiles read them
  const int M = split.M, D = split.D, tokens = static_cast<int>(split.tokens);
  const int passes = M / 4 * column_tiles(D, 4) + M % 4 / 2 * column_tiles(D, 2) + M % 2 * column_tiles(D, 1);
  for (int t = 0; t < tokens; t += kBlock) {
    const int count = tokens - t < kBlock ? tokens - t : kBlock;
    const auto* weight = weights + t;
    float* sum = sums;
    int pass = 0;
    for (int m = 4; m <= M; m += 4, weight += 4 * kSplitTokens, sum += 4 * D)
      value_columns<Dot, 4, value_tile_columns(4)>(split, tokens + t, count, 0, weight, sum, pass, passes);
    if (M & 2) {
      value_columns<Dot, 2, value_tile_columns(2)>(split, tokens + t, count, 0, weight, sum, pass, passes);
      weight += 2 * kSplitTokens, sum += 2 * D;
    }
    if (M & 1) value_columns<Dot, 1, value_tile_columns(1)>(split, tokens + t, count, 0, weight, sum, pass, passes);
  }
}

// kHeadDim is a head_dim known to the compiler, or 0 for any. It saves a third of the instructions. Where they are not
// short only short rows are read faster for it: with longer ones the core comes too soon and asks for too much at once.
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
      Dot::pack_query(static_cast<const typename Dot::Element*>(split.q) + m * split.q_stride + d, query + m * D + d);
  score_all<Dot>(split, query, scores);
  for (int m = 0; m < M; ++m) {
    softmax<Dot>(scores + m * kSplitTokens, static_cast<int>(split.tokens), split.scale_log2,
                 weights + m * kSplitTokens, largest + m, total + m);
    for (int d = 0; d < D; d += kWidth) store(sums + m * D + d, zero());
  }
  add_values<Dot>(split, weights, sums);
}

template <class Dot>
void decode_split(const DecodeSplit& split) {
  if (split.D == 64) return decode_split_of<Dot, 64>(split);
  if (kShortOfInstructions && split.D == 128) return decode_split_of<Dot, 128>(split);
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
