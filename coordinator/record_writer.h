#ifndef EDUBA_COORDINATOR_RECORD_WRITER_H_
#define EDUBA_COORDINATOR_RECORD_WRITER_H_

#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "base/mutex.h"
#include "coordinator/effects.h"
#include "coordinator/recorder.h"

namespace eduba {

// A thread that writes changes down, so that nobody else waits for the disk. All changes that have come in
// while the disk was busy are written together. Thread-safe.
class RecordWriter {
 public:
  using Written = std::vector<std::pair<uint64_t, absl::Status>>;  // Ids of Persist effects, in their order.
  // Called by the writer's thread, with no lock held.
  using Done = std::function<void(const Written& written)>;

  RecordWriter(std::unique_ptr<Recorder> recorder, Done done);
  // Writes what was added, as Drain does, and ends the thread.
  ~RecordWriter();
  RecordWriter(const RecordWriter&) = delete;
  RecordWriter& operator=(const RecordWriter&) = delete;

  // Returns at once.
  void Add(Persist change);
  // Returns when all that was added before has been written, and `done` has returned. Not to be called by
  // `done`.
  void Drain();

 private:
  void Run();

  const std::unique_ptr<Recorder> recorder_;
  const Done done_;
  Mutex mutex_;
  CondVar changed_;
  std::vector<Persist> queue_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_RECORD_WRITER_H_
