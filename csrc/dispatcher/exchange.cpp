// Local search by ejection chains. A lane of the slowest device goes elsewhere; where it does not fit, other lanes make
// room and go on to a third device, and so on, until every device of the chain is below the old makespan. Moves, swaps,
// one for several and rings over several devices are all such chains. Depth, width and the number of places visited are
// bounded, by counts and not by a clock, so that equal problems have equal solutions.

#include <algorithm>
#include <cmath>
#include <tuple>

#include "solver.h"

namespace hetis {
namespace {

constexpr double kStep = 2e-3;  // the least fraction by which a chain lowers the makespan
constexpr int kDepth = 4;       // moves of a chain after the first
constexpr int kWidth = 12;      // ejections that are tried for each move, those first that eject least
constexpr int64_t kVisits = 8000, kVisitsPerChain = 2500;  // of devices, or of sequences on devices

// Lanes of another sequence that leave a device to make room there.
struct Ejection {
  double weight_us;
  int64_t device, other, count;

  bool operator<(const Ejection& e) const {
    return std::tie(weight_us, device, other, count) < std::tie(e.weight_us, e.device, e.other, e.count);
  }
};

// The `kWidth` ejections of least weight, ascending.
class Ejections {
 public:
  void offer(const Ejection& ejection) {
    if (size_ == kWidth) {
      if (!(ejection < ejections_[kWidth - 1])) return;
    } else {
      ++size_;
    }
    int at = size_ - 1;
    for (; at > 0 && ejection < ejections_[at - 1]; --at) ejections_[at] = ejections_[at - 1];
    ejections_[at] = ejection;
  }
  const Ejection* begin() const { return ejections_; }
  const Ejection* end() const { return ejections_ + size_; }

 private:
  Ejection ejections_[kWidth];
  int size_ = 0;
};

class Exchange {
 public:
  Exchange(const Problem& problem, Counts& counts)
      : problem_(problem),
        held_(counts),
        present_(problem.num_devices),
        where_(problem.size(), -1),
        busy_us_(problem.num_devices),
        free_(problem.free_pages, problem.free_pages + problem.num_devices),
        placed_((kDepth + 1) * problem.num_devices) {
    for (int64_t device = 0; device < problem.num_devices; ++device) {
      busy_us_[device] = problem.start_us[device] + lanes_us(problem, counts, device);
      present_[device].reserve(problem.num_sequences);
      for (int64_t j = 0; j < problem.num_sequences; ++j) {
        const int64_t count = held(device, j);
        free_[device] -= count * problem.pages(device)[j];
        if (count) enter(device, j);
      }
    }
    by_weight_.reserve(problem.num_sequences);
  }

  // Relieves the slowest device again and again.
  void descend() {
    int64_t visits = kVisits;
    while (visits > 0) {
      int64_t slowest = 0;
      for (int64_t device = 1; device < problem_.num_devices; ++device) {
        if (time_us(device) > time_us(slowest)) slowest = device;
      }
      if (!relieve(slowest, visits)) return;
    }
  }

 private:
  int64_t& held(int64_t device, int64_t j) { return held_[device * problem_.num_sequences + j]; }

  double time_us(int64_t device) const {
    return present_[device].empty() ? 0.0 : std::max(problem_.floor_us[device], busy_us_[device]);
  }

  void enter(int64_t device, int64_t j) {
    where_[device * problem_.num_sequences + j] = static_cast<int64_t>(present_[device].size());
    present_[device].push_back(j);
  }

  void leave(int64_t device, int64_t j) {
    auto& present = present_[device];
    const int64_t at = where_[device * problem_.num_sequences + j], last = present.back();
    present[at] = last;
    where_[device * problem_.num_sequences + last] = at;
    present.pop_back();
  }

  void put(int64_t j, int64_t device, int64_t count) {
    int64_t& now = held(device, j);
    if (!now) enter(device, j);
    now += count;
    if (!now) leave(device, j);
    busy_us_[device] += static_cast<double>(count) * problem_.lanes(device)[j];
    free_[device] -= count * problem_.pages(device)[j];
  }

