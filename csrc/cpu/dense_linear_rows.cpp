// Rows of packed weights: packing them in place, and reading single ones (an embedding that is also the LM head).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "dense_linear.h"

namespace hetis {
namespace {

constexpr int64_t kGrainUnits = 1 << 15;  // units to move that are worth a wake-up of a thread

// Bytes that stay neighbours: one input, or a pair of bfloat16.
template <class Work>
void with_unit(at::ScalarType dtype, const Work& work) {
  if (dtype == at::kHalf) return work(uint16_t{});
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16, "linear: dtype ", dtype,
                    " is not supported; use float32, bfloat16 or float16");
  work(uint32_t{});
}

void check_packed(const at::Tensor& weight) {
  const int64_t inputs = weight.scalar_type() == at::kBFloat16 ? kInputs<c10::BFloat16> : 1;
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == kBlockRows && weight.size(3) == inputs &&
                        weight.is_contiguous() && weight.device().is_cpu(),
                    "linear: a packed weight of ", weight.scalar_type(), " must be a contiguous CPU tensor [N / 32, ",
                    "K / ", inputs, ", 32, ", inputs, "]; it is ", weight.sizes());
}

template <class Unit>
void pack_block(Unit* block, Unit* copy, int64_t steps) {
  std::memcpy(copy, block, static_cast<size_t>(kBlockRows * steps) * sizeof(Unit));
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t row = 0; row < kBlockRows; ++row) block[step * kBlockRows + row] = copy[row * steps + step];
}

// Packs a weight whose memory holds its rows, padded to whole steps and blocks, in row-major order.
void linear_pack(const at::Tensor& weight) {
  check_packed(weight);
  with_unit(weight.scalar_type(), [&](auto zero) {
    using Unit = decltype(zero);
    auto* data = static_cast<Unit*>(weight.mutable_data_ptr());
    const int64_t steps = weight.size(1), block_units = kBlockRows * steps;
    at::parallel_for(0, weight.size(0), std::max<int64_t>(1, kGrainUnits / std::max<int64_t>(1, block_units)),
                     [&](int64_t begin, int64_t end) {
                       std::vector<Unit> copy(static_cast<size_t>(block_units));
                       for (int64_t i = begin; i < end; ++i) pack_block(data + i * block_units, copy.data(), steps);
                     });
  });
}

template <class Unit>
void copy_row(const Unit* weight, int64_t row, int64_t steps, void* out, size_t bytes) {
  const Unit* unit = weight + row / kBlockRows * kBlockRows * steps + row % kBlockRows;
  auto* target = static_cast<char*>(out);
  const auto whole = static_cast<int64_t>(bytes / sizeof(Unit));
  for (int64_t step = 0; step < whole; ++step)
    std::memcpy(target + step * sizeof(Unit), unit + step * kBlockRows, sizeof(Unit));
  // of the last pair only the first input where their number is odd
  if (bytes % sizeof(Unit) != 0)
    std::memcpy(target + whole * sizeof(Unit), unit + whole * kBlockRows, bytes % sizeof(Unit));
}

}  // namespace

void linear_rows(const at::Tensor& weight, int64_t num_rows, const at::Tensor& index, const at::Tensor& out) {
  check_packed(weight);
  TORCH_CHECK_VALUE(index.dim() == 1 && index.scalar_type() == at::kLong && index.is_contiguous() &&
                        index.device().is_cpu() && out.dim() == 2 && out.size(0) == index.size(0) &&
                        out.scalar_type() == weight.scalar_type() && out.device().is_cpu() &&
                        (out.stride(1) == 1 || out.size(1) <= 1) &&
                        (out.size(1) + weight.size(3) - 1) / weight.size(3) == weight.size(1) &&
                        num_blocks(num_rows) == weight.size(0),
                    "linear_rows: the index must be int64 [T], the result [T, K] of the weight's dtype");
  const auto* rows = index.const_data_ptr<int64_t>();
  const int64_t count = index.size(0), steps = weight.size(1);
  TORCH_CHECK_INDEX(std::all_of(rows, rows + count, [&](int64_t row) { return 0 <= row && row < num_rows; }),
                    "linear_rows: a row is not below ", num_rows);
  const auto bytes = static_cast<size_t>(out.size(1) * out.element_size());
  const int64_t stride = out.stride(0) * out.element_size();
  auto* target = static_cast<char*>(out.mutable_data_ptr());
  with_unit(weight.scalar_type(), [&](auto zero) {
    using Unit = decltype(zero);
    const auto* data = static_cast<const Unit*>(weight.const_data_ptr());
    at::parallel_for(0, count, std::max<int64_t>(1, kGrainUnits / 4 / std::max<int64_t>(1, steps)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t i = begin; i < end; ++i) copy_row(data, rows[i], steps, target + i * stride, bytes);
                     });
  });
}

}  // namespace hetis

TORCH_LIBRARY_FRAGMENT(hetis, m) {
  m.def("linear_pack(Tensor(a!) weight) -> ()");
  m.def("linear_rows(Tensor weight, int num_rows, Tensor index, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(hetis, CPU, m) {
  m.impl("linear_pack", &hetis::linear_pack);
  m.impl("linear_rows", &hetis::linear_rows);
}
