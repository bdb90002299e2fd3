#ifndef EDUBA_WORKER_MODEL_SESSIONS_H_
#define EDUBA_WORKER_MODEL_SESSIONS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "attention/page_store.h"
#include "base/id_log.h"
#include "collective/communicator.h"
#include "eduba/v1/eduba.pb.h"
#include "eduba/v1/group.pb.h"
#include "kernels/backend.h"
#include "model/engine.h"
#include "model/pooler.h"
#include "model/sampler.h"
#include "model/wave.h"
#include "worker/served_model.h"

namespace eduba {

// The model sessions of one epoch on one rank, and the jobs on them (docs/adr/0008). Every rank has the same
// sessions and jobs, and makes the same steps: each call here is made by all ranks in the same order. In a
// step, every rank computes the same rows; but a generation that has a home is computed there alone, and the
// others hold their session without its newest rows until it ends. One thread.
class ModelSessions {
 public:
  struct Options {
    Backend* backend = nullptr;  // All outlive the object.
    PageStore* store = nullptr;
    ServedModel* model = nullptr;
    Communicator* group = nullptr;
    uint64_t epoch = 0;
    int64_t chunk_rows =
        256;  // That one job reads in one step: how long a generated token waits for a prompt.
    // Progress and results of jobs.
    std::function<void(const v1::WorkerMessage& message)> send;
  };

  explicit ModelSessions(Options options);
  ModelSessions(const ModelSessions&) = delete;
  ModelSessions& operator=(const ModelSessions&) = delete;

  // FAILED_PRECONDITION when the session was made for another model.
  absl::Status Open(uint64_t session_id, const v1::SessionSpec& spec);
  // Its jobs end with NOT_FOUND. Unknown sessions are ignored.
  void Close(uint64_t session_id);
  absl::Status Fork(const v1::ForkSession& request);

  // Makes the command a job, whose result is sent when it has ended; after an error there is no job and the
  // result is the caller's to send. REQUIRES: a model command; as for Fork, its session has no generation
  // under way.
  absl::Status Start(const v1::Command& command);
  // Ends a job with what it has, one with a home in the next step; one that has ended already is left alone.
  void Cancel(uint64_t ordinal);
  // Ends all jobs with an error.
  void FailAll(const absl::Status& status);

  bool busy() const { return !jobs_.empty(); }
  // One step of all jobs that have a turn. `newest` is the ordinal of the newest command that this rank has
  // received; returned is rank 0's: up to it all ranks run commands before the next step. An error is the end
  // of the group: the communicator is dead. REQUIRES: busy().
  absl::StatusOr<uint64_t> Step(uint64_t newest);

 private:
  struct Session {
    explicit Session(Context content) : context(std::move(content)) {}
    int64_t stripe_pages = 0;
    Context context;
    IdLog ids;  // Of the context: what Embed reads again.
  };
  enum class Kind { kAppend, kGenerate, kScore, kEmbed };
  // How a job has ended.
  struct End {
    absl::Status status;
    v1::FinishReason reason = v1::FINISH_REASON_UNSPECIFIED;
    bool cancelled = false;
  };
  struct Job {
    Kind kind = Kind::kAppend;
    uint64_t ordinal = 0;
    uint64_t session_id = 0;
    absl::Duration patience;            // With the other ranks, a step.
    std::optional<Context> fork;        // kScore, kEmbed: what they read into.
    Context* context = nullptr;         // The fork or the session's.
    std::vector<int32_t> ids;           // To be read; kGenerate: generated so far.
    int64_t done = 0;                   // Tokens that are in the context now.
    std::unique_ptr<Wave> wave;         // Of the ids behind `done`, under way over some steps.
    int64_t in_chunks_until = 0;        // In `done`: a wave that failed goes in chunks.
    std::vector<float> before;          // kScore: the hidden state ahead of the chunk under way.
    std::vector<float> log_probs;       // kScore
    std::vector<PositionRange> ranges;  // kEmbed, as the next ones.
    Pool pool = Pool::kMean;
    std::optional<Pooler> pooler;  // None before its first turn for which this rank has memory.
    ReservedBytes memory;          // For its ids, its pooler and the answer, ...
    absl::Status no_memory;        // ... or why there is none, which its turn tells the others.
    v1::GenerateRequest generate;  // kGenerate, as the next ones.
    SamplingOptions sampling;
    TokenChoice chosen;  // To be read in the step under way.
    std::unique_ptr<TextStream> text_stream;
    std::optional<int> home;  // kGenerate: the rank that computes it; none: all do.
    bool cancelled = false;   // It has a home, and ends in the next step.
    std::optional<End> over;  // At home: it ended in the last step, and the others hear so in the next.
    std::vector<int64_t> sink_mass;  // kGenerate, kScore: sums [layers, query_heads]; empty: not wanted.
    std::string tail;                // The end of the text: what a stop string may have begun in.
  };

