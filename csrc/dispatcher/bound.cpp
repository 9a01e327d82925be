#include <algorithm>

#include "solver.h"

namespace hetis {

Bound::Bound(const Problem& problem)
    : problem_(problem),
      total_us_(problem.num_devices),
      shares_(problem.size()),
      prices_(problem.num_devices),
      least_(problem.num_sequences) {
  for (int64_t device = 0; device < problem.num_devices; ++device) {
    const double* costs = problem.lanes(device);
    total_us_[device] = std::accumulate(costs, costs + problem.num_sequences, 0.0);
  }
  for (int worker = 0; worker < 2; ++worker) {
    const int64_t* pages = worker ? problem.worker_pages : problem.home_pages;
    const int64_t* end = pages + problem.num_sequences;
    total_pages_[worker] = std::accumulate(pages, end, int64_t{0});
    all_take_pages_[worker] = std::find(pages, end, 0) == end;
  }
  devices_.reserve(problem.num_devices);
}

void Bound::share(int64_t device, double limit_us, double* shares) const {
  const double budget_us = limit_us - problem_.start_us[device];
  const auto free = static_cast<double>(problem_.free_pages[device]);
  const bool worker = device >= problem_.num_homes;
  const int64_t num_sequences = problem_.num_sequences;
  if (all_take_pages_[worker] && static_cast<double>(total_pages_[worker]) * budget_us > total_us_[device] * free) {
    const int64_t* pages = problem_.pages(device);
    const double room = std::max(free, 0.5);
    for (int64_t j = 0; j < num_sequences; ++j) shares[j] = static_cast<double>(pages[j]) / room;
  } else {
    const double* costs = problem_.lanes(device);
    for (int64_t j = 0; j < num_sequences; ++j) shares[j] = costs[j] / budget_us;
  }
}

bool Bound::is_possible(double limit_us) {
  const int64_t num_sequences = problem_.num_sequences;
  const int64_t longest = problem_.order.front(), shortest = problem_.order.back();
  devices_.clear();
  for (int64_t device = 0; device < problem_.num_devices; ++device) {
    if (!problem_.is_helpful(device, limit_us)) continue;
    const auto row = static_cast<int64_t>(devices_.size());
    double* shares = shares_.data() + row * num_sequences;
    share(device, limit_us, shares);
    devices_.emplace_back(shares[shortest] / shares[longest], row);
  }
  if (devices_.empty()) return false;
  std::sort(devices_.begin(), devices_.end());

  const auto shares_of = [&](size_t place) { return shares_.data() + devices_[place].second * num_sequences; };
  const auto lanes = static_cast<double>(problem_.num_lanes);
  int64_t next = num_sequences - 1, j = problem_.order[next];
  double left = lanes, price = 1.0;
  prices_[0] = price;
  for (size_t place = 0; place < devices_.size(); ++place) {
    const double* shares = shares_of(place);
    double room = 1.0;
    while (left * shares[j] <= room) {
      room -= left * shares[j];
      if (--next < 0) return true;
      j = problem_.order[next];
      left = lanes;
    }
    left -= room / shares[j];
    if (place + 1 < devices_.size()) {
      price *= shares[j] / shares_of(place + 1)[j];
      prices_[place + 1] = price;
    }
  }
  double worth = 0.0;
  for (size_t place = 0; place < devices_.size(); ++place) {
    const double* shares = shares_of(place);
    const double at = prices_[place];
    worth += at;
    for (int64_t k = 0; k < num_sequences; ++k) {
      const double cost = at * shares[k];
      least_[k] = place == 0 ? cost : std::min(least_[k], cost);
    }
  }
  return lanes * std::accumulate(least_.begin(), least_.end(), 0.0) <= worth * (1 + 1e-9);
}

double Bound::least_possible_us(double highest_us) {
  double lowest_us = 0.0;
  while (highest_us - lowest_us > 1e-3 * highest_us) {
    const double middle_us = (lowest_us + highest_us) / 2;
    (is_possible(middle_us) ? highest_us : lowest_us) = middle_us;
  }
  return lowest_us;
}

}  // namespace hetis
