// One call of `linear`, whatever shares its work over threads: packs x, then multiplies, for at most kSlabTokens tokens
// at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dense_linear.h"

namespace hetis {

constexpr int64_t kSlabTokens = 512;        // bounds the packed copy of x: 3 MB for 3,072 inputs in bfloat16
constexpr int64_t kGrainWeights = 1 << 18;  // weights of about 10 us of work, several times a wake-up
constexpr int64_t kGrainPacked = 1 << 15;   // values of x to pack, for the same work

// Bytes of `packed` that `run_linear` needs.
template <class T>
int64_t linear_scratch_bytes(const LinearKernel<T>& kernel, int64_t tokens, int64_t inputs) {
  return kernel.packed_bytes(std::min(kSlabTokens, tokens), inputs);
}

// share(count, grain, work) calls work(begin, end) for parts of [0, count), of at least `grain` where it pays to wake
// threads, and returns when all are done.
template <class T, class Share>
void run_linear(LinearProblem<T> problem, const LinearKernel<T>& kernel, void* packed, const Share& share) {
  const int64_t tokens = problem.tokens, inputs = problem.inputs;
  // the last two blocks share rows, so one thread computes both
  const int64_t blocks = (problem.outputs + kBlockRows - 1) / kBlockRows, units = std::max<int64_t>(1, blocks - 1);
  for (int64_t first = 0; first < tokens; first += kSlabTokens) {
    problem.tokens = std::min(kSlabTokens, tokens - first);
    const int64_t panels = kernel.num_panels(problem.tokens), panel_values = problem.tokens * inputs / panels;
    share(panels, std::max<int64_t>(1, kGrainPacked / std::max<int64_t>(1, panel_values)),
          [&](int64_t begin, int64_t end) { kernel.pack(problem, packed, begin, end); });
    const int64_t block_weights = std::max<int64_t>(1, kBlockRows * inputs * (1 + problem.tokens / 16));
    share(units, std::max<int64_t>(1, kGrainWeights / block_weights), [&](int64_t begin, int64_t end) {
      kernel.multiply(problem, packed, begin, end == units ? blocks : end);
    });
    problem.x += problem.tokens * problem.x_stride;
    problem.out += problem.tokens * problem.out_stride;
  }
}

}  // namespace hetis
