// paged_decode on the CPU: cuts lanes into splits, shares the splits over torch's threads, merges each lane's splits.
//
// U lanes to attend over, N (token, head group) entries of q and out, M query heads per group, D head_dim, P pages, S
// tokens per page, B lanes of the page table, W pages of a lane.

#include <algorithm>
#include <vector>

#include <c10/util/Exception.h>

#include "attention.h"
#include "operations.h"

namespace hetis {
namespace {

// A call that reads less runs on the calling thread: waking others takes longer.
constexpr int64_t kAloneBytes = 512 * 1024;

struct Call {
  const AttentionKernels& kernels;
  const char* q;
  int64_t q_stride_n, q_stride_m;
  const char* pool;
  int64_t value_bytes, row_bytes, page_size;
  const int32_t* table;
  int64_t table_stride;
  const int32_t *lane_U, *qkv_U, *length_U;
  int64_t window;
  float scale_log2;
  int M, D, element_size;
  char* out;
  int64_t out_stride_n, out_stride_m;

  int64_t num_entries, num_lanes, max_length;

  // Indices are read here anyway; a wrong one would read or write memory that is not ours.
  void check_lane(int64_t u) const {
    TORCH_CHECK_VALUE(lane_U[u] >= 0 && lane_U[u] < num_lanes && qkv_U[u] >= 0 && qkv_U[u] < num_entries &&
                          length_U[u] >= 0 && length_U[u] <= max_length,
                      "paged_decode: lane ", lane_U[u], " of ", num_lanes, ", entry of q ", qkv_U[u], " of ",
                      num_entries, ", length ", length_U[u], " of ", max_length, "; an index is out of range");
  }
  int64_t first_token(int64_t u) const { return window > 0 ? std::max<int64_t>(0, length_U[u] - window) : 0; }
};

// The splits of all lanes in order, so that the parts of a lane lie side by side.
struct Plan {
  std::vector<int32_t> lane;         // of each split
  std::vector<int64_t> first_split;  // of each lane
  std::vector<int32_t> splits_left;  // of each lane; who finishes the last one merges
  int64_t tokens = 0;

  void fill(const Call& call, int64_t num_lanes) {
    lane.clear();
    first_split.resize(num_lanes);
    splits_left.resize(num_lanes);
    tokens = 0;
    for (int64_t u = 0; u < num_lanes; ++u) {
      call.check_lane(u);
      const int64_t count = call.length_U[u] - call.first_token(u);
      const int64_t splits = (count + kSplitTokens - 1) / kSplitTokens;
      first_split[u] = static_cast<int64_t>(lane.size());
      splits_left[u] = static_cast<int32_t>(splits);
      lane.insert(lane.end(), splits, static_cast<int32_t>(u));
      tokens += count;
    }
  }
};

// Addresses of K, then V of one split, then of what comes next (or the last row again).
class SplitRows {
 public:
  int64_t tokens() const { return tokens_; }
  const char* const* rows() const { return rows_; }

  void find(const Call& call, int64_t u, int64_t split) {
    const int32_t* pages = call.table + call.lane_U[u] * call.table_stride;
    const int64_t first = call.first_token(u) + split * kSplitTokens;
    const int64_t last = std::min<int64_t>(first + kSplitTokens, call.length_U[u]);
    tokens_ = last - first;
    int64_t filled = 0;
    for (int64_t token = first; token < last;) {
      const int64_t offset = token % call.page_size;
      const int64_t run = std::min(call.page_size - offset, last - token);
      const char* key = call.pool + (pages[token / call.page_size] * call.page_size + offset) * call.row_bytes;
      for (int64_t i = 0; i < run; ++i) rows_[filled + i] = key + i * call.row_bytes;
      filled += run;
      token += run;
    }
    for (int64_t i = 0; i < tokens_; ++i) rows_[tokens_ + i] = rows_[i] + call.value_bytes;
  }

  void follow_with(const SplitRows& next) {
    const char** behind = rows_ + 2 * tokens_;
    const int64_t known = std::min<int64_t>(kRowsAhead, 2 * next.tokens_);
    std::copy(next.rows_, next.rows_ + known, behind);
    std::fill(behind + known, behind + kRowsAhead, behind[-1]);
  }

