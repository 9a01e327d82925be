// The min-max solver of hetis/dispatcher, which is its reference: the same decisions from the same floating point
// operations in the same order, so that both return the same counts. What the functions do is described there, in the
// file of the same name; here it is only said what differs. Compiled without contraction of a * b + c.
//
// N devices (homes first), J sequences, G lanes of each. Arrays [N][J] are flat, a row per device.
#pragma once

#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace hetis {

using Counts = std::vector<int64_t>;  // [N][J] lanes; empty: no placement

constexpr double kTolerance = 0.02;

// Of a caller's arrays, which it does not own, and what is derived from them once.
struct Problem {
  int64_t num_devices, num_sequences, num_lanes, num_homes;
  const double* start_us;      // [N]
  const double* floor_us;      // [N]
  const double* lane_us;       // [N][J]
  const int64_t* most_lanes;   // [N]
  const int64_t* free_pages;   // [N]
  const int64_t* home_pages;   // [J]
  const int64_t* worker_pages; // [J]

  std::vector<double> weight_us;  // [J] a lane's time, of all devices together
  std::vector<int64_t> order;     // sequences, longest first

  void derive();

  const double* lanes(int64_t device) const { return lane_us + device * num_sequences; }
  const int64_t* pages(int64_t device) const { return device < num_homes ? home_pages : worker_pages; }
  int64_t size() const { return num_devices * num_sequences; }
  bool is_helpful(int64_t device, double limit_us) const {
    return start_us[device] < limit_us && floor_us[device] <= limit_us && most_lanes[device];
  }
};

// problem.py
double lanes_us(const Problem& problem, const Counts& counts, int64_t device);  // what they add to the device's start
double peak_us(const Problem& problem, const Counts& counts);

// A proof that limits are out of reach (bound.py). Holds its memory from one question to the next.
class Bound {
 public:
  explicit Bound(const Problem& problem);
  bool is_possible(double limit_us);
  double least_possible_us(double highest_us);
  bool is_good(double reached_us) { return !is_possible(reached_us / (1 + kTolerance)); }

 private:
  void share(int64_t device, double limit_us, double* shares) const;

  const Problem& problem_;
  std::vector<double> total_us_;                      // [N] a lane of each sequence
  std::vector<double> shares_, prices_, least_;       // [helpful][J]; [helpful]; [J]
  std::vector<std::pair<double, int64_t>> devices_;   // (key, row of shares_)
  int64_t total_pages_[2];                            // a lane of each sequence: at home, on a worker
  bool all_take_pages_[2];
};

Counts first_fit(const Problem& problem, double limit_us);        // first_fit.py
void exchange(const Problem& problem, Counts& counts);            // exchange.py: Exchange.descend
Counts balance(const Problem& problem);                           // balance.py

}  // namespace hetis
