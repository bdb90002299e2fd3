#ifndef EDUBA_COORDINATOR_TESTING_FAKE_RANK_H_
#define EDUBA_COORDINATOR_TESTING_FAKE_RANK_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/records.h"
#include "coordinator/testing/fake_node.h"
#include "eduba/v1/group.pb.h"

namespace eduba {

// What a worker of one epoch answers, without any attention: outputs are twice the queries, lse is the row's
// position, so that a test can see which row went where. Notes what it was asked, and what should not have
// been. What it keeps is the node's.
class FakeRank {
 public:
  // `node` must outlive it.
  FakeRank(int rank, FakeNode* node) : rank_(rank), node_(node) {}

  // Content of what is uploaded, where no rows are added one by one: enters the digest.
  uint64_t content = 1;
  // The next command of that kind fails with this.
  std::map<v1::Command::KindCase, absl::Status> failures;
  // A step with a query row that begins with this number fails and names the row, as overflowing arithmetic
  // does.
  std::optional<float> overflowing;

  // A row of an append, uploaded.
  void AddRow(uint64_t append_id, int64_t hash) { uploads_[append_id].low += static_cast<uint64_t>(hash); }

  // Everything that the rank says to a command: jobs' progress, and results. A job waits while `hold_jobs`.
  std::vector<v1::WorkerMessage> Say(const v1::Command& command) {
    std::vector<v1::WorkerMessage> said(1);
    *said[0].mutable_result() = Answer(command);
    const bool job = command.has_model_append() || command.has_model_generate() ||
                     command.has_model_score() || command.has_model_embed();
    if (job && said[0].result().code() == 0) {
      if (Tells(command)) AddProgress(command, said);
      if (hold_jobs) {
        held_[command.ordinal()] = std::move(said.back());
        said.pop_back();
      }
    } else if (const auto held = held_.find(command.cancel_job().ordinal()); held != held_.end()) {
      held->second.mutable_result()->mutable_model()->set_cancelled(true);
      said.insert(said.begin(), std::move(held->second));
      held_.erase(held);
    }
    return said;
  }
  bool hold_jobs = false;  // Jobs end only when they are cancelled.
  bool omit_sink_mass = false;
  bool omit_embeddings = false;
  uint64_t digest = 5;                  // The digest of what it computes.
  int64_t misses = 0;                   // Tokens of a job that it says it did not do.
  std::map<uint64_t, int> owner_ranks;  // The owner ranks of generations that one rank computes, by ordinal.

