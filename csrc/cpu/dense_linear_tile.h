// The kernel of `linear`, compiled once for each instruction set: included between HETIS_TARGET_BEGIN and
// HETIS_TARGET_END, inside a namespace of its own. No include guard, for that reason.
//
// A vector holds one sum for each of `kWidth` neighbouring outputs; a tile is the sums of P tokens and V vectors. Each
// step loads V vectors of weights, which lie one after the other, and broadcasts one unit of x (four bytes: one float,
// or two bfloat16) per token. An output is one chain of multiply-adds over all inputs in order: the result for a token
// depends on its own x only, not on other tokens or on the thread that computes it, and decode at T = 1 equals prefill
// bit for bit.
//
// Traffic: a strip of a block is read from memory by the first tile and from caches by the others, which prefetch the
// next strip meanwhile; strips are short enough for a panel's part of x to stay in the L1 cache.

template <class Lanes>
struct LinearTile {
  using Element = typename Lanes::Element;
  using Vector = typename Lanes::Vector;
  using Problem = LinearProblem<Element>;

  static constexpr int kParts = Lanes::kParts, kWidth = Lanes::kWidth, kVectors = kBlockRows / kWidth;
  static constexpr int kMaxTokens = Lanes::kMaxSums / 2;
  static constexpr int kGroup = kBlockRows * kInputs<Element>;  // elements of a block for one step
  static constexpr int64_t kLineBytes = 64, kFetchSteps = 8;

  // Tokens are divided evenly among the fewest panels.
  struct Panels {
    int64_t tokens, count;

    explicit Panels(int64_t tokens) : tokens(tokens), count((tokens + kMaxTokens - 1) / kMaxTokens) {}
    int64_t first_token(int64_t panel) const { return tokens * panel / count; }
  };

  static int64_t num_units(int64_t inputs) { return num_steps<Element>(inputs) * kParts; }
  static int64_t num_panels(int64_t tokens) { return Panels(tokens).count; }
  static int64_t packed_bytes(int64_t tokens, int64_t inputs) { return 4 * tokens * num_units(inputs); }

  // Units [first, first + 4) of rows of x, zeros after their end.
  static HETIS_INLINE __m128 four_units(const Element* row, int64_t first, int64_t inputs) {
    constexpr int kFour = 4 * kInputs<Element> / kParts;
    const int64_t k = first * kFour / 4;
    if (k + kFour <= inputs) return Lanes::units(row + k);
    Element rest[kFour] = {};
    for (int64_t i = k; i < inputs; ++i) rest[i - k] = row[i];
    return Lanes::units(rest);
  }

