// Loops over rows, compiled once for each instruction set: included between HETIS_TARGET_BEGIN and HETIS_TARGET_END,
// inside a namespace that has Floats, Ints, load, store and rounded. No include guard, for that reason.

constexpr int64_t kLanes = sizeof(Floats) / sizeof(float);

HETIS_INLINE Floats all(float x) { return Floats{} + x; }

// `count` values, zeros in the other lanes.
template <class T>
HETIS_INLINE Floats load_some(const T* x, int64_t count) {
  if (count >= kLanes) return load(x);
  T padded[kLanes] = {};
  __builtin_memcpy(static_cast<void*>(padded), x, count * sizeof(T));
  return load(padded);
}

template <class T>
HETIS_INLINE void store_some(Floats x, T* out, int64_t count) {
  if (count >= kLanes) return store(x, out);
  T padded[kLanes];
  store(x, padded);
  __builtin_memcpy(static_cast<void*>(out), padded, count * sizeof(T));
}

HETIS_INLINE float inverse_root_mean(Floats squares, int64_t count, float epsilon) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += squares[i];
  return 1.0f / __builtin_sqrtf(sum / static_cast<float>(count) + epsilon);
}

// out = weight * (x * scale), rounded after each product as LlamaRMSNorm of transformers does.
template <class T>
HETIS_INLINE void scale_row(const T* x, float scale, const T* weight, T* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats normalised = rounded<T>(load_some(x + i, count - i) * scale);
    store_some(load_some(weight + i, count - i) * normalised, out + i, count - i);
  }
}

template <class T>
void norm_rows(const NormProblem<T>& problem, int64_t begin, int64_t end) {
  const int64_t count = problem.hidden;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = problem.x + t * problem.x_stride;
    T* residual = problem.residual == nullptr ? nullptr : problem.residual + t * problem.residual_stride;
    Floats squares = {};
    for (int64_t i = 0; i < count; i += kLanes) {
      Floats value = load_some(x + i, count - i);
      if (residual != nullptr) {
        value = rounded<T>(load_some(residual + i, count - i) + value);
        store_some(value, residual + i, count - i);
      }
      squares += value * value;
    }
    scale_row(residual == nullptr ? x : residual, inverse_root_mean(squares, count, problem.epsilon), problem.weight,
              problem.out + t * problem.out_stride, count);
  }
}

template <class T>
HETIS_INLINE void rotate(T* x, const float* cos_sin, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = half - i;
    const Floats x1 = load_some(x + i, count), x2 = load_some(x + half + i, count);
    const Floats cos = load_some(cos_sin + i, count), sin = load_some(cos_sin + half + i, count);
    store_some(x1 * cos - x2 * sin, x + i, count);
    store_some(x2 * cos + x1 * sin, x + half + i, count);
  }
}

template <class T>
void rope_rows(const RopeProblem<T>& problem, int64_t begin, int64_t end) {
  const int64_t count = problem.head_dim;
  for (int64_t row = begin; row < end; ++row) {
    T* head = problem.qkv + row * (problem.queries + 2) * count;
    for (int64_t h = 0; h <= problem.queries; ++h, head += count) {
      const T* weight = h < problem.queries ? problem.q_weight : problem.k_weight;
      if (weight != nullptr) {
        Floats squares = {};
        for (int64_t i = 0; i < count; i += kLanes) {
          const Floats value = load_some(head + i, count - i);
          squares += value * value;
        }
        scale_row(head, inverse_root_mean(squares, count, problem.epsilon), weight, head, count);
      }
      if (problem.cos_sin != nullptr)
        rotate(head, problem.cos_sin + problem.position[row / problem.groups] * problem.rotary, problem.rotary / 2);
    }
  }
}

// e^x within 2 units in the last place: 2^n times a polynomial of the remainder; saturates instead of overflowing.
HETIS_INLINE Floats exponential(Floats x) {
  x = x > 88.0f ? all(88.0f) : x;
  x = x < -87.0f ? all(-87.0f) : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats shifted = x * 1.44269504088896341f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // log 2 in two parts
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (Floats)((Ints)p + ((Ints)shifted << 23));
}

template <Activation A>
HETIS_INLINE Floats activate(Floats x) {
  if constexpr (A == Activation::silu) return x / (1.0f + exponential(-x));
  if constexpr (A == Activation::relu) return x > 0.0f ? x : (x == x ? Floats{} : x);  // NaN stays NaN
  // 0.5 (1 + tanh z) = 1 / (1 + e^(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3)
  if constexpr (A == Activation::gelu_tanh)
    return x / (1.0f + exponential(x * (1.0f + 0.044715f * x * x) * -1.5957691216057308f));
  if constexpr (A == Activation::gelu)
    for (int i = 0; i < kLanes; ++i) x[i] *= 0.5f * (1.0f + __builtin_erff(x[i] * 0.70710678118654752f));
  return x;
}

template <Activation A, class T>
HETIS_INLINE void gate_row(const T* gate, const T* up, T* out, int64_t columns) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    const Floats active = rounded<T>(activate<A>(load_some(gate + i, columns - i)));
    store_some(active * load_some(up + i, columns - i), out + i, columns - i);
  }
}

template <class T>
void gate_rows(const GateProblem<T>& problem, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const T* gate = problem.gate_up + t * problem.gate_up_stride;
    const T* up = gate + problem.columns;
    T* out = problem.out + t * problem.out_stride;
    switch (problem.activation) {
      case Activation::silu: gate_row<Activation::silu>(gate, up, out, problem.columns); break;
      case Activation::gelu: gate_row<Activation::gelu>(gate, up, out, problem.columns); break;
      case Activation::gelu_tanh: gate_row<Activation::gelu_tanh>(gate, up, out, problem.columns); break;
      case Activation::relu: gate_row<Activation::relu>(gate, up, out, problem.columns); break;
    }
  }
}

template <class T>
RowKernels<T> kernels() {
  return {&norm_rows<T>, &rope_rows<T>, &gate_rows<T>};
}
