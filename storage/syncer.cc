#include "storage/syncer.h"

#include <cstdlib>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/log.h"

namespace eduba {

Syncer::Syncer() : thread_([this] { Run(); }) {}

Syncer::~Syncer() {
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
    changed_.NotifyOne();
  }
  thread_.join();
}

void Syncer::Sync(std::shared_ptr<FrameLog> log, std::function<void()> done) {
  const MutexLock lock(mutex_);
  waiting_.push_back({std::move(log), std::move(done)});
  changed_.NotifyOne();
}

void Syncer::Run() {
  while (true) {
    std::vector<Waiting> batch;
    {
      const MutexLock lock(mutex_);
      while (waiting_.empty() && !stopping_) changed_.Wait(mutex_);
      if (waiting_.empty()) return;
      batch.swap(waiting_);
    }
    std::set<FrameLog*> synced;
    for (const Waiting& waiting : batch) {
      if (!synced.insert(waiting.log.get()).second) continue;
      const absl::Status status = waiting.log->Sync();
      if (status.ok()) continue;
      LogError(absl::StrCat(std::string(status.message()),
                            "; nothing that was not acknowledged before is kept; this process ends"));
      std::_Exit(EXIT_FAILURE);
    }
    for (const Waiting& waiting : batch) waiting.done();
  }
}

}  // namespace eduba
