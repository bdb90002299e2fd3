#include "worker/command_loop.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "base/mutex.h"
#include "base/placement.h"
#include "collective/local/local_communicator.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/reference/reference_backend.h"
#include "kernels/testing/forwarding_backend.h"
#include "rpc/placement.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kSession = 77;
constexpr uint64_t kAppend = 501;

// A step that goes on until it is called off.
class EndlessStep final : public AttentionStep {
 public:
  EndlessStep(const std::atomic<bool>* cancelled, absl::Notification* started)
      : cancelled_(cancelled), started_(started) {}
  absl::Status Attend() override {
    started_->Notify();
    while (!*cancelled_) absl::SleepFor(absl::Milliseconds(1));
    return absl::CancelledError("called off");
  }
  absl::Status SinkSums(absl::Span<int64_t>) override { return absl::UnimplementedError(""); }
  absl::StatusOr<absl::Span<const int64_t>> SelectForMaximum() override {
    return absl::UnimplementedError("");
  }
  absl::Status TakeSelection(absl::Span<const int64_t>) override { return absl::UnimplementedError(""); }
  absl::Status Maxima(absl::Span<float>) override { return absl::UnimplementedError(""); }
  absl::Status MaximumSums(absl::Span<int64_t>) override { return absl::UnimplementedError(""); }
  absl::Status Finish(float*, float*, float*) override { return absl::UnimplementedError(""); }
  PathCounts paths() const override { return {}; }
  int64_t bytes_read() const override { return 0; }

 private:
  const std::atomic<bool>* const cancelled_;
  absl::Notification* const started_;
};

class EndlessBackend final : public testing::ForwardingBackend {
 public:
  explicit EndlessBackend(absl::Notification* started)
      : ForwardingBackend(MakeReferenceBackend()), started_(started) {}

  absl::StatusOr<std::unique_ptr<AttentionStep>> StartStep(const StepArgs& args) override {
    return std::make_unique<EndlessStep>(args.cancelled, started_);
  }

 private:
  absl::Notification* const started_;
};

// One node: its content, a command loop over it, and everything that the loop said.
class Rank {
 public:
  explicit Rank(LocalHub* hub, std::unique_ptr<Backend> backend = MakeReferenceBackend())
      : hub_(hub), backend_(std::move(backend)) {
    Connect();
  }

  // A new connection to the coordinator: another loop, over the same content.
  void Connect() {
    loop = nullptr;
    CommandLoop::Options options;
    options.backend = backend_.get();
    options.content = &content;
    options.connect = [this](const v1::FormGroup& form, absl::Time deadline) {
      return hub_->Join(form.epoch(), form.attempt(), form.rank(), form.size(), deadline);
    };
    options.send = [this](const v1::WorkerMessage& message) {
      const MutexLock lock(mutex_);
      said_.push_back(message);
      changed_.NotifyAll();
    };
    options.on_active = [this](bool is_active) {
      const MutexLock lock(mutex_);
      active_ = is_active;
    };
    loop = std::make_unique<CommandLoop>(std::move(options));
  }

  void Form(uint64_t epoch, int rank, int size, uint64_t cluster = 1) {
    v1::GroupMessage message;
    v1::FormGroup& form = *message.mutable_form();
    form.set_epoch(epoch);
    form.set_attempt(1);
    form.set_rank(rank);
    form.set_size(size);
    form.set_timeout_ms(30000);
    form.set_cluster(cluster);
    for (const std::string& node : Placement::OfRanks(size).nodes) form.add_nodes(node);
    loop->Handle(message);
    epoch_ = epoch;
    ordinal_ = 0;
  }

  void Abort(uint64_t epoch, const std::string& reason) {
    v1::GroupMessage message;
    message.mutable_abort()->set_epoch(epoch);
    message.mutable_abort()->set_reason(reason);
    loop->Handle(message);
  }