 private:
  int64_t tokens_ = 0;
  const char* rows_[2 * kSplitTokens + kRowsAhead];
};

void merge_lane(const Call& call, const Plan& plan, int64_t u, int64_t num_parts, const float* parts) {
  call.kernels.decode_merge({parts + plan.first_split[u] * decode_part_floats(call.M, call.D), num_parts, call.M,
                             call.D, call.out + call.qkv_U[u] * call.out_stride_n * call.element_size,
                             call.out_stride_m});
}

// One thread's work. It claims a split ahead of its work, so as to fetch the rows of the next one in time.
template <class Claim>
void run_splits(const Call& call, Plan& plan, float* parts, const Claim& claim) {
  static thread_local Workspace scratch;
  static thread_local SplitRows rows[2];
  const int64_t num_splits = static_cast<int64_t>(plan.lane.size());
  const int64_t part_floats = decode_part_floats(call.M, call.D);
  auto* floats = reinterpret_cast<float*>(scratch.reserve(decode_scratch_floats(call.M, call.D) * sizeof(float)));
  const auto find = [&](int64_t split, SplitRows& found) {
    found.find(call, plan.lane[split], split - plan.first_split[plan.lane[split]]);
  };

  int64_t split = claim();
  if (split < num_splits) find(split, rows[0]);
  for (int turn = 0; split < num_splits; turn ^= 1) {
    SplitRows &current = rows[turn], &next = rows[turn ^ 1];
    const int64_t next_split = claim();
    if (next_split < num_splits) find(next_split, next);
    current.follow_with(next_split < num_splits ? next : current);
    const int32_t u = plan.lane[split];
    const char* q = call.q + call.qkv_U[u] * call.q_stride_n * call.element_size;
    call.kernels.decode_split({q, call.q_stride_m, current.rows(), current.tokens(), call.M, call.D, call.scale_log2,
                               parts + split * part_floats, floats});
    if (__atomic_sub_fetch(&plan.splits_left[u], 1, __ATOMIC_ACQ_REL) == 0) {
      const int64_t end = u + 1 < static_cast<int64_t>(plan.first_split.size()) ? plan.first_split[u + 1] : num_splits;
      merge_lane(call, plan, u, end - plan.first_split[u], parts);
    }
    split = next_split;
  }
}

void run(const Call& call, int64_t num_lanes) {
  static thread_local Plan plan;
  static thread_local Workspace parts_space;
  plan.fill(call, num_lanes);
  const auto num_splits = static_cast<int64_t>(plan.lane.size());
  auto* parts =
      reinterpret_cast<float*>(parts_space.reserve(num_splits * decode_part_floats(call.M, call.D) * sizeof(float)));
  for (int64_t u = 0; u < num_lanes; ++u)
    if (plan.splits_left[u] == 0) merge_lane(call, plan, u, 0, parts);
  Plan& shared = plan;  // a thread_local names another plan on another thread
  share(num_splits, plan.tokens * 2 * call.row_bytes < kAloneBytes,
        [&](const auto& claim) { run_splits(call, shared, parts, claim); });
}

}  // namespace

void paged_decode(const at::Tensor& q_NMD, const at::Tensor& pool_2PSD, const at::Tensor& page_table_BW,
                  const at::Tensor& lane_U, const at::Tensor& qkv_U, const at::Tensor& length_U, double scale,
                  int64_t window, const at::Tensor& out_NMD) {
  const int64_t num_lanes = lane_U.numel();
  check_value_tensor(q_NMD, q_NMD, 3, "q");
  check_value_tensor(out_NMD, q_NMD, 3, "out");
  check_window(window);
  check_pool(pool_2PSD, q_NMD, q_NMD.size(1));
  check_index_tensor(page_table_BW, 2, "page_table");
  for (const at::Tensor* index : {&lane_U, &qkv_U, &length_U}) check_index_tensor(*index, 1, "an index of lanes");
  TORCH_CHECK_VALUE(
      out_NMD.sizes() == q_NMD.sizes() && qkv_U.numel() == num_lanes && length_U.numel() == num_lanes,
      "paged_decode: shapes of q ", q_NMD.sizes(), ", out ", out_NMD.sizes(), ", ", num_lanes, " lanes, ",
      qkv_U.numel(), " entries of q and ", length_U.numel(), " lengths do not fit together");
  if (num_lanes == 0) return;
  const Element element = element_of(q_NMD);
  const auto element_size = static_cast<int>(q_NMD.element_size());
  const int64_t D = q_NMD.size(2);
  run({attention_kernels(element),
       static_cast<const char*>(q_NMD.const_data_ptr()),
       q_NMD.stride(0),
       q_NMD.stride(1),
       static_cast<const char*>(pool_2PSD.const_data_ptr()),
       pool_2PSD.stride(0) * element_size,
       D * element_size,
       pool_2PSD.size(2),
       page_table_BW.const_data_ptr<int32_t>(),
       page_table_BW.stride(0),
       lane_U.const_data_ptr<int32_t>(),
       qkv_U.const_data_ptr<int32_t>(),
       length_U.const_data_ptr<int32_t>(),
       window,
       static_cast<float>(scale * 1.4426950408889634),
       static_cast<int>(q_NMD.size(1)),
       static_cast<int>(D),
       element_size,
       static_cast<char*>(out_NMD.mutable_data_ptr()),
       out_NMD.stride(0),
       out_NMD.stride(1),
       q_NMD.size(0),
       page_table_BW.size(0),
       page_table_BW.size(1) * pool_2PSD.size(2)},
      num_lanes);
}

}  // namespace hetis
