// paged_prefill on the CPU: cuts chunks into blocks of queries and shares them over torch's threads.
//
// T tokens of all chunks, C chunks, G head groups, M query heads per group, D head_dim, P pages, S tokens per page, B
// lanes of the page table.

#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include "attention.h"
#include "operations.h"

namespace hetis {
namespace {

// Consecutive tokens of a chunk; their head groups are items of their own.
struct TokenBlock {
  int64_t first_token, tokens, first_position, chunk;
};

// Blocks of few keys come last, where they even out what threads have to do.
void cut_chunks(const at::Tensor& query_start_C1, const at::Tensor& context_C, int64_t num_tokens, int64_t max_context,
                int64_t block_tokens, std::vector<TokenBlock>& blocks) {
  const auto* start = query_start_C1.const_data_ptr<int32_t>();
  const auto* context = context_C.const_data_ptr<int32_t>();
  blocks.clear();
  for (int64_t chunk = 0; chunk < context_C.numel(); ++chunk) {
    const int64_t tokens = start[chunk + 1] - start[chunk];
    TORCH_CHECK_VALUE(start[chunk] >= 0 && tokens >= 0 && start[chunk + 1] <= num_tokens && context[chunk] >= tokens &&
                          context[chunk] <= max_context,
                      "paged_prefill: chunk ", chunk, " has tokens ", start[chunk], " to ", start[chunk + 1], " of ",
                      num_tokens, " and a context of ", context[chunk], " of at most ", max_context);
    for (int64_t t = 0; t < tokens; t += block_tokens)
      blocks.push_back({start[chunk] + t, std::min(block_tokens, tokens - t), context[chunk] - tokens + t, chunk});
  }
  std::sort(blocks.begin(), blocks.end(), [](const TokenBlock& a, const TokenBlock& b) {
    return a.first_position + a.tokens > b.first_position + b.tokens;
  });
}

// Queries (tokens * M) of a block: its work of packing keys is shared by all of them, but threads need several blocks
// each, or one of them waits for the last block of another.
constexpr int64_t kLeastRows = 96, kBlocksPerThread = 8;

int64_t rows_of_block(int64_t num_rows, int64_t G, int64_t most) {
  return std::clamp(num_rows * G / (kBlocksPerThread * at::get_num_threads()), kLeastRows, most);
}

// The work in products of queries and keys, roughly; below it other threads are not worth waking.
constexpr int64_t kAloneProducts = 64 * 64;

int64_t count_products(const std::vector<TokenBlock>& blocks, int64_t M, int64_t G) {
  int64_t products = 0;
  for (const TokenBlock& block : blocks) products += block.tokens * (block.first_position + block.tokens);
  return products * M * G;
}

void check(const at::Tensor& q_TGMD, const at::Tensor& pool_2PSD, const at::Tensor& page_table_BW,
           const at::Tensor& query_start_C1, const at::Tensor& lane_CG, const at::Tensor& context_C, int64_t window,
           const at::Tensor& out_TGMD) {
  check_value_tensor(q_TGMD, q_TGMD, 4, "q");
  check_value_tensor(out_TGMD, q_TGMD, 4, "out");
  check_window(window);
  check_pool(pool_2PSD, q_TGMD, q_TGMD.size(2));
  check_index_tensor(page_table_BW, 2, "page_table");
  check_index_tensor(query_start_C1, 1, "query_start");
  check_index_tensor(lane_CG, 2, "lane");
  check_index_tensor(context_C, 1, "context");
  const int64_t C = context_C.numel();
  TORCH_CHECK_VALUE(out_TGMD.sizes() == q_TGMD.sizes() && query_start_C1.numel() == C + 1 && lane_CG.size(0) == C &&
                        lane_CG.size(1) == q_TGMD.size(1),
                    "paged_prefill: shapes of q ", q_TGMD.sizes(), ", out ", out_TGMD.sizes(), ", lanes ",
                    lane_CG.sizes(), " and ", C, " contexts do not fit together");
}

}  // namespace

void paged_prefill(const at::Tensor& q_TGMD, const at::Tensor& pool_2PSD, const at::Tensor& page_table_BW,
                   const at::Tensor& query_start_C1, const at::Tensor& lane_CG, const at::Tensor& context_C,
                   double scale, int64_t window, const at::Tensor& out_TGMD) {
  check(q_TGMD, pool_2PSD, page_table_BW, query_start_C1, lane_CG, context_C, window, out_TGMD);
  const AttentionKernels& kernels = attention_kernels(element_of(q_TGMD));
  const int64_t G = q_TGMD.size(1), M = q_TGMD.size(2), D = q_TGMD.size(3), element_size = q_TGMD.element_size();
  const auto* q = static_cast<const char*>(q_TGMD.const_data_ptr());
  const auto* pool = static_cast<const char*>(pool_2PSD.const_data_ptr());
  const auto* table = page_table_BW.const_data_ptr<int32_t>();
  const auto* lanes = lane_CG.const_data_ptr<int32_t>();
  auto* out = static_cast<char*>(out_TGMD.mutable_data_ptr());

  for (int64_t i = 0; i < lane_CG.numel(); ++i)
    TORCH_CHECK_VALUE(lanes[i] >= 0 && lanes[i] < page_table_BW.size(0), "paged_prefill: lane ", lanes[i],
                      " is not in the page table of ", page_table_BW.size(0), " lanes");

  static thread_local std::vector<TokenBlock> thread_blocks;
  std::vector<TokenBlock>& blocks = thread_blocks;
  cut_chunks(query_start_C1, context_C, q_TGMD.size(0), page_table_BW.size(1) * pool_2PSD.size(2),
             std::max<int64_t>(1, rows_of_block(q_TGMD.size(0) * M, G, kernels.prefill_rows) / M), blocks);
  const auto num_items = static_cast<int64_t>(blocks.size()) * G;
  share(num_items, count_products(blocks, M, G) < kAloneProducts, [&](const auto& claim) {
    static thread_local Workspace scratch;
    char* memory = scratch.reserve(kernels.prefill_scratch_bytes(static_cast<int>(D)));
    for (int64_t item = claim(); item < num_items; item = claim()) {
      const TokenBlock& block = blocks[item / G];
      const int64_t g = item % G, t = block.first_token;
      kernels.prefill_block(
          {q + (t * q_TGMD.stride(0) + g * q_TGMD.stride(1)) * element_size, q_TGMD.stride(0), q_TGMD.stride(2),
           block.tokens, block.first_position, window, pool, pool_2PSD.stride(0) * element_size,
           table + lanes[block.chunk * G + g] * page_table_BW.stride(0), pool_2PSD.size(2), static_cast<int>(M),
           static_cast<int>(D), static_cast<float>(scale * 1.4426950408889634),
           out + (t * out_TGMD.stride(0) + g * out_TGMD.stride(1)) * element_size, out_TGMD.stride(0),
           out_TGMD.stride(2), memory});
    }
  });
}

}  // namespace hetis
