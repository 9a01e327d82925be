#include <algorithm>

#include "solver.h"

namespace hetis {

void Problem::derive() {
  weight_us.assign(num_sequences, 0.0);
  for (int64_t device = 0; device < num_devices; ++device) {
    const double* costs = lanes(device);
    for (int64_t j = 0; j < num_sequences; ++j) weight_us[j] += costs[j];
  }
  order.resize(num_sequences);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [this](int64_t j, int64_t k) {
    return weight_us[j] != weight_us[k] ? weight_us[j] > weight_us[k] : j < k;
  });
}

double lanes_us(const Problem& problem, const Counts& counts, int64_t device) {
  const int64_t* held = counts.data() + device * problem.num_sequences;
  const double* costs = problem.lanes(device);
  double total = 0.0;
  for (int64_t j = 0; j < problem.num_sequences; ++j) total += static_cast<double>(held[j]) * costs[j];
  return total;
}

double makespan_us(const Problem& problem, const Counts& counts) {
  double longest_us = 0.0;
  for (int64_t device = 0; device < problem.num_devices; ++device) {
    const auto held = counts.begin() + device * problem.num_sequences;
    if (std::all_of(held, held + problem.num_sequences, [](int64_t count) { return count == 0; })) continue;
    const double line_us = problem.start_us[device] + lanes_us(problem, counts, device);
    longest_us = std::max(longest_us, std::max(problem.floor_us[device], line_us));
  }
  return longest_us;
}

}  // namespace hetis
