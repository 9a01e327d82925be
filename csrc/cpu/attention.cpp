#include "attention.h"

#include <c10/util/Exception.h>

#include "operations.h"

namespace hetis {

const AttentionKernels& attention_kernels(Element element) {
  const int index = static_cast<int>(element);
#if HETIS_X86
  const Isa isa = dense_isa();
  if (isa == Isa::avx512_bf16 && element == Element::bf16) return kAvx512Bf16Attention;
  if (isa >= Isa::avx512) return kAvx512Attention[index];
  if (isa == Isa::avx2) return kAvx2Attention[index];
#endif
  return kPortableAttention[index];
}

Element element_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Element::f32;
    case at::kBFloat16:
      return Element::bf16;
    case at::kHalf:
      return Element::f16;
    default:
      TORCH_CHECK_VALUE(false, "attention of ", tensor.scalar_type(), "; use float32, bfloat16 or float16");
  }
}

void check_value_tensor(const at::Tensor& tensor, const at::Tensor& like, int64_t dim, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() == dim && tensor.device().is_cpu() && tensor.scalar_type() == like.scalar_type() &&
                        (tensor.stride(-1) == 1 || tensor.size(-1) <= 1),
                    name, " must be a CPU tensor of ", dim, " dimensions, of dtype ", like.scalar_type(),
                    ", with a contiguous last dimension");
}

void check_index_tensor(const at::Tensor& tensor, int64_t dim, const char* name) {
  TORCH_CHECK_VALUE(
      tensor.dim() == dim && tensor.device().is_cpu() && tensor.scalar_type() == at::kInt && tensor.is_contiguous(),
      name, " must be a contiguous int32 CPU tensor of ", dim, " dimensions");
}

void check_window(int64_t window) {
  TORCH_CHECK_VALUE(window >= 0, "window is ", window, "; use 0 for no window or a positive number of tokens");
}

void check_pool(const at::Tensor& pool_2PSD, const at::Tensor& q, int64_t num_queries) {
  check_value_tensor(pool_2PSD, q, 4, "pool");
  const int64_t head_dim = q.size(-1);
  TORCH_CHECK_VALUE(pool_2PSD.size(0) == 2 && pool_2PSD.size(3) == head_dim && pool_2PSD.stride(2) == head_dim &&
                        pool_2PSD.stride(1) == pool_2PSD.size(2) * head_dim,
                    "the pool has shape ", pool_2PSD.sizes(), "; it must be [2, P, S, ", head_dim,
                    "] with contiguous halves");
  TORCH_CHECK_VALUE(head_dim % 16 == 0 && head_dim > 0 && head_dim <= kMaxHeadDim, "head_dim is ", head_dim,
                    "; it must be a multiple of 16 up to ", kMaxHeadDim);
  TORCH_CHECK_VALUE(num_queries > 0 && num_queries <= kMaxQueries, num_queries,
                    " query heads per group; the kernel takes 1 to ", kMaxQueries);
}

int64_t attention_products(const at::Tensor& like, int64_t rounds) {
  const AttentionKernels& kernels = attention_kernels(element_of(like));
  std::atomic<int64_t> products{0};
  std::atomic<bool> finite{true};
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const ProductRun run = kernels.run_products(rounds);
      products += run.products;
      if (!(run.sum < 1e30f)) finite = false;
    }
  });
  TORCH_INTERNAL_ASSERT(finite);
  return products;
}

}  // namespace hetis
