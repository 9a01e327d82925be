// First fit under a limit. Devices are visited by increasing cost of a long lane relative to a short one; each takes
// the longest remaining lanes that fit. Several homes, which can take only their share of each sequence, are visited
// before the workers, and each prefers the sequences that would fall to it in the order of all devices; if that fails,
// homes wait their turn.

#include <algorithm>
#include <cmath>

#include "solver.h"

namespace hetis {
namespace {

struct Rated {
  double relative_cost;  // of a long lane, in short ones; a lane costs its share of the device's time and of its pages
  int64_t device;
  double fitting;  // lanes of middle length that fit
};

struct Visit {
  int64_t device;
  std::vector<int64_t> preferred;  // sequences
};

std::vector<Rated> rate(const Problem& problem, double limit_us) {
  const auto& order = problem.order;
  const int64_t lanes[3] = {order.front(), order[order.size() / 2], order.back()};
  std::vector<Rated> rated;
  rated.reserve(problem.num_devices);
  for (int64_t device = 0; device < problem.num_devices; ++device) {
    if (!problem.is_helpful(device, limit_us)) continue;
    const double budget_us = limit_us - problem.start_us[device];
    const double free = std::max(static_cast<double>(problem.free_pages[device]), 1e-9);
    double shares[3];
    for (int k = 0; k < 3; ++k) {
      const int64_t j = lanes[k];
      shares[k] = problem.lanes(device)[j] / budget_us + static_cast<double>(problem.pages(device)[j]) / free;
    }
    rated.push_back({shares[0] / shares[2], device, 1 / shares[1]});
  }
  std::sort(rated.begin(), rated.end(), [](const Rated& a, const Rated& b) {
    return a.relative_cost != b.relative_cost ? a.relative_cost < b.relative_cost : a.device < b.device;
  });
  return rated;
}

// Sequences by distance from the place `at` in the order of all sequences.
std::vector<int64_t> nearest_to(const std::vector<int64_t>& order, double at) {
  std::vector<std::pair<double, int64_t>> nearest(order.size());
  for (size_t place = 0; place < order.size(); ++place) {
    nearest[place] = {std::abs(static_cast<double>(place) + 0.5 - at), order[place]};
  }
  std::sort(nearest.begin(), nearest.end());
  std::vector<int64_t> sequences;
  sequences.reserve(order.size());
  for (const auto& [distance, j] : nearest) sequences.push_back(j);
  return sequences;
}

std::vector<Visit> homes_first(const Problem& problem, const std::vector<Rated>& rated) {
  const auto& order = problem.order;
  double total = 0.0, passed = 0.0;
  for (const Rated& each : rated) total += each.fitting;
  std::vector<Visit> visits, others;
  for (const Rated& each : rated) {
    if (each.device < problem.num_homes) {
      const double others_fitting = std::max(std::max(total - each.fitting, passed), 1e-300);
      const double at = static_cast<double>(order.size()) * passed / others_fitting;
      visits.push_back({each.device, nearest_to(order, at)});
    } else {
      others.push_back({each.device, order});
    }
    passed += each.fitting;
  }
  std::move(others.begin(), others.end(), std::back_inserter(visits));
  return visits;
}

// Fills `counts`, which it overwrites, device by device.
class Filling {
 public:
  Filling(const Problem& problem, double limit_us, Counts& counts)
      : problem_(problem), limit_us_(limit_us), counts_(counts), left_(problem.num_sequences, problem.num_lanes) {
    counts_.assign(problem.size(), 0);
  }

  void visit(int64_t device, const std::vector<int64_t>& preferred) {
    double budget_us = limit_us_ - problem_.start_us[device];
    int64_t free = problem_.free_pages[device];
    const double* costs = problem_.lanes(device);
    const int64_t* pages = problem_.pages(device);
    const auto most = static_cast<double>(problem_.most_lanes[device]);
    int64_t* held = counts_.data() + device * problem_.num_sequences;
    for (const int64_t j : preferred) {
      if (costs[j] > budget_us || !left_[j]) continue;
      int64_t count = std::min(static_cast<int64_t>(std::min(budget_us / costs[j], most)), left_[j]);
      if (pages[j] * count > free) count = free / pages[j];
      held[j] = count;
      left_[j] -= count;
      budget_us -= static_cast<double>(count) * costs[j];
      free -= count * pages[j];
    }
  }

  bool is_done() const {
    return std::all_of(left_.begin(), left_.end(), [](int64_t count) { return count == 0; });
  }

 private:
  const Problem& problem_;
  double limit_us_;
  Counts& counts_;
  std::vector<int64_t> left_;  // [J] lanes without a device
};

}  // namespace

Counts first_fit(const Problem& problem, double limit_us) {
  const std::vector<Rated> rated = rate(problem, limit_us);
  Counts counts;
  if (problem.num_homes > 1) {
    Filling filling(problem, limit_us, counts);
    for (const Visit& each : homes_first(problem, rated)) filling.visit(each.device, each.preferred);
    if (filling.is_done()) return counts;
  }
  Filling filling(problem, limit_us, counts);
  for (const Rated& each : rated) filling.visit(each.device, problem.order);
  return filling.is_done() ? counts : Counts();
}

}  // namespace hetis