  v1::CommandResult Answer(const v1::Command& command) {
    if (command.ordinal() != ++ordinal_) {
      complaints.push_back(
          absl::StrCat("rank ", rank_, " got ordinal ", command.ordinal(), ", wanted ", ordinal_));
    }
    commands.push_back(command.kind_case());
    v1::CommandResult result;
    result.set_epoch(command.epoch());
    result.set_ordinal(command.ordinal());
    const auto failure = failures.extract(command.kind_case());
    if (!failure.empty()) {
      Fail(failure.mapped(), &result);
      return result;
    }
    if (command.has_attend() && overflowing.has_value() && Overflows(command.attend(), &result)) {
      return result;
    }
    switch (command.kind_case()) {
      case v1::Command::kRetainSessions:
        Retain(command.retain_sessions());
        break;
      case v1::Command::kOpenSession:
        if (!opened_.insert(command.open_session().session_id()).second) {
          complaints.push_back("a session was opened twice");
        }
        *result.mutable_content() = node_->Open(command.open_session());
        break;
      case v1::Command::kSettleSession: {
        const std::string complaint = node_->Settle(command.settle_session());
        if (!complaint.empty()) complaints.push_back(complaint);
        break;
      }
      case v1::Command::kCloseSession:
        if (node_->sessions.erase(command.close_session().session_id()) == 0 &&
            retained_.count(command.close_session().session_id()) == 0) {
          complaints.push_back("no session to close");
        }
        break;
      case v1::Command::kBeginAppend:
        appends_[command.begin_append().append_id()] = command.begin_append();
        if (!command.begin_append().compare_only() &&
            command.begin_append().at() != node_->sessions.at(command.begin_append().session_id()).length) {
          complaints.push_back("an append begins where the session does not end");
        }
        break;
      case v1::Command::kSealAppend:
        Seal(appends_.at(command.seal_append().append_id()), result.mutable_seal());
        break;
      case v1::Command::kCommitAppend:
        Commit(command.commit_append());
        break;
      case v1::Command::kAbortAppend:
        Abort(command.abort_append().append_id());
        break;
      case v1::Command::kAttend:
        Attend(command.attend(), result.mutable_attend());
        break;
      case v1::Command::kModelAppend:
        Read(command.model_append(), &result);
        break;
      case v1::Command::kModelGenerate:
        Generate(command,
                 hold_jobs ? 1 : std::min<int64_t>(100, command.model_generate().request().max_tokens()),
                 result.mutable_model());
        result.mutable_model()->set_finish_reason(v1::FINISH_REASON_LENGTH);
        if (command.model_generate().has_owner_rank()) {
          owner_ranks[command.ordinal()] = command.model_generate().owner_rank();
          if (!Tells(command)) result.mutable_model()->clear_digest();
        }
        AddSinkMass(command, command.model_generate().request().sink_mass(),
                    command.model_generate().session_id(), result.mutable_model());
        break;
      case v1::Command::kModelScore:
        RunJob(static_cast<int64_t>(command.model_score().ids().size() / 4), result.mutable_model());
        if (rank_ == 0) {
          result.mutable_model()->set_log_probs(std::string(command.model_score().ids().size(), '\1'));
        }
        AddSinkMass(command, command.model_score().sink_mass(), command.model_score().session_id(),
                    result.mutable_model());
        break;
      case v1::Command::kModelEmbed:
        RunJob(1, result.mutable_model());
        break;
      case v1::Command::kCancelJob:
        break;
      case v1::Command::kForkSession:
        if (node_->sessions.count(command.fork_session().session_id()) == 0) {
          complaints.push_back("no session to fork");
        }
        node_->sessions[command.fork_session().fork_id()] =
            node_->sessions[command.fork_session().session_id()];
        break;
      case v1::Command::KIND_NOT_SET:
        complaints.push_back("an empty command");
        break;
    }
    return result;
  }

  // Fails as a worker does: some errors mean that the communicator is dead.
  static void Fail(const absl::Status& status, v1::CommandResult* result) {
    result->set_code(static_cast<int>(status.code()));
    result->set_message(std::string(status.message()));
    result->set_ends_group(status.code() == absl::StatusCode::kUnavailable ||
                           status.code() == absl::StatusCode::kDeadlineExceeded ||
                           status.code() == absl::StatusCode::kAborted);
  }

  size_t appends() const { return appends_.size(); }
  size_t sessions() const { return node_->sessions.size(); }

  std::vector<v1::Command::KindCase> commands;
  std::vector<std::string> complaints;
  std::string exponents;  // of the last commit

 private:
  bool Overflows(const v1::AttendStep& step, v1::CommandResult* result) const {
    const size_t row_bytes = step.queries().size() / step.rows();
    for (int row = 0; row < step.rows(); ++row) {
      float first = 0;
      std::memcpy(&first, step.queries().data() + row * row_bytes, sizeof(first));
      if (first != *overflowing) continue;
      result->set_code(static_cast<int>(absl::StatusCode::kInvalidArgument));
      result->set_message(absl::StrCat("row ", step.first_row() + row, " overflows"));
      return true;
    }
    return false;
  }

  void Retain(const v1::RetainSessions& retain) {
    if (ordinal_ != 1) complaints.push_back("RetainSessions is not the first command");
    retained_ = std::set<uint64_t>(retain.session_ids().begin(), retain.session_ids().end());
    std::erase_if(node_->sessions,
                  [this](const auto& session) { return retained_.count(session.first) == 0; });
  }

