// The kernel of `linear`, compiled once for each instruction set: included between HETIS_TARGET_BEGIN and
// HETIS_TARGET_END, inside a namespace of its own. No include guard, for that reason.
//
// A vector holds one sum for each of `kWidth` neighbouring outputs; a tile is the sums of P tokens and V vectors. Each
// step loads V vectors of weights, which lie one after the other, and broadcasts one unit of x (four bytes: one float,
// or two bfloat16) per token. An output is one chain of multiply-adds over all inputs in order: the result for a token
// depends on its own x only, not on other tokens or on the thread that computes it, and decode at T = 1 equals prefill
// bit for bit.
//
// Traffic: a block is read from memory by the first panel of tokens and from the L2 cache by the others, which prefetch
// the next block meanwhile.

template <class Lanes>
struct LinearTile {
  using Element = typename Lanes::Element;
  using Vector = typename Lanes::Vector;
  using Problem = LinearProblem<Element>;

  static constexpr int kParts = Lanes::kParts, kWidth = Lanes::kWidth, kVectors = kBlockRows / kWidth;
  static constexpr int kMaxSums = Lanes::kMaxSums, kMaxTokens = kMaxSums / 2;
  static constexpr int kGroup = kBlockRows * kInputs<Element>;  // elements of a block for one step
  static constexpr int64_t kLineBytes = 64, kStrip = 8;         // steps between prefetches

  // Tokens are divided evenly among the fewest panels, in units of Lanes::kTokenUnit.
  struct Panels {
    int64_t tokens, units, count;

    explicit Panels(int64_t tokens)
        : tokens(tokens),
          units((tokens + Lanes::kTokenUnit - 1) / Lanes::kTokenUnit),
          count((tokens + kMaxTokens - 1) / kMaxTokens) {}
    int64_t first_token(int64_t panel) const {
      const int64_t token = units * panel / count * Lanes::kTokenUnit;
      return token < tokens ? token : tokens;
    }
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
    for (int part = 0; part < kParts; ++part) {
      Vector w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = Lanes::load(weight, v, part);
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p) {
        const Vector token = Lanes::broadcast(x + part * P + p);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[p][v] = Lanes::multiply_add(w[v], token, sum[p][v]);
      }
    }
  }

  // Lines of the next block, some of which are prefetched after every strip of a block that several tiles read.
  struct Ahead {
    const char *next, *end;
    int64_t per_strip;

    HETIS_INLINE void fetch() {
      for (int64_t i = 0; i < per_strip && next < end; ++i, next += kLineBytes) _mm_prefetch(next, _MM_HINT_T1);
    }
  };

  // Sums of P tokens and V vectors of a block, from `row` on.
  template <int P, int V>
  static void multiply_tile(const Problem& problem, const Element* weight, const float* x, int64_t token, int64_t row,
                            Ahead& shared_ahead) {
    Ahead ahead = shared_ahead;
    Vector sum[P][V];
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[p][v] = Lanes::zero();
    int64_t left = num_steps<Element>(problem.inputs);
    for (; left >= kStrip; left -= kStrip) {
      ahead.fetch();
#pragma GCC unroll 4
      for (int64_t i = 0; i < kStrip; ++i, weight += kGroup, x += kParts * P) multiply_step<P, V>(weight, x, sum);
    }
    for (; left > 0; --left, weight += kGroup, x += kParts * P) multiply_step<P, V>(weight, x, sum);
    shared_ahead = ahead;
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(problem, sum[p][v], token + p, row + v * kWidth);
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
  static constexpr int tile_vectors(int tokens) { return tokens * kVectors <= kMaxSums ? kVectors : kVectors / 2; }

  // A block times a panel of `width` <= P tokens.
  template <int P>
  static void multiply_panel(int64_t width, const Problem& problem, const Element* weight, const float* x,
                             int64_t token, int64_t row, Ahead& ahead) {
    if constexpr (P > 1)
      if (width < P) return multiply_panel<P - 1>(width, problem, weight, x, token, row, ahead);
    constexpr int V = tile_vectors(P);
    for (int v = 0; v < kVectors; v += V)
      multiply_tile<P, V>(problem, weight + v * kWidth * kInputs<Element>, x, token, row + v * kWidth, ahead);
  }

  static void multiply(const Problem& problem, const void* packed, int64_t begin, int64_t end) {
    const Panels panels(problem.tokens);
    const int64_t steps = num_steps<Element>(problem.inputs), units = num_units(problem.inputs);
    const int64_t lines = steps * kGroup * static_cast<int64_t>(sizeof(Element)) / kLineBytes;
    const int64_t tiles = panels.count * kVectors / tile_vectors(panels.first_token(1));
    const int64_t per_strip = lines / (tiles * (steps < kStrip ? 1 : steps / kStrip)) + 1;
    for (int64_t block = begin; block < end; ++block) {
      const Element* weight = problem.weight + block * steps * kGroup;
      const char* next = reinterpret_cast<const char*>(weight + steps * kGroup);
      Ahead ahead = {next, tiles > 1 && block + 1 < end ? next + lines * kLineBytes : next, per_strip};
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t token = panels.first_token(panel), width = panels.first_token(panel + 1) - token;
        multiply_panel<kMaxTokens>(width, problem, weight, static_cast<const float*>(packed) + token * units, token,
                                   block * kBlockRows, ahead);
      }
    }
  }

  static constexpr LinearKernel<Element> kernel() { return {&packed_bytes, &num_panels, &pack, &multiply}; }
};
