// Copies between the KV cache, messages and buffers.
//
// A appended (token, head group) pairs, N vectors of such pairs, U vectors of a message, F values per vector, L layers,
// P pages, S tokens per page, D head_dim.

#include <algorithm>
#include <cstring>

#include "attention.h"
#include "operations.h"

namespace hetis {
namespace {

// Bytes that one thread copies before waking another one pays.
constexpr int64_t kGrainBytes = 128 * 1024;

// Copies `count` pieces of `bytes`; address(i) gives destination and source of piece i.
template <class Address>
void copy_pieces(int64_t count, int64_t bytes, const Address& address) {
  at::parallel_for(0, count, std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const auto [to, from] = address(i);
                       std::memcpy(to, from, bytes);
                     }
                   });
}

struct Piece {
  char* to;
  const char* from;
};

char* bytes_of(const at::Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }

void check_vectors(const at::Tensor& message_UF, const at::Tensor& qkv_U, const at::Tensor& vectors_NF) {
  check_value_tensor(message_UF, vectors_NF, 2, "the message");
  check_value_tensor(vectors_NF, vectors_NF, 2, "the vectors");
  check_index_tensor(qkv_U, 1, "qkv");
  TORCH_CHECK_VALUE(message_UF.size(0) == qkv_U.size(0) && message_UF.size(1) == vectors_NF.size(1), "the message is ",
                    message_UF.sizes(), ", the vectors are ", vectors_NF.sizes(), " for ", qkv_U.size(0), " indices");
}

void check_pages(const at::Tensor& pool_L2PSD, const at::Tensor& page_N, const at::Tensor& buffer_NL2SD) {
  check_index_tensor(page_N, 1, "page");
  TORCH_CHECK_VALUE(pool_L2PSD.dim() == 5 && buffer_NL2SD.dim() == 5 && pool_L2PSD.device().is_cpu() &&
                        buffer_NL2SD.device().is_cpu() && pool_L2PSD.is_contiguous() && buffer_NL2SD.is_contiguous() &&
                        pool_L2PSD.scalar_type() == buffer_NL2SD.scalar_type() && pool_L2PSD.size(1) == 2 &&
                        buffer_NL2SD.size(0) == page_N.size(0) && buffer_NL2SD.size(1) == pool_L2PSD.size(0) &&
                        buffer_NL2SD.size(2) == 2 && buffer_NL2SD.sizes().slice(3) == pool_L2PSD.sizes().slice(3),
                    "the pool ", pool_L2PSD.sizes(), " and the buffer ", buffer_NL2SD.sizes(), " for ", page_N.size(0),
                    " pages must be contiguous CPU tensors of one dtype that fit together");
}

// Pieces of a buffer of whole pages: (n, l, kv) in order. in_pool and in_buffer are byte offsets.
struct PagePieces {
  int64_t planes, num_pages, bytes;
  const int32_t* page_N;

  PagePieces(const at::Tensor& pool_L2PSD, const at::Tensor& page)
      : planes(2 * pool_L2PSD.size(0)),
        num_pages(pool_L2PSD.size(2)),
        bytes(pool_L2PSD.size(3) * pool_L2PSD.size(4) * pool_L2PSD.element_size()),
        page_N(page.const_data_ptr<int32_t>()) {}
  int64_t in_pool(int64_t i) const { return (i % planes * num_pages + page_N[i / planes]) * bytes; }
  int64_t in_buffer(int64_t i) const { return i * bytes; }
};

}  // namespace

