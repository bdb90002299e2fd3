#ifndef EDUBA_MODEL_JOB_LOOP_H_
#define EDUBA_MODEL_JOB_LOOP_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "collective/communicator.h"
#include "model/job.h"
#include "model/model_content.h"
#include "model/running_job.h"
#include "model/tokenizer/tokenizer.h"

namespace eduba {

// The one loop in which sessions grow and answer: jobs on the sessions of one node, carried out step by step
// together with the other ranks of a group (docs/adr/0008-model-service.md). A job loop lives as long as its
// group; the sessions (ModelContent) outlive it.
//
// In lockstep. Every rank has the same sessions and jobs and makes the same steps: each call here is made by
// all ranks in the same order. One step has one token of every generation and a chunk of one job that reads;
// jobs that read take turns. Its order is:
//   1. choose the next token of every generation, from its last hidden state;
//   2. reserve memory, and agree with the other ranks: who has none, and whose generation has ended (one
//      collective);
//   3. compute the rows. All ranks compute all of them, but for two exceptions: a generation that has an
//      owner rank is computed there alone, and a long append is shared out (SequenceParallelPrefill), some of
//      its work in each step;
//   4. tell what came of it, and end the jobs that are complete.
// So nothing that a rank decides by itself (memory, time, a broken device) can make ranks differ.
//
// One thread. Results and progress come from within the calls.
class JobLoop {
 public:
  struct Options {
    ModelContent* content = nullptr;  // These four outlive the loop.
    Communicator* group = nullptr;
    const Tokenizer* tokenizer = nullptr;  // Null: there is no text, and stop strings are refused.
    JobListener* listener = nullptr;
    bool sequence_parallel = true;  // False: all ranks compute long appends too, which gives the same bits.
  };

  explicit JobLoop(const Options& options) : options_(options) {}
  // Ends jobs as FailAll does, without results.
  ~JobLoop();
  JobLoop(const JobLoop&) = delete;
  JobLoop& operator=(const JobLoop&) = delete;

  // These do what ModelContent's functions of the same names do. Jobs of sessions that go end with NOT_FOUND.
  // Fork also answers UNAVAILABLE while the session is being read again. REQUIRES of Fork: no generation of
  // the session is under way.
  absl::Status Open(uint64_t session_id, const ContextOptions& options, const Placement& placement,
                    int index);
  void Close(uint64_t session_id);
  void Retain(const std::set<uint64_t>& session_ids);
  absl::Status Fork(uint64_t session_id, uint64_t fork_id);

  // Begins a job, whose result comes from a later step; or from within this call, where there is nothing to
  // do. While its session is being read again the job waits, and what is wrong with it becomes its result.
  // After an error there is no job, and no result comes:
  //   NOT_FOUND            the session is not open
  //   INVALID_ARGUMENT     a token is not in the vocabulary, an option is out of range
  //   FAILED_PRECONDITION  a generation or score of an empty session; a settlement that does not fit what is
  //                        held; keys and values are missing, because a settlement failed
  //   OUT_OF_RANGE         an append or range beyond the session's end
  //   ALREADY_EXISTS       an append of other ids than are there; names the first position that differs
  // Any other error is that of this node's disk; the group is dead. REQUIRES: a generation of the session is
  // not under way, and no two jobs make it longer.
  absl::Status Start(const JobId& id, JobRequest request);
  // Ends a job with what it has, one with an owner rank in the next step. One that has ended is left alone.
  void Cancel(uint64_t job);
  // The group is over: ends all jobs with an error. Each session keeps the tokens that were read, and nothing
  // of a step that was half done. (What an owner rank generated, the others do not have then; if more than
  // one row, their keys and values have to be read again, and are dropped.)
  void FailAll(const absl::Status& status);

  bool busy() const { return !jobs_.empty(); }
  // One step. `newest` is the number of the newest command that this rank has received; returned is rank 0's:
  // up to it all ranks run commands before the next step. An error is the end of the group: the communicator
  // is dead, and FailAll the caller's next call. REQUIRES: busy().
  absl::StatusOr<uint64_t> Step(uint64_t newest);

 private:
  using Kind = RunningJob::Kind;
  // The jobs of a step. Entry i is jobs[i]'s; `prefill` reads by a prefill, and may be null.
  struct StepPlan {
    std::vector<RunningJob*> jobs;
    std::vector<BatchEntry> entries;
    RunningJob* prefill = nullptr;
    bool room = false;  // Whether this rank can go on with the prefill.
  };

  ModelEngine& engine() const { return options_.content->engine(); }
  int rank() const { return options_.group->rank(); }
  // Whether this rank computes the job, and whether it is the one that reports what came of it.
  bool Computes(const RunningJob& job) const { return job.generate.owner_rank.value_or(rank()) == rank(); }
  bool Reports(const RunningJob& job) const { return job.generate.owner_rank.value_or(0) == rank(); }

