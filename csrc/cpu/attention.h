// What the torch side of attention and of the cache operations shares: argument checks, working memory, threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "attention_kernels.h"

namespace hetis {

Element element_of(const at::Tensor& tensor);

// TORCH_CHECK with ValueError. These are the only checks of a call on the CPU: launchers in Python leave them to us.
void check_value_tensor(const at::Tensor& tensor, const at::Tensor& like, int64_t dim, const char* name);
void check_index_tensor(const at::Tensor& tensor, int64_t dim, const char* name);
void check_window(int64_t window);
void check_pool(const at::Tensor& pool_2PSD, const at::Tensor& q, int64_t num_queries);

// Memory that grows and is kept, one per thread and purpose: no allocation once the largest call has been seen.
class Workspace {
 public:
  // Aligned to 64 bytes; what was there before is lost.
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      memory_.reset(static_cast<char*>(::operator new[](bytes, std::align_val_t{64})));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
  };
  std::unique_ptr<char[], Free> memory_;
  size_t size_ = 0;
};

// Calls work(claim) on torch's threads, or on this one alone if `alone`; claim() hands out 0 ... num_items - 1 in order
// and then num_items. Who gets which item is up to chance, so items must not depend on it; unequal ones balance by
// themselves.
template <class Work>
void share(int64_t num_items, bool alone, const Work& work) {
  const int64_t threads = alone ? 1 : std::min<int64_t>(num_items, at::get_num_threads());
  std::atomic<int64_t> next{0};
  const auto claim = [&] { return std::min(next.fetch_add(1, std::memory_order_relaxed), num_items); };
  if (threads <= 1) return work(claim);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin < end) work(claim);
  });
}

}  // namespace hetis
