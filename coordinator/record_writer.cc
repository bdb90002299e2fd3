#include "coordinator/record_writer.h"

namespace eduba {

RecordWriter::RecordWriter(std::unique_ptr<Recorder> recorder, Done done)
    : recorder_(std::move(recorder)), done_(std::move(done)), thread_([this] { Run(); }) {}

RecordWriter::~RecordWriter() {
  {
    const MutexLock lock(mutex_);
    ending_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

void RecordWriter::Add(Persist change) {
  const MutexLock lock(mutex_);
  queue_.push_back(std::move(change));
  changed_.NotifyAll();
}

void RecordWriter::Drain() {
  const MutexLock lock(mutex_);
  while (writing_ || !queue_.empty()) changed_.Wait(mutex_);
}

void RecordWriter::Run() {
  for (;;) {
    std::vector<Persist> taken;
    {
      const MutexLock lock(mutex_);
      writing_ = false;
      changed_.NotifyAll();
      while (queue_.empty() && !ending_) changed_.Wait(mutex_);
      if (queue_.empty()) return;
      taken.swap(queue_);
      writing_ = true;
    }
    std::vector<Change> changes;
    for (Persist& persist : taken) changes.push_back(std::move(persist.change));
    std::vector<absl::Status> statuses = recorder_->ApplyAll(changes);
    Written written;
    for (size_t i = 0; i < taken.size(); ++i) written.emplace_back(taken[i].id, std::move(statuses[i]));
    done_(written);
  }
}

}  // namespace eduba
