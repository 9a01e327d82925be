// The C interface that hetis/dispatcher/native.py calls through ctypes. No exception leaves it.
//
// `arrays`, 8 bytes each: start_us[N], floor_us[N], lane_us[N][J] float64; most_lanes[N], free_pages[N],
// home_pages[J], worker_pages[J] int64. N and J are at least 1. A function whose arguments change needs a new name, so
// that a library from an earlier build is refused when it is loaded.

#include <algorithm>
#include <limits>

#include "solver.h"

namespace {

using hetis::Bound;
using hetis::Counts;
using hetis::Problem;

struct Sizes {
  int64_t num_devices, num_sequences, num_lanes, num_homes;
};

Problem read(const Sizes* sizes, const void* arrays) {
  Problem problem{};
  problem.num_devices = sizes->num_devices;
  problem.num_sequences = sizes->num_sequences;
  problem.num_lanes = sizes->num_lanes;
  problem.num_homes = sizes->num_homes;
  problem.start_us = static_cast<const double*>(arrays);
  problem.floor_us = problem.start_us + problem.num_devices;
  problem.lane_us = problem.floor_us + problem.num_devices;
  // The integers follow the floats in the same buffer.
  problem.most_lanes = reinterpret_cast<const int64_t*>(problem.lane_us + problem.size());
  problem.free_pages = problem.most_lanes + problem.num_devices;
  problem.home_pages = problem.free_pages + problem.num_devices;
  problem.worker_pages = problem.home_pages + problem.num_sequences;
  problem.derive();
  return problem;
}

}  // namespace

extern "C" {

// 1: `counts` [N][J] holds the placement; 0: none was found; -1: out of memory.
int hetis_solve(const Sizes* sizes, const void* arrays, int64_t* counts) noexcept try {
  const Counts found = hetis::solve(read(sizes, arrays));
  std::copy(found.begin(), found.end(), counts);
  return !found.empty();
} catch (...) {
  return -1;
}

// See Bound::lower_bound_us. NaN: out of memory.
double hetis_lower_bound_us(const Sizes* sizes, const void* arrays, double reached_us, double enough_us) noexcept try {
  const Problem problem = read(sizes, arrays);
  return Bound(problem).lower_bound_us(reached_us, enough_us);
} catch (...) {
  return std::numeric_limits<double>::quiet_NaN();
}
}
