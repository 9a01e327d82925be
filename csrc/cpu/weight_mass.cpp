// The operation `weight_mass`: sums of weights over the blocks of a vocabulary, cut to integers one by one.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

namespace hetis {
namespace {

constexpr int64_t kGrainValues = 16 * 1024;  // 5 to 10 us of work

void weight_mass(const at::Tensor& weight_RKB, const at::Tensor& mass_RK) {
  TORCH_CHECK_VALUE(weight_RKB.dim() == 3 && weight_RKB.is_contiguous() && weight_RKB.device().is_cpu() &&
                        weight_RKB.scalar_type() == at::kFloat,
                    "weight_mass: weights must be contiguous float32 [R, K, B] on the CPU");
  TORCH_CHECK_VALUE(mass_RK.sizes() == weight_RKB.sizes().slice(0, 2) && mass_RK.is_contiguous() &&
                        mass_RK.device().is_cpu() && mass_RK.scalar_type() == at::kLong,
                    "weight_mass: sums must be contiguous int64 [R, K] on the CPU");
  const int64_t size = weight_RKB.size(2);
  const auto* weight = weight_RKB.const_data_ptr<float>();
  auto* mass = mass_RK.mutable_data_ptr<int64_t>();
  at::parallel_for(0, mass_RK.numel(), std::max<int64_t>(1, kGrainValues / std::max<int64_t>(1, size)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       int64_t sum = 0;
                       for (int64_t k = i * size; k < (i + 1) * size; ++k)  // what is not a number counts 0
                         sum += weight[k] >= 1.0f ? static_cast<int64_t>(weight[k]) : 0;
                       mass[i] = sum;
                     }
                   });
}

}  // namespace
}  // namespace hetis

TORCH_LIBRARY_FRAGMENT(hetis, m) {
  m.def("weight_mass(Tensor weight_RKB, Tensor(a!) mass_RK) -> ()", &hetis::weight_mass);
}