  // Sends the command with the next ordinal.
  void Send(v1::Command command) {
    v1::GroupMessage message;
    *message.mutable_command() = std::move(command);
    message.mutable_command()->set_epoch(epoch_);
    message.mutable_command()->set_ordinal(++ordinal_);
    message.mutable_command()->set_timeout_ms(30000);
    loop->Handle(message);
  }

  // The next thing said.
  v1::WorkerMessage Next() {
    const MutexLock lock(mutex_);
    while (heard_ == said_.size()) changed_.Wait(mutex_);
    return said_[heard_++];
  }
  v1::CommandResult Result() { return Next().result(); }
  v1::CommandResult Run(v1::Command command) {
    Send(std::move(command));
    return Result();
  }
  bool active() {
    const MutexLock lock(mutex_);
    return active_;
  }
  void SkipOrdinal() { ++ordinal_; }

 private:
  LocalHub* const hub_;
  std::unique_ptr<Backend> backend_;

 public:
  PageStore store{backend_.get(), int64_t{16} << 20};
  NodeContent content{backend_.get(), &store, nullptr};

 private:
  Mutex mutex_;
  CondVar changed_;
  std::vector<v1::WorkerMessage> said_ ABSL_GUARDED_BY(mutex_);
  size_t heard_ ABSL_GUARDED_BY(mutex_) = 0;
  bool active_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t epoch_ = 0;
  uint64_t ordinal_ = 0;

 public:
  std::unique_ptr<CommandLoop> loop;
};

// In a group of `size`.
v1::Command Open(int size = 1, uint64_t session_id = kSession) {
  v1::Command command;
  v1::OpenSession& open = *command.mutable_open_session();
  open.set_session_id(session_id);
  *open.mutable_placement() = PlacementToProto(Placement::OfRanks(size));
  open.mutable_spec()->set_query_heads(1);
  open.mutable_spec()->set_kv_heads(1);
  open.mutable_spec()->set_head_dim(2);
  open.mutable_spec()->set_value_dim(1);
  open.mutable_spec()->set_window(4);
  return command;
}

v1::Command Settle(int64_t length, const std::string& exponents = "") {
  v1::Command command;
  command.mutable_settle_session()->set_session_id(kSession);
  command.mutable_settle_session()->set_length(length);
  command.mutable_settle_session()->set_exponents(exponents);
  return command;
}

v1::Command Retain(const std::vector<uint64_t>& sessions) {
  v1::Command command;
  command.mutable_retain_sessions()->mutable_session_ids()->Add(sessions.begin(), sessions.end());
  return command;
}

v1::Command Close() {
  v1::Command command;
  command.mutable_close_session()->set_session_id(kSession);
  return command;
}

v1::Command Begin(int64_t at, int64_t count, bool owned) {
  v1::Command command;
  v1::BeginAppend& begin = *command.mutable_begin_append();
  begin.set_append_id(kAppend);
  begin.set_session_id(kSession);
  begin.set_at(at);
  begin.set_count(count);
  if (owned) {
    v1::Extent& extent = *begin.add_owned();
    extent.set_first_position(at);
    extent.set_count(count);
  }
  return command;
}

v1::Command Seal() {
  v1::Command command;
  command.mutable_seal_append()->set_append_id(kAppend);
  return command;
}

v1::Command Commit(const std::string& exponents) {
  v1::Command command;
  command.mutable_commit_append()->set_append_id(kAppend);
  command.mutable_commit_append()->set_exponents(exponents);
  return command;
}

template <typename T>
std::string Bytes(const std::vector<T>& numbers) {
  return std::string(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(T));
}

// Position j has key (1, 0) and value j + 1.
v1::UploadRequest Rows(int64_t first, int count) {
  v1::UploadRequest request;
  request.set_append_id(kAppend);
  request.set_first_position(first);
  request.set_count(count);
  request.set_dtype(v1::DTYPE_F32);
  std::vector<float> keys;
  std::vector<float> values;
  for (int64_t j = first; j < first + count; ++j) {
    keys.insert(keys.end(), {1, 0});
    values.push_back(static_cast<float>(j + 1));
  }
  request.set_keys(Bytes(keys));
  request.set_values(Bytes(values));
  return request;
}

