// The operation `linear`: threads, scratch and checks around the kernels.

#include "dense_linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>

#include "dense_isa.h"

namespace hetis {
namespace {

constexpr int64_t kGrainWeights = 1 << 18;  // weights of about 10 us of work, several times a wake-up
constexpr int64_t kOwnTokens = 96;          // per thread, from which on threads divide tokens
constexpr int64_t kGrainPacked = 1 << 15;   // values of x that are worth a second parallel region to pack them

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

// The tokens [first, last) of a problem, at most kSlabTokens of them.
template <class T>
LinearProblem<T> slab_of(const LinearProblem<T>& problem, int64_t first, int64_t last) {
  LinearProblem<T> slab = problem;
  slab.tokens = std::min<int64_t>(kSlabTokens, last - first);
  slab.x = problem.x + first * problem.x_stride;
  slab.out = problem.out + first * problem.out_stride;
  return slab;
}

// Many tokens: each thread packs and multiplies tokens of its own, so that no packed x passes between cores: that took
// 0.2 ms of 2.5 (256 tokens, K = 2,048), in other minutes 0.55. Every thread reads all weights.
template <class T>
void run_by_tokens(const LinearProblem<T>& problem, const LinearKernel<T>& kernel, int64_t threads) {
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = problem.tokens * end / threads;
    for (int64_t first = problem.tokens * begin / threads; first < last; first += kSlabTokens) {
      const LinearProblem<T> slab = slab_of(problem, first, last);
      void* packed = scratch(static_cast<size_t>(kernel.packed_bytes(slab.tokens, slab.inputs)));
      kernel.pack(slab, packed, 0, kernel.num_panels(slab.tokens));
      kernel.multiply(slab, packed, 0, num_blocks(slab.outputs));
    }
  });
}

// Fewer tokens: each thread multiplies blocks of its own. x is packed once for all, or, where it is small, once in each
// thread: that saves a barrier.
template <class T>
void run_by_blocks(const LinearProblem<T>& problem, const LinearKernel<T>& kernel) {
  const auto bytes = static_cast<size_t>(kernel.packed_bytes(problem.tokens, problem.inputs));
  const int64_t panels = kernel.num_panels(problem.tokens), values = problem.tokens * problem.inputs;
  void* common = nullptr;
  if (values > kGrainPacked) {
    common = scratch(bytes);
    at::parallel_for(0, panels, std::max<int64_t>(1, kGrainPacked * panels / values),
                     [&](int64_t begin, int64_t end) { kernel.pack(problem, common, begin, end); });
  }
  const int64_t block_weights = std::max<int64_t>(1, kBlockRows * problem.inputs * (1 + problem.tokens / 16));
  at::parallel_for(0, num_blocks(problem.outputs), std::max<int64_t>(1, kGrainWeights / block_weights),
                   [&](int64_t begin, int64_t end) {
                     void* packed = common != nullptr ? common : scratch(bytes);
                     if (common == nullptr) kernel.pack(problem, packed, 0, panels);
                     kernel.multiply(problem, packed, begin, end);
                   });
}

// Makes a row-major copy, which takes less time than oneDNN gains by matrix units, and lives during the call.
void linear_by_onednn(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                   const at::Tensor& out) {
  const at::Tensor rows = at::empty({out.size(1), x.size(1)}, weight.options());
  linear_rows(weight, rows.size(0), at::arange(rows.size(0), at::kLong), rows);
  at::Tensor result = out;
  if (bias)
    at::addmm_out(result, *bias, x, rows.t());
  else
    at::mm_out(result, x, rows.t());
}

void check(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
           const at::Tensor& out) {
  const int64_t group = weight.scalar_type() == at::kBFloat16 ? kInputs<c10::BFloat16> : 1;
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 4 && out.dim() == 2 && out.size(0) == x.size(0) &&
                        weight.size(0) == num_blocks(out.size(1)) && weight.size(2) == kBlockRows &&
                        weight.size(1) == (x.size(1) + group - 1) / group && weight.size(3) == group &&
                        weight.is_contiguous(),
                    "linear: x is ", x.sizes(), ", the weight ", weight.sizes(), " and the result ", out.sizes(),
                    "; they must be [T, K], packed [N / 32, K / ", group, ", 32, ", group, "] and [T, N]");
  for (const at::Tensor& tensor : {x, weight, out})
    TORCH_CHECK_VALUE(tensor.scalar_type() == weight.scalar_type() && tensor.device().is_cpu() &&
                          (tensor.stride(-1) == 1 || tensor.size(-1) <= 1),
                      "linear: x, weight and result must be CPU tensors of one dtype with contiguous rows");
  TORCH_CHECK_VALUE(!bias || (bias->scalar_type() == weight.scalar_type() && bias->device().is_cpu() &&
                              bias->is_contiguous() && bias->dim() == 1 && bias->size(0) == out.size(1)),
                    "linear: the bias must be one contiguous value of the weight's dtype for each output");
}

template <class T>
void run_tensors(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                 const at::Tensor& out) {
  linear<T>({x.const_data_ptr<T>(), weight.const_data_ptr<T>(), bias ? bias->const_data_ptr<T>() : nullptr,
             out.mutable_data_ptr<T>(), x.stride(0), out.stride(0), x.size(0), out.size(1), x.size(1)});
}

bool linear_has_kernel() { return linear_kernel<float>().multiply != nullptr; }

}  // namespace

template <class T>
void linear(const LinearProblem<T>& problem) {
  const LinearKernel<T> kernel = linear_kernel<T>();
  TORCH_CHECK(kernel.multiply != nullptr, "linear: no kernel for this processor");
  if (problem.outputs == 0) return;
  const int64_t threads = at::get_num_threads();
  if (problem.tokens >= kOwnTokens * threads) return run_by_tokens(problem, kernel, threads);
  for (int64_t first = 0; first < problem.tokens; first += kSlabTokens)
    run_by_blocks(slab_of(problem, first, problem.tokens), kernel);
}

template void linear<float>(const LinearProblem<float>& problem);
template void linear<c10::BFloat16>(const LinearProblem<c10::BFloat16>& problem);
template void linear<c10::Half>(const LinearProblem<c10::Half>& problem);

void linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
            const at::Tensor& out) {
  check(x, weight, bias, out);
  const at::ScalarType dtype = weight.scalar_type();
  if (dtype == at::kBFloat16 && x.size(0) > kOneDnnTokens && has_amx()) return linear_by_onednn(x, weight, bias, out);
  if (dtype == at::kBFloat16) return run_tensors<c10::BFloat16>(x, weight, bias, out);
  if (dtype == at::kHalf) return run_tensors<c10::Half>(x, weight, bias, out);
  TORCH_CHECK_VALUE(dtype == at::kFloat, "linear: dtype ", dtype,
                    " is not supported; use float32, bfloat16 or float16");
  run_tensors<float>(x, weight, bias, out);
}

}  // namespace hetis

TORCH_LIBRARY_FRAGMENT(hetis, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("linear_by_onednn(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()", &hetis::linear_by_onednn);
  m.def("linear_has_kernel() -> bool", &hetis::linear_has_kernel);
}

TORCH_LIBRARY_IMPL(hetis, CPU, m) {
  m.impl("linear", static_cast<void (*)(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                        const at::Tensor&)>(&hetis::linear));
}
