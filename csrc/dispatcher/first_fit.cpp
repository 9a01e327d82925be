#include <algorithm>
#include <cmath>

#include "solver.h"

namespace hetis {
namespace {

struct Rated {
  double price;
  int64_t device;
  double fitting;
};

struct Wish {
  int64_t device;
  std::vector<int64_t> liked;
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
    return a.price != b.price ? a.price < b.price : a.device < b.device;
  });
  return rated;
}

std::vector<Wish> homes_first(const Problem& problem, const std::vector<Rated>& rated) {
  const auto& order = problem.order;
  double total = 0.0, passed = 0.0;
  for (const Rated& each : rated) total += each.fitting;
  std::vector<Wish> wishes, others;
  std::vector<std::pair<double, int64_t>> nearest(order.size());
  for (const auto& [price, device, fitting] : rated) {
    if (device < problem.num_homes) {
      const double at =
          static_cast<double>(order.size()) * passed / std::max(std::max(total - fitting, passed), 1e-300);
      for (size_t rank = 0; rank < order.size(); ++rank) {
        nearest[rank] = {std::abs(static_cast<double>(rank) + 0.5 - at), order[rank]};
      }
      std::sort(nearest.begin(), nearest.end());
      Wish wish{device, {}};
      wish.liked.reserve(order.size());
      for (const auto& [distance, j] : nearest) wish.liked.push_back(j);
      wishes.push_back(std::move(wish));
    } else {
      others.push_back({device, order});
    }
    passed += fitting;
  }
  std::move(others.begin(), others.end(), std::back_inserter(wishes));
  return wishes;
}

// `counts` is overwritten; false: not all lanes found a place.
class Taking {
 public:
  Taking(const Problem& problem, double limit_us, Counts& counts)
      : problem_(problem), limit_us_(limit_us), counts_(counts), left_(problem.num_sequences, problem.num_lanes) {
    counts_.assign(problem.size(), 0);
  }

  void take(int64_t device, const std::vector<int64_t>& liked) {
    double budget_us = limit_us_ - problem_.start_us[device];
    int64_t free = problem_.free_pages[device];
    const double* costs = problem_.lanes(device);
    const int64_t* pages = problem_.pages(device);
    const auto most = static_cast<double>(problem_.most_lanes[device]);
    int64_t* held = counts_.data() + device * problem_.num_sequences;
    for (const int64_t j : liked) {
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
  std::vector<int64_t> left_;
};

}  // namespace

Counts first_fit(const Problem& problem, double limit_us) {
  const std::vector<Rated> rated = rate(problem, limit_us);
  Counts counts;
  if (problem.num_homes > 1) {
    Taking taking(problem, limit_us, counts);
    for (const Wish& wish : homes_first(problem, rated)) taking.take(wish.device, wish.liked);
    if (taking.is_done()) return counts;
  }
  Taking taking(problem, limit_us, counts);
  for (const Rated& each : rated) taking.take(each.device, problem.order);
  return taking.is_done() ? counts : Counts();
}

}  // namespace hetis
