#ifndef EDUBA_COORDINATOR_RUNNING_CLOCK_H_
#define EDUBA_COORDINATOR_RUNNING_CLOCK_H_

#include <algorithm>
#include <cstdint>

namespace eduba {

// Milliseconds in which this process ran, as far as it can tell: it is asked at least every kTick, so a
// longer gap means that the process was stopped, its machine paused, or had no CPU to give. Nobody is late or
// silent because the coordinator was not there to hear.
class RunningClock {
 public:
  // The most that one gap counts.
  static constexpr int64_t kGapMaxMs = 500;

  // `steady_ms`: now, by a clock that never goes back.
  int64_t At(int64_t steady_ms) {
    if (last_ms_ != kNever) running_ms_ += std::clamp<int64_t>(steady_ms - last_ms_, 0, kGapMaxMs);
    last_ms_ = steady_ms;
    return running_ms_;
  }

 private:
  static constexpr int64_t kNever = -1;
  int64_t last_ms_ = kNever;
  int64_t running_ms_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_RUNNING_CLOCK_H_
