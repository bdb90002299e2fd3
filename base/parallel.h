#ifndef EDUBA_BASE_PARALLEL_H_
#define EDUBA_BASE_PARALLEL_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "base/mutex.h"

namespace eduba {

// A fixed set of threads for data-parallel loops. The caller is one of them, so ThreadPool(1) starts none.
// One loop at a time: ParallelFor is not re-entrant and not thread-safe.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(index, thread) once for each index in [0, count), thread in [0, threads()); returns when all
  // are done. Which thread takes which index is not fixed, so nothing that `body` adds up may depend on it.
  // `body` must not throw.
  void ParallelFor(int64_t count, const std::function<void(int64_t index, int thread)>& body);

 private:
  void Work(int thread);
  void Drain(int thread);

  std::vector<std::thread> workers_;
  Mutex mutex_;
  CondVar start_;
  CondVar done_;
  std::atomic<uint64_t> generation_{0};  // One more for every loop. Written under mutex_.
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::atomic<int> running_{0};  // Workers that have not finished this generation.
  const std::function<void(int64_t, int)>* body_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
};

}  // namespace eduba

#endif  // EDUBA_BASE_PARALLEL_H_
