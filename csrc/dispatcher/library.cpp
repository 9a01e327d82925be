// What hetis/dispatcher/native.py calls: plain functions over flat arrays. Nothing is thrown across the border.
//
// `arrays`, 8 bytes each: start_us[N], floor_us[N], lane_us[N][J] float64; most_lanes[N], free_pages[N],
// home_pages[J], worker_pages[J] int64. N and J are at least 1.

#include <algorithm>
#include <limits>

#include "solver.h"

namespace {

// To be raised with every change of what the functions below take or return; INTERFACE in native.py is the same.
constexpr int64_t kInterface = 1;

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
  // Integers lie behind the floats in one buffer of the caller's.
  problem.most_lanes = reinterpret_cast<const int64_t*>(problem.lane_us + problem.size());
  problem.free_pages = problem.most_lanes + problem.num_devices;
  problem.home_pages = problem.free_pages + problem.num_devices;
  problem.worker_pages = problem.home_pages + problem.num_sequences;
  problem.derive();
  return problem;
}

}  // namespace

extern "C" {

int64_t hetis_interface() noexcept { return kInterface; }

// 1: `counts` [N][J] holds the placement; 0: none was found; -1: out of memory.
int hetis_balance(const Sizes* sizes, const void* arrays, int64_t* counts) noexcept try {
  const Counts found = hetis::balance(read(sizes, arrays));
  std::copy(found.begin(), found.end(), counts);
  return !found.empty();
} catch (...) {
  return -1;
}

// 1: unknown; 0: impossible; -1: out of memory.
int hetis_is_possible(const Sizes* sizes, const void* arrays, double limit_us) noexcept try {
  const Problem problem = read(sizes, arrays);
  return Bound(problem).is_possible(limit_us);
} catch (...) {
  return -1;
}

// Not a number: out of memory.
double hetis_least_possible_us(const Sizes* sizes, const void* arrays, double highest_us) noexcept try {
  const Problem problem = read(sizes, arrays);
  return Bound(problem).least_possible_us(highest_us);
} catch (...) {
  return std::numeric_limits<double>::quiet_NaN();
}
}
