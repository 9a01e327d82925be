// The kernel of `linear`, compiled once for each instruction set: included between HETIS_TARGET_BEGIN and
// HETIS_TARGET_END, inside a namespace of its own. No include guard, for that reason.
//
// A vector holds `kTokens` tokens times four chains (partial sums over K): lane 4 t + j sums every fourth group of
// inputs of token t. A 4-lane piece of a weight row, broadcast to all tokens of the vector, is multiplied with several
// vectors of x, so that a tile of 6 rows x 4 vectors needs 10 loads for 24 multiply-adds at any number of tokens. The
// chains are joined at the end in one fixed order: the result for a token depends on its own x only, not on other
// tokens or on the thread that computes it, and decode at T = 1 equals prefill bit for bit.
//
// Traffic: weight rows are processed in chunks that stay in the L2 cache while all panels of x, each about as large as
// the L1 cache, are multiplied with them. So the weight is read from memory once per call; the next rows are prefetched
// meanwhile.

template <class Lanes>
struct LinearTile {
  using Element = typename Lanes::Element;
  using Packed = typename Lanes::Packed;
  using Vector = typename Lanes::Vector;
  using Problem = LinearProblem<Element>;

  static constexpr int kTokens = Lanes::kTokens, kStep = Lanes::kStep, kMaxVectors = Lanes::kMaxVectors;
  static constexpr int64_t kChunkBytes = 384 * 1024, kLineBytes = 64;

  // Vectors are divided evenly among the fewest panels: a panel of one vector would waste most of the tile.
  struct Panels {
    int64_t vectors, count;

    explicit Panels(int64_t tokens) : vectors((tokens + kTokens - 1) / kTokens) {
      if (vectors < Lanes::kMinVectors) vectors = Lanes::kMinVectors;
      count = (vectors + kMaxVectors - 1) / kMaxVectors;
    }
    int64_t first_token(int64_t panel) const { return vectors * panel / count * kTokens; }
  };

  static int64_t num_steps(int64_t inputs) { return (inputs + kStep - 1) / kStep; }

  static int64_t num_panels(int64_t tokens) { return Panels(tokens).count; }

  static int64_t packed_bytes(int64_t tokens, int64_t inputs) {
    return Panels(tokens).vectors * kTokens * num_steps(inputs) * kStep * static_cast<int64_t>(sizeof(Packed));
  }

  // One row of x into every `stride`-th piece of a panel, zeros after its end.
  static void pack_row(const Element* row, int64_t inputs, Packed* piece, int64_t stride) {
    int64_t k = 0;
    for (; k + kStep <= inputs; k += kStep, piece += stride) Lanes::pack(row + k, piece);
    if (k == num_steps(inputs) * kStep) return;
    Element rest[kStep] = {};
    for (int64_t i = k; i < inputs; ++i) rest[i - k] = row[i];
    Lanes::pack(rest, piece);
  }

