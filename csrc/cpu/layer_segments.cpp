// The class `LayerSegments`: all that a layer loop computes between two attentions, as one call and one parallel region.
//
// A layer has three parts: QKV (norm of the residual stream, projection, query/key norm and rotary positions), OUTPUT
// (projection of the attention) and MLP (norm, gate and up, activation, down). Part p belongs to layer p / 3. The kernels
// are those of the operations `linear`, `rms_norm`, `add_rms_norm`, `qk_norm_rope` and `gated_activation`, none of which
// lets a result depend on the division of work, so the bits are theirs.
//
// Tensors are checked when they are given: weights once, those of a step in `begin`.
//
// T tokens, H hidden size, G head groups, M query heads per group, D head_dim, F MLP columns.

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "dense_isa.h"
#include "dense_linear.h"
#include "dense_rows.h"
#include "team.h"

namespace hetis {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kParts = 3;
constexpr int64_t kTinyWeights = 1 << 19;  // about 20 us of work, less than it takes to wake threads
constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
enum Part : int64_t { kQkv = 0, kOutput = 1, kMlp = 2 };

void check(const char* name, const Tensor& tensor, const Tensor& like, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.scalar_type() == like.scalar_type() &&
                        tensor.sizes() == shape && tensor.stride(-1) == 1,
                    "LayerSegments: ", name, " is ", tensor.scalar_type(), " ", tensor.sizes(), "; it must be ",
                    like.scalar_type(), " ", shape, " on the CPU with contiguous rows");
}

struct Matrix {
  Tensor weight;
  OptionalTensor bias;

  void check_shape(const char* name, int64_t outputs, int64_t inputs) const {
    const int64_t group = weight.scalar_type() == at::kBFloat16 ? kInputs<c10::BFloat16> : 1;
    check(name, weight, weight, {num_blocks(outputs), (inputs + group - 1) / group, kBlockRows, group});
    TORCH_CHECK_VALUE(weight.is_contiguous(), "LayerSegments: ", name, " must be contiguous");
    if (bias) check(name, *bias, weight, {outputs});
  }
};

struct Layer {
  Tensor attention_norm;
  Matrix qkv;
  OptionalTensor query_norm, key_norm;
  Matrix output;
  Tensor mlp_norm;
  Matrix gate_up, down;
};

// Buffers of the layer loop for the largest step; rows are contiguous and follow each other.
struct Buffers {
  Tensor normed_TH, delta_TH, qkv_TGHD, attended_TGMD, gate_up_TF, active_TF;
};

