// The min-max solver: places the lanes of sequences on devices so that the makespan, the time of the slowest device
// that is used, is small. hetis/dispatcher/problem.py states the problem: generalised assignment on unrelated machines
// with capacities, NP-hard from two sequences on. Results depend on nothing but the problem: no clock, no threads.
//
// N devices (homes first), J sequences, G lanes of each. Arrays [N][J] are flat, one device after the other.
#pragma once

#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace hetis {

using Counts = std::vector<int64_t>;  // [N][J] lanes; empty: no placement

// A makespan that exceeds its lower bound by no more than this fraction is good enough.
constexpr double kTolerance = 0.02;

// Arrays of the caller, which this struct does not own, and quantities that are derived from them once.
struct Problem {
  int64_t num_devices, num_sequences, num_lanes, num_homes;
  const double* start_us;       // [N] time before the first new lane
  const double* floor_us;       // [N] least time of a device that is used
  const double* lane_us;        // [N][J] time that one lane adds, > 0
  const int64_t* most_lanes;    // [N] of one sequence
  const int64_t* free_pages;    // [N]
  const int64_t* home_pages;    // [J] of a lane at home
  const int64_t* worker_pages;  // [J] of a lane on a worker

  std::vector<double> weight_us;  // [J] time of a lane, summed over all devices: one length for unlike devices
  std::vector<int64_t> order;     // sequences by descending weight, ties in order of arrival

  void derive();

  const double* lanes(int64_t device) const { return lane_us + device * num_sequences; }
  const int64_t* pages(int64_t device) const { return device < num_homes ? home_pages : worker_pages; }
  int64_t size() const { return num_devices * num_sequences; }
  // Whether a device can take a lane within `limit_us`, if it has the pages.
  bool is_helpful(int64_t device, double limit_us) const {
    return start_us[device] < limit_us && floor_us[device] <= limit_us && most_lanes[device];
  }
};

// Time that a placement adds to the start of a device.
double lanes_us(const Problem& problem, const Counts& counts, int64_t device);
double makespan_us(const Problem& problem, const Counts& counts);

// Lower bounds on the makespan from weak duality. Keeps its buffers from one call to the next.
class Bound {
 public:
  explicit Bound(const Problem& problem);
  // False: no placement keeps every device within `limit_us`, not even one of divisible lanes. True: unknown.
  bool is_possible(double limit_us);
  // To a thousandth of `reached_us`, the makespan of some placement. Infinite if above `enough_us`.
  double lower_bound_us(double reached_us, double enough_us);
  bool is_good(double reached_us) { return !is_possible(reached_us / (1 + kTolerance)); }

 private:
  void share(int64_t device, double limit_us, double* shares) const;
  void collect(double limit_us);
  bool fill();
  bool is_affordable();
  const double* shares_of(size_t place) const {
    return shares_.data() + devices_[place].second * problem_.num_sequences;
  }

  const Problem& problem_;
  std::vector<double> total_us_;                     // [N] a lane of each sequence
  std::vector<double> shares_, prices_, least_;      // [helpful][J]; [helpful]; [J]
  std::vector<std::pair<double, int64_t>> devices_;  // (relative cost of short lanes, its [J] in shares_), ascending
  int64_t total_pages_[2];                           // a lane of each sequence: at home, on a worker
  bool all_take_pages_[2];
};

// A placement with no device above `limit_us`; empty if this heuristic finds none.
Counts first_fit(const Problem& problem, double limit_us);

// Local search: lowers the makespan of a feasible placement. It stays feasible.
void exchange(const Problem& problem, Counts& counts);

// The best placement found; empty if none that fits was found. Exact for one sequence.
Counts solve(const Problem& problem);

}  // namespace hetis
