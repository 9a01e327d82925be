// y_TN = x_TK w_NK^T + b_N by a kernel that reads the weight as the checkpoint holds it: row-major, not packed, not
// copied.
//
// T tokens, N outputs, K inputs.
#pragma once

#include <cstdint>

namespace hetis {

constexpr int kBlockRows = 6;  // weight rows of one register tile, a block of `multiply`

// Strides are counted in elements; rows are contiguous.
template <class T>
struct LinearProblem {
  const T* x;
  const T* weight;
  const T* bias;  // may be null
  T* out;
  int64_t x_stride, weight_stride, out_stride;
  int64_t tokens, outputs, inputs;
};

// Kernel of one instruction set: `pack` copies x, panel by panel, into the order in which `multiply` reads it for
// blocks of weight rows. The last two blocks may share rows, so that one thread must compute both.
template <class T>
struct LinearKernel {
  int64_t (*packed_bytes)(int64_t tokens, int64_t inputs);
  int64_t (*num_panels)(int64_t tokens);
  void (*pack)(const LinearProblem<T>& problem, void* packed, int64_t panel_begin, int64_t panel_end);
  void (*multiply)(const LinearProblem<T>& problem, const void* packed, int64_t block_begin, int64_t block_end);
};

// The kernel for this processor; all members are null where there is none (portable).
template <class T>
LinearKernel<T> linear_kernel();

}  // namespace hetis