template <class T>
T* pointer(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

class LayerSegments : public torch::CustomClassHolder {
 public:
  // `buffers`: in the order of `Buffers`. `cos_sin_PR`: None where the model has no rotary positions.
  LayerSegments(const std::string& activation, double epsilon, const OptionalTensor& cos_sin_PR,
                const std::vector<Tensor>& buffers)
      : activation_(activation_named(activation)), epsilon_(static_cast<float>(epsilon)), cos_sin_PR_(cos_sin_PR) {
    TORCH_CHECK_VALUE(buffers.size() == 6, "LayerSegments: there are six buffers, not ", buffers.size());
    buffers_ = {buffers[0], buffers[1], buffers[2], buffers[3], buffers[4], buffers[5]};
    for (const Tensor& buffer : buffers)
      TORCH_CHECK_VALUE(buffer.is_contiguous() && buffer.size(0) == buffers[0].size(0) && buffer.device().is_cpu() &&
                            buffer.scalar_type() == buffers[0].scalar_type() && buffer.numel() > 0,
                        "LayerSegments: buffers must be contiguous, of one dtype, for the same number of tokens");
    const auto& [normed, delta, qkv, attended, gate_up, active] = buffers_;
    TORCH_CHECK_VALUE(qkv.dim() == 4 && attended.dim() == 4, "LayerSegments: qkv is [T, G, M + 2, D]");
    hidden_ = normed.size(1), groups_ = qkv.size(1), queries_ = qkv.size(2) - 2, head_dim_ = qkv.size(3);
    columns_ = active.size(1);
    check("delta", delta, normed, normed.sizes());
    check("attended", attended, normed, {normed.size(0), groups_, queries_, head_dim_});
    check("gate_up", gate_up, normed, {normed.size(0), 2 * columns_});
    if (cos_sin_PR)
      TORCH_CHECK_VALUE(cos_sin_PR->scalar_type() == at::kFloat && cos_sin_PR->is_contiguous() &&
                            cos_sin_PR->dim() == 2 && cos_sin_PR->size(1) % 2 == 0 &&
                            cos_sin_PR->size(1) <= head_dim_,
                        "LayerSegments: cos_sin must be contiguous float32 [positions, R], R even and at most D");
  }

  // In order: attention norm, weight and bias of QKV, query norm, key norm, weight and bias of the output projection, MLP
  // norm, weight and bias of gate and up, weight and bias of down. Biases, and the query and key norm together, may be
  // None.
  void add_layer(const std::vector<OptionalTensor>& given) {
    TORCH_CHECK_VALUE(given.size() == 12, "LayerSegments: a layer has 12 tensors, not ", given.size());
    for (const size_t needed : {0, 1, 5, 7, 8, 10})
      TORCH_CHECK_VALUE(given[needed].has_value(), "LayerSegments: tensor ", needed, " of a layer is missing");
    TORCH_CHECK_VALUE(given[3].has_value() == given[4].has_value(), "LayerSegments: one of two head norms is missing");
    const Layer layer = {*given[0], {*given[1], given[2]}, given[3],     given[4],
                         {*given[5], given[6]}, *given[7], {*given[8], given[9]}, {*given[10], given[11]}};
    for (const Tensor& weight : {layer.qkv.weight, layer.output.weight, layer.gate_up.weight, layer.down.weight})
      check("a weight", weight, buffers_.normed_TH, weight.sizes());
    check("a norm", layer.attention_norm, buffers_.normed_TH, {hidden_});
    check("a norm", layer.mlp_norm, buffers_.normed_TH, {hidden_});
    layer.qkv.check_shape("QKV", groups_ * (queries_ + 2) * head_dim_, hidden_);
    layer.output.check_shape("output", hidden_, groups_ * queries_ * head_dim_);
    layer.gate_up.check_shape("gate_up", 2 * columns_, hidden_);
    layer.down.check_shape("down", hidden_, columns_);
    for (const OptionalTensor& norm : {layer.query_norm, layer.key_norm})
      if (norm) check("a head norm", *norm, buffers_.normed_TH, {head_dim_});
    layers_.push_back(layer);
  }

  // The tensors of a step: the residual stream, and int64 positions. Both must live until the last `run` of the step.
  void begin(const Tensor& hidden_TH, const Tensor& position_T) {
    tokens_ = hidden_TH.size(0);
    TORCH_CHECK_VALUE(tokens_ <= buffers_.normed_TH.size(0), "LayerSegments: ", tokens_, " tokens are too many");
    check("hidden", hidden_TH, buffers_.normed_TH, {tokens_, hidden_});
    check_positions(position_T);
    hidden_TH_ = hidden_TH, position_T_ = position_T;
  }

  // Computes the parts [begin, end).
  void run(int64_t begin, int64_t end) {
    TORCH_CHECK_VALUE(hidden_TH_.defined() && 0 <= begin && begin <= end &&
                          end <= kParts * static_cast<int64_t>(layers_.size()),
                      "LayerSegments: parts ", begin, " to ", end, " of ", layers_.size(), " layers, or no step");
    switch (hidden_TH_.scalar_type()) {
      case at::kFloat: return run_parts<float>(begin, end);
      case at::kBFloat16: return run_parts<c10::BFloat16>(begin, end);
      case at::kHalf: return run_parts<c10::Half>(begin, end);
      default: TORCH_CHECK_VALUE(false, "LayerSegments: use float32, bfloat16 or float16");
    }
  }

 private:
  void check_positions(const Tensor& position_T) const {
    if (!cos_sin_PR_) return;
    TORCH_CHECK_VALUE(position_T.scalar_type() == at::kLong && position_T.is_contiguous() && position_T.dim() == 1 &&
                          position_T.size(0) == tokens_ && position_T.device().is_cpu(),
                      "LayerSegments: positions must be contiguous int64 [T]");
    const auto* begin = position_T.const_data_ptr<int64_t>();
    const int64_t positions = cos_sin_PR_->size(0);
    TORCH_CHECK_INDEX(std::all_of(begin, begin + tokens_, [&](int64_t p) { return 0 <= p && p < positions; }),
                      "LayerSegments: a position is outside the table of ", positions);
  }

  int64_t weights_of(int64_t begin, int64_t end) const {
    int64_t weights = 0;
    for (int64_t part = begin; part < end; ++part) {
      const Layer& layer = layers_[part / kParts];
      if (part % kParts == kQkv) weights += layer.qkv.weight.numel();
      if (part % kParts == kOutput) weights += layer.output.weight.numel();
      if (part % kParts == kMlp) weights += layer.gate_up.weight.numel() + layer.down.weight.numel();
    }
    return weights;
  }

  template <class T>
  void run_parts(int64_t begin, int64_t end) {
    const LinearKernel<T> kernel = linear_kernel<T>();
    TORCH_CHECK(kernel.multiply != nullptr, "LayerSegments: no kernel of `linear` for this processor");
    const int64_t longest = std::max({hidden_, columns_, groups_ * queries_ * head_dim_});
    const auto bytes = static_cast<size_t>(kernel.packed_bytes(std::min<int64_t>(kSlabTokens, tokens_), longest));
    if (packed_.size() * sizeof(CacheLine) < bytes) packed_.resize(bytes / sizeof(CacheLine) + 1);
    // OpenMP keeps its threads only while the number stays the same: all of them, or none for tiny models
    const bool is_tiny = weights_of(begin, end) * (1 + tokens_ / 16) < kTinyWeights;
    run_team(is_tiny ? 1 : kNoLimit, [&](const Team& team) {
      for (int64_t part = begin; part < end; ++part) {
        const Layer& layer = layers_[part / kParts];
        if (part % kParts == kQkv) run_qkv<T>(team, kernel, layer, part != 0);
        if (part % kParts == kOutput) run_output<T>(team, kernel, layer);
        if (part % kParts == kMlp) run_mlp<T>(team, kernel, layer);
      }
    });
  }

  template <class T>
  void run_qkv(const Team& team, const LinearKernel<T>& kernel, const Layer& layer, bool adds) {
    normalise<T>(team, layer.attention_norm, adds);
    project<T>(team, kernel, layer.qkv, buffers_.normed_TH, hidden_, buffers_.qkv_TGHD,
               groups_ * (queries_ + 2) * head_dim_);
    if (!layer.query_norm && !cos_sin_PR_) return;
    const RopeProblem<T> problem = {static_cast<T*>(buffers_.qkv_TGHD.data_ptr()),
                                    pointer<const T>(layer.query_norm),
                                    pointer<const T>(layer.key_norm),
                                    pointer<const float>(cos_sin_PR_),
                                    cos_sin_PR_ ? static_cast<const int64_t*>(position_T_.data_ptr()) : nullptr,
                                    groups_,
                                    queries_,
                                    head_dim_,
                                    cos_sin_PR_ ? cos_sin_PR_->size(1) : 0,
                                    epsilon_};
    const RowKernels<T> rows = row_kernels<T>();
    team(tokens_ * groups_, [&](int64_t begin, int64_t end) { rows.rope(problem, begin, end); });
  }

  template <class T>
  void run_output(const Team& team, const LinearKernel<T>& kernel, const Layer& layer) {
    project<T>(team, kernel, layer.output, buffers_.attended_TGMD, groups_ * queries_ * head_dim_, buffers_.delta_TH,
               hidden_);
  }

  template <class T>
  void run_mlp(const Team& team, const LinearKernel<T>& kernel, const Layer& layer) {
    normalise<T>(team, layer.mlp_norm, true);
    project<T>(team, kernel, layer.gate_up, buffers_.normed_TH, hidden_, buffers_.gate_up_TF, 2 * columns_);
    const GateProblem<T> problem = {static_cast<const T*>(buffers_.gate_up_TF.data_ptr()),
                                    static_cast<T*>(buffers_.active_TF.data_ptr()),
                                    2 * columns_,
                                    columns_,
                                    columns_,
                                    activation_};
    const RowKernels<T> rows = row_kernels<T>();
    team(tokens_, [&](int64_t begin, int64_t end) { rows.gate(problem, begin, end); });
    project<T>(team, kernel, layer.down, buffers_.active_TF, columns_, buffers_.delta_TH, hidden_);
  }

  // normed = norm(hidden), after hidden += delta where `adds`.
  template <class T>
  void normalise(const Team& team, const Tensor& weight, bool adds) {
    T* hidden = static_cast<T*>(hidden_TH_.data_ptr());
    const T* delta = static_cast<const T*>(buffers_.delta_TH.data_ptr());
    const int64_t stride = hidden_TH_.stride(0);
    const NormProblem<T> problem = {adds ? delta : hidden,
                                    adds ? hidden : nullptr,
                                    static_cast<const T*>(weight.data_ptr()),
                                    static_cast<T*>(buffers_.normed_TH.data_ptr()),
                                    adds ? hidden_ : stride,
                                    stride,
                                    hidden_,
                                    hidden_,
                                    epsilon_};
    const RowKernels<T> rows = row_kernels<T>();
    team(tokens_, [&](int64_t begin, int64_t end) { rows.norm(problem, begin, end); });
  }

  // out = x weight^T + bias, by all threads of the team.
  template <class T>
  void project(const Team& team, const LinearKernel<T>& kernel, const Matrix& matrix, const Tensor& x, int64_t inputs,
               const Tensor& out, int64_t outputs) {
    auto* packed = static_cast<void*>(packed_.data());
    for (int64_t first = 0; first < tokens_; first += kSlabTokens) {
      const LinearProblem<T> slab = {static_cast<const T*>(x.data_ptr()) + first * inputs,
                                     static_cast<const T*>(matrix.weight.data_ptr()),
                                     pointer<const T>(matrix.bias),
                                     static_cast<T*>(out.data_ptr()) + first * outputs,
                                     inputs,
                                     outputs,
                                     std::min<int64_t>(kSlabTokens, tokens_ - first),
                                     outputs,
                                     inputs};
      team(kernel.num_panels(slab.tokens), [&](int64_t begin, int64_t end) { kernel.pack(slab, packed, begin, end); });
      team(num_blocks(outputs), [&](int64_t begin, int64_t end) { kernel.multiply(slab, packed, begin, end); });
    }
  }

  struct alignas(64) CacheLine {
    char bytes[64];
  };

  Activation activation_;
  float epsilon_;
  OptionalTensor cos_sin_PR_;
  Buffers buffers_;
  int64_t hidden_ = 0, groups_ = 0, queries_ = 0, head_dim_ = 0, columns_ = 0, tokens_ = 0;
  std::vector<Layer> layers_;
  Tensor hidden_TH_, position_T_;
  std::vector<CacheLine> packed_;
};

// Most tokens of a step for which the operation `linear` uses the same kernel; 0: never.
int64_t segments_max_tokens(at::ScalarType dtype) {
  if (linear_kernel<float>().multiply == nullptr) return 0;
  return has_amx() && dtype == at::kBFloat16 ? kOneDnnTokens : kNoLimit;
}

}  // namespace
}  // namespace hetis

TORCH_LIBRARY_FRAGMENT(hetis, m) {
  m.def("segments_max_tokens(ScalarType dtype) -> int", &hetis::segments_max_tokens);
  m.class_<hetis::LayerSegments>("LayerSegments")
      .def(torch::init<const std::string&, double, const std::optional<at::Tensor>&, const std::vector<at::Tensor>&>())
      .def("add_layer", &hetis::LayerSegments::add_layer)
      .def("begin", &hetis::LayerSegments::begin)
      .def("run", &hetis::LayerSegments::run);
}
