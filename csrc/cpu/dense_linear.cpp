// The operation `linear`: threads, scratch and checks around the kernels.

#include "dense_linear.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>

#include "dense_isa.h"
#include "dense_linear_run.h"

namespace hetis {
namespace {

// Memory of the calling thread for packed x, reused by later calls.
void* scratch(size_t bytes) {
  constexpr size_t kAlignment = 64;
  thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    capacity = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    memory.reset(std::aligned_alloc(kAlignment, capacity));
    TORCH_CHECK(memory != nullptr, "linear: no memory for ", capacity, " bytes of activations");
  }
  return memory.get();
}

template <class T>
void run(const LinearProblem<T>& problem) {
  const LinearKernel<T> kernel = linear_kernel<T>();
  TORCH_CHECK(kernel.multiply != nullptr, "linear: no kernel for this processor");
  void* packed = scratch(static_cast<size_t>(linear_scratch_bytes(kernel, problem.tokens, problem.inputs)));
  run_linear(problem, kernel, packed, [](int64_t count, int64_t grain, const auto& work) {
    at::parallel_for(0, count, grain, work);
  });
}

void check(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
           const at::Tensor& out) {
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 2 && out.dim() == 2 && x.size(1) == weight.size(1) &&
                        out.size(0) == x.size(0) && out.size(1) == weight.size(0),
                    "linear: x is ", x.sizes(), ", the weight ", weight.sizes(), " and the result ", out.sizes(),
                    "; they must be [T, K], [N, K] and [T, N]");
  for (const at::Tensor& tensor : {x, weight, out})
    TORCH_CHECK_VALUE(tensor.scalar_type() == weight.scalar_type() && tensor.device().is_cpu() &&
                          (tensor.stride(1) == 1 || tensor.size(1) == 1),
                      "linear: x, weight and result must be CPU tensors of one dtype with contiguous rows");
  TORCH_CHECK_VALUE(!bias || (bias->scalar_type() == weight.scalar_type() && bias->device().is_cpu() &&
                              bias->is_contiguous() && bias->dim() == 1 && bias->size(0) == weight.size(0)),
                    "linear: the bias must be one contiguous value of the weight's dtype for each output");
}

void linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
            const at::Tensor& out) {
  check(x, weight, bias, out);
  if (out.numel() == 0) return;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "linear", [&] {
    if constexpr (std::is_same_v<scalar_t, double>) {
      TORCH_CHECK_VALUE(false, "linear: float64 is not supported; use float32, bfloat16 or float16");
    } else {
      run<scalar_t>({x.const_data_ptr<scalar_t>(), weight.const_data_ptr<scalar_t>(),
                     bias ? bias->const_data_ptr<scalar_t>() : nullptr, out.mutable_data_ptr<scalar_t>(),
                     x.stride(0), weight.stride(0), out.stride(0), x.size(0), weight.size(0), x.size(1)});
    }
  });
}

// Number of tokens up to which this kernel is fastest; with matrix units (AMX), oneDNN is faster beyond.
int64_t linear_max_tokens(at::ScalarType dtype) {
  constexpr int64_t kNone = 0, kFew = 32, kAll = std::numeric_limits<int64_t>::max();
  if (linear_kernel<float>().multiply == nullptr) return kNone;
  return has_amx() && dtype == at::kBFloat16 ? kFew : kAll;
}

}  // namespace
}  // namespace hetis

TORCH_LIBRARY_FRAGMENT(hetis, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("linear_max_tokens(ScalarType dtype) -> int", &hetis::linear_max_tokens);
}

TORCH_LIBRARY_IMPL(hetis, CPU, m) { m.impl("linear", &hetis::linear); }
