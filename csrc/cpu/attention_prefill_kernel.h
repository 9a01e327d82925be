// Prefill: a block of queries of one head group against all keys they see. Included inside a namespace and a target
// region, after the vectors.
//
// Rows are (token, query head) pairs. Keys come in blocks that begin at multiples of kKeyBlock of the lane's tokens:
// where a chunk of a prompt begins does not change what is computed for a query. Each block of K and V is packed once,
// then tile after tile of kTileRows rows multiplies it: scores, weights, and the row's weighted sum of V.
//
// Weights are 2^(score - base). The base of a row is kHeadroom above its largest score when it was set, and is set again,
// with what was summed so far shrunk, when a score is larger. So few blocks look for the largest score of a row; a tenth
// of the time went there when all did.

constexpr int kKeyBlock = 128;
constexpr int kBlockRows = 384;  // the work of packing is shared by so many rows
constexpr float kHeadroom = 8.0f;  // weights are at most 1, and those of the largest score so far 2^-8 at least
constexpr int kPanelKeys = kTileColumns * kWidth;
static_assert(kKeyBlock % kPanelKeys == 0 && kBlockRows % kTileRows == 0 && kBlockRows >= kMaxQueries);

HETIS_INLINE int round_up(int64_t count, int unit) { return static_cast<int>((count + unit - 1) / unit * unit); }

template <class Dot>
struct Prefill {
  using Element = typename Dot::Element;
  using Packed = typename Dot::Packed;
  static constexpr int kPair = Dot::kPair;

  // The block's memory, carved out of its scratch: hot and small things first.
  struct Memory {
    float* scores;      // [kTileRows, kKeyBlock]
    Packed* weights;    // [kTileRows, kKeyBlock]
    int64_t* position;  // [kBlockRows] of the row's query
    float* base;        // [kBlockRows], in powers of two
    float* total;       // [kBlockRows, kWidth] lanes of the sum of weights
    Element* zeros;     // [D]
    Packed* keys;       // [kKeyBlock / kPanelKeys, D / kPair, kPanelKeys, kPair]
    Packed* values;     // [kKeyBlock / kPair, D, kPair]
    Packed* queries;    // [kBlockRows, D]
    float* sums;        // [kBlockRows, D]
  };

  template <class T>
  static HETIS_INLINE T* carve(uintptr_t& memory, size_t count) {
    T* result = reinterpret_cast<T*>(memory);
    memory += (count * sizeof(T) + 63) / 64 * 64;
    return result;
  }

  static Memory carve_all(uintptr_t& memory, int D) {
    Memory all;
    all.scores = carve<float>(memory, kTileRows * kKeyBlock);
    all.weights = carve<Packed>(memory, kTileRows * kKeyBlock);
    all.position = carve<int64_t>(memory, kBlockRows);
    all.base = carve<float>(memory, kBlockRows);
    all.total = carve<float>(memory, kBlockRows * kWidth);
    all.zeros = carve<Element>(memory, D);
    all.keys = carve<Packed>(memory, kKeyBlock * D);
    all.values = carve<Packed>(memory, kKeyBlock * D);
    all.queries = carve<Packed>(memory, kBlockRows * D);
    all.sums = carve<float>(memory, kBlockRows * D);
    return all;
  }

  static size_t scratch_bytes(int D) {
    uintptr_t end = 0;
    carve_all(end, D);
    return end;
  }

