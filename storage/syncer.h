#ifndef EDUBA_STORAGE_SYNCER_H_
#define EDUBA_STORAGE_SYNCER_H_

#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "base/mutex.h"
#include "storage/frame_log.h"

namespace eduba {

// A thread that brings logs to the disk, so that nobody else waits for it. Whatever asked while it was busy
// is done together, with one sync for each log. If a sync fails, the process ends with a line that says why:
// what the disk holds is not known then, and nothing may be acknowledged any more.
class Syncer {
 public:
  Syncer();
  // Does what it was asked to first.
  ~Syncer();
  Syncer(const Syncer&) = delete;
  Syncer& operator=(const Syncer&) = delete;

  // Calls done() from the syncer's thread when all that has been written to `log` is on the disk.
  void Sync(std::shared_ptr<FrameLog> log, std::function<void()> done);

 private:
  struct Waiting {
    std::shared_ptr<FrameLog> log;
    std::function<void()> done;
  };

  void Run();

  Mutex mutex_;
  CondVar changed_;
  std::vector<Waiting> waiting_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace eduba

#endif  // EDUBA_STORAGE_SYNCER_H_