  void Commit(const v1::CommitAppend& commit) {
    const auto append = appends_.extract(commit.append_id());
    if (append.empty()) return complaints.push_back("no append to publish");
    FakeNode::Session& session = node_->sessions.at(append.mapped().session_id());
    if (!session.sealed.has_value())
      return complaints.push_back("an append was published before it was sealed");
    exponents = commit.exponents();
    session.Publish(commit.exponents());
  }

  void Abort(uint64_t append_id) {
    const auto append = appends_.extract(append_id);
    if (append.empty()) return;
    const auto session = node_->sessions.find(append.mapped().session_id());
    if (session != node_->sessions.end() && session->second.sealed.has_value() &&
        session->second.sealed->append_id == append_id) {
      session->second.sealed.reset();
    }
  }

  void RunJob(int64_t done, v1::ModelResult* result) const {
    result->set_done(done - misses);
    result->set_digest(digest);
  }

  // Compares what is there, and reads the rest.
  void Read(const v1::ModelAppend& append, v1::CommandResult* result) {
    std::vector<int32_t>& held = node_->sessions.at(append.session_id()).ids;
    std::vector<int32_t> ids(append.ids().size() / 4);
    std::memcpy(ids.data(), append.ids().data(), append.ids().size());
    if (append.at() > static_cast<int64_t>(held.size()))
      complaints.push_back("an append of tokens leaves a gap");
    for (size_t i = 0; i < ids.size() && append.at() + i < held.size(); ++i) {
      const int64_t position = append.at() + static_cast<int64_t>(i);
      if (held[position] == ids[i]) continue;
      return Fail(absl::AlreadyExistsError(absl::StrCat("position ", position, " holds token ",
                                                        held[position], " already, not ", ids[i])),
                  result);
    }
    for (size_t i = held.size() - append.at(); i < ids.size(); ++i) held.push_back(ids[i]);
    RunJob(static_cast<int64_t>(ids.size()), result->mutable_model());
    result->mutable_model()->set_length(static_cast<int64_t>(held.size()));
  }

  // A generated token is the command's ordinal modulo 10.
  void Generate(const v1::Command& command, int64_t count, v1::ModelResult* result) {
    std::vector<int32_t>& held = node_->sessions.at(command.model_generate().session_id()).ids;
    held.insert(held.end(), count, static_cast<int32_t>(command.ordinal() % 10));
    RunJob(count, result);
    result->set_length(static_cast<int64_t>(held.size()));
  }

  // Whether what comes of the job is this rank's to say.
  bool Tells(const v1::Command& command) const {
    return rank_ == (command.model_generate().has_owner_rank() ? command.model_generate().owner_rank() : 0);
  }

  void AddSinkMass(const v1::Command& command, bool wanted, uint64_t session_id,
                   v1::ModelResult* result) const {
    if (!Tells(command) || !wanted || omit_sink_mass) return;
    const v1::SessionSpec& spec = node_->sessions.at(session_id).spec;
    result->set_sink_mass(std::string(size_t{4} * spec.layers() * spec.query_heads(), '\1'));
  }

