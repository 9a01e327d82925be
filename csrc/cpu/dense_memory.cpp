// Huge pages for weights: with 4 KB pages a quarter of the memory bandwidth is lost to page walks (measured on Zen 5).

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// Advises the kernel to use huge pages inside `tensor`; with `now`, to gather them before it returns (the tensor must
// be filled, since this makes all of it resident). Has no effect where the system declines.
void advise_huge_pages(const at::Tensor& tensor, bool now) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (tensor.numel() == 0) return;
  int64_t elements = 1;  // from the first to the last one, with gaps between rows of a slice
  for (int64_t d = 0; d < tensor.dim(); ++d) elements += (tensor.size(d) - 1) * tensor.stride(d);
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + elements * tensor.element_size()) / kHugePage * kHugePage;
  if (first >= last) return;
  void* address = reinterpret_cast<void*>(first);
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1; older systems refuse it
  if (madvise(address, last - first, MADV_HUGEPAGE) == 0 && now) madvise(address, last - first, kCollapse);
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hetis, m) { m.def("advise_huge_pages(Tensor tensor, bool now) -> ()"); }

TORCH_LIBRARY_IMPL(hetis, CPU, m) { m.impl("advise_huge_pages", &advise_huge_pages); }