void kv_append(const at::Tensor& k_ND, const at::Tensor& v_ND, const at::Tensor& pool_2PSD, const at::Tensor& qkv_A,
               const at::Tensor& cell_A) {
  check_value_tensor(k_ND, k_ND, 2, "k");
  check_value_tensor(v_ND, k_ND, 2, "v");
  check_value_tensor(pool_2PSD, k_ND, 4, "pool");
  check_index_tensor(qkv_A, 1, "qkv");
  const int64_t A = qkv_A.size(0), D = k_ND.size(1);
  TORCH_CHECK_VALUE(v_ND.sizes() == k_ND.sizes() && pool_2PSD.size(0) == 2 && pool_2PSD.size(3) == D &&
                        pool_2PSD.stride(2) == D && pool_2PSD.stride(1) == pool_2PSD.size(2) * D,
                    "kv_append: k is ", k_ND.sizes(), ", v ", v_ND.sizes(), ", the pool ", pool_2PSD.sizes(),
                    "; they must be [N, D], [N, D] and [2, P, S, D] with contiguous halves");
  TORCH_CHECK_VALUE(cell_A.dim() == 1 && cell_A.size(0) == A && cell_A.scalar_type() == at::kLong &&
                        cell_A.device().is_cpu() && cell_A.is_contiguous(),
                    "kv_append: cell must be a contiguous int64 CPU tensor of ", A, " values");
  const int64_t size = k_ND.element_size(), vector_bytes = D * size;
  const auto* qkv = qkv_A.const_data_ptr<int32_t>();
  const auto* cell = cell_A.const_data_ptr<int64_t>();
  char* pool[2] = {bytes_of(pool_2PSD), bytes_of(pool_2PSD) + pool_2PSD.stride(0) * size};
  const char* source[2] = {static_cast<const char*>(k_ND.const_data_ptr()),
                           static_cast<const char*>(v_ND.const_data_ptr())};
  const int64_t stride[2] = {k_ND.stride(0) * size, v_ND.stride(0) * size};
  copy_pieces(2 * A, vector_bytes, [&](int64_t i) {
    return Piece{pool[i & 1] + cell[i / 2] * vector_bytes, source[i & 1] + qkv[i / 2] * stride[i & 1]};
  });
}

void lane_pack(const at::Tensor& source_NF, const at::Tensor& qkv_U, const at::Tensor& out_UF) {
  check_vectors(out_UF, qkv_U, source_NF);
  const int64_t size = source_NF.element_size(), from = source_NF.stride(0) * size, to = out_UF.stride(0) * size;
  copy_pieces(
      qkv_U.size(0), source_NF.size(1) * size,
      [source = static_cast<const char*>(source_NF.const_data_ptr()), out = bytes_of(out_UF), from, to,
       qkv = qkv_U.const_data_ptr<int32_t>()](int64_t u) { return Piece{out + u * to, source + qkv[u] * from}; });
}

void lane_unpack(const at::Tensor& source_UF, const at::Tensor& qkv_U, const at::Tensor& out_NF) {
  check_vectors(source_UF, qkv_U, out_NF);
  const int64_t size = out_NF.element_size(), from = source_UF.stride(0) * size, to = out_NF.stride(0) * size;
  copy_pieces(
      qkv_U.size(0), out_NF.size(1) * size,
      [source = static_cast<const char*>(source_UF.const_data_ptr()), out = bytes_of(out_NF), from, to,
       qkv = qkv_U.const_data_ptr<int32_t>()](int64_t u) { return Piece{out + qkv[u] * to, source + u * from}; });
}

void page_gather(const at::Tensor& pool_L2PSD, const at::Tensor& page_N, const at::Tensor& out_NL2SD) {
  check_pages(pool_L2PSD, page_N, out_NL2SD);
  const PagePieces pieces(pool_L2PSD, page_N);
  const auto* pool = static_cast<const char*>(pool_L2PSD.const_data_ptr());
  char* out = bytes_of(out_NL2SD);
  copy_pieces(page_N.size(0) * pieces.planes, pieces.bytes,
              [&](int64_t i) { return Piece{out + pieces.in_buffer(i), pool + pieces.in_pool(i)}; });
}

void page_scatter(const at::Tensor& source_NL2SD, const at::Tensor& page_N, const at::Tensor& pool_L2PSD) {
  check_pages(pool_L2PSD, page_N, source_NL2SD);
  const PagePieces pieces(pool_L2PSD, page_N);
  const auto* source = static_cast<const char*>(source_NL2SD.const_data_ptr());
  char* pool = bytes_of(pool_L2PSD);
  copy_pieces(page_N.size(0) * pieces.planes, pieces.bytes,
              [&](int64_t i) { return Piece{pool + pieces.in_pool(i), source + pieces.in_buffer(i)}; });
}

}  // namespace hetis
