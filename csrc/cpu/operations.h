// Operations registered by registration.cpp. Their contracts are the docstrings of the launchers in kernels/.
#pragma once

#include <ATen/core/Tensor.h>

namespace hetis {

void paged_decode(const at::Tensor& q_NMD, const at::Tensor& pool_2PSD, const at::Tensor& page_table_BW,
                  const at::Tensor& lane_U, const at::Tensor& qkv_U, const at::Tensor& length_U, double scale,
                  int64_t window, const at::Tensor& out_NMD);
void paged_prefill(const at::Tensor& q_TGMD, const at::Tensor& pool_2PSD, const at::Tensor& page_table_BW,
                   const at::Tensor& query_start_C1, const at::Tensor& lane_CG, const at::Tensor& context_C,
                   double scale, int64_t window, const at::Tensor& out_TGMD);

void kv_append(const at::Tensor& k_ND, const at::Tensor& v_ND, const at::Tensor& pool_2PSD, const at::Tensor& qkv_A,
               const at::Tensor& cell_A);
void lane_pack(const at::Tensor& source_NF, const at::Tensor& qkv_U, const at::Tensor& out_UF);
void lane_unpack(const at::Tensor& source_UF, const at::Tensor& qkv_U, const at::Tensor& out_NF);
void page_gather(const at::Tensor& pool_L2PSD, const at::Tensor& page_N, const at::Tensor& out_NL2SD);
void page_scatter(const at::Tensor& source_NL2SD, const at::Tensor& page_N, const at::Tensor& pool_L2PSD);

// Multiplies and adds in registers as decode attention of `like`'s dtype does, `rounds` times on each of torch's threads;
// returns the number of products. Used to measure what bounds decode beside memory.
int64_t attention_products(const at::Tensor& like, int64_t rounds);

// Reads a contiguous tensor with torch's threads and returns the sum of its 64-bit words. Used to measure memory
// bandwidth.
int64_t stream_read(const at::Tensor& tensor);

}  // namespace hetis
