#include <ATen/Parallel.h>

#include <atomic>

#include <c10/util/Exception.h>

#include "dense_isa.h"
#include "operations.h"

namespace hetis {
namespace {

#if HETIS_X86
#define HETIS_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define HETIS_CLONES
#endif

// 32 independent sums: enough for any vector unit to be limited by memory only.
HETIS_CLONES int64_t sum_of(const int64_t* words, int64_t count) {
  constexpr int64_t kSums = 32;
  uint64_t sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int64_t j = 0; j < kSums; ++j) sums[j] += static_cast<uint64_t>(words[i + j]);
  uint64_t total = 0;
  for (; i < count; ++i) total += static_cast<uint64_t>(words[i]);
  for (const uint64_t sum : sums) total += sum;
  return static_cast<int64_t>(total);
}

}  // namespace

int64_t stream_read(const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.is_contiguous(), "stream_read takes a contiguous CPU tensor");
  const auto* words = static_cast<const int64_t*>(tensor.const_data_ptr());
  const auto count = static_cast<int64_t>(tensor.nbytes() / sizeof(int64_t));
  std::atomic<int64_t> total{0};
  at::parallel_for(0, count, 1 << 16, [&](int64_t begin, int64_t end) { total += sum_of(words + begin, end - begin); });
  return total;
}

}  // namespace hetis