  // Packed x: [panel][step][token of the panel][input of the step]; tokens after the last one are zero.
  static void pack(const Problem& problem, void* packed, int64_t panel_begin, int64_t panel_end) {
    const Panels panels(problem.tokens);
    const int64_t steps = num_steps(problem.inputs);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t first = panels.first_token(panel), width = panels.first_token(panel + 1) - first;
      const int64_t stride = width * kStep;
      Packed* target = static_cast<Packed*>(packed) + first * steps * kStep;
      for (int64_t t = 0; t < width; ++t) {
        Packed* piece = target + t * kStep;
        if (first + t < problem.tokens) {
          pack_row(problem.x + (first + t) * problem.x_stride, problem.inputs, piece, stride);
        } else {
          for (int64_t step = 0; step < steps; ++step) Lanes::pack_zeros(piece + step * stride);
        }
      }
    }
  }

  template <int R, int V>
  static HETIS_INLINE void multiply_step(const Element* weight, int64_t stride, const Packed* x, Vector (&sum)[R][V]) {
    Vector x_vector[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) x_vector[v] = Lanes::load(x + v * kTokens * kStep);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector piece = Lanes::broadcast(weight + r * stride);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = Lanes::multiply_add(piece, x_vector[v], sum[r][v]);
    }
  }

  // Chains of R weight rows times V vectors of x. Prefetches 24 cache lines ahead in every row, at its end in the next
  // rows: 16 or 48 lines are 5 to 10 % slower, and a whole block of long rows would evict x from the L1 cache.
  template <int R, int V>
  static HETIS_INLINE void multiply_tile(const Element* weight, int64_t stride, const Packed* x, int64_t inputs,
                                         Vector (&sum)[R][V]) {
    constexpr int64_t kLine = kLineBytes / sizeof(Element), kAhead = 24 * kLine, kWidth = V * kTokens;
    const auto here = reinterpret_cast<uintptr_t>(weight);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = Lanes::zero();
    int64_t k = 0;
    for (; k + kLine <= inputs; k += kLine) {
      const int64_t ahead = k + kAhead < inputs ? k + kAhead : R * stride + k + kAhead - inputs;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        __builtin_prefetch(reinterpret_cast<const void*>(here + (r * stride + ahead) * sizeof(Element)));
#pragma GCC unroll 2
      for (int64_t i = k; i < k + kLine; i += kStep) multiply_step<R, V>(weight + i, stride, x + i * kWidth, sum);
    }
    for (; k + kStep <= inputs; k += kStep) multiply_step<R, V>(weight + k, stride, x + k * kWidth, sum);
    if (k < inputs) {
      Element rest[R * kStep] = {};
      for (int r = 0; r < R; ++r)
        for (int64_t i = k; i < inputs; ++i) rest[r * kStep + i - k] = weight[r * stride + i];
      multiply_step<R, V>(rest, kStep, x + k * kWidth, sum);
    }
  }

  // Joins the chains of rows FIRST ... FIRST + COUNT - 1 (at most 4) of all tokens of one vector, adds the bias,
  // rounds, and writes COUNT neighbouring outputs of each token.
  template <int FIRST, int COUNT, int R, int V>
  static HETIS_INLINE void store_rows(const Problem& problem, int64_t row, int64_t token, int v,
                                      const Vector (&sum)[R][V]) {
    constexpr int kLast = FIRST + COUNT - 1;
    float bias[4] = {};
    if (problem.bias != nullptr)
      for (int r = 0; r < COUNT; ++r) bias[r] = static_cast<float>(problem.bias[row + FIRST + r]);
    const Vector joined = Lanes::join(sum[FIRST][v], sum[FIRST + 1 < kLast ? FIRST + 1 : kLast][v],
                                      sum[FIRST + 2 < kLast ? FIRST + 2 : kLast][v], sum[kLast][v]);
    alignas(64) Element rounded[4 * kTokens];
    Lanes::round(Lanes::add(joined, Lanes::broadcast_sums(bias)), rounded);
    const int64_t first = token + v * kTokens;
    Element* out = problem.out + first * problem.out_stride + row + FIRST;
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
      if (first + t < problem.tokens)
        __builtin_memcpy(out + t * problem.out_stride, rounded + 4 * t, COUNT * sizeof(Element));
  }

  template <int R, int V>
  static void multiply_panel(const Problem& problem, const Packed* x, int64_t token, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      // the last block begins earlier to be whole: rows that it shares with the previous block get equal values again
      const int64_t row = block * R + R <= problem.outputs ? block * R : problem.outputs - R;
      Vector sum[R][V];
      multiply_tile<R, V>(problem.weight + row * problem.weight_stride, problem.weight_stride, x, problem.inputs, sum);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        store_rows<0, (R < 4 ? R : 4)>(problem, row, token, v, sum);
        if constexpr (R > 4) store_rows<4, R - 4>(problem, row, token, v, sum);
      }
    }
  }

  template <int R>
  static void multiply_chunk(const Problem& problem, const Packed* packed, int64_t begin, int64_t end) {
    const Panels panels(problem.tokens);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t token = panels.first_token(panel);
      const int64_t width = (panels.first_token(panel + 1) - token) / kTokens;
      const Packed* x = packed + token * num_steps(problem.inputs) * kStep;
      if constexpr (kMaxVectors == 4) {
        if (width == 4) multiply_panel<R, 4>(problem, x, token, begin, end);
        if (width == 3) multiply_panel<R, 3>(problem, x, token, begin, end);
      }
      if (width == 2) multiply_panel<R, 2>(problem, x, token, begin, end);
      if constexpr (Lanes::kMinVectors == 1)
        if (width == 1) multiply_panel<R, 1>(problem, x, token, begin, end);
    }
  }

  static void multiply(const Problem& problem, const void* packed, int64_t begin, int64_t end) {
    const auto* x = static_cast<const Packed*>(packed);
    if (problem.outputs < kBlockRows) return multiply_chunk<1>(problem, x, 0, problem.outputs);
    const int64_t block_bytes = kBlockRows * problem.inputs * static_cast<int64_t>(sizeof(Element));
    const int64_t chunk = block_bytes < kChunkBytes ? kChunkBytes / block_bytes : 1;
    for (int64_t i = begin; i < end; i += chunk)
      multiply_chunk<kBlockRows>(problem, x, i, i + chunk < end ? i + chunk : end);
  }

  static constexpr LinearKernel<Element> kernel() { return {&packed_bytes, &num_panels, &pack, &multiply}; }
};
