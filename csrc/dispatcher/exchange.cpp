#include <algorithm>
#include <cmath>
#include <tuple>

#include "solver.h"

namespace hetis {
namespace {

// As in exchange.py.
constexpr double kStep = 2e-3;
constexpr int kDepth = 4, kWidth = 12;
constexpr int64_t kLooks = 8000, kLooksPerChain = 2500;

struct Way {
  double weight_us;  // of what is driven away
  int64_t device, other, driven;

  bool operator<(const Way& way) const {
    return std::tie(weight_us, device, other, driven) < std::tie(way.weight_us, way.device, way.other, way.driven);
  }
};

// The `kWidth` ways that drive away least, ascending.
class Ways {
 public:
  void offer(const Way& way) {
    if (count_ == kWidth) {
      if (!(way < ways_[kWidth - 1])) return;
    } else {
      ++count_;
    }
    int at = count_ - 1;
    for (; at > 0 && way < ways_[at - 1]; --at) ways_[at] = ways_[at - 1];
    ways_[at] = way;
  }
  const Way* begin() const { return ways_; }
  const Way* end() const { return ways_ + count_; }

 private:
  Way ways_[kWidth];
  int count_ = 0;
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

  void descend() {
    int64_t looks = kLooks;
    while (looks > 0) {
      int64_t slowest = 0;
      for (int64_t device = 1; device < problem_.num_devices; ++device) {
        if (time_us(device) > time_us(slowest)) slowest = device;
      }
      if (!relieve(slowest, looks)) return;
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

  bool relieve(int64_t slowest, int64_t& looks) {
    const double limit_us = time_us(slowest) * (1 - kStep);
    by_weight_ = present_[slowest];
    std::sort(by_weight_.begin(), by_weight_.end(), [this](int64_t j, int64_t k) {
      return problem_.weight_us[j] != problem_.weight_us[k] ? problem_.weight_us[j] < problem_.weight_us[k] : j < k;
    });
    for (const int64_t j : by_weight_) {
      put(j, slowest, -1);
      if (time_us(slowest) <= limit_us) {
        const int64_t allowed = looks_ = std::min(looks, kLooksPerChain);
        const bool relieved = place(j, 1, slowest, limit_us, kDepth);
        looks -= allowed - looks_;
        if (relieved) return true;
      }
      put(j, slowest, 1);
    }
    return false;
  }

  bool place(int64_t j, int64_t count, int64_t origin, double limit_us, int depth) {
    looks_ -= problem_.num_devices;
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
    if (depth && looks_ > 0) {
      for (const Way& way : ways(j, count, origin, limit_us)) {
        put(way.other, way.device, -way.driven);
        put(j, way.device, count);
        if (place(way.other, way.driven, way.device, limit_us, depth - 1)) return true;
        put(j, way.device, -count);
        put(way.other, way.device, way.driven);
        if (looks_ <= 0) break;
      }
    }
    for (auto* each = placed; each != last; ++each) put(j, each->first, -each->second);
    return false;
  }

  int64_t room(int64_t j, int64_t device, double limit_us) {
    if (problem_.floor_us[device] > limit_us) return 0;
    const auto most = static_cast<double>(problem_.most_lanes[device] - held(device, j));
    const double fitting_us = (limit_us - busy_us_[device]) / problem_.lanes(device)[j];
    const auto fitting = static_cast<int64_t>(std::min(fitting_us, most));
    const int64_t pages = problem_.pages(device)[j];
    return pages ? std::min(fitting, free_[device] / pages) : fitting;
  }

  Ways ways(int64_t j, int64_t count, int64_t origin, double limit_us) {
    Ways ways;
    for (int64_t device = 0; device < problem_.num_devices; ++device) {
      if (present_[device].empty() || device == origin || problem_.floor_us[device] > limit_us) continue;
      if (held(device, j) + count > problem_.most_lanes[device]) continue;
      const double* costs = problem_.lanes(device);
      const int64_t* pages = problem_.pages(device);
      const double over_us = busy_us_[device] + static_cast<double>(count) * costs[j] - limit_us;
      const int64_t lacking = count * pages[j] - free_[device];
      looks_ -= static_cast<int64_t>(present_[device].size());
      for (const int64_t other : present_[device]) {
        const int64_t present = held(device, other);
        if (other == j) continue;
        int64_t driven = 1;
        if (over_us > 0) {
          const double needed = std::ceil(over_us / costs[other]);
          if (needed > static_cast<double>(present)) continue;
          driven = static_cast<int64_t>(needed);
        }
        if (lacking > 0) {
          if (!pages[other]) continue;
          driven = std::max(driven, (lacking + pages[other] - 1) / pages[other]);
        }
        if (driven > present) continue;
        ways.offer({static_cast<double>(driven) * problem_.weight_us[other], device, other, driven});
      }
    }
    return ways;
  }

  const Problem& problem_;
  Counts& held_;
  std::vector<std::vector<int64_t>> present_;           // by device: sequences with lanes there, in no order
  std::vector<int64_t> where_;                          // [N][J] in present_
  std::vector<double> busy_us_;                         // [N]
  std::vector<int64_t> free_;                           // [N]
  std::vector<std::pair<int64_t, int64_t>> placed_;     // [depth][N] (device, lanes)
  std::vector<int64_t> by_weight_;
  int64_t looks_ = 0;
};

}  // namespace

void exchange(const Problem& problem, Counts& counts) { Exchange(problem, counts).descend(); }

}  // namespace hetis
