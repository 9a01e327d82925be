// The part of attention that is compiled once for each instruction set, and the table to call it through.
//
// M query heads per group, D head_dim (a multiple of 16), S tokens per page. Element types are known to the kernels
// only, so that this header needs nothing of torch: what is compiled for AVX-512 must contain no inline function that
// others share (the linker keeps one copy for all).
#pragma once

#include <cstddef>
#include <cstdint>

#include "dense_isa.h"

namespace hetis {

// Storage of the two 16-bit types; arithmetic is in float.
struct Bf16 {
  uint16_t bits;
};
struct Half16 {
  uint16_t bits;
};
enum class Element { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int kMaxHeadDim = 256;
constexpr int kMaxQueries = 64;
// A lane is cut into splits of so many tokens, counted from its first visible one: the unit of work and of the softmax.
constexpr int kSplitTokens = 256;
// Rows of K and V are fetched at most so many rows before they are used.
constexpr int kRowsAhead = 128;

// 2^x on [-0.5, 0.5], relative error below 1e-7; exactly 1 at 0.
constexpr float kExp2[7] = {1.0f,           0.69314718246f, 0.24022646248f, 0.05550328642f,
                            0.00961848907f, 0.00133999309f, 0.00015345812f};

// One split of one lane.
struct DecodeSplit {
  const void* q;            // [M, D]
  int64_t q_stride;         // elements from one query head to the next
  const char* const* rows;  // K of each token, then V of each token, then kRowsAhead rows of what comes next
  int64_t tokens;           // 1 ... kSplitTokens
  int M, D;
  float scale_log2;  // the softmax scale times log2(e)
  float* part;       // result, decode_part_floats(M, D) of them
  float* scratch;    // decode_scratch_floats(M, D)
};

// What a split leaves behind: sums[M][D] of V weighted by exp2(score - largest), largest[M], total[M] of the weights.
inline int64_t decode_part_floats(int M, int D) { return int64_t{M} * (D + 2); }
inline int64_t decode_scratch_floats(int M, int D) { return int64_t{M} * (kSplitTokens + D); }

// All splits of one lane, in order; none at all gives 0.
struct DecodeMerge {
  const float* parts;
  int64_t num_parts;
  int M, D;
  void* out;  // [M, D]
  int64_t out_stride;
};

// Consecutive new tokens of one head group of one chunk. Query t stands at position first_position + t.
struct PrefillBlock {
  const void* q;  // [tokens, M, D]
  int64_t q_stride_t, q_stride_m;
  int64_t tokens, first_position, window;
  const char* keys;  // K of page 0; V lies value_bytes behind
  int64_t value_bytes;
  const int32_t* pages;  // of the lane
  int64_t page_size;
  int M, D;
  float scale_log2;
  void* out;  // [tokens, M, D]
  int64_t out_stride_t, out_stride_m;
  char* scratch;  // prefill_scratch_bytes, aligned to 64
};

struct ProductRun {
  int64_t products;  // of two values, each added to a sum
  float sum;         // keeps the work from being left out
};

struct AttentionKernels {
  void (*decode_split)(const DecodeSplit&);
  void (*decode_merge)(const DecodeMerge&);
  ProductRun (*run_products)(int64_t rounds);  // the arithmetic of decode alone, to measure what bounds it
  void (*prefill_block)(const PrefillBlock&);
  int prefill_rows;  // a block has at most so many queries (tokens * M), or one token
  size_t (*prefill_scratch_bytes)(int D);
};

// Indexed by Element. The bfloat16 table of a processor with avx512_bf16 is a single entry.
extern const AttentionKernels kPortableAttention[3];
#if HETIS_X86
extern const AttentionKernels kAvx2Attention[3];
extern const AttentionKernels kAvx512Attention[3];
extern const AttentionKernels kAvx512Bf16Attention;
#endif

// The best kernels this processor can run, or fewer if the instruction set was limited.
const AttentionKernels& attention_kernels(Element element);

}  // namespace hetis