v1::Command Attend(int64_t length, const std::vector<int64_t>& positions, const std::vector<float>& queries) {
  v1::Command command;
  v1::AttendStep& step = *command.mutable_attend();
  step.set_session_id(kSession);
  step.set_length(length);
  step.set_policy(v1::POLICY_GLOBAL);
  step.set_rows(static_cast<int>(positions.size()));
  step.set_queries(Bytes(queries));
  step.mutable_positions()->Add(positions.begin(), positions.end());
  return command;
}

float FirstOutput(const v1::CommandResult& result) {
  float output = 0;
  EXPECT_GE(result.attend().outputs().size(), sizeof(output)) << result.ShortDebugString();
  std::memcpy(&output, result.attend().outputs().data(), sizeof(output));
  return output;
}

absl::StatusCode CodeOf(const v1::CommandResult& result) {
  return static_cast<absl::StatusCode>(result.code());
}

// Ranks in a group, with a session of three positions (values 1, 2, 3) that rank 0 owns.
class CommandLoopTest : public ::testing::Test {
 protected:
  void StartGroup(int size) {
    while (static_cast<int>(ranks_.size()) < size) ranks_.push_back(std::make_unique<Rank>(&hub_));
    ++epoch_;
    for (int rank = 0; rank < size; ++rank) ranks_[rank]->Form(epoch_, rank, size);
    for (int rank = 0; rank < size; ++rank) {
      const v1::WorkerMessage formed = ranks_[rank]->Next();
      ASSERT_EQ(formed.formed().code(), 0) << formed.ShortDebugString();
      EXPECT_EQ(formed.formed().epoch(), epoch_);
      EXPECT_TRUE(ranks_[rank]->active());
    }
  }

  void Fill() {
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      ASSERT_EQ(ranks_[rank]->Run(Open(static_cast<int>(ranks_.size()))).code(), 0);
      ASSERT_EQ(ranks_[rank]->Run(Begin(0, 3, rank == 0)).code(), 0);
    }
    ASSERT_EQ(ranks_[0]->loop->Upload(Rows(0, 3)), absl::OkStatus());
    const v1::CommandResult seal = ranks_[0]->Run(Seal());
    ASSERT_EQ(seal.code(), 0) << seal.message();
    for (size_t rank = 1; rank < ranks_.size(); ++rank) {
      const v1::CommandResult empty = ranks_[rank]->Run(Seal());
      ASSERT_EQ(empty.code(), 0);
      EXPECT_EQ(empty.seal().digest_low(), 0u);
      EXPECT_EQ(empty.seal().exponents(), Bytes(std::vector<int16_t>{INT16_MIN}));
    }
    EXPECT_EQ(seal.seal().exponents(), Bytes(std::vector<int16_t>{2}));  // |v| <= 3 <= 2^2
    for (const auto& rank : ranks_) ASSERT_EQ(rank->Run(Commit(seal.seal().exponents())).code(), 0);
  }

  LocalHub hub_;
  uint64_t epoch_ = 0;
  std::vector<std::unique_ptr<Rank>> ranks_;
};

TEST_F(CommandLoopTest, AnAppendIsQueriedAcrossRanksAndRankZeroAnswers) {
  StartGroup(2);
  Fill();
  for (const auto& rank : ranks_) rank->Send(Attend(3, {2, 0}, {1, 0, 1, 0}));
  const v1::CommandResult answer = ranks_[0]->Result();
  const v1::CommandResult other = ranks_[1]->Result();
  ASSERT_EQ(answer.code(), 0) << answer.message();
  ASSERT_EQ(other.code(), 0) << other.message();
  EXPECT_FLOAT_EQ(FirstOutput(answer), 2.0f);  // equal weights of 1, 2, 3
  EXPECT_EQ(answer.attend().outputs().size(), 8u);
  EXPECT_EQ(answer.attend().lse().size(), 8u);
  EXPECT_EQ(answer.attend().sink_mass(), Bytes(std::vector<float>{0, 0}));
  EXPECT_EQ(answer.attend().row_heads_maximum(), Bytes(std::vector<int32_t>{1, 1}));  // no sink to refer to
  EXPECT_EQ(answer.attend().collectives(), 2);
  EXPECT_EQ(answer.attend().bytes_read(), 3 * 3 * 4);
  EXPECT_TRUE(other.attend().outputs().empty());
  EXPECT_EQ(other.attend().bytes_read(), 0);
}