  // A vector has 4 numbers.
  void AddProgress(const v1::Command& command, std::vector<v1::WorkerMessage>& said) const {
    const int64_t tokens = command.has_model_generate() ? said[0].result().model().done() : 0;
    for (int64_t i = 0; i < tokens; ++i) {
      const auto id = static_cast<int32_t>(command.ordinal() % 10);
      v1::WorkerMessage message;
      message.mutable_progress()->set_epoch(command.epoch());
      message.mutable_progress()->set_ordinal(command.ordinal());
      message.mutable_progress()->mutable_tokens()->set_ids(&id, 4);
      message.mutable_progress()->mutable_tokens()->set_log_probs(std::string(4, '\0'));
      said.insert(said.end() - 1, std::move(message));
    }
    const auto ranges = static_cast<int32_t>(command.model_embed().ranges().size() / 16);
    if (ranges == 0 || omit_embeddings) return;
    v1::WorkerMessage message;
    message.mutable_progress()->set_epoch(command.epoch());
    message.mutable_progress()->set_ordinal(command.ordinal());
    message.mutable_progress()->mutable_embeddings()->set_count(ranges);
    message.mutable_progress()->mutable_embeddings()->set_vectors(std::string(size_t{16} * ranges, '\1'));
    said.insert(said.end() - 1, std::move(message));
  }

  void Seal(const v1::BeginAppend& append, v1::SealResult* seal) {
    Digest digest;
    const auto upload = uploads_.find(append.append_id());
    if (upload != uploads_.end()) {
      digest = upload->second;
    } else {
      for (const v1::Extent& extent : append.owned()) {
        // The sum over the extent of position + 1, in closed form: an append may have a billion positions.
        const auto n = static_cast<uint64_t>(extent.count());
        const uint64_t positions = n * static_cast<uint64_t>(extent.first_position() + 1) + n * (n - 1) / 2;
        digest += Digest{0, positions * content * 0x9e3779b97f4a7c15u};
      }
    }
    seal->set_digest_low(digest.low);
    seal->set_digest_high(digest.high);
    FakeNode::Session& session = node_->sessions.at(append.session_id());
    const v1::SessionSpec& spec = session.spec;
    std::string bytes(size_t{2} * spec.layers() * spec.kv_heads() * spec.value_dim(), '\0');
    for (size_t i = 0; i < bytes.size() / 2; ++i) {
      const auto exponent = static_cast<int16_t>(i % 2 == 0 ? rank_ : -rank_);
      std::memcpy(bytes.data() + 2 * i, &exponent, 2);
    }
    seal->set_exponents(bytes);
    if (append.compare_only()) return;
    session.sealed = FakeNode::Sealed{append.append_id(), append.count(), digest, bytes};
  }

  void Attend(const v1::AttendStep& step, v1::AttendResult* result) {
    result->set_bytes_read(100);
    result->set_collectives(1);
    if (step.positions_size() != step.rows()) complaints.push_back("a step without a position for every row");
    if (rank_ != 0) return;
    const v1::SessionSpec& spec = node_->sessions.at(step.session_id()).spec;
    const int64_t heads = spec.query_heads();
    std::vector<float> queries(step.queries().size() / 4);
    std::memcpy(queries.data(), step.queries().data(), step.queries().size());
    std::vector<float> outputs;
    std::vector<float> lse;
    const std::vector<float> mass(step.rows() * heads, 0.25f);
    std::vector<int32_t> maximum;
    for (int64_t row = 0; row < step.rows(); ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        const float* query = queries.data() + (row * heads + head) * spec.head_dim();
        for (int c = 0; c < spec.value_dim(); ++c) outputs.push_back(2 * query[c % spec.head_dim()]);
        lse.push_back(static_cast<float>(step.positions(static_cast<int>(row))));
      }
      maximum.push_back(1);
    }
    result->set_outputs(outputs.data(), outputs.size() * 4);
    result->set_lse(lse.data(), lse.size() * 4);
    result->set_sink_mass(mass.data(), mass.size() * 4);
    result->set_row_heads_maximum(maximum.data(), maximum.size() * 4);
  }

  const int rank_;
  FakeNode* const node_;
  uint64_t ordinal_ = 0;
  std::set<uint64_t> retained_;
  std::set<uint64_t> opened_;
  std::map<uint64_t, v1::BeginAppend> appends_;
  std::map<uint64_t, Digest> uploads_;
  std::map<uint64_t, v1::WorkerMessage> held_;  // Results of jobs, by ordinal.
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_TESTING_FAKE_RANK_H_
