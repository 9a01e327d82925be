// Lagrangian lower bound on the makespan: a proof by prices that a limit is out of reach.
//
// Each device offers its scarcer resource alone, time or pages, of which a lane takes a share. In that fractional
// relaxation it is optimal to sort devices by the cost of a short lane relative to a long one and to fill them with the
// shortest lanes first; the sequence that two neighbours divide sets their relative price. If at these prices all
// lanes, each on its cheapest device, cost more than all devices are worth, no placement keeps the limit. By weak
// duality that holds whatever the prices are, so the bound is valid, if weaker, where the order above is not optimal.

#include <algorithm>
#include <limits>

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

// The share that a lane of each sequence takes of a device's time or pages, whichever is scarcer for all together.
void Bound::share(int64_t device, double limit_us, double* shares) const {
  const double budget_us = limit_us - problem_.start_us[device];
  const auto free = static_cast<double>(problem_.free_pages[device]);
  const bool worker = device >= problem_.num_homes;
  const int64_t num_sequences = problem_.num_sequences;
  if (all_take_pages_[worker] && static_cast<double>(total_pages_[worker]) * budget_us > total_us_[device] * free) {
    const int64_t* pages = problem_.pages(device);
    const double room = std::max(free, 0.5);  // less than one page: no lane fits
    for (int64_t j = 0; j < num_sequences; ++j) shares[j] = static_cast<double>(pages[j]) / room;
  } else {
    const double* costs = problem_.lanes(device);
    for (int64_t j = 0; j < num_sequences; ++j) shares[j] = costs[j] / budget_us;
  }
}

// Devices that can take a lane within the limit, by increasing cost of a short lane relative to a long one.
void Bound::collect(double limit_us) {
  const int64_t longest = problem_.order.front(), shortest = problem_.order.back();
  devices_.clear();
  for (int64_t device = 0; device < problem_.num_devices; ++device) {
    if (!problem_.is_helpful(device, limit_us)) continue;
    const auto line = static_cast<int64_t>(devices_.size());
    double* shares = shares_.data() + line * problem_.num_sequences;
    share(device, limit_us, shares);
    devices_.emplace_back(shares[shortest] / shares[longest], line);
  }
  std::sort(devices_.begin(), devices_.end());
}

// Fills the devices with divisible lanes, shortest first, and sets the price of each relative to the one before it.
// True: all lanes fit.
bool Bound::fill() {
  const auto lanes = static_cast<double>(problem_.num_lanes);
  int64_t next = problem_.num_sequences - 1, j = problem_.order[next];
  double left = lanes;
  prices_[0] = 1.0;
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
    if (place + 1 < devices_.size()) prices_[place + 1] = prices_[place] * (shares[j] / shares_of(place + 1)[j]);
  }
  return false;
}

// Whether all lanes, each where it is cheapest, cost no more than the devices are worth.
bool Bound::is_affordable() {
  double worth = 0.0;
  for (size_t place = 0; place < devices_.size(); ++place) {
    const double* shares = shares_of(place);
    const double price = prices_[place];
    worth += price;
    for (int64_t j = 0; j < problem_.num_sequences; ++j) {
      const double cost = price * shares[j];
      least_[j] = place == 0 ? cost : std::min(least_[j], cost);
    }
  }
  const double cost = static_cast<double>(problem_.num_lanes) * std::accumulate(least_.begin(), least_.end(), 0.0);
  return cost <= worth * (1 + 1e-9);  // a difference that may be rounding proves nothing
}

bool Bound::is_possible(double limit_us) {
  collect(limit_us);
  return !devices_.empty() && (fill() || is_affordable());
}

double Bound::lower_bound_us(double reached_us, double enough_us) {
  if (enough_us < reached_us && !is_possible(enough_us)) return std::numeric_limits<double>::infinity();
  double lowest_us = 0.0, highest_us = reached_us;
  while (highest_us - lowest_us > 1e-3 * highest_us) {
    const double middle_us = (lowest_us + highest_us) / 2;
    (is_possible(middle_us) ? highest_us : lowest_us) = middle_us;
  }
  return lowest_us;
}

}  // namespace hetis