  // Whether this rank computes the job, and whether it is the one that says what came of it.
  bool Computes(const Job& job) const {
    return job.home.value_or(options_.group->rank()) == options_.group->rank();
  }
  bool Tells(const Job& job) const { return job.home.value_or(0) == options_.group->rank(); }
  absl::StatusOr<Session*> Find(uint64_t session_id);
  absl::Status CheckIds(absl::Span<const int32_t> ids) const;
  absl::Status StartAppend(const v1::ModelAppend& request, Job& job);
  absl::Status StartGenerate(const v1::ModelGenerate& request, Job& job);
  absl::Status StartScore(const v1::ModelScore& request, Job& job);
  absl::Status StartEmbed(const v1::ModelEmbed& request, Job& job);
  // Takes its memory, or says that there is none: in a turn, so that waves may give way to it.
  void BeginEmbed(Job& job);
  // The jobs that have a turn in the next step: all that generate, and one that reads.
  std::vector<Job*> NextJobs();
  // The next token of every job that generates here. Those that have none, because logits are not finite, end
  // and leave `jobs`, those with a home in the next step.
  void ChooseTokens(std::vector<Job*>& jobs);
  // Whether the job, which reads, goes on by a wave, under way or begun here; else by a chunk. `room`:
  // whether this rank can go on with it.
  bool GoesByWave(Job& job, bool& room);
  Turn MakeTurn(Job& job);
  // Its ids are to be read in chunks.
  void GiveUpWave(Job& job);
  // Makes room for the sums of sink mass, where they are wanted.
  void WantSinkMass(bool wanted, Job& job) const;
  // What turn `index` of the last step brought.
  void AddSinkMass(size_t index, Job& job) const;
  // Takes memory for the turns. `waver`, which may be null, loses its wave and becomes null where some rank
  // has no `room` for it. Turns that some rank has no memory for leave the step: for this time if waves had
  // it, which are given up then; else their jobs end. So do generations that are over at home, or cancelled.
  // Returns rank 0's `newest`.
  absl::StatusOr<uint64_t> AgreeOnStep(uint64_t newest, absl::Time deadline, std::vector<Job*>& jobs,
                                       std::vector<Turn>& turns, Job*& waver, bool room);
  // Ends a generation that has a home, and gives all ranks its rows. `word`: what the home said of it, ahead
  // of this step; `otherwise`: how it has ended if not by itself.
  absl::Status EndAtHome(Job& job, int64_t word, End otherwise, absl::Time deadline);
  // Of jobs that all ranks compute, or of some that have their home here.
  absl::Status RunStep(absl::Time deadline, const std::vector<Job*>& jobs, const std::vector<Turn>& turns);
  // As much of the job's wave as a chunk costs.
  absl::Status RunWave(absl::Time deadline, Job& job);
  // `count` more of the job's ids are in its context.
  void AdvanceReading(Job& job, int64_t count);
  // The job's turn has been read; `hidden` [turn's ids, hidden_size].
  void Advance(Job& job, const Turn& turn, const float* hidden);
  void AdvanceGeneration(Job& job);
  void SendProgress(const Job& job, v1::ModelProgress progress);
  void SendEmbeddings(const Job& job, const std::vector<float>& vectors);
  // Finishes the job, one with a home in the next step.
  void EndByItself(Job& job, End end);
  // Sends the job's result and forgets it.
  void Finish(Job& job, const End& end);

  const Options options_;
  ModelEngine engine_;
  std::map<uint64_t, Session> sessions_;
  std::map<uint64_t, Job> jobs_;  // By ordinal.
  uint64_t last_reader_ = 0;      // Ordinal of the job that read last: jobs take turns.
};

}  // namespace eduba

#endif  // EDUBA_WORKER_MODEL_SESSIONS_H_