  // x of panels [begin, end): [panel][unit][token of the panel].
  static void pack(const Problem& problem, void* packed, int64_t begin, int64_t end) {
    const Panels panels(problem.tokens);
    const int64_t units = num_units(problem.inputs);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panels.first_token(panel), width = panels.first_token(panel + 1) - first;
      const Element* x = problem.x + first * problem.x_stride;
      pack_panel(problem, x, width, units, static_cast<float*>(packed) + first * units);
    }
  }

  static void pack_panel(const Problem& problem, const Element* x, int64_t width, int64_t units, float* target) {
    for (int64_t unit = 0; unit < units; unit += 4) {
      const int64_t count = units - unit < 4 ? units - unit : 4;
      int64_t t = 0;
      for (; t + 4 <= width; t += 4) {
        __m128 row[4];
        for (int i = 0; i < 4; ++i) row[i] = four_units(x + (t + i) * problem.x_stride, unit, problem.inputs);
        _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
        for (int64_t i = 0; i < count; ++i) _mm_storeu_ps(target + (unit + i) * width + t, row[i]);
      }
      for (; t < width; ++t) {
        alignas(16) float row[4];
        _mm_store_ps(row, four_units(x + t * problem.x_stride, unit, problem.inputs));
        for (int64_t i = 0; i < count; ++i) __builtin_memcpy(target + (unit + i) * width + t, row + i, sizeof(float));
      }
    }
  }

  template <int P, int V>
  static HETIS_INLINE void multiply_step(const Element* weight, const float* x, Vector (&sum)[P][V]) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part, x += P) {
      Vector w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = Lanes::load(weight, v, part);
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p) {
        const Vector token = Lanes::broadcast(x + p);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[p][v] = Lanes::multiply_add(w[v], token, sum[p][v]);
      }
    }
  }

  // Lines of the next strip, some of which are prefetched after every few steps of a strip that several tiles read. For
  // one tile alone prefetches gain nothing (8 to 12 tokens) or cost 10 % (1 token).
  struct Ahead {
    const char *next, *end;
    int64_t at_once;

    HETIS_INLINE void fetch() {
      for (int64_t i = 0; i < at_once && next < end; ++i, next += kLineBytes) _mm_prefetch(next, _MM_HINT_T1);
    }
  };

  static Ahead ahead_of(const Element* weight, int64_t steps, int64_t tiles, const char* range_end) {
    if (tiles == 1) return {nullptr, nullptr, 0};
    const int64_t bytes = steps * kGroup * static_cast<int64_t>(sizeof(Element));
    const char* next = reinterpret_cast<const char*>(weight) + bytes;
    const int64_t fetches = tiles * (steps < kFetchSteps ? 1 : steps / kFetchSteps);
    return {next, range_end - next < bytes ? range_end : next + bytes, (bytes / kLineBytes + fetches - 1) / fetches};
  }

  // Some steps of a block for a panel of tokens. `sums` [token][row of the block] keeps them between its strips.
  struct Strip {
    const Element* weight;
    const float* x;
    int64_t steps, token, row;
    float* sums;
    bool is_first, is_last;
  };

  // P tokens and V vectors of a strip, from vector `first` on.
  template <int P, int V>
  static void multiply_tile(const Problem& problem, const Strip& strip, int first, Ahead& shared_ahead) {
    Ahead ahead = shared_ahead;
    const Element* weight = strip.weight + first * kWidth * kInputs<Element>;
    const float* x = strip.x;
    float* sums = strip.sums + strip.token * kBlockRows + first * kWidth;
    Vector sum[P][V];
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[p][v] = Lanes::zero();
    if (!strip.is_first) {
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[p][v] = Lanes::kept(sums + p * kBlockRows + v * kWidth);
    }
    int64_t left = strip.steps;
    for (; left >= kFetchSteps; left -= kFetchSteps) {
      ahead.fetch();
#pragma GCC unroll 4
      for (int64_t i = 0; i < kFetchSteps; ++i, weight += kGroup, x += kParts * P) multiply_step<P, V>(weight, x, sum);
    }
    for (; left > 0; --left, weight += kGroup, x += kParts * P) multiply_step<P, V>(weight, x, sum);
    shared_ahead = ahead;
    if (strip.is_last) {
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(problem, sum[p][v], strip.token + p, strip.row + (first + v) * kWidth);
    } else {
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) Lanes::keep(sum[p][v], sums + p * kBlockRows + v * kWidth);
    }
  }

  // Adds the bias, rounds, and writes the outputs of one vector that exist.
  static HETIS_INLINE void store(const Problem& problem, Vector sum, int64_t token, int64_t row) {
    Element* out = problem.out + token * problem.out_stride + row;
    const int64_t left = problem.outputs - row;
    if (left >= kWidth) {
      if (problem.bias != nullptr) sum = Lanes::add(sum, Lanes::floats(problem.bias + row));
      Lanes::round(sum, out);
    } else if (left > 0) {
      Element bias[kWidth] = {}, rounded[kWidth];
      if (problem.bias != nullptr) __builtin_memcpy(bias, problem.bias + row, left * sizeof(Element));
      Lanes::round(problem.bias != nullptr ? Lanes::add(sum, Lanes::floats(bias)) : sum, rounded);
      __builtin_memcpy(out, rounded, left * sizeof(Element));
    }
  }

  // Vectors of a tile of so many tokens: all of a block, or half of them where the registers hold no more sums.
  static constexpr int tile_vectors(int64_t tokens) {
    return tokens * kVectors <= Lanes::kWholeSums ? kVectors : kVectors / 2;
  }

  // A strip times a panel of `width` <= P tokens.
  template <int P>
  static void multiply_panel(int64_t width, const Problem& problem, const Strip& strip, Ahead& ahead) {
    if constexpr (P > 1)
      if (width < P) return multiply_panel<P - 1>(width, problem, strip, ahead);
    constexpr int V = tile_vectors(P);
    for (int v = 0; v < kVectors; v += V) multiply_tile<P, V>(problem, strip, v, ahead);
  }

  static void multiply(const Problem& problem, const void* packed, int64_t begin, int64_t end) {
    alignas(64) float sums[kSlabTokens * kBlockRows];
    const Panels panels(problem.tokens);
    const int64_t steps = num_steps<Element>(problem.inputs), units = num_units(problem.inputs);
    const int64_t tiles = panels.count * kVectors / tile_vectors(panels.first_token(1));
    const int64_t strip_steps = tiles > 1 && steps > Lanes::kStripSteps ? Lanes::kStripSteps : steps;
    const char* range_end = reinterpret_cast<const char*>(problem.weight + end * steps * kGroup);
    for (int64_t block = begin; block < end; ++block) {
      int64_t first = 0;
      do {
        const int64_t count = steps - first < strip_steps ? steps - first : strip_steps;
        const Element* weight = problem.weight + (block * steps + first) * kGroup;
        Ahead ahead = ahead_of(weight, count, tiles, range_end);
        for (int64_t panel = 0; panel < panels.count; ++panel) {
          const int64_t token = panels.first_token(panel), width = panels.first_token(panel + 1) - token;
          const float* x = static_cast<const float*>(packed) + token * units + first * kParts * width;
          const bool is_last = first + count == steps;
          multiply_panel<kMaxTokens>(
              width, problem, {weight, x, count, token, block * kBlockRows, sums, first == 0, is_last}, ahead);
        }
        first += count;
      } while (first < steps);
    }
  }

  static constexpr LinearKernel<Element> kernel() { return {&packed_bytes, &num_panels, &pack, &multiply}; }
};
