#ifndef EDUBA_MODEL_TESTING_JOB_DRIVER_H_
#define EDUBA_MODEL_TESTING_JOB_DRIVER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "collective/communicator.h"
#include "model/job.h"
#include "model/job_loop.h"
#include "model/model_content.h"

namespace eduba::testing {

// What came of one job on one rank.
struct JobOutcome {
  bool ended = false;
  JobResult result;
  std::vector<TokenChoice> tokens;  // On the reporting rank.
  // [rows, hidden_size] of the job's steps, where it was the only job, and read in chunks.
  std::vector<float> hidden;

  const absl::Status& status() const { return result.status; }
  bool ok() const { return ended && result.status.ok(); }
  std::vector<int32_t> ids() const;
};

// One rank's sessions, and the loop that the service runs on them, driven until jobs are done. All ranks of a
// group drive theirs alike.
class JobDriver final : private JobListener {
 public:
  // A session that is closed with the object, which the driver outlives.
  class Session {
   public:
    Session(JobDriver* driver, uint64_t id) : driver_(driver), id_(id) {}
    Session(Session&& other) noexcept : driver_(std::exchange(other.driver_, nullptr)), id_(other.id_) {}
    Session& operator=(Session&& other) noexcept {
      std::swap(driver_, other.driver_);
      std::swap(id_, other.id_);
      return *this;
    }
    ~Session() {
      if (driver_ != nullptr) driver_->loop_->Close(id_);
    }

    uint64_t id() const { return id_; }
    Context& context() const;
    int64_t length() const { return context().length(); }
    absl::Span<const float> last() const { return context().last(); }
    int64_t page_bytes() const { return context().page_bytes(); }
    // The session's tokens from `begin` on.
    std::vector<int32_t> Ids(int64_t begin) const;
    Session Fork() const;

   private:
    JobDriver* driver_;
    uint64_t id_;
  };

  // What `options` points to, and the group, outlive the driver. A group that is null: this rank is alone.
  explicit JobDriver(const ModelEngine::Options& options, Communicator* group = nullptr,
                     int64_t stripe_pages = 1);

  absl::StatusOr<Session> Open(const ContextOptions& options);

  // Starts a job, and makes steps until it has ended, as all others.
  JobOutcome Run(const Session& session, JobRequest request);
  JobOutcome Append(const Session& session, absl::Span<const int32_t> ids);
  JobOutcome Score(const Session& session, absl::Span<const int32_t> ids);
  // Does what Append does, but all ranks compute all rows, so that the outcome has their hidden states.
  JobOutcome AppendInChunks(const Session& session, absl::Span<const int32_t> ids);

  // Starts a job without a step. An error is its outcome.
  uint64_t Start(const Session& session, JobRequest request);
  bool busy() const { return loop_->busy(); }
  // One step. After an error all jobs have ended with it, and the group is dead.
  absl::Status Step();
  absl::Status RunAll();
  const JobOutcome& OutcomeOf(uint64_t job) { return outcomes_[job]; }

  // Ends the membership, and begins one with another group of as many ranks; the sessions stay.
  void LeaveGroup(const absl::Status& reason);
  void JoinGroup(Communicator* group);
  void JoinGroupOfOne();

  ModelContent& content() { return content_; }
  ModelEngine& engine() { return content_.engine(); }
  JobLoop& loop() { return *loop_; }
  Communicator& group() { return *group_; }

 private:
  void OnProgress(uint64_t job, const JobProgress& progress) override;
  void OnResult(uint64_t job, const JobResult& result) override;

  std::unique_ptr<Communicator> alone_;
  Communicator* group_;
  const int64_t stripe_pages_;
  ModelContent content_;
  std::unique_ptr<JobLoop> loop_;
  uint64_t next_job_ = 1;
  uint64_t next_session_ = 1;
  std::map<uint64_t, JobOutcome> outcomes_;
};

}  // namespace eduba::testing

#endif  // EDUBA_MODEL_TESTING_JOB_DRIVER_H_
