// Names and signatures of the attention and cache operations in torch.ops.hetis. Other files register their operations
// with TORCH_LIBRARY_FRAGMENT.
//
// Operations here have no dispatch key: a call goes straight to the function, which checks that its tensors are on the
// CPU.

#include <torch/library.h>
#include <torch/version.h>

#include "operations.h"

TORCH_LIBRARY(hetis, m) {
  m.def(
      "paged_decode(Tensor q_NMD, Tensor pool_2PSD, Tensor page_table_BW, Tensor lane_U, Tensor qkv_U, "
      "Tensor length_U, float scale, int window, Tensor(a!) out_NMD) -> ()",
      &hetis::paged_decode);
  m.def(
      "paged_prefill(Tensor q_TGMD, Tensor pool_2PSD, Tensor page_table_BW, Tensor query_start_C1, Tensor lane_CG, "
      "Tensor context_C, float scale, int window, Tensor(a!) out_TGMD) -> ()",
      &hetis::paged_prefill);
  m.def("kv_append(Tensor k_ND, Tensor v_ND, Tensor(a!) pool_2PSD, Tensor qkv_A, Tensor cell_A) -> ()",
        &hetis::kv_append);
  m.def("lane_pack(Tensor source_NF, Tensor qkv_U, Tensor(a!) out_UF) -> ()", &hetis::lane_pack);
  m.def("lane_unpack(Tensor source_UF, Tensor qkv_U, Tensor(a!) out_NF) -> ()", &hetis::lane_unpack);
  m.def("page_gather(Tensor pool_L2PSD, Tensor page_N, Tensor(a!) out_NL2SD) -> ()", &hetis::page_gather);
  m.def("page_scatter(Tensor source_NL2SD, Tensor page_N, Tensor(a!) pool_L2PSD) -> ()", &hetis::page_scatter);
  m.def("attention_products(Tensor like, int rounds) -> int", &hetis::attention_products);
  m.def("stream_read(Tensor tensor) -> int", &hetis::stream_read);
  m.def("built_for_torch() -> str", [] { return std::string(TORCH_VERSION); });
}
