#ifndef EDUBA_BASE_PLAYED_QUEUE_H_
#define EDUBA_BASE_PLAYED_QUEUE_H_

#include <deque>
#include <functional>
#include <mutex>
#include <utility>

namespace eduba {

// A GPU's stream as a host plays it, for tests: work in order, done when somebody waits for it and not
// before, so that what is used too early shows. Thread-safe.
class PlayedQueue {
 public:
  // `work` says whether it could be done; what is behind it waits until it is asked again.
  void Push(std::function<bool()> work) {
    const std::scoped_lock lock(mutex_);
    work_.push_back(std::move(work));
  }

  // Does what can be done now. Whether nothing is left.
  bool Run() {
    const std::scoped_lock lock(mutex_);
    while (!work_.empty() && work_.front()()) work_.pop_front();
    return work_.empty();
  }

 private:
  std::mutex mutex_;
  std::deque<std::function<bool()>> work_;  // Guarded by mutex_.
};

}  // namespace eduba

#endif  // EDUBA_BASE_PLAYED_QUEUE_H_
