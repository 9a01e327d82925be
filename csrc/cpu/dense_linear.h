// y_TN = x_TK w_NK^T + b_N by a kernel that reads the weight, once per call, as one stream of memory per thread.
//
// T tokens, N outputs, K inputs. A packed weight lies in blocks of 32 rows (outputs):
//   [N / 32][K / kInputs][32 rows][kInputs], sizes rounded up, padded with zeros,
// kInputs = 2 neighbouring inputs for bfloat16 (what one multiply-add of AVX-512 takes), 1 for float32 and float16. A
// block takes the memory of its 32 row-major rows, so weights are packed in place.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <optional>
#include <type_traits>

namespace hetis {

constexpr int kBlockRows = 32;
constexpr int kSlabTokens = 252;  // that a kernel takes at once: whole panels; bounds the packed copy of x
constexpr int64_t kOneDnnTokens = 32;  // with matrix units (AMX), oneDNN is faster beyond in bfloat16

// Neighbouring inputs of one row in a packed weight.
template <class T>
inline constexpr int kInputs = std::is_same_v<T, c10::BFloat16> ? 2 : 1;

// Strides are counted in elements; rows of x and out are contiguous.
template <class T>
struct LinearProblem {
  const T* x;
  const T* weight;  // packed
  const T* bias;    // [N], may be null
  T* out;
  int64_t x_stride, out_stride;
  int64_t tokens, outputs, inputs;
};

// Entry for C++ callers, as final as torch.ops.hetis.linear, which is this function: x [T, K] and out [T, N] with
// contiguous rows of any stride, `weight` packed [B, G, 32, kInputs], bias [N]; one dtype, on the CPU. Checks shapes,
// uses torch's threads, and allocates nothing but scratch that later calls of the thread reuse. out must not overlap x.
void linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
            const at::Tensor& out);

// The same without checks, for callers that hold pointers. T: float, c10::BFloat16, c10::Half.
template <class T>
void linear(const LinearProblem<T>& problem);

// out[i] = row index[i] (int64, below num_rows = N) of a packed weight; out [T, K].
void linear_rows(const at::Tensor& weight, int64_t num_rows, const at::Tensor& index, const at::Tensor& out);

// Kernel of one instruction set, for at most kSlabTokens tokens: `pack` copies x, panel by panel, into the order in
// which `multiply` reads it for each block of the weight.
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

// Steps over K inputs of a packed weight, and its blocks of N outputs.
template <class T>
constexpr int64_t num_steps(int64_t inputs) {
  return (inputs + kInputs<T> - 1) / kInputs<T>;
}
constexpr int64_t num_blocks(int64_t outputs) { return (outputs + kBlockRows - 1) / kBlockRows; }

}  // namespace hetis