TEST_F(CommandLoopTest, AnOrdinalThatIsNotDueEndsTheGroup) {
  StartGroup(1);
  ranks_[0]->SkipOrdinal();
  const v1::CommandResult gap = ranks_[0]->Run(Open());
  EXPECT_EQ(CodeOf(gap), absl::StatusCode::kAborted);
  EXPECT_THAT(gap.message(), HasSubstr("command 2 came where 1 was due"));
  EXPECT_FALSE(ranks_[0]->active());
  EXPECT_EQ(CodeOf(ranks_[0]->Run(Open())), absl::StatusCode::kAborted);
}

TEST_F(CommandLoopTest, AbortGroupEndsACollectiveUnderWay) {
  StartGroup(2);
  Fill();
  // Rank 1 never gets the step, so rank 0 waits for it.
  ranks_[0]->Send(Attend(3, {2}, {1, 0}));
  ranks_[0]->Abort(epoch_, "rank 1 left");
  const v1::CommandResult result = ranks_[0]->Result();
  EXPECT_EQ(CodeOf(result), absl::StatusCode::kAborted);
  EXPECT_THAT(result.message(), HasSubstr("rank 1 left"));
  EXPECT_TRUE(result.ends_group());
  const v1::CommandResult late = ranks_[0]->Run(Seal());
  EXPECT_EQ(CodeOf(late), absl::StatusCode::kAborted);
  EXPECT_TRUE(late.ends_group());
  EXPECT_FALSE(ranks_[0]->active());
}

TEST_F(CommandLoopTest, TheEndOfAnEpochOrOfTheWorkerEndsAStepThatComputes) {
  for (const bool stop : {false, true}) {
    absl::Notification started;
    ranks_.clear();
    ranks_.push_back(std::make_unique<Rank>(&hub_, std::make_unique<EndlessBackend>(&started)));
    StartGroup(1);
    Fill();
    ranks_[0]->Send(Attend(3, {2}, {1, 0}));
    started.WaitForNotification();
    if (stop) {
      ranks_[0]->loop->Stop();
    } else {
      ranks_[0]->Abort(epoch_, "rank 1 left");
    }
    const v1::CommandResult result = ranks_[0]->Result();
    EXPECT_EQ(CodeOf(result), absl::StatusCode::kAborted);
    EXPECT_THAT(result.message(), HasSubstr(stop ? "the worker has left its coordinator" : "rank 1 left"));
  }
}

