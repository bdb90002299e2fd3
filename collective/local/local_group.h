#ifndef EDUBA_COLLECTIVE_LOCAL_LOCAL_GROUP_H_
#define EDUBA_COLLECTIVE_LOCAL_LOCAL_GROUP_H_

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "collective/operation.h"
#include "collective/transfer.h"

namespace eduba {

// One call as one rank makes it. `data` is `count` int64 (kSumI64, kReduceScatterI64) or float (kMaxF32),
// nothing (kBarrier), or where the bytes of `transfer` go (kSendReceive).
struct LocalCall {
  Operation operation = Operation::kBarrier;
  void* data = nullptr;
  int64_t count = 0;
  Transfer transfer;  // kSendReceive, as the next.
  const void* send = nullptr;
  absl::Span<const int64_t> part_begins;  // kReduceScatterI64: [ranks + 1]
};

// What the ranks of one local group share. A call is a round: every rank enters with a view of its data; the
// last to enter opens the work, cut into slices; every rank that is awake takes slices, and whoever finishes
// the last one ends the round. So a small payload costs one wake-up, and a large one is spread over the
// ranks.
//
// A rank may give up on a round that is not open yet (deadline, abort, a peer gone), which ends the group. In
// an open round nobody waits for a rank that is not running, and each stays to the end, because the others
// write into its data.
class LocalGroup {
 public:
  explicit LocalGroup(int size);

  int size() const { return size_; }

  // Takes the rank's place; false if it is taken.
  bool Claim(int rank);
  // Takes part in the next round. The first error ends the group: the rank that met it is told its cause, the
  // others UNAVAILABLE (DEADLINE_EXCEEDED if theirs is over too), or INTERNAL where the calls differ.
  absl::Status Run(int rank, const LocalCall& call, absl::Time deadline);
  // Ends the group on behalf of `rank`. A call that the rank itself has under way or makes later returns
  // ABORTED with the reason; `others` is what its peers are told. In a group that is dead already only the
  // rank's own answers change.
  void Leave(int rank, const std::string& reason, const std::string& others);

 private:
  struct Rank {
    bool claimed = false;
    bool entered = false;  // In the current round.
    LocalCall call;
    absl::Status aborted;  // ABORTED once the rank itself has left.
  };

  void OpenWork();
  void TakeSlices(std::unique_lock<std::mutex>& lock);
  void ReduceSlice(int64_t slice) const;
  // kReduceScatterI64: of the words [begin, end), each rank's to that rank.
  void ScatterSlice(int64_t begin, int64_t end) const;
  // kSendReceive: its slices are the ranks.
  void DeliverTo(int64_t rank) const;
  absl::Status Differences() const;
  std::string Missing() const;
  absl::Status ErrorFor(int rank, absl::Time deadline) const;
  void Fail(const absl::Status& status);

  const int size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  // All below guarded by mutex_, except that an open round's calls are constant and read without it.
  std::vector<Rank> ranks_;
  uint64_t round_ = 0;
  int entered_ = 0;
  bool open_ = false;
  int64_t slices_ = 0;
  int64_t next_slice_ = 0;
  int64_t finished_slices_ = 0;
  absl::Status failure_;  // Not OK: the group is dead.
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_LOCAL_LOCAL_GROUP_H_