  // Finds a chain for one lane of the slowest device, short lanes first.
  bool relieve(int64_t slowest, int64_t& visits) {
    const double limit_us = time_us(slowest) * (1 - kStep);
    by_weight_ = present_[slowest];
    std::sort(by_weight_.begin(), by_weight_.end(), [this](int64_t j, int64_t k) {
      return problem_.weight_us[j] != problem_.weight_us[k] ? problem_.weight_us[j] < problem_.weight_us[k] : j < k;
    });
    for (const int64_t j : by_weight_) {
      put(j, slowest, -1);
      if (time_us(slowest) <= limit_us) {
        const int64_t allowed = visits_ = std::min(visits, kVisitsPerChain);
        const bool relieved = place(j, 1, slowest, limit_us, kDepth);
        visits -= allowed - visits_;
        if (relieved) return true;
      }
      put(j, slowest, 1);
    }
    return false;
  }

  // Places lanes that left `origin` with no device above `limit_us`. False: not found, and nothing is changed.
  bool place(int64_t j, int64_t count, int64_t origin, double limit_us, int depth) {
    visits_ -= problem_.num_devices;
    std::pair<int64_t, int64_t>* const placed = placed_.data() + depth * problem_.num_devices;
    auto* last = placed;
    for (int64_t device = 0; device < problem_.num_devices; ++device) {
      if (device == origin || !(busy_us_[device] + problem_.lanes(device)[j] <= limit_us)) continue;
      const int64_t fitting = std::min(count, room(j, device, limit_us));
      if (fitting <= 0) continue;
      put(j, device, fitting);
      *last++ = {device, fitting};
      count -= fitting;
      if (!count) return true;
    }
    if (depth && visits_ > 0) {
      for (const Ejection& each : ejections(j, count, origin, limit_us)) {
        put(each.other, each.device, -each.count);
        put(j, each.device, count);
        if (place(each.other, each.count, each.device, limit_us, depth - 1)) return true;
        put(j, each.device, -count);
        put(each.other, each.device, each.count);
        if (visits_ <= 0) break;
      }
    }
    for (auto* each = placed; each != last; ++each) put(j, each->first, -each->second);
    return false;
  }

  // Lanes of `j` that a device can take as it is; one of them fits into its time.
  int64_t room(int64_t j, int64_t device, double limit_us) {
    if (problem_.floor_us[device] > limit_us) return 0;
    const auto most = static_cast<double>(problem_.most_lanes[device] - held(device, j));
    const double fitting_us = (limit_us - busy_us_[device]) / problem_.lanes(device)[j];
    const auto fitting = static_cast<int64_t>(std::min(fitting_us, most));
    const int64_t pages = problem_.pages(device)[j];
    return pages ? std::min(fitting, free_[device] / pages) : fitting;
  }

  // Ejections after which `count` lanes of `j` fit.
  Ejections ejections(int64_t j, int64_t count, int64_t origin, double limit_us) {
    Ejections found;
    for (int64_t device = 0; device < problem_.num_devices; ++device) {
      if (present_[device].empty() || device == origin || problem_.floor_us[device] > limit_us) continue;
      if (held(device, j) + count > problem_.most_lanes[device]) continue;
      const double* costs = problem_.lanes(device);
      const int64_t* pages = problem_.pages(device);
      const double over_us = busy_us_[device] + static_cast<double>(count) * costs[j] - limit_us;
      const int64_t lacking = count * pages[j] - free_[device];
      visits_ -= static_cast<int64_t>(present_[device].size());
      for (const int64_t other : present_[device]) {
        const int64_t present = held(device, other);
        if (other == j) continue;
        int64_t ejected = 1;
        if (over_us > 0) {
          const double needed = std::ceil(over_us / costs[other]);
          if (needed > static_cast<double>(present)) continue;
          ejected = static_cast<int64_t>(needed);
        }
        if (lacking > 0) {
          if (!pages[other]) continue;
          ejected = std::max(ejected, (lacking + pages[other] - 1) / pages[other]);
        }
        if (ejected > present) continue;
        found.offer({static_cast<double>(ejected) * problem_.weight_us[other], device, other, ejected});
      }
    }
    return found;
  }

  const Problem& problem_;
  Counts& held_;
  std::vector<std::vector<int64_t>> present_;           // by device: sequences with lanes there, in no order
  std::vector<int64_t> where_;                          // [N][J] in present_
  std::vector<double> busy_us_;                         // [N]
  std::vector<int64_t> free_;                           // [N]
  std::vector<std::pair<int64_t, int64_t>> placed_;     // [depth][N] (device, lanes)
  std::vector<int64_t> by_weight_;
  int64_t visits_ = 0;                                   // left for the chain that is being built
};

}  // namespace

void exchange(const Problem& problem, Counts& counts) { Exchange(problem, counts).descend(); }

}  // namespace hetis
