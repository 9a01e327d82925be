// Operations on rows of activations: RMS norm, query/key norm with rotary positions, gated activation.
//
// T tokens, H hidden size, G head groups, M query heads per group, D head_dim, R rotary dimensions, F MLP columns.
#pragma once

#include <cstdint>
#include <string>

namespace hetis {

// residual (null for rms_norm): residual += x; out = norm(residual) * weight. Strides in elements.
template <class T>
struct NormProblem {
  const T* x;
  T* residual;
  const T* weight;
  T* out;
  int64_t x_stride, residual_stride, out_stride, hidden;
  float epsilon;
};

// Rows are the (token, head group) pairs of a contiguous qkv_TGHD. Both weights, or cos_sin, may be null.
template <class T>
struct RopeProblem {
  T* qkv;
  const T* q_weight;
  const T* k_weight;
  const float* cos_sin;
  const int64_t* position;
  int64_t groups, queries, head_dim, rotary;
  float epsilon;
};

enum class Activation { silu, gelu, gelu_tanh, relu };

// Raises ValueError for an unknown name.
Activation activation_named(const std::string& name);

template <class T>
struct GateProblem {
  const T* gate_up;
  T* out;
  int64_t gate_up_stride, out_stride, columns;
  Activation activation;
};

// Loops over a range of rows, for one instruction set.
template <class T>
struct RowKernels {
  void (*norm)(const NormProblem<T>& problem, int64_t begin, int64_t end);
  void (*rope)(const RopeProblem<T>& problem, int64_t begin, int64_t end);
  void (*gate)(const GateProblem<T>& problem, int64_t begin, int64_t end);
};

template <class T>
RowKernels<T> row_kernels();

}  // namespace hetis