TEST_F(CommandLoopTest, ARowIsNamedByItsNumberInTheCall) {
  StartGroup(1);
  Fill();
  ASSERT_EQ(ranks_[0]->Run(Begin(3, 1, true)).code(), 0);
  v1::UploadRequest large = Rows(3, 1);
  large.set_keys(Bytes(std::vector<float>{4, 0}));
  ASSERT_EQ(ranks_[0]->loop->Upload(large), absl::OkStatus());
  ASSERT_EQ(ranks_[0]->Run(Commit(ranks_[0]->Run(Seal()).seal().exponents())).code(), 0);
  v1::Command command = Attend(4, {3, 3}, {1, 0, 3e38f, 0});
  command.mutable_attend()->set_first_row(70);
  const v1::CommandResult result = ranks_[0]->Run(command);
  EXPECT_EQ(CodeOf(result), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(result.message(), HasSubstr("query row 71, head 0, page 0"));
  EXPECT_THAT(result.message(), HasSubstr("scale the query"));
}

TEST_F(CommandLoopTest, SaysIntoWhichAppendsRowsHaveCome) {
  StartGroup(1);
  Fill();
  ASSERT_EQ(ranks_[0]->Run(Begin(3, 20, true)).code(), 0);
  ranks_[0]->loop->TakeTouchedAppends();
  EXPECT_EQ(ranks_[0]->loop->TakeTouchedAppends(), std::vector<uint64_t>());
  ASSERT_EQ(ranks_[0]->loop->Upload(Rows(3, 10)), absl::OkStatus());
  ASSERT_EQ(ranks_[0]->loop->Upload(Rows(13, 5)), absl::OkStatus());
  EXPECT_EQ(ranks_[0]->loop->TakeTouchedAppends(), std::vector<uint64_t>{kAppend});
  EXPECT_EQ(ranks_[0]->loop->TakeTouchedAppends(), std::vector<uint64_t>());
}

// The ways in which a group ends while its nodes live.
enum class End { kNewGroup, kAbort, kBrokenStream, kWrongOrdinal };

class ContentTest : public CommandLoopTest, public ::testing::WithParamInterface<End> {
 protected:
  // Ends the group, and forms the next one from the same nodes.
  void FormAnew() {
    const int size = static_cast<int>(ranks_.size());
    for (const auto& rank : ranks_) {
      if (GetParam() == End::kAbort) rank->Abort(epoch_, "rank 9 left");
      if (GetParam() == End::kBrokenStream) rank->Connect();
      if (GetParam() == End::kWrongOrdinal) {
        rank->SkipOrdinal();
        EXPECT_TRUE(rank->Run(Close()).ends_group());
      }
    }
    StartGroup(size);
  }

  // Retains and opens the session on all ranks; returns what the first one holds.
  v1::SessionContent Reopen() {
    v1::SessionContent first;
    for (const auto& rank : ranks_) {
      EXPECT_EQ(rank->Run(Retain({kSession})).code(), 0);
      const v1::CommandResult opened = rank->Run(Open(static_cast<int>(ranks_.size())));
      EXPECT_EQ(opened.code(), 0) << opened.message();
      if (rank == ranks_.front()) first = opened.content();
    }
    return first;
  }

  std::string AskAll(int64_t length) {
    for (const auto& rank : ranks_) rank->Send(Attend(length, {length - 1, 0}, {1, 0, 2, 1}));
    std::string bytes;
    for (const auto& rank : ranks_) {
      const v1::CommandResult result = rank->Result();
      EXPECT_EQ(result.code(), 0) << result.message();
      bytes += result.attend().outputs() + result.attend().lse() + result.attend().sink_mass();
    }
    return bytes;
  }

  // Position 3, which rank 0 owns, up to its seal; what rank 0 says of it.
  v1::SealResult SealFourth() {
    v1::SealResult first;
    for (const auto& rank : ranks_) {
      EXPECT_EQ(rank->Run(Begin(3, 1, rank == ranks_.front())).code(), 0);
      if (rank == ranks_.front()) {
        EXPECT_EQ(rank->loop->Upload(Rows(3, 1)), absl::OkStatus());
      }
      const v1::CommandResult seal = rank->Run(Seal());
      EXPECT_EQ(seal.code(), 0) << seal.message();
      if (rank == ranks_.front()) first = seal.seal();
    }
    return first;
  }
};

TEST_P(ContentTest, OutlivesTheGroupAndAnswersWithTheSameBytes) {
  StartGroup(2);
  Fill();
  const std::string answer = AskAll(3);
  FormAnew();
  const v1::SessionContent content = Reopen();
  EXPECT_EQ(content.length(), 3);
  EXPECT_EQ(content.sealed_count(), 0);
  EXPECT_NE(content.digest_low(), 0u);
  EXPECT_EQ(content.sealed().exponents(), Bytes(std::vector<int16_t>{2}));
  for (const auto& rank : ranks_) EXPECT_EQ(rank->Run(Settle(3)).code(), 0);
  EXPECT_EQ(AskAll(3), answer);
}

TEST_P(ContentTest, AnAppendThatIsNotSealedEndsWithItsGroup) {
  StartGroup(1);
  Fill();
  const int64_t used = ranks_[0]->store.used_bytes();
  ASSERT_EQ(ranks_[0]->Run(Begin(3, 1000, true)).code(), 0);
  ASSERT_EQ(ranks_[0]->loop->Upload(Rows(3, 10)), absl::OkStatus());
  FormAnew();
  EXPECT_EQ(ranks_[0]->store.used_bytes(), used);
  // Its client may still be uploading: it hears that it may try again, not that it asked for nonsense.
  EXPECT_EQ(ranks_[0]->loop->Upload(Rows(13, 10)).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Reopen().sealed_count(), 0);
  EXPECT_EQ(CodeOf(ranks_[0]->Run(Seal())), absl::StatusCode::kUnavailable);
}

TEST_P(ContentTest, ASealedAppendIsPublishedOrDroppedByTheNextGroup) {
  for (const bool publish : {true, false}) {
    ranks_.clear();
    StartGroup(1);
    Fill();
    const std::string three = AskAll(3);
    const v1::SealResult seal = SealFourth();
    FormAnew();
    const v1::SessionContent content = Reopen();
    EXPECT_EQ(content.length(), 3);
    EXPECT_EQ(content.sealed_count(), 1);
    EXPECT_EQ(content.sealed().exponents(), seal.exponents());
    EXPECT_NE(content.sealed().digest_low(), content.digest_low());
    ASSERT_EQ(ranks_[0]->Run(Settle(publish ? 4 : 3, publish ? seal.exponents() : "")).code(), 0);
    EXPECT_EQ(AskAll(3), three);
    // Either way nothing is left of it but what was published.
    EXPECT_EQ(CodeOf(ranks_[0]->Run(Seal())), absl::StatusCode::kNotFound);
    const v1::CommandResult again = ranks_[0]->Run(Open());
    EXPECT_EQ(again.content().length(), publish ? 4 : 3);
    EXPECT_EQ(again.content().sealed_count(), 0);
    EXPECT_EQ(again.content().digest_low(), (publish ? content.sealed() : v1::SealResult()).digest_low() +
                                                (publish ? 0 : content.digest_low()));
    EXPECT_EQ(ranks_[0]->Run(Begin(publish ? 4 : 3, 1, true)).code(), 0);
  }
}

TEST_P(ContentTest, ASealedAppendThatOnlyComparesEndsWithItsGroup) {
  StartGroup(1);
  Fill();
  v1::Command compare = Begin(0, 3, true);
  compare.mutable_begin_append()->set_compare_only(true);
  ASSERT_EQ(ranks_[0]->Run(compare).code(), 0);
  ASSERT_EQ(ranks_[0]->loop->Upload(Rows(0, 3)), absl::OkStatus());
  ASSERT_EQ(ranks_[0]->Run(Seal()).code(), 0);
  FormAnew();
  EXPECT_EQ(CodeOf(ranks_[0]->Run(Seal())), absl::StatusCode::kNotFound);
}

INSTANTIATE_TEST_SUITE_P(Ends, ContentTest,
                         ::testing::Values(End::kNewGroup, End::kAbort, End::kBrokenStream,
                                           End::kWrongOrdinal));

TEST_F(CommandLoopTest, ASessionIsSettledOnlyOnWhatIsHeld) {
  StartGroup(1);
  EXPECT_EQ(CodeOf(ranks_[0]->Run(Settle(3))), absl::StatusCode::kNotFound);
  Fill();
  const v1::CommandResult wrong = ranks_[0]->Run(Settle(4));
  EXPECT_EQ(CodeOf(wrong), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(wrong.message(), HasSubstr("holds 3 positions of session 77, wanted 4"));
  EXPECT_FALSE(wrong.ends_group());
  EXPECT_EQ(ranks_[0]->Run(Settle(3)).code(), 0);
}

TEST_F(CommandLoopTest, SessionsThatAreNotRetainedAreDropped) {
  StartGroup(1);
  Fill();
  ASSERT_EQ(ranks_[0]->Run(Open(1, kSession + 1)).code(), 0);
  ASSERT_EQ(ranks_[0]->Run(Retain({kSession + 1, 5000})).code(), 0);
  EXPECT_EQ(ranks_[0]->store.used_bytes(), 0);
  EXPECT_EQ(ranks_[0]->Run(Open()).content().length(), 0);
}

TEST_F(CommandLoopTest, ContentOfAnotherClusterIsDropped) {
  StartGroup(1);
  Fill();
  ranks_[0]->Form(++epoch_, 0, 1, /*cluster=*/1);
  ranks_[0]->Next();
  EXPECT_GT(ranks_[0]->store.used_bytes(), 0);
  ranks_[0]->Form(++epoch_, 0, 1, /*cluster=*/2);
  ranks_[0]->Next();
  EXPECT_EQ(ranks_[0]->store.used_bytes(), 0);
  EXPECT_EQ(ranks_[0]->Run(Open()).content().length(), 0);
}

TEST_F(CommandLoopTest, ContentUnderAnotherPlacementOrSpecIsDropped) {
  v1::Command placed = Open();
  placed.mutable_open_session()->mutable_placement()->set_stripe_pages(1);
  v1::Command versioned = Open();
  versioned.mutable_open_session()->mutable_placement()->set_version(2);
  v1::Command shaped = Open();
  shaped.mutable_open_session()->mutable_spec()->set_window(5);
  StartGroup(1);
  for (const v1::Command& other : {placed, versioned, shaped}) {
    ASSERT_EQ(ranks_[0]->Run(Close()).code(), 0);
    Fill();
    EXPECT_EQ(ranks_[0]->Run(Open()).content().length(), 3);
    const v1::CommandResult opened = ranks_[0]->Run(other);
    EXPECT_EQ(opened.code(), 0) << opened.message();
    EXPECT_EQ(opened.content().length(), 0);
    EXPECT_EQ(ranks_[0]->store.used_bytes(), 0);
  }
}

TEST_F(CommandLoopTest, APlacementOfOtherNodesIsRefused) {
  StartGroup(2);
  v1::Command reversed = Open(2);
  reversed.mutable_open_session()->mutable_placement()->set_nodes(1, "node-0002");
  EXPECT_EQ(CodeOf(ranks_[1]->Run(reversed)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CodeOf(ranks_[1]->Run(Open(1))), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CodeOf(ranks_[1]->Run(Open(3))), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ranks_[1]->Run(Open(2)).code(), 0);
}

TEST_F(CommandLoopTest, AGroupWithoutNamesIsNotJoined) {
  Rank rank(&hub_);
  v1::GroupMessage message;
  message.mutable_form()->set_epoch(3);
  message.mutable_form()->set_size(1);
  rank.loop->Handle(message);
  EXPECT_EQ(static_cast<absl::StatusCode>(rank.Next().formed().code()), absl::StatusCode::kInvalidArgument);
}

TEST_F(CommandLoopTest, AnEpochThatEndsWhileItFormsIsNotJoined) {
  Rank alone(&hub_);
  alone.Form(9, 0, 2);
  alone.Abort(9, "the other one left");
  // The other rank does come, so Join succeeds, but too late.
  absl::Notification joined;
  std::thread other([this, &joined] {
    const auto communicator = hub_.Join(9, 1, 1, 2, absl::Now() + absl::Seconds(30));
    joined.WaitForNotification();
  });
  const v1::WorkerMessage formed = alone.Next();
  joined.Notify();
  other.join();
  EXPECT_EQ(static_cast<absl::StatusCode>(formed.formed().code()), absl::StatusCode::kAborted);
  EXPECT_THAT(formed.formed().message(), HasSubstr("the other one left"));
  EXPECT_FALSE(alone.active());
}

TEST_F(CommandLoopTest, AWrongStepIsRefusedByAllAndTheGroupLivesOn) {
  StartGroup(2);
  Fill();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  v1::Command wrong_layer = Attend(3, {2}, {1, 0});
  wrong_layer.mutable_attend()->set_layer(1);
  const v1::Command wrong[] = {Attend(3, {2}, {1, nan}), Attend(3, {2}, {1}), Attend(3, {3}, {1, 0}),
                               Attend(3, {2, 1}, {1, 0}), wrong_layer};
  for (const v1::Command& command : wrong) {
    for (const auto& rank : ranks_) {
      const v1::CommandResult result = rank->Run(command);
      EXPECT_TRUE(CodeOf(result) == absl::StatusCode::kInvalidArgument ||
                  CodeOf(result) == absl::StatusCode::kOutOfRange)
          << result.ShortDebugString();
      EXPECT_FALSE(result.ends_group());
    }
  }
  for (const auto& rank : ranks_) rank->Send(Attend(3, {2}, {1, 0}));
  EXPECT_FLOAT_EQ(FirstOutput(ranks_[0]->Result()), 2.0f);
}

TEST_F(CommandLoopTest, ARankThatCannotTakePartEndsTheGroupForAll) {
  StartGroup(2);
  Fill();
  ASSERT_EQ(ranks_[0]->Run(Seal()).code(),
            static_cast<int>(absl::StatusCode::kNotFound));  // uses up an ordinal
  ASSERT_EQ(ranks_[1]->Run(Close()).code(), 0);
  for (const auto& rank : ranks_) rank->Send(Attend(3, {2}, {1, 0}));
  const v1::CommandResult unable = ranks_[1]->Result();
  EXPECT_EQ(CodeOf(unable), absl::StatusCode::kAborted);
  EXPECT_TRUE(unable.ends_group());
  const v1::CommandResult broken = ranks_[0]->Result();
  EXPECT_TRUE(broken.ends_group());
  EXPECT_FALSE(ranks_[0]->active());
  const absl::StatusCode waiting = CodeOf(broken);
  EXPECT_TRUE(waiting == absl::StatusCode::kUnavailable || waiting == absl::StatusCode::kAborted);
}

TEST_F(CommandLoopTest, ClosingASessionGivesAllItsMemoryBack) {
  StartGroup(1);
  Fill();
  ASSERT_EQ(ranks_[0]->Run(Begin(3, 1000, true)).code(), 0);
  ASSERT_EQ(ranks_[0]->loop->Upload(Rows(3, 10)), absl::OkStatus());
  ASSERT_EQ(ranks_[0]->Run(Close()).code(), 0);
  EXPECT_EQ(ranks_[0]->store.used_bytes(), 0);
  EXPECT_EQ(ranks_[0]->loop->Upload(Rows(13, 10)).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ranks_[0]->Run(Close()).code(), 0);
}

TEST_F(CommandLoopTest, AnUploadErrorIsRepeatedAtTheSeal) {
  StartGroup(1);
  ASSERT_EQ(ranks_[0]->Run(Open()).code(), 0);
  ASSERT_EQ(ranks_[0]->Run(Begin(0, 3, true)).code(), 0);
  v1::UploadRequest rows = Rows(0, 3);
  rows.set_values(Bytes(std::vector<float>{1, std::numeric_limits<float>::infinity(), 3}));
  EXPECT_EQ(ranks_[0]->loop->Upload(rows).code(), absl::StatusCode::kInvalidArgument);
  const v1::CommandResult seal = ranks_[0]->Run(Seal());
  EXPECT_EQ(CodeOf(seal), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(seal.message(), HasSubstr("values at position 1, layer 0, KV head 0, channel 0: found Inf"));
}

TEST_F(CommandLoopTest, StopWaitsForNoOneAndKeepsTheContent) {
  StartGroup(2);
  Fill();
  const int64_t used = ranks_[0]->store.used_bytes();
  ASSERT_EQ(ranks_[0]->Run(Begin(3, 1, true)).code(), 0);
  ranks_[0]->Send(Attend(3, {2}, {1, 0}));  // waits for rank 1
  ranks_[0]->loop->Stop();
  EXPECT_EQ(ranks_[0]->store.used_bytes(), used);
  EXPECT_EQ(ranks_[0]->loop->Upload(Rows(3, 1)).code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace eduba
