#include "model/testing/job_driver.h"

#include <algorithm>

#include "absl/time/clock.h"
#include "base/check.h"
#include "collective/local/local_communicator.h"

namespace eduba::testing {
namespace {

std::unique_ptr<Communicator> GroupOfOne() {
  LocalHub hub;
  return hub.Join(1, 0, 0, 1, absl::Now() + absl::Seconds(60)).value();
}

}  // namespace

std::vector<int32_t> JobOutcome::ids() const {
  std::vector<int32_t> ids;
  for (const TokenChoice& token : tokens) ids.push_back(token.id);
  return ids;
}

Context& JobDriver::Session::context() const { return driver_->content_.Find(id_).value()->context; }

std::vector<int32_t> JobDriver::Session::Ids(int64_t begin) const {
  const IdLog& log = driver_->content_.Find(id_).value()->ids;
  std::vector<int32_t> ids(log.size() - begin);
  EDUBA_CHECK(log.Read(begin, absl::MakeSpan(ids)).ok());
  return ids;
}

JobDriver::Session JobDriver::Session::Fork() const {
  const uint64_t fork = driver_->next_session_++;
  EDUBA_CHECK(driver_->loop_->Fork(id_, fork).ok());
  return {driver_, fork};
}

JobDriver::JobDriver(const ModelEngine::Options& options, Communicator* group, int64_t stripe_pages)
    : stripe_pages_(stripe_pages), content_(options) {
  if (group == nullptr) {
    JoinGroupOfOne();
  } else {
    JoinGroup(group);
  }
}

void JobDriver::JoinGroupOfOne() {
  loop_ = nullptr;
  alone_ = GroupOfOne();
  JoinGroup(alone_.get());
}

void JobDriver::JoinGroup(Communicator* group) {
  group_ = group;
  JobLoop::Options options;
  options.content = &content_;
  options.group = group_;
  options.listener = this;
  loop_ = std::make_unique<JobLoop>(options);
}

void JobDriver::LeaveGroup(const absl::Status& reason) { loop_->FailAll(reason); }

absl::StatusOr<JobDriver::Session> JobDriver::Open(const ContextOptions& options) {
  const uint64_t id = next_session_++;
  const absl::Status status =
      loop_->Open(id, options, Placement::OfRanks(group_->size(), stripe_pages_), group_->rank());
  if (!status.ok()) return status;
  return Session(this, id);
}

uint64_t JobDriver::Start(const Session& session, JobRequest request) {
  const uint64_t job = next_job_++;
  const absl::Status status =
      loop_->Start({job, session.id(), /*timeout=*/absl::Seconds(60)}, std::move(request));
  if (!status.ok()) {
    JobResult refused;
    refused.status = status;
    OnResult(job, refused);
  }
  return job;
}

absl::Status JobDriver::Step() {
  const absl::Status status = loop_->Step(0).status();
  if (!status.ok()) loop_->FailAll(status);
  return status;
}

absl::Status JobDriver::RunAll() {
  while (busy()) {
    if (absl::Status status = Step(); !status.ok()) return status;
  }
  return absl::OkStatus();
}

JobOutcome JobDriver::Run(const Session& session, JobRequest request) {
  const uint64_t job = Start(session, std::move(request));
  while (busy()) {
    if (!Step().ok()) break;
    const absl::Span<const float> hidden = engine().hidden();
    std::vector<float>& all = outcomes_[job].hidden;
    all.insert(all.end(), hidden.begin(), hidden.end());
  }
  return outcomes_[job];
}

JobOutcome JobDriver::Append(const Session& session, absl::Span<const int32_t> ids) {
  return Run(session, AppendJob{{ids.begin(), ids.end()}, session.length()});
}

JobOutcome JobDriver::Score(const Session& session, absl::Span<const int32_t> ids) {
  return Run(session, ScoreJob{{ids.begin(), ids.end()}, /*sink_mass=*/false});
}

JobOutcome JobDriver::AppendInChunks(const Session& session, absl::Span<const int32_t> ids) {
  EDUBA_CHECK(!busy());
  JobLoop::Options options;
  options.content = &content_;
  options.group = group_;
  options.listener = this;
  options.sequence_parallel = false;
  std::unique_ptr<JobLoop> loop = std::make_unique<JobLoop>(options);
  loop_.swap(loop);
  JobOutcome outcome = Append(session, ids);
  loop_.swap(loop);
  return outcome;
}

void JobDriver::OnProgress(uint64_t job, const JobProgress& progress) {
  if (progress.token) outcomes_[job].tokens.push_back(*progress.token);
}

void JobDriver::OnResult(uint64_t job, const JobResult& result) {
  EDUBA_CHECK(!outcomes_[job].ended);
  outcomes_[job].ended = true;
  outcomes_[job].result = result;
}

}  // namespace eduba::testing
