#ifndef EDUBA_RPC_TASK_THREADS_H_
#define EDUBA_RPC_TASK_THREADS_H_

#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "base/mutex.h"

namespace eduba {

// A few threads that run what must not run on gRPC's own, because it takes long or waits for a lock: gRPC has
// as few as two threads for the reactions of all calls of a process. Tasks begin in the order of Add.
class TaskThreads {
 public:
  explicit TaskThreads(int threads);
  // Runs what has been added, then ends the threads.
  ~TaskThreads();
  TaskThreads(const TaskThreads&) = delete;
  TaskThreads& operator=(const TaskThreads&) = delete;

  // Unbounded: whoever adds tasks bounds how many it has under way. From any thread, tasks included.
  void Add(std::function<void()> task);

 private:
  void Run();

  Mutex mutex_;
  CondVar changed_;
  std::deque<std::function<void()>> tasks_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace eduba

#endif  // EDUBA_RPC_TASK_THREADS_H_
