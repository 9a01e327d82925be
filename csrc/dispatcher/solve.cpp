// Several sequences are inserted longest first or fitted under a limit, whichever is better; then lanes are exchanged.
// Each step is left out once the lower bound proves that the makespan is good enough. Last, lanes go home.

#include <algorithm>
#include <functional>

#include "solver.h"

namespace hetis {
namespace {

constexpr int kFits = 8;  // limits that first fit tries

// Each lane goes to the device that then takes least time. Exact for one sequence: the time of device i with n lanes
// rises with n, so the makespan is the G-th smallest among the times of all (i, n).
Counts insert(const Problem& problem) {
  const int64_t num_devices = problem.num_devices, num_sequences = problem.num_sequences;
  std::vector<double> busy_us(problem.start_us, problem.start_us + num_devices);
  std::vector<int64_t> free(problem.free_pages, problem.free_pages + num_devices);
  Counts counts(problem.size());
  std::vector<std::pair<double, int64_t>> places;  // a heap: (time with one lane more, device), the least first
  places.reserve(num_devices);
  const auto later = std::greater<>();
  const auto place = [&](int64_t j, int64_t device) {
    return std::pair(std::max(problem.floor_us[device], busy_us[device] + problem.lanes(device)[j]), device);
  };
  for (const int64_t j : problem.order) {
    places.clear();
    for (int64_t device = 0; device < num_devices; ++device) {
      if (problem.most_lanes[device] && problem.pages(device)[j] <= free[device]) places.push_back(place(j, device));
    }
    std::make_heap(places.begin(), places.end(), later);
    for (int64_t lane = 0; lane < problem.num_lanes; ++lane) {
      if (places.empty()) return {};
      std::pop_heap(places.begin(), places.end(), later);
      const int64_t device = places.back().second, pages = problem.pages(device)[j];
      busy_us[device] += problem.lanes(device)[j];
      free[device] -= pages;
      const int64_t held = ++counts[device * num_sequences + j];
      if (held < problem.most_lanes[device] && pages <= free[device]) {
        places.back() = place(j, device);
        std::push_heap(places.begin(), places.end(), later);
      } else {
        places.pop_back();
      }
    }
  }
  return counts;
}

// Any placement within the pages, under a limit that no placement exceeds; for when insertion finds none.
Counts fit_any(const Problem& problem) {
  double all_us = 0.0;
  for (int64_t j = 0; j < problem.num_sequences; ++j) {
    double dearest_us = problem.lanes(0)[j];
    for (int64_t device = 1; device < problem.num_devices; ++device) {
      dearest_us = std::max(dearest_us, problem.lanes(device)[j]);
    }
    all_us += dearest_us;
  }
  const double begin_us = std::max(*std::max_element(problem.start_us, problem.start_us + problem.num_devices),
                                   *std::max_element(problem.floor_us, problem.floor_us + problem.num_devices));
  return first_fit(problem, begin_us + static_cast<double>(problem.num_lanes) * all_us);
}

// First fit under the least limit for which it succeeds, by bisection around the makespan of insertion.
Counts fit(const Problem& problem, Bound& bound, double inserted_us) {
  Counts best;
  double lowest_us = inserted_us * 0.5, next_us = inserted_us * 0.98, highest_us = inserted_us * 1.05;
  for (int turn = 0; turn < kFits; ++turn) {
    Counts found = first_fit(problem, next_us);
    if (found.empty()) {
      lowest_us = next_us;
    } else {
      best = std::move(found);
      highest_us = makespan_us(problem, best);
      if (bound.is_good(highest_us)) break;
    }
    next_us = (lowest_us + highest_us) / 2;
  }
  return best;
}

// Moves lanes from workers to their homes wherever that does not raise the makespan.
void send_home(const Problem& problem, Counts& counts) {
  const int64_t num_sequences = problem.num_sequences;
  const double limit_us = makespan_us(problem, counts);
  for (int64_t home = 0; home < problem.num_homes; ++home) {
    const double* costs = problem.lanes(home);
    int64_t* held = counts.data() + home * num_sequences;
    double budget_us = limit_us - problem.start_us[home] - lanes_us(problem, counts, home);
    if (problem.floor_us[home] > limit_us || budget_us < *std::min_element(costs, costs + num_sequences)) continue;
    int64_t free = problem.free_pages[home];
    for (int64_t j = 0; j < num_sequences; ++j) free -= held[j] * problem.home_pages[j];
    for (int64_t j = 0; j < num_sequences; ++j) {
      const int64_t pages = problem.home_pages[j], most = problem.most_lanes[home];
      for (int64_t device = problem.num_homes; device < problem.num_devices; ++device) {
        int64_t& away = counts[device * num_sequences + j];
        while (away && held[j] < most && costs[j] <= budget_us && pages <= free) {
          --away;
          ++held[j];
          budget_us -= costs[j];
          free -= pages;
        }
      }
    }
  }
}

}  // namespace

Counts solve(const Problem& problem) {
  Counts best = insert(problem);
  if (problem.num_sequences > 1) {
    Bound bound(problem);
    const auto is_good = [&] { return !best.empty() && bound.is_good(makespan_us(problem, best)); };
    if (!is_good()) {
      Counts fitted = best.empty() ? fit_any(problem) : fit(problem, bound, makespan_us(problem, best));
      const bool is_better =
          !fitted.empty() && (best.empty() || makespan_us(problem, fitted) <= makespan_us(problem, best));
      if (is_better) best = std::move(fitted);
      if (!best.empty() && !is_good()) exchange(problem, best);
    }
  }
  if (!best.empty()) send_home(problem, best);
  return best;
}

}  // namespace hetis
