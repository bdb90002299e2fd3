#ifndef EDUBA_COLLECTIVE_LOCAL_LOCAL_GROUP_H_
#define EDUBA_COLLECTIVE_LOCAL_LOCAL_GROUP_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/mutex.h"
#include "collective/operation.h"
#include "collective/transfer.h"

namespace eduba {

// One call as one rank makes it. `data` points to `count` int64 words (kSumI64, kReduceScatterI64), to
// `count` floats (kMaxF32), to where the received bytes of `transfer` go (kSendReceive), or to nothing
// (kBarrier).
struct LocalCall {
  Operation operation = Operation::kBarrier;
  void* data = nullptr;
  int64_t count = 0;
  // For kSendReceive only.
  Transfer transfer;
  const void* send = nullptr;
  // For kReduceScatterI64 only: [ranks + 1], see parts.h.
  absl::Span<const int64_t> part_begins;
};

// What the ranks of one local group share. One call of the group is one round:
//   1. Every rank enters the round with a view of its data.
//   2. The last rank to enter opens the work, which is cut into slices.
//   3. Every rank that is awake takes slices, and whoever finishes the last slice ends the round.
// So a small payload costs one wake-up, and a large one is spread over the ranks.
//
// A rank may give up on a round that is not open yet (its deadline has passed, it was aborted, or a peer is
// gone); that ends the group. A rank never gives up on an open round, because the others write into its data;
// an open round always ends, because whoever is running takes the slices of those who are not.
class LocalGroup {
 public:
  explicit LocalGroup(int size);

  int size() const { return size_; }

  // Takes the rank's place. Returns false if the place is taken already.
  bool Claim(int rank);
  // Takes part in the next round. The first error ends the group. The rank that met the error is told its
  // cause. The others are told UNAVAILABLE, or DEADLINE_EXCEEDED if their own deadline has passed too. Where
  // the ranks made different calls, all are told INTERNAL.
  absl::Status Run(int rank, const LocalCall& call, absl::Time deadline);
  // Ends the group on behalf of `rank`. A call that the rank itself has under way or makes later returns
  // ABORTED with `reason`; its peers are told `others`. In a group that is dead already, only the rank's own
  // answers change.
  void Leave(int rank, const std::string& reason, const std::string& others);

 private:
  struct Rank {
    bool claimed = false;
    bool entered = false;  // The rank has entered the current round.
    absl::Status aborted;  // ABORTED once the rank itself has left the group.
  };

  void OpenWork() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Works on slices of the open round until none is left to take. Gives up mutex_ while it works.
  void TakeSlices() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ReduceSlice(int64_t slice) const;
  // For kReduceScatterI64: sums the words [begin, end), each into the data of the rank that gets it.
  void ScatterSlice(int64_t begin, int64_t end) const;
  // For kSendReceive, which has one slice per rank: copies what `rank` receives.
  void DeliverTo(int64_t rank) const;
  // INTERNAL if the ranks did not all make the same call.
  absl::Status Differences() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Names the ranks that have not entered the round.
  std::string Missing() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // What `rank` is told in a dead group.
  absl::Status ErrorFor(int rank, absl::Time deadline) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Fail(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const int size_;
  Mutex mutex_;
  CondVar changed_;
  std::vector<Rank> ranks_ ABSL_GUARDED_BY(mutex_);
  uint64_t round_ ABSL_GUARDED_BY(mutex_) = 0;
  int entered_ ABSL_GUARDED_BY(mutex_) = 0;  // Ranks that have entered the current round.
  bool open_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t slices_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t next_slice_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t finished_slices_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);  // Not OK: the group is dead.
  // By rank. Written under mutex_ before a round opens. Constant while the round is open, so the slices read
  // it without the lock.
  std::vector<LocalCall> calls_;
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_LOCAL_LOCAL_GROUP_H_
