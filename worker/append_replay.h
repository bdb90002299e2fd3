#ifndef EDUBA_WORKER_APPEND_REPLAY_H_
#define EDUBA_WORKER_APPEND_REPLAY_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "attention/append_log.h"
#include "attention/page_store.h"
#include "attention/sequence.h"
#include "attention/staged_append.h"
#include "base/parallel.h"
#include "kernels/backend.h"

namespace eduba {

// Replays the appends of a log into a sequence: through StagedAppend, as they came once, so every check is
// made again. Rows are taken by all threads of a pool, some of them together. DATA_LOSS where the rows are
// not those that were sealed, or frames do not follow one another; else StagedAppend's errors.
class AppendReplay final : public AppendLog {
 public:
  // All outlive the replay.
  AppendReplay(Backend* backend, PageStore* store, Sequence* sequence, ThreadPool* threads)
      : backend_(backend), store_(store), sequence_(sequence), threads_(threads) {}

  absl::Status Begin(const AppendShare& share) override;
  absl::Status AddRows(int layer, int64_t first, int64_t count, absl::Span<const char> keys,
                       absl::Span<const char> values) override;
  absl::Status Seal(const AppendSeal& seal) override;
  absl::Status Publish(absl::Span<const int16_t> exponents) override;

  // The append that is sealed and not published, or null.
  std::shared_ptr<StagedAppend> TakeSealed();

 private:
  // Rows that wait to be taken.
  struct Rows {
    int layer = 0;
    int64_t first = 0;
    int64_t count = 0;
    std::vector<char> keys;
    std::vector<char> values;
  };

  absl::Status CheckBegun() const;
  // Has all waiting rows taken.
  absl::Status TakeRows();

  Backend* const backend_;
  PageStore* const store_;
  Sequence* const sequence_;
  ThreadPool* const threads_;
  std::shared_ptr<StagedAppend> append_;
  // The first `waiting_count_` wait; the memory of the others is used again.
  std::vector<Rows> waiting_;
  int64_t waiting_count_ = 0;
  int64_t waiting_bytes_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_WORKER_APPEND_REPLAY_H_