  // The functions of job_loop.cc: how jobs begin and end.
  // Whether a job with a smaller id reads the session again, or waits for one that does.
  bool IsBeingReadAgain(uint64_t session_id, uint64_t before_job) const;
  absl::Status Begin(JobRequest& request, RunningJob& job);
  absl::Status Begin(AppendJob& request, RunningJob& job);
  absl::Status Begin(GenerateJob& request, RunningJob& job);
  absl::Status Begin(ScoreJob& request, RunningJob& job);
  absl::Status Begin(EmbedJob& request, RunningJob& job);
  absl::Status Begin(SettleJob& request, RunningJob& job);
  absl::Status CheckIds(absl::Span<const int32_t> ids) const;
  // Whether `job` reads nothing any more.
  static bool IsComplete(const RunningJob& job);
  void BeginWaitingJobs();
  void EndJobsOf(uint64_t session_id);
  // Leaves the job's session as its last whole step left it.
  void TakeBackHalfAStep(RunningJob& job);
  // Ends the job, one with an owner rank in the next step.
  void End(RunningJob& job, JobEnd end);
  // Tells the job's result and forgets it.
  void Finish(RunningJob& job, const JobEnd& end);
  void WantSinkMass(bool wanted, RunningJob& job) const;
  void ReportProgress(const RunningJob& job, const JobProgress& progress) const;

  // The functions of job_loop_step.cc: the parts of a step, in order.
  // All jobs that generate, and last the one that reads.
  std::vector<RunningJob*> NextJobs();
  // Jobs whose logits are not finite end and leave `jobs`, those with an owner rank in the next step.
  void ChooseTokens(std::vector<RunningJob*>& jobs);
  absl::Status ChooseTokens(absl::Span<RunningJob* const> jobs) const;
  // For RunningJob::needs_memory.
  void TakeMemory(RunningJob& job);
  StepPlan PlanStep(std::vector<RunningJob*> jobs);
  // The next ids of a job that reads, as far as they are read in one way, and in which.
  static BatchEntry IdsLeft(RunningJob& job);
  BatchEntry MakeEntry(RunningJob& job) const;
  // Whether the job, which reads, goes on by a prefill, which is under way or begun here; else by a chunk.
  bool GoesByPrefill(RunningJob& job, bool& room);
  static void GiveUpPrefill(RunningJob& job);
  // ModelEngine::Prepare, and room on the disk; a rank whose device is broken ends the group.
  absl::Status Reserve(const RunningJob& job, const BatchEntry& entry) const;
  // Room on the disk for what the job adds to its session with `count` more tokens.
  absl::Status ReserveTokens(const RunningJob& job, int64_t count) const;
  // Reserves memory, and agrees with all ranks. What is left in the plan can be computed by all.
  absl::StatusOr<uint64_t> AgreeOnStep(uint64_t newest, absl::Time deadline, StepPlan& plan);
  // Whether there was any, whose memory an entry may have lacked.
  bool GiveUpAllPrefills(StepPlan& plan);
  // Ends a generation that has an owner rank, and gives all ranks its rows. `word`: an EndWord; `otherwise`:
  // how it ends if that is 0.
  absl::Status EndOnAllRanks(RunningJob& job, int64_t word, JobEnd otherwise, absl::Time deadline);
  // Computes rows that all ranks compute, or some that are this rank's alone.
  absl::Status RunEntries(absl::Time deadline, const std::vector<RunningJob*>& jobs,
                          const std::vector<BatchEntry>& entries);
  // Runs as much of the job's prefill as a chunk costs.
  absl::Status RunPrefill(absl::Time deadline, RunningJob& job);
  // Entry `index` of the engine's last step, whose hidden states are [entry's ids, hidden_size], was `job`'s.
  absl::Status Advance(RunningJob& job, const BatchEntry& entry, size_t index, const float* hidden);
  // `count` more of the job's ids are in its context.
  absl::Status AdvanceReading(RunningJob& job, int64_t count);
  absl::Status AdvanceGeneration(RunningJob& job);
  // Adds tokens to the job's session. What the disk does not take, though there was room, ends the group.
  absl::Status ExtendSession(RunningJob& job, absl::Span<const int32_t> ids) const;
  // The text that the token completes, and whether a stop string is in it.
  static std::string NextText(RunningJob& job, bool& stop);

  const Options options_;
  std::map<uint64_t, RunningJob> jobs_;  // By id.
  uint64_t last_reader_ = 0;             // The job that read last.
};

}  // namespace eduba

#endif  // EDUBA_MODEL_JOB_LOOP_H_
