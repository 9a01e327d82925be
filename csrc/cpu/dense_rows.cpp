// The operations rms_norm, add_rms_norm, qk_norm_rope and gated_activation: checks and threads around the loops.
// The Python launchers check shapes; the checks here keep direct calls from out-of-bounds access.

#include "dense_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "dense_isa.h"

namespace hetis {

Activation activation_named(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  TORCH_CHECK_VALUE(name == "relu", "unknown activation ", name, "; choose silu, gelu, gelu_tanh or relu");
  return Activation::relu;
}

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrainValues = 24 * 1024;  // values that are worth a wake-up of a thread: 5 to 10 us of work

void check_rows(const char* name, const Tensor& tensor, const Tensor& like) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.scalar_type() == like.scalar_type() &&
                        (tensor.size(-1) <= 1 || tensor.stride(-1) == 1),
                    name, " must be a CPU tensor of dtype ", like.scalar_type(), " with contiguous rows");
}

template <class Work>
void for_rows(int64_t rows, int64_t row_values, const Work& work) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrainValues / std::max<int64_t>(1, row_values)), work);
}

template <class Body>
void dispatch(at::ScalarType dtype, const Body& body) {
  if (dtype == at::kFloat) return body(float{});
  if (dtype == at::kBFloat16) return body(c10::BFloat16{});
  if (dtype == at::kHalf) return body(c10::Half{});
  TORCH_CHECK_VALUE(false, "dtype ", dtype, " is not supported; use float32, bfloat16 or float16");
}

void norm(const Tensor& x, const OptionalTensor& residual, const Tensor& weight, double epsilon, const Tensor& out) {
  TORCH_CHECK_VALUE(x.dim() == 2 && out.sizes() == x.sizes() && weight.dim() == 1 && weight.size(0) == x.size(1) &&
                        (!residual || residual->sizes() == x.sizes()),
                    "rms_norm: x, residual and result must be [T, H], the weight [H]");
  check_rows("rms_norm: weight", weight, x);
  check_rows("rms_norm: x", x, x);
  check_rows("rms_norm: result", out, x);
  if (residual) check_rows("rms_norm: residual", *residual, x);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const NormProblem<T> problem = {x.const_data_ptr<T>(),
                                    residual ? residual->mutable_data_ptr<T>() : nullptr,
                                    weight.const_data_ptr<T>(),
                                    out.mutable_data_ptr<T>(),
                                    x.stride(0),
                                    residual ? residual->stride(0) : 0,
                                    out.stride(0),
                                    x.size(1),
                                    static_cast<float>(epsilon)};
    const RowKernels<T> kernels = row_kernels<T>();
    for_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end) { kernels.norm(problem, begin, end); });
  });
}

void rms_norm(const Tensor& x, const Tensor& weight, double epsilon, const Tensor& out) {
  norm(x, std::nullopt, weight, epsilon, out);
}

void add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double epsilon, const Tensor& out) {
  norm(x, residual, weight, epsilon, out);
}

void check_rope(const Tensor& qkv, int64_t queries, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                const OptionalTensor& cos_sin, const Tensor& position) {
  TORCH_CHECK_VALUE(qkv.dim() == 4 && qkv.is_contiguous() && qkv.device().is_cpu() && qkv.size(2) == queries + 2,
                    "qk_norm_rope: qkv must be a contiguous CPU tensor [T, G, ", queries, " + 2, D]");
  TORCH_CHECK_VALUE(q_weight.has_value() == k_weight.has_value(),
                    "qk_norm_rope: give both the query and the key weight or neither");
  for (const OptionalTensor& weight : {q_weight, k_weight}) {
    if (!weight) continue;
    check_rows("qk_norm_rope: weight", *weight, qkv);
    TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == qkv.size(3), "qk_norm_rope: weights must be [D]");
  }
  if (!cos_sin) return;
  TORCH_CHECK_VALUE(cos_sin->scalar_type() == at::kFloat && cos_sin->is_contiguous() && cos_sin->dim() == 2 &&
                        cos_sin->size(1) % 2 == 0 && cos_sin->size(1) <= qkv.size(3),
                    "qk_norm_rope: cos_sin must be contiguous float32 [positions, R], R even and at most D");
  TORCH_CHECK_VALUE(position.scalar_type() == at::kLong && position.is_contiguous() && position.dim() == 1 &&
                        position.size(0) == qkv.size(0),
                    "qk_norm_rope: position must be contiguous int64 [T]");
  const auto* begin = position.const_data_ptr<int64_t>();
  const int64_t positions = cos_sin->size(0);
  TORCH_CHECK_INDEX(std::all_of(begin, begin + position.size(0), [&](int64_t p) { return 0 <= p && p < positions; }),
                    "qk_norm_rope: a position is outside the table of ", positions);
}

void qk_norm_rope(const Tensor& qkv, int64_t queries, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                  double epsilon, const OptionalTensor& cos_sin, const Tensor& position) {
  check_rope(qkv, queries, q_weight, k_weight, cos_sin, position);
  dispatch(qkv.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RopeProblem<T> problem = {qkv.mutable_data_ptr<T>(),
                                    q_weight ? q_weight->const_data_ptr<T>() : nullptr,
                                    k_weight ? k_weight->const_data_ptr<T>() : nullptr,
                                    cos_sin ? cos_sin->const_data_ptr<float>() : nullptr,
                                    cos_sin ? position.const_data_ptr<int64_t>() : nullptr,
                                    qkv.size(1),
                                    queries,
                                    qkv.size(3),
                                    cos_sin ? cos_sin->size(1) : 0,
                                    static_cast<float>(epsilon)};
    const RowKernels<T> kernels = row_kernels<T>();
    for_rows(qkv.size(0) * qkv.size(1), (queries + 1) * qkv.size(3),
             [&](int64_t begin, int64_t end) { kernels.rope(problem, begin, end); });
  });
}

void gated_activation(const Tensor& gate_up, const std::string& activation, const Tensor& out) {
  TORCH_CHECK_VALUE(gate_up.dim() == 2 && out.dim() == 2 && gate_up.size(0) == out.size(0) &&
                        gate_up.size(1) == 2 * out.size(1),
                    "gated_activation: the input must be [T, 2 F] and the result [T, F]");
  check_rows("gated_activation: input", gate_up, gate_up);
  check_rows("gated_activation: result", out, gate_up);
  dispatch(out.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const GateProblem<T> problem = {gate_up.const_data_ptr<T>(),
                                    out.mutable_data_ptr<T>(),
                                    gate_up.stride(0),
                                    out.stride(0),
                                    out.size(1),
                                    activation_named(activation)};
    const RowKernels<T> kernels = row_kernels<T>();
    for_rows(out.size(0), out.size(1), [&](int64_t begin, int64_t end) { kernels.gate(problem, begin, end); });
  });
}

}  // namespace
}  // namespace hetis

TORCH_LIBRARY_FRAGMENT(hetis, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float epsilon, Tensor(a!) out) -> ()");
  m.def("add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float epsilon, Tensor(b!) out) -> ()");
  m.def(
      "qk_norm_rope(Tensor(a!) qkv, int num_queries, Tensor? q_weight, Tensor? k_weight, float epsilon, "
      "Tensor? cos_sin, Tensor position) -> ()");
  m.def("gated_activation(Tensor gate_up, str activation, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(hetis, CPU, m) {
  m.impl("rms_norm", &hetis::rms_norm);
  m.impl("add_rms_norm", &hetis::add_rms_norm);
  m.impl("qk_norm_rope", &hetis::qk_norm_rope);
  m.impl("gated_activation", &hetis::gated_activation);
}
