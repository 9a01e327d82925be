// The operation `logit_peaks`: the largest logit of every block of a vocabulary, and whether all are finite, in one pass
// over logits of any float dtype.
//
// Floats are compared as integers: the bits, with those of negative floats flipped but for the sign, have the order of
// the floats; NaN lies above infinity or below its negative. Integers need no care for NaN, so the compiler makes vector
// instructions of the loop.
//
// R rows, V vocabulary, N blocks, B = kBlock tokens per block.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace hetis {
namespace {

constexpr int64_t kBlock = 64;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kGrainBlocks = 1024;  // 128 KiB of bfloat16: 5 to 10 us of work

template <class Float, class Int>
struct Keys {
  static Int of(Int bits) {
    constexpr int kSign = 8 * sizeof(Int) - 1;
    return static_cast<Int>(bits ^ ((bits >> kSign) & std::numeric_limits<Int>::max()));
  }
  static Float value(Int key) {
    const Int bits = of(key);
    Float found;
    std::memcpy(static_cast<void*>(&found), &bits, sizeof(found));
    return found;
  }
};

// `infinity`: its bits, which are its key; the key of its negative is their complement.
template <class Float, class Int>
void find_peaks(const at::Tensor& logits_RV, Int infinity, const at::Tensor& peak_RN, const at::Tensor& finite_RN) {
  const int64_t size = logits_RV.size(1), blocks = peak_RN.size(1), stride = logits_RV.stride(0);
  const auto* logits = reinterpret_cast<const Int*>(logits_RV.const_data_ptr());
  auto* peak = peak_RN.mutable_data_ptr<float>();
  auto* finite = finite_RN.mutable_data_ptr<bool>();
  at::parallel_for(0, logits_RV.size(0) * blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kBlock, count = std::min(kBlock, size - first);
      const Int* x = logits + i / blocks * stride + first;
      Int largest = std::numeric_limits<Int>::min(), smallest = std::numeric_limits<Int>::max();
      for (int64_t k = 0; k < count; ++k) {
        const Int key = Keys<Float, Int>::of(x[k]);
        largest = std::max(largest, key);
        smallest = std::min(smallest, key);
      }
      const Int least = static_cast<Int>(~infinity);
      peak[i] = smallest < least ? kNan : static_cast<float>(Keys<Float, Int>::value(largest));
      finite[i] = largest < infinity && smallest > least;
    }
  });
}

}  // namespace

void logit_peaks(const at::Tensor& logits_RV, const at::Tensor& peak_RN, const at::Tensor& finite_RN) {
  TORCH_CHECK_VALUE(logits_RV.dim() == 2 && logits_RV.device().is_cpu() && logits_RV.stride(1) == 1,
                    "logit_peaks: logits must be a CPU tensor [R, V] with contiguous rows");
  const int64_t blocks = (logits_RV.size(1) + kBlock - 1) / kBlock;
  for (const at::Tensor& out : {peak_RN, finite_RN})
    TORCH_CHECK_VALUE(out.is_contiguous() && out.device().is_cpu() && out.dim() == 2 &&
                          out.size(0) == logits_RV.size(0) && out.size(1) == blocks,
                      "logit_peaks: results must be contiguous [", logits_RV.size(0), ", ", blocks, "]");
  TORCH_CHECK_VALUE(peak_RN.scalar_type() == at::kFloat && finite_RN.scalar_type() == at::kBool,
                    "logit_peaks: peaks must be float32, the others bool");
  switch (logits_RV.scalar_type()) {
    case at::kFloat: return find_peaks<float, int32_t>(logits_RV, 0x7f800000, peak_RN, finite_RN);
    case at::kBFloat16: return find_peaks<c10::BFloat16, int16_t>(logits_RV, 0x7f80, peak_RN, finite_RN);
    case at::kHalf: return find_peaks<c10::Half, int16_t>(logits_RV, 0x7c00, peak_RN, finite_RN);
    default: TORCH_CHECK_VALUE(false, "logit_peaks: use float32, bfloat16 or float16");
  }
}

}  // namespace hetis

TORCH_LIBRARY_FRAGMENT(hetis, m) {
  m.def("logit_peaks(Tensor logits_RV, Tensor(a!) peak_RN, Tensor(b!) finite_RN) -> ()", &hetis::logit_peaks);
}
