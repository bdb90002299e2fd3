#ifndef EDUBA_BASE_TESTING_EMULATED_QUEUE_H_
#define EDUBA_BASE_TESTING_EMULATED_QUEUE_H_

#include <deque>
#include <functional>
#include <utility>

#include "base/mutex.h"

namespace eduba {

// A GPU's stream as a host emulates it, for tests: work happens in order, when somebody waits for it and not
// before, so that a result that is used too early shows. Thread-safe.
class EmulatedQueue {
 public:
  // `work` says whether it could be done; what was pushed after it waits until it is asked again.
  void Push(std::function<bool()> work) {
    const MutexLock lock(mutex_);
    work_.push_back(std::move(work));
  }

  // Does what can be done now. True when nothing is left.
  bool Run() {
    const MutexLock lock(mutex_);
    while (!work_.empty() && work_.front()()) work_.pop_front();
    return work_.empty();
  }

 private:
  Mutex mutex_;
  std::deque<std::function<bool()>> work_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace eduba

#endif  // EDUBA_BASE_TESTING_EMULATED_QUEUE_H_
