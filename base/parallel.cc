#include "base/parallel.h"

#include <chrono>
#include <thread>

#include "base/mutex.h"

namespace eduba {
namespace {

// Before a thread sleeps it looks around for so long, giving its core to whoever wants it in between. A layer
// of a model is a dozen short loops, one after another, and waking a thread takes as long as some of them. A
// time and not a number of looks, because where many want the cores each look may cost milliseconds.
constexpr std::chrono::microseconds kLookAround(50);

template <class Ready>
bool ComesSoon(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kLookAround;
  do {
    if (ready()) return true;
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { Work(i); });
}

ThreadPool::~ThreadPool() {
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
  }
  start_.NotifyAll();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::ParallelFor(int64_t count, const std::function<void(int64_t, int)>& body) {
  if (count <= 0) return;
  if (workers_.empty() || count == 1) {
    for (int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
  {
    const MutexLock lock(mutex_);
    body_ = &body;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
  }
  start_.NotifyAll();
  Drain(0);
  const auto all_done = [this] { return running_.load(std::memory_order_acquire) == 0; };
  if (ComesSoon(all_done)) return;
  const MutexLock lock(mutex_);
  while (!all_done()) done_.Wait(mutex_);
}

void ThreadPool::Drain(int thread) {
  for (int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < count_;
       i = next_.fetch_add(1, std::memory_order_relaxed)) {
    (*body_)(i, thread);
  }
}

void ThreadPool::Work(int thread) {
  uint64_t seen = 0;
  const auto has_work = [&] { return generation_.load(std::memory_order_acquire) != seen; };
  for (;;) {
    if (!ComesSoon(has_work)) {
      const MutexLock lock(mutex_);
      while (!stopping_ && !has_work()) start_.Wait(mutex_);
      if (stopping_) return;
    }
    ++seen;  // Nobody begins a loop before all have ended the one before.
    Drain(thread);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      // The caller may have looked and be about to sleep. It holds the mutex until it sleeps, so this waits
      // for that.
      { const MutexLock lock(mutex_); }
      done_.NotifyOne();
    }
  }
}

}  // namespace eduba
