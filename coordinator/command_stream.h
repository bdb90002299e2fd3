#ifndef EDUBA_COORDINATOR_COMMAND_STREAM_H_
#define EDUBA_COORDINATOR_COMMAND_STREAM_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/outbox.h"
#include "eduba/v1/group.pb.h"

namespace eduba {

// A command that every rank has answered.
struct Answered {
  uint64_t ordinal = 0;
  std::vector<v1::CommandResult> results;  // By rank.
};

// The ordered commands of one epoch: every rank gets the same ones, numbered 1, 2, 3, ..., and answers each
// once.
class CommandStream {
 public:
  // Not called when the epoch ends first.
  using Done = std::function<void(Answered answered, int64_t now_ms)>;
  // Changes what one rank gets: shares of an append.
  using Share = std::function<void(int rank, v1::Command* own)>;

  // `timeout_ms`: for one command, from when a worker begins it.
  CommandStream(int64_t timeout_ms, Outbox* outbox) : timeout_ms_(timeout_ms), outbox_(outbox) {}

  // The epoch begins; `workers` are its ranks.
  void Begin(uint64_t epoch, std::vector<WorkerId> workers, int64_t now_ms);
  // The epoch is over: forgets what is unanswered.
  void End();

  // Sends the command to all ranks, and returns it with its ordinal. `extra_ms`: what the command gets beside
  // the time that all have. REQUIRES: between Begin and End.
  std::shared_ptr<const v1::GroupMessage> Send(v1::Command command, int64_t now_ms, Done done,
                                               const Share& share = nullptr, int64_t extra_ms = 0);

  // What a rank says to a command. False: it was not asked, or has answered before.
  bool Take(int rank, v1::CommandResult result, int64_t now_ms);
  // The ranks have made a step of a job. Commands wait for steps: while steps are made, no rank is late.
  void StepMade(int64_t now_ms) { answered_ms_ = now_ms; }

  struct Late {
    int rank = 0;
    uint64_t ordinal = 0;
  };
  // A rank that should have answered a command by now. Workers take commands one after another, so only the
  // first unanswered command can be late, and its time began when the one before it was answered.
  std::optional<Late> FindLate(int64_t now_ms) const;

 private:
  struct Pending {
    std::vector<std::optional<v1::CommandResult>> results;  // By rank.
    int missing = 0;
    int64_t sent_ms = 0;
    int64_t timeout_ms = 0;
    Done done;
  };

  const int64_t timeout_ms_;
  Outbox* const outbox_;
  uint64_t epoch_ = 0;
  std::vector<WorkerId> workers_;  // By rank.
  uint64_t next_ordinal_ = 1;
  std::map<uint64_t, Pending> pending_;  // By ordinal.
  int64_t answered_ms_ = 0;              // When the last command was answered.
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_COMMAND_STREAM_H_