  // sum[kTileRows][kColumns] += a[kTileRows, steps * kPair] b[steps, columns, kPair]
  template <int kColumns>
  static HETIS_INLINE void multiply(const Packed* a, int a_stride, const Packed* b, int b_stride, int steps,
                                    Vector (&sum)[kTileRows][kColumns]) {
    for (int k = 0; k < steps; ++k) {
      Vector column[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) column[c] = Dot::load_packed(b + c * kWidth * kPair);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const Vector row = Dot::broadcast(a + r * a_stride);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) sum[r][c] = Dot::add_product(row, column[c], sum[r][c]);
      }
      a += kPair;
      b += b_stride;
    }
  }

  static void score(const Packed* queries, const Packed* panel, int D, float* scores) {
    Vector sum[kTileRows][kTileColumns];
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kTileColumns; ++c) sum[r][c] = zero();
    multiply<kTileColumns>(queries, D, panel, kPanelKeys * kPair, D / kPair, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kTileColumns; ++c) store(scores + r * kKeyBlock + c * kWidth, sum[r][c]);
  }

  template <int kColumns>
  static void add_values(const Packed* weights, const Packed* values, int keys, int D, float* sums) {
    Vector sum[kTileRows][kColumns];
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sum[r][c] = load(sums + r * D + c * kWidth);
    multiply<kColumns>(weights, kKeyBlock, values, D * kPair, keys / kPair, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) store(sums + r * D + c * kWidth, sum[r][c]);
  }

  // Scores of one row, of keys in [from, to), become weights.
  static HETIS_INLINE void softmax(float* scores, int keys, int from, int to, float scale_log2, int D, float& base,
                                   float* total, float* sums, Packed* weights) {
    if (from > 0 || to < keys)
      for (int k = 0; k < keys; k += kWidth) store(scores + k, hide_outside(load(scores + k), from - k, to - k));
    Vector best = load(scores);
    for (int k = kWidth; k < keys; k += kWidth) best = largest_of(best, load(scores + k));
    const Vector scale = set(scale_log2);
    if (any_above(best * scale, base)) {
      const float before = base;
      base = largest_lane(best) * scale_log2 + kHeadroom;
      const Vector shrink = exp2_of(set(before - base));
      store(total, load(total) * shrink);
      for (int d = 0; d < D; d += kWidth) store(sums + d, load(sums + d) * shrink);
    }
    // a row may not see any key of its first blocks: then there is nothing to be relative to yet
    const Vector offset = set(base == -__builtin_inff() ? 0.0f : -base);
    Vector sum = load(total);
    for (int k = 0; k < keys; k += kWidth) {
      const Vector weight = exp2_of(multiply_add(load(scores + k), scale, offset));
      sum += weight;
      Dot::pack_weights(weight, weights + k);
    }
    store(total, sum);
  }

  static void pack_keys(const Element* const* rows, int keys, int D, Packed* packed) {
    for (int key = 0; key < keys; key += kWidth) {
      Packed* panel = packed + key / kPanelKeys * kPanelKeys * D + key % kPanelKeys * kPair;
      for (int d = 0; d < D; d += Dot::kStep) {
        Vector part[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) part[i] = Dot::load_row(rows[key + i] + d, D - d);
        transpose(part);
        const int steps = (D - d < Dot::kStep ? D - d : Dot::kStep) / kPair;
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
          if (i < steps) Dot::store_packed(panel + (d / kPair + i) * kPanelKeys * kPair, part[i]);
      }
    }
  }

  static void pack_values(const Element* const* rows, int keys, int D, Packed* packed) {
    for (int key = 0; key < keys; key += kPair)
      for (int d = 0; d < D; d += kWidth) Dot::pack_values(rows + key, d, packed + (key * D + d * kPair));
  }

  static void pack_queries(const PrefillBlock& block, Packed* queries) {
    const auto* q = static_cast<const Element*>(block.q);
    for (int64_t t = 0; t < block.tokens; ++t)
      for (int m = 0; m < block.M; ++m, queries += block.D)
        for (int d = 0; d < block.D; d += kWidth)
          Dot::pack_query(q + t * block.q_stride_t + m * block.q_stride_m + d, queries + d);
  }

  // K rows of a key block, then V rows. Keys that no query of the block sees are zeros: their pages may hold anything.
  static void find_rows(const PrefillBlock& block, const Element* zeros, int64_t first_key, int64_t from, int64_t to,
                        const Element** rows) {
    const int64_t row_bytes = block.D * static_cast<int64_t>(sizeof(Element));
    for (int i = 0; i < kKeyBlock; ++i) {
      const int64_t key = first_key + i;
      const bool seen = key >= from && key < to;
      const int64_t cell = seen ? block.pages[key / block.page_size] * block.page_size + key % block.page_size : 0;
      const char* row = block.keys + cell * row_bytes;
      rows[i] = seen ? reinterpret_cast<const Element*>(row) : zeros;
      rows[kKeyBlock + i] = seen ? reinterpret_cast<const Element*>(row + block.value_bytes) : zeros;
    }
  }

  // One tile of rows against one packed key block, as far as its last row sees it.
  static void attend(const PrefillBlock& block, const Memory& memory, int first_row, int64_t first_key, int keys) {
    const int D = block.D, seen = clamp(memory.position[first_row + kTileRows - 1] + 1 - first_key, keys);
    if (seen == 0) return;
    keys = round_up(seen, kPanelKeys);
    for (int key = 0; key < keys; key += kPanelKeys)
      score(memory.queries + first_row * D, memory.keys + key * D, D, memory.scores + key);
    float* sums = memory.sums + first_row * D;
    for (int r = 0; r < kTileRows; ++r) {
      const int row = first_row + r;
      const int64_t position = memory.position[row];
      const int64_t oldest = block.window > 0 ? position - block.window + 1 : 0;
      softmax(memory.scores + r * kKeyBlock, keys, clamp(oldest - first_key, keys),
              clamp(position + 1 - first_key, keys), block.scale_log2, D, memory.base[row], memory.total + row * kWidth,
              sums + r * D, memory.weights + r * kKeyBlock);
    }
    int d = 0;
    for (; d + kTileColumns * kWidth <= D; d += kTileColumns * kWidth)
      add_values<kTileColumns>(memory.weights, memory.values + d * kPair, round_up(seen, kPair), D, sums + d);
    for (; d < D; d += kWidth)
      add_values<1>(memory.weights, memory.values + d * kPair, round_up(seen, kPair), D, sums + d);
  }

  static HETIS_INLINE int clamp(int64_t x, int limit) { return static_cast<int>(x < 0 ? 0 : x > limit ? limit : x); }

  static void finish(const PrefillBlock& block, const Memory& memory) {
    for (int64_t row = 0; row < block.tokens * block.M; ++row) {
      const int64_t t = row / block.M, m = row % block.M;
      auto* out = static_cast<Element*>(block.out) + t * block.out_stride_t + m * block.out_stride_m;
      const float* sums = memory.sums + row * block.D;
      const Vector shrink = set(1.0f / sum_of_lanes(load(memory.total + row * kWidth)));
      for (int d = 0; d < block.D; d += kWidth) narrow(out + d, load(sums + d) * shrink);
    }
  }

  static void run(const PrefillBlock& block) {
    const int D = block.D, num_rows = static_cast<int>(block.tokens * block.M);
    auto scratch = reinterpret_cast<uintptr_t>(block.scratch);
    const Memory memory = carve_all(scratch, D);
    const int padded = round_up(num_rows, kTileRows);  // with rows of zeros
    memset(memory.zeros, 0, D * sizeof(Element));
    memset(memory.queries, 0, padded * D * sizeof(Packed));
    memset(memory.sums, 0, padded * D * sizeof(float));
    memset(memory.total, 0, padded * kWidth * sizeof(float));
    for (int row = 0; row < padded; ++row) {
      memory.position[row] = block.first_position + (row < num_rows ? row : num_rows - 1) / block.M;
      memory.base[row] = -__builtin_inff();
    }
    pack_queries(block, memory.queries);

    const int64_t end = block.first_position + block.tokens;
    const int64_t oldest = block.first_position - block.window + 1;
    const int64_t begin = block.window > 0 && oldest > 0 ? oldest : 0;
    const Element* rows[2 * kKeyBlock];
    for (int64_t key = begin / kKeyBlock * kKeyBlock; key < end; key += kKeyBlock) {
      const int keys = end - key < kKeyBlock ? round_up(end - key, kPanelKeys) : kKeyBlock;
      find_rows(block, memory.zeros, key, begin, end, rows);
      pack_keys(rows, keys, D, memory.keys);
      pack_values(rows + kKeyBlock, keys, D, memory.values);
      for (int row = 0; row < num_rows; row += kTileRows) attend(block, memory, row, key, keys);
    }
    finish(block, memory);
  }
};

// One entry of the table; decode and prefill may multiply in different ways.
template <class Dot, class PrefillDot = Dot>
constexpr AttentionKernels attention_table() {
  return {decode_split<Dot>, decode_merge<Dot>, run_products<Dot>, Prefill<PrefillDot>::run, kBlockRows,
          Prefill<PrefillDot>::scratch_bytes};
}
