// ClusterState: sessions of the workers' model.
#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

#include "absl/strings/str_cat.h"
#include "coordinator/state.h"
#include "coordinator/testing/fake_cluster.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rpc/limits.h"

namespace eduba {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

ClusterState::Options TwoWorkers() {
  ClusterState::Options options;
  options.group_size = 2;
  options.version = "test";
  return options;
}

v1::Model TinyModel(uint64_t hash = 9) {
  v1::Model model;
  model.set_name("tiny");
  model.set_hash(hash);
  model.set_vocab_size(10);
  model.set_hidden_size(4);
  model.set_query_heads(2);
  model.set_kv_heads(1);
  model.set_head_dim(2);
  model.set_dtype(v1::DTYPE_F32);
  model.set_tokenizer("genes");
  model.add_layer_windows(0);
  model.add_layer_windows(3);
  return model;
}

class ModelStateTest : public testing::Test {
 protected:
  void SetUp() override {
    StartGroup();
    ASSERT_TRUE(Create("s").ok());
  }
  void TearDown() override { EXPECT_THAT(cluster_.complaints(), IsEmpty()); }

  void StartGroup() {
    const v1::Model model = TinyModel();
    a_ = cluster_.Join("a:1", 7, "", &model);
    b_ = cluster_.Join("b:1", 7, "", &model);
    cluster_.Settle();
    ASSERT_TRUE(cluster_.serving);
  }

  template <typename T, typename Event>
  absl::StatusOr<T> Get(const Event& event) {
    const absl::StatusOr<Answer> answer = cluster_.Get(event);
    if (!answer.ok()) return answer.status();
    return std::get<T>(*answer);
  }
  absl::StatusOr<v1::Session> Create(const std::string& name, const v1::ModelSpec& model = {}) {
    v1::CreateSessionRequest request;
    request.set_name(name);
    *request.mutable_spec()->mutable_model() = model;
    return Get<v1::Session>(
        [&](ClusterState& state, RequestId id) { state.CreateSession(id, request, 99, cluster_.now()); });
  }
  absl::StatusOr<v1::Session> Show(const std::string& name) {
    v1::GetSessionRequest request;
    request.set_name(name);
    return Get<v1::Session>([&](ClusterState& state, RequestId id) { state.GetSession(id, request); });
  }
  RequestId AskAppend(const std::string& name, std::optional<int64_t> at, const std::vector<int32_t>& ids) {
    return cluster_.Ask(
        [&](ClusterState& state, RequestId id) { state.AppendTokens(id, name, at, ids, cluster_.now()); });
  }
  absl::StatusOr<v1::AppendTokensReceipt> Append(const std::string& name, std::optional<int64_t> at,
                                                 const std::vector<int32_t>& ids) {
    return Get<v1::AppendTokensReceipt>(
        [&](ClusterState& state, RequestId id) { state.AppendTokens(id, name, at, ids, cluster_.now()); });
  }
  RequestId AskGenerate(int64_t max_tokens, int64_t time_limit_ms = 0, const std::string& name = "s") {
    v1::GenerateRequest request;
    request.set_session(name);
    request.set_max_tokens(max_tokens);
    request.set_time_limit_ms(time_limit_ms);
    return cluster_.Ask(
        [&](ClusterState& state, RequestId id) { state.Generate(id, request, cluster_.now()); });
  }
  absl::Status StatusOf(RequestId id) {
    const auto& reply = cluster_.requests[id].reply;
    return reply.has_value() ? reply->status() : absl::UnknownError("no reply yet");
  }
  v1::GenerateSummary SummaryOf(RequestId id) {
    return std::get<v1::GenerateSummary>(**cluster_.requests[id].reply);
  }
  void HoldJobs() {
    cluster_.workers[a_].rank->hold_jobs = true;
    cluster_.workers[b_].rank->hold_jobs = true;
  }

  // The newest command, a job that is held, ends with this on both ranks.
  void EndHeldJob(const absl::Status& status, const v1::ModelResult& result) {
    for (const WorkerId worker : {a_, b_}) {
      v1::WorkerMessage message;
      message.mutable_result()->set_epoch(cluster_.workers[worker].epoch);
      message.mutable_result()->set_ordinal(cluster_.workers[worker].rank->commands.size());
      message.mutable_result()->set_code(static_cast<int>(status.code()));
      *message.mutable_result()->mutable_model() = result;
      cluster_.state().WorkerSaid(worker, message, cluster_.now());
      cluster_.Collect();
    }
  }
  // The connections break, and the same processes come again.
  void Reform() {
    for (WorkerId* worker : {&a_, &b_}) {
      if (cluster_.workers[*worker].connected) cluster_.Leave(*worker);
      *worker = cluster_.Reconnect(*worker);
    }
    cluster_.Advance(300);
    cluster_.Settle();
    ASSERT_TRUE(cluster_.serving);
  }

  // All that the workers do without a disk.
  void DeliverAll() {
    while (cluster_.Deliver(a_) || cluster_.Deliver(b_)) {
    }
  }
  absl::Status Delete(const std::string& name) {
    v1::DeleteSessionRequest request;
    request.set_name(name);
    return cluster_
        .Get([&](ClusterState& state, RequestId id) { state.DeleteSession(id, request, cluster_.now()); })
        .status();
  }
  absl::Status Generate(const v1::GenerateRequest& request) {
    return Get<v1::GenerateSummary>(
               [&](ClusterState& state, RequestId id) { state.Generate(id, request, cluster_.now()); })
        .status();
  }
  absl::Status Score(const std::string& name, const std::vector<int32_t>& ids, bool sink_mass = false) {
    v1::ScoreRequest request;
    request.set_session(name);
    request.set_ids(ids.data(), ids.size() * 4);
    request.set_sink_mass(sink_mass);
    return Get<v1::ScoreResponse>(
               [&](ClusterState& state, RequestId id) { state.Score(id, request, cluster_.now()); })
        .status();
  }
  RequestId AskEmbed(const std::vector<int64_t>& ranges, int pool = v1::POOL_MEAN) {
    v1::EmbedRequest request;
    request.set_session("s");
    request.set_ranges(ranges.data(), ranges.size() * 8);
    request.set_pool(static_cast<v1::Pool>(pool));
    return cluster_.Ask([&](ClusterState& state, RequestId id) { state.Embed(id, request, cluster_.now()); });
  }

  FakeCluster cluster_{TwoWorkers()};
  WorkerId a_ = 0;
  WorkerId b_ = 0;
};

TEST_F(ModelStateTest, ASessionTakesItsShapeFromTheModel) {
  const auto session = Show("s");
  ASSERT_TRUE(session.ok());
  EXPECT_EQ(session->spec().layers(), 2);
  EXPECT_EQ(session->spec().query_heads(), 2);
  EXPECT_EQ(session->spec().model().sink_tokens(), 4);
  EXPECT_EQ(session->spec().model().model_hash(), 9);
  ASSERT_TRUE(Append("s", {}, {1, 2, 3, 4, 5}).ok());
  // 16 bytes a position and layer; one layer keeps a window of 3.
  EXPECT_EQ(Show("s")->bytes(), 16 * (5 + 3));
}

TEST_F(ModelStateTest, AWorkerWithAnotherModelIsRefused) {
  cluster_.Leave(b_);
  const v1::Model other = TinyModel(10);
  const WorkerId with_other = cluster_.Join("c:1", 7, "", &other);
  EXPECT_EQ(cluster_.workers[with_other].closed.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(cluster_.workers[with_other].closed.message()), HasSubstr("--model"));
  // It would find other stop strings.
  v1::Model reads_otherwise = TinyModel();
  reads_otherwise.set_tokenizer_hash(5);
  const WorkerId with_other_text = cluster_.Join("e:1", 7, "", &reads_otherwise);
  EXPECT_EQ(cluster_.workers[with_other_text].closed.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(cluster_.workers[with_other_text].closed.message()), HasSubstr("tokenizer"));
  const WorkerId without = cluster_.Join("d:1");
  EXPECT_EQ(cluster_.workers[without].closed.code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(ModelStateTest, ARepeatedAppendIsComparedIdByIdWhateverItsBorders) {
  ASSERT_TRUE(Append("s", {}, {1, 2, 3}).ok());
  ASSERT_TRUE(Append("s", 3, {4, 5}).ok());
  const auto same = Append("s", 1, {2, 3, 4});
  ASSERT_TRUE(same.ok()) << same.status();
  EXPECT_EQ(same->already_stored(), 3);
  EXPECT_EQ(same->length(), 5);
  const auto longer = Append("s", 4, {5, 6, 7});
  ASSERT_TRUE(longer.ok()) << longer.status();
  EXPECT_EQ(longer->at(), 4);
  EXPECT_EQ(longer->count(), 3);
  EXPECT_EQ(longer->already_stored(), 1);
  EXPECT_EQ(longer->length(), 7);
  const absl::Status other = Append("s", 1, {2, 9}).status();
  EXPECT_EQ(other.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(other.message()), HasSubstr("position 2 holds token 3 already, not 9"));
  EXPECT_EQ(Append("s", 8, {1}).status().code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(Append("s", {}, {10}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(ModelStateTest, ASessionsOwnSinksComeBeforeItsFirstTokens) {
  v1::ModelSpec spec;
  spec.set_sink_tokens(3);
  spec.set_sink_token(7);
  ASSERT_TRUE(Create("d", spec).ok());
  EXPECT_EQ(Show("d")->length(), 0);
  // They hold their positions before they are read.
  EXPECT_EQ(Append("d", 0, {1}).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(Append("d", 1, {7, 1}).status().message()),
              HasSubstr("position 2 holds the sink token 7 already, not 1"));
  EXPECT_THAT(std::string(Append("d", 4, {1}).status().message()), HasSubstr("append at 3"));
  EXPECT_EQ(Show("d")->length(), 0);
  const auto first = Append("d", {}, {1, 2});
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->at(), 3);
  EXPECT_EQ(first->count(), 2);
  EXPECT_EQ(first->already_stored(), 0);
  EXPECT_EQ(first->length(), 5);
  const auto again = Append("d", 0, {7, 7, 7, 1, 2, 4});
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->already_stored(), 5);
  EXPECT_EQ(again->length(), 6);

  ASSERT_TRUE(Create("e", spec).ok());
  const auto sinks = Append("e", 1, {7});
  ASSERT_TRUE(sinks.ok()) << sinks.status();
  EXPECT_EQ(sinks->at(), 1);
  EXPECT_EQ(sinks->count(), 1);
  EXPECT_EQ(sinks->already_stored(), 1);
  EXPECT_EQ(sinks->length(), 3);
  spec.set_sink_token(10);
  EXPECT_THAT(std::string(Create("f", spec).status().message()), HasSubstr("wanted -1 to 9"));
  spec.set_sink_token(1);
  spec.set_sink_tokens(4097);
  EXPECT_THAT(std::string(Create("f", spec).status().message()),
              HasSubstr("sink_tokens (with a sink_token)"));
}

TEST_F(ModelStateTest, WhatASessionLeavesOutTheModelsDefaultsFillIn) {
  cluster_.Leave(a_);
  cluster_.Leave(b_);
  v1::Model model = TinyModel();
  v1::ModelSpec& defaults = *model.mutable_session_defaults();
  defaults.set_policy(v1::MODEL_POLICY_STREAMING);
  defaults.set_positions(v1::POSITION_MODE_ROLLING);
  defaults.set_window(256);
  defaults.set_sink_tokens(2);
  defaults.set_sink_token(5);
  cluster_.Join("a:1", 7, "", &model);
  const v1::Model without = TinyModel();
  const WorkerId other = cluster_.Join("b:1", 7, "", &without);
  EXPECT_THAT(std::string(cluster_.workers[other].closed.message()), HasSubstr("streaming.json"));
  cluster_.Join("b:1", 7, "", &model);
  cluster_.Advance(2000);
  cluster_.Settle();
  cluster_.Advance(2000);
  cluster_.Settle();

  const auto spec = [&](const std::string& name, const v1::ModelSpec& given) {
    const auto session = Create(name, given);
    EXPECT_TRUE(session.ok()) << session.status();
    return session.ok() ? session->spec().model() : v1::ModelSpec();
  };
  const v1::ModelSpec plain = spec("plain", {});
  EXPECT_EQ(plain.policy(), v1::MODEL_POLICY_STREAMING);
  EXPECT_EQ(plain.positions(), v1::POSITION_MODE_ROLLING);
  EXPECT_EQ(plain.window(), 256);
  EXPECT_EQ(plain.sink_tokens(), 2);
  EXPECT_EQ(plain.sink_token(), 5);
  v1::ModelSpec given;
  given.set_policy(v1::MODEL_POLICY_MODEL);
  const v1::ModelSpec own = spec("own", given);
  EXPECT_EQ(own.positions(), v1::POSITION_MODE_ABSOLUTE);
  EXPECT_EQ(own.window(), 0);
  EXPECT_EQ(own.sink_token(), 5);
  given.set_policy(v1::MODEL_POLICY_STAR);
  EXPECT_EQ(spec("star", given).positions(), v1::POSITION_MODE_ABSOLUTE);
  given.set_policy(v1::MODEL_POLICY_UNSPECIFIED);
  given.set_window(9);
  given.set_positions(v1::POSITION_MODE_ABSOLUTE);
  given.set_sink_tokens(0);
  given.set_sink_token(-1);
  const v1::ModelSpec overridden = spec("overridden", given);
  EXPECT_EQ(overridden.policy(), v1::MODEL_POLICY_STREAMING);
  EXPECT_EQ(overridden.positions(), v1::POSITION_MODE_ABSOLUTE);
  EXPECT_EQ(overridden.window(), 9);
  EXPECT_EQ(overridden.sink_tokens(), 0);
  EXPECT_EQ(Append("overridden", {}, {1})->at(), 0);
}

TEST_F(ModelStateTest, SinkMassComesWhereItIsWantedAndHasItsSize) {
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  v1::ScoreRequest request;
  request.set_session("s");
  request.set_ids(std::string(8, '\0'));
  const auto score = [&] {
    return Get<v1::ScoreResponse>(
        [&](ClusterState& state, RequestId id) { state.Score(id, request, cluster_.now()); });
  };
  EXPECT_EQ(score()->sink_mass().size(), 0U);
  request.set_sink_mass(true);
  EXPECT_EQ(score()->sink_mass().size(), size_t{4} * 2 * 2);
  cluster_.workers[a_].rank->omit_sink_mass = true;
  EXPECT_EQ(score().status().code(), absl::StatusCode::kInternal);
  EXPECT_FALSE(cluster_.serving);
}

TEST_F(ModelStateTest, GeneratedTokensBelongToTheSession) {
  ASSERT_TRUE(Append("s", {}, {1, 2}).ok());
  const RequestId generation = AskGenerate(3);
  cluster_.Settle();
  EXPECT_EQ(SummaryOf(generation).tokens(), 3);
  EXPECT_EQ(SummaryOf(generation).length(), 5);
  EXPECT_EQ(SummaryOf(generation).finish_reason(), v1::FINISH_REASON_LENGTH);
  ASSERT_EQ(cluster_.requests[generation].generated.size(), 12U);
  int32_t id = 0;
  std::memcpy(&id, cluster_.requests[generation].generated.data(), 4);
  EXPECT_EQ(Append("s", 2, {id, id, id})->already_stored(), 3);
}

TEST_F(ModelStateTest, ASessionOfWindowsGeneratesOnTheWorkerWithTheFewestGenerations) {
  v1::ModelSpec streaming;
  streaming.set_policy(v1::MODEL_POLICY_STREAMING);
  streaming.set_window(3);
  for (const char* name : {"x", "y", "z"}) {
    ASSERT_TRUE(Create(name, streaming).ok());
    ASSERT_TRUE(Append(name, {}, {1}).ok());
  }
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  const auto owner_rank_of_last = [&] {
    const auto& owner_ranks = cluster_.workers[b_].rank->owner_ranks;
    EXPECT_EQ(owner_ranks, cluster_.workers[a_].rank->owner_ranks);
    return owner_ranks.rbegin()->second;
  };
  HoldJobs();
  const RequestId x = AskGenerate(5, 0, "x");
  cluster_.Settle();
  EXPECT_EQ(owner_rank_of_last(), 0);
  const RequestId y = AskGenerate(5, 0, "y");
  cluster_.Settle();
  EXPECT_EQ(owner_rank_of_last(), 1);
  cluster_.Cancel(x);
  cluster_.Settle();
  AskGenerate(5, 0, "z");
  cluster_.Settle();
  EXPECT_EQ(owner_rank_of_last(), 0);
  // Where a layer sees all keys, all generate.
  AskGenerate(5);
  cluster_.Settle();
  EXPECT_EQ(cluster_.workers[a_].rank->owner_ranks.size(), 3U);
  EXPECT_EQ(Show("x")->length(), 2);
  EXPECT_EQ(cluster_.requests[y].generated.size(), 4U);
}

TEST_F(ModelStateTest, WhatAGenerationBringsComesFromItsOwnerRank) {
  v1::ModelSpec streaming;
  streaming.set_policy(v1::MODEL_POLICY_STREAMING);
  streaming.set_window(3);
  for (const char* name : {"x", "y"}) {
    ASSERT_TRUE(Create(name, streaming).ok());
    ASSERT_TRUE(Append(name, {}, {1}).ok());
  }
  HoldJobs();
  AskGenerate(5, 0, "x");
  cluster_.Settle();
  cluster_.workers[a_].rank->hold_jobs = cluster_.workers[b_].rank->hold_jobs = false;
  v1::GenerateRequest request;
  request.set_session("y");
  request.set_max_tokens(3);
  request.set_sink_mass(true);
  const auto summary = Get<v1::GenerateSummary>(
      [&](ClusterState& state, RequestId id) { state.Generate(id, request, cluster_.now()); });
  ASSERT_TRUE(summary.ok()) << summary.status();
  EXPECT_EQ(cluster_.workers[a_].rank->owner_ranks.rbegin()->second, 1);
  EXPECT_EQ(summary->tokens(), 3);
  EXPECT_EQ(summary->sink_mass().size(), size_t{4} * 2 * 2);
  EXPECT_EQ(Show("y")->length(), 4);
  // What the other says of how far it came is compared all the same.
  cluster_.workers[a_].rank->failures[v1::Command::kModelGenerate] = absl::ResourceExhaustedError("full");
  EXPECT_EQ(StatusOf(AskGenerate(3, 0, "y")).code(), absl::StatusCode::kUnknown);
  cluster_.Settle();
  EXPECT_FALSE(cluster_.serving);
}

TEST_F(ModelStateTest, TokensFromAnotherRankThanTheReportingOneEndTheEpoch) {
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  HoldJobs();
  const RequestId generation = AskGenerate(5);
  cluster_.Settle();
  v1::WorkerMessage message;
  message.mutable_progress()->set_epoch(1);
  cluster_.state().WorkerSaid(b_, message, cluster_.now());  // This is the progress of a job that has ended.
  cluster_.Collect();
  EXPECT_TRUE(cluster_.serving);
  message.mutable_progress()->set_ordinal(4);
  message.mutable_progress()->mutable_tokens()->set_ids(std::string(4, '\0'));
  message.mutable_progress()->mutable_tokens()->set_log_probs(std::string(4, '\0'));
  cluster_.state().WorkerSaid(b_, message, cluster_.now());
  cluster_.Collect();
  EXPECT_FALSE(cluster_.serving);
  EXPECT_EQ(StatusOf(generation).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(cluster_.requests[generation].generated.size(), 4U);
}

TEST_F(ModelStateTest, OneCallAtATimeExtendsASession) {
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  const RequestId first = AskAppend("s", {}, {2});
  EXPECT_EQ(StatusOf(AskAppend("s", {}, {3})).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(StatusOf(AskGenerate(1)).code(), absl::StatusCode::kAborted);
  // Nor is it asked or forked meanwhile: the workers may hold it without its newest rows.
  v1::ScoreRequest score;
  score.set_session("s");
  score.set_ids(std::string(4, '\0'));
  v1::EmbedRequest embed;
  embed.set_session("s");
  embed.set_ranges(std::string(16, '\0'));
  v1::ForkSessionRequest fork;
  fork.set_session("s");
  fork.set_name("f");
  EXPECT_EQ(StatusOf(cluster_.Ask([&](ClusterState& state, RequestId id) {
              state.Score(id, score, cluster_.now());
            })).code(),
            absl::StatusCode::kAborted);
  EXPECT_EQ(StatusOf(cluster_.Ask([&](ClusterState& state, RequestId id) {
              state.Embed(id, embed, cluster_.now());
            })).code(),
            absl::StatusCode::kAborted);
  EXPECT_EQ(StatusOf(cluster_.Ask([&](ClusterState& state, RequestId id) {
              state.ForkSession(id, fork, 99, cluster_.now());
            })).code(),
            absl::StatusCode::kAborted);
  cluster_.Settle();
  EXPECT_TRUE(StatusOf(first).ok());
  EXPECT_EQ(Show("s")->length(), 2);
}

TEST_F(ModelStateTest, ADeadlineEndsAGenerationWithWhatItHas) {
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  HoldJobs();
  const RequestId generation = AskGenerate(5, /*time_limit_ms=*/1000);
  cluster_.Settle();
  EXPECT_EQ(StatusOf(generation).code(), absl::StatusCode::kUnknown);
  cluster_.Advance(1200);
  cluster_.Settle();
  EXPECT_EQ(SummaryOf(generation).finish_reason(), v1::FINISH_REASON_DEADLINE);
  EXPECT_EQ(SummaryOf(generation).tokens(), 1);
  EXPECT_EQ(Show("s")->length(), 2);
}

TEST_F(ModelStateTest, ATimeLimitBeyondAllTimeIsNone) {
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  cluster_.Advance(1000);
  HoldJobs();
  const RequestId generation = AskGenerate(5, std::numeric_limits<int64_t>::max());
  cluster_.Settle();
  cluster_.Advance(1000);
  cluster_.Settle();
  EXPECT_EQ(StatusOf(generation).code(), absl::StatusCode::kUnknown);
}

TEST_F(ModelStateTest, ACancelledGenerationFreesTheSessionAndKeepsItsTokens) {
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  HoldJobs();
  const RequestId generation = AskGenerate(5);
  cluster_.Settle();
  cluster_.Cancel(generation);
  cluster_.Settle();
  EXPECT_EQ(Show("s")->length(), 2);
}

TEST_F(ModelStateTest, ALongJobIsNotLateWhileTheGroupMakesSteps) {
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  HoldJobs();
  const RequestId generation = AskGenerate(5);
  cluster_.Settle();
  for (int i = 0; i < 10; ++i) {
    cluster_.Advance(25000);
    v1::WorkerMessage alive;
    alive.mutable_progress()->set_epoch(1);
    cluster_.state().WorkerSaid(a_, alive, cluster_.now());
  }
  EXPECT_EQ(StatusOf(generation).code(), absl::StatusCode::kUnknown);
  cluster_.Advance(70000);
  EXPECT_EQ(StatusOf(generation).code(), absl::StatusCode::kUnavailable);
}

TEST_F(ModelStateTest, AFailedJobSaysHowFarItCame) {
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  for (const WorkerId worker : {a_, b_}) {
    cluster_.workers[worker].rank->failures[v1::Command::kModelAppend] = absl::ResourceExhaustedError("full");
  }
  const absl::Status status = Append("s", {}, {2}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("0 tokens of it are in the session, which has 1 now"));
  EXPECT_TRUE(Append("s", {}, {2}).ok());
}

TEST_F(ModelStateTest, RanksThatComputeOtherBitsEndTheEpoch) {
  cluster_.workers[b_].rank->digest = 6;
  EXPECT_EQ(Append("s", {}, {1}).status().code(), absl::StatusCode::kInternal);
  EXPECT_FALSE(cluster_.serving);
}

TEST_F(ModelStateTest, RanksWhoseOutcomesDifferAreQuoted) {
  cluster_.workers[b_].rank->failures[v1::Command::kModelAppend] = absl::InternalError("the disk is on fire");
  const absl::Status status = Append("s", {}, {1}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("ended with INTERNAL (the disk is on fire), and worker 0 with OK"));
  EXPECT_FALSE(cluster_.serving);
}

TEST_F(ModelStateTest, RanksThatCameDifferentlyFarEndTheEpoch) {
  cluster_.workers[b_].rank->misses = 1;
  const absl::Status status = Append("s", {}, {1, 2, 3}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("did 2 tokens, and worker 0 3"));
  EXPECT_FALSE(cluster_.serving);
}

TEST_F(ModelStateTest, AnEpochsEndEndsItsJobs) {
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  const RequestId generation = AskGenerate(5);
  cluster_.Leave(b_);
  EXPECT_EQ(StatusOf(generation).code(), absl::StatusCode::kUnavailable);
  // A new process has none of the session's tokens: it cannot go on, and says so.
  const v1::Model model = TinyModel();
  cluster_.Join("b:1", 7, "", &model);
  cluster_.Advance(1000);
  cluster_.Settle();
  const absl::Status status = StatusOf(AskGenerate(1));
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("node b:1 does not hold its part"));
}

TEST_F(ModelStateTest, RanksThatStandAtOnePlaceGoOnFromThere) {
  ASSERT_TRUE(Append("s", {}, {1, 2}).ok());
  // Both ranks have read the token, and the epoch ends before it is written down.
  const RequestId append = AskAppend("s", {}, {3});
  DeliverAll();
  cluster_.Leave(b_);
  EXPECT_EQ(StatusOf(append).code(), absl::StatusCode::kUnknown);  // It is being written down.
  cluster_.Settle();
  EXPECT_TRUE(StatusOf(append).ok()) << StatusOf(append);
  // Here nothing says that both have read it but themselves.
  Reform();
  const RequestId second = AskAppend("s", {}, {4});
  HoldJobs();
  DeliverAll();
  Reform();
  EXPECT_EQ(StatusOf(second).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Show("s")->length(), 4);
  EXPECT_EQ(cluster_.stored().sessions[0].length(), 4);
  EXPECT_EQ(Append("s", 0, {1, 2, 3, 4})->already_stored(), 4);
  EXPECT_TRUE(Append("s", 4, {5}).ok());
}

TEST_F(ModelStateTest, RanksThatStoppedAtDifferentPlacesGoBackToTheRecord) {
  ASSERT_TRUE(Append("s", {}, {1, 2}).ok());
  AskAppend("s", {}, {3, 4});
  while (cluster_.Deliver(a_)) {
  }
  EXPECT_EQ(cluster_.workers[a_].node->sessions.begin()->second.ids.size(), 4U);
  EXPECT_EQ(cluster_.workers[b_].node->sessions.begin()->second.ids.size(), 2U);
  Reform();
  EXPECT_EQ(Show("s")->length(), 2);
  EXPECT_FALSE(Show("s")->lost());
  EXPECT_EQ(cluster_.workers[a_].node->sessions.begin()->second.ids.size(), 2U);
  const auto again = Append("s", 2, {3, 4});
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->already_stored(), 0);
  EXPECT_EQ(again->length(), 4);
}

TEST_F(ModelStateTest, TokensAreWrittenDownAndToldOfAlthoughTheirEpochIsOver) {
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  v1::GenerateRequest request;
  request.set_session("s");
  request.set_max_tokens(2);
  request.set_sink_mass(true);
  const RequestId generation =
      cluster_.Ask([&](ClusterState& state, RequestId id) { state.Generate(id, request, cluster_.now()); });
  DeliverAll();
  cluster_.Leave(a_);
  cluster_.Leave(b_);
  EXPECT_EQ(StatusOf(generation).code(), absl::StatusCode::kUnknown);
  ASSERT_TRUE(cluster_.FinishWrite());
  ASSERT_TRUE(StatusOf(generation).ok()) << StatusOf(generation);
  EXPECT_EQ(SummaryOf(generation).length(), 3);
}

TEST_F(ModelStateTest, TokensThatCouldNotBeWrittenDownAreWrittenWithTheNextOnes) {
  cluster_.disk_failures = 1;
  EXPECT_EQ(Append("s", {}, {1, 2}).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Show("s")->length(), 2);
  ASSERT_TRUE(Append("s", {}, {3}).ok());
  EXPECT_EQ(cluster_.stored().sessions[0].length(), 3);
}

TEST_F(ModelStateTest, AGenerationWhoseSessionCouldNotBeDeletedEnds) {
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  HoldJobs();
  const RequestId generation = AskGenerate(5);
  cluster_.Settle();
  cluster_.disk_failures = 1;
  EXPECT_EQ(Delete("s").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(StatusOf(generation).code(), absl::StatusCode::kNotFound);
  // Nobody waits for it any more.
  cluster_.Settle();
  EXPECT_EQ(Show("s")->length(), 2);
  cluster_.workers[a_].rank->hold_jobs = cluster_.workers[b_].rank->hold_jobs = false;
  EXPECT_TRUE(Append("s", {}, {3}).ok());
}

TEST_F(ModelStateTest, WhatNoGenerationCanDoIsRefusedByName) {
  v1::GenerateRequest request;
  request.set_session("s");
  request.set_max_tokens(1);
  EXPECT_EQ(Generate(request).code(), absl::StatusCode::kFailedPrecondition);  // It is empty.
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  EXPECT_TRUE(Generate(request).ok());
  const auto refused = [&](const std::function<void(v1::GenerateRequest&)>& change) {
    v1::GenerateRequest changed = request;
    change(changed);
    const absl::Status status = Generate(changed);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(refused([](auto& r) { r.set_max_tokens(0); }), HasSubstr("max_tokens"));
  EXPECT_THAT(refused([](auto& r) { r.set_max_tokens(kGenerateTokensMax + 1); }), HasSubstr("max_tokens"));
  EXPECT_THAT(refused([](auto& r) { r.set_time_limit_ms(-1); }), HasSubstr("time_limit_ms"));
  EXPECT_THAT(refused([](auto& r) { r.add_stop_ids(10); }), HasSubstr("stop ids: id 0 is 10"));
  EXPECT_THAT(refused([](auto& r) { r.add_stop_ids(-1); }), HasSubstr("stop ids: id 0 is -1"));
  EXPECT_THAT(refused([](auto& r) { r.add_stop_strings(std::string()); }),
              HasSubstr("a stop string of 0 bytes"));
  EXPECT_THAT(refused([](auto& r) { r.add_stop_strings(std::string(257, 'x')); }), HasSubstr("257 bytes"));
  EXPECT_THAT(refused([](auto& r) {
                for (int i = 0; i <= kStopIdsMax; ++i) r.add_stop_ids(1);
              }),
              HasSubstr("1025 stop ids"));
  EXPECT_THAT(refused([](auto& r) {
                for (int i = 0; i <= kStopStringsMax; ++i) r.add_stop_strings(std::string(1, 'x'));
              }),
              HasSubstr("17 stop strings"));
  // The same string twice is no mistake.
  for (int i = 0; i < kStopStringsMax; ++i) request.add_stop_strings(std::string(256, 'x'));
  EXPECT_TRUE(Generate(request).ok());
}

TEST_F(ModelStateTest, WhatCannotBeReadIsRefusedByName) {
  EXPECT_EQ(Score("s", {1}).code(), absl::StatusCode::kFailedPrecondition);  // It is empty.
  ASSERT_TRUE(Append("s", {}, {1, 2, 3, 4}).ok());
  EXPECT_EQ(Append("s", {}, {-1}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Append("s", -1, {1}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Append("s", {}, {}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Append("s", {}, std::vector<int32_t>(kTokenIdsMax + 1)).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Score("s", {}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Score("s", {10}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Score("s", std::vector<int32_t>(kTokenIdsMax + 1)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(Score("s", {9}).ok());

  const auto embed = [&](const std::vector<int64_t>& ranges, int pool = v1::POOL_MEAN) {
    const RequestId request = AskEmbed(ranges, pool);
    cluster_.Settle();
    return StatusOf(request).code();
  };
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(embed({0, 1, 1, 4}), absl::StatusCode::kOk);
  EXPECT_EQ(embed({0, 5}), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(embed({kLargest - 1, kLargest}), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(embed({2, 2}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(embed({-1, 2}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(embed({0, 3, 2, 4}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(embed({0, 3, 3}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(embed({}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(embed({0, 1}, 7), absl::StatusCode::kInvalidArgument);
}

TEST_F(ModelStateTest, WhatTheModelIsTooLargeForOrHasNotIsRefused) {
  cluster_.Leave(a_);
  cluster_.Leave(b_);
  v1::Model model = TinyModel();
  model.clear_tokenizer();
  model.set_query_heads(1024);
  while (model.layer_windows_size() < 49) model.add_layer_windows(0);
  cluster_.Join("a:1", 7, "", &model);
  cluster_.Join("b:1", 7, "", &model);
  cluster_.Advance(2000);
  cluster_.Settle();
  ASSERT_TRUE(Create("large").ok());
  ASSERT_TRUE(Append("large", {}, {1}).ok());
  EXPECT_TRUE(Score("large", {1}).ok());
  EXPECT_EQ(Score("large", {1}, /*sink_mass=*/true).code(), absl::StatusCode::kInvalidArgument);
  v1::GenerateRequest request;
  request.set_session("large");
  request.set_max_tokens(1);
  request.set_sink_mass(true);
  EXPECT_EQ(Generate(request).code(), absl::StatusCode::kInvalidArgument);
  request.set_sink_mass(false);
  request.add_stop_strings("x");
  EXPECT_EQ(Generate(request).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(ModelStateTest, AnAppendThatEndedAmongTheSinksGoesOnFromThere) {
  v1::ModelSpec spec;
  spec.set_sink_tokens(3);
  spec.set_sink_token(7);
  ASSERT_TRUE(Create("d", spec).ok());
  HoldJobs();
  const RequestId append = AskAppend("d", {}, {1, 2});
  cluster_.Settle();
  v1::ModelResult result;
  result.set_done(1);
  result.set_length(1);
  EndHeldJob(absl::ResourceExhaustedError("full"), result);
  cluster_.Settle();
  EXPECT_EQ(StatusOf(append).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Show("d")->length(), 1);
  cluster_.workers[a_].rank->hold_jobs = cluster_.workers[b_].rank->hold_jobs = false;
  EXPECT_THAT(std::string(Score("d", {1}).message()), HasSubstr("it has 1 of its 3 sink tokens"));
  const auto again = Append("d", 3, {1, 2});
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->count(), 2);
  EXPECT_EQ(again->already_stored(), 0);
  EXPECT_EQ(again->length(), 5);
}

TEST_F(ModelStateTest, AnswersThatMakeNoSenseEndTheEpoch) {
  const auto restart = [&] {
    EXPECT_FALSE(cluster_.serving);
    cluster_.Restart();
    StartGroup();
    static int next = 0;
    std::string name = absl::StrCat("n", next++);
    EXPECT_TRUE(Create(name).ok());
    EXPECT_TRUE(Append(name, {}, {1, 2}).ok());
    HoldJobs();
    return name;
  };
  ASSERT_TRUE(Append("s", {}, {1, 2}).ok());
  HoldJobs();
  // Fewer tokens than were told of.
  RequestId request = AskGenerate(5);
  cluster_.Settle();
  EndHeldJob(absl::OkStatus(), {});
  EXPECT_EQ(StatusOf(request).code(), absl::StatusCode::kInternal);
  // More than were to be read.
  std::string name = restart();
  request = AskAppend(name, {}, {1});
  cluster_.Settle();
  v1::ModelResult result;
  result.set_done(2);
  EndHeldJob(absl::OkStatus(), result);
  EXPECT_EQ(StatusOf(request).code(), absl::StatusCode::kInternal);
  // Log-probabilities of other tokens.
  name = restart();
  v1::ScoreRequest score;
  score.set_session(name);
  score.set_ids(std::string(8, '\0'));
  request = cluster_.Ask([&](ClusterState& state, RequestId id) { state.Score(id, score, cluster_.now()); });
  cluster_.Settle();
  result.set_log_probs(std::string(4, '\0'));
  EndHeldJob(absl::OkStatus(), result);
  EXPECT_EQ(StatusOf(request).code(), absl::StatusCode::kInternal);
  // Tokens without their probabilities, vectors that come before others, and fewer of them than were asked
  // for.
  for (const int part : {0, 1, 2}) {
    name = restart();
    v1::WorkerMessage message;
    if (part == 0) {
      request = AskGenerate(5, 0, name);
      message.mutable_progress()->mutable_tokens()->set_ids(std::string(4, '\0'));
    } else {
      v1::EmbedRequest embed;
      embed.set_session(name);
      const std::vector<int64_t> ranges = {0, 1, 1, 2};
      embed.set_ranges(ranges.data(), 32);
      cluster_.workers[a_].rank->omit_embeddings = true;
      request =
          cluster_.Ask([&](ClusterState& state, RequestId id) { state.Embed(id, embed, cluster_.now()); });
      message.mutable_progress()->mutable_embeddings()->set_first_range(part == 1 ? 1 : 0);
      message.mutable_progress()->mutable_embeddings()->set_count(1);
      message.mutable_progress()->mutable_embeddings()->set_vectors(std::string(16, '\0'));
    }
    cluster_.Settle();
    message.mutable_progress()->set_epoch(cluster_.workers[a_].epoch);
    message.mutable_progress()->set_ordinal(cluster_.workers[a_].rank->commands.size());
    cluster_.state().WorkerSaid(a_, message, cluster_.now());
    cluster_.Collect();
    if (part < 2) {
      EXPECT_EQ(StatusOf(request).code(), absl::StatusCode::kUnavailable) << part;
    } else {
      EndHeldJob(absl::OkStatus(), {});
      EXPECT_EQ(StatusOf(request).code(), absl::StatusCode::kInternal);
    }
    EXPECT_FALSE(cluster_.serving) << part;
  }
}

TEST_F(ModelStateTest, AGenerationIsCancelledOnce) {
  ASSERT_TRUE(Append("s", {}, {1}).ok());
  HoldJobs();
  const RequestId generation = AskGenerate(5, /*time_limit_ms=*/1000);
  cluster_.Settle();
  cluster_.Advance(2000);
  cluster_.Cancel(generation);
  cluster_.Settle();
  const auto& commands = cluster_.workers[a_].rank->commands;
  EXPECT_EQ(std::count(commands.begin(), commands.end(), v1::Command::kCancelJob), 1);
}

TEST_F(ModelStateTest, ADeletedSessionsGenerationMayEndAtAnyMoment) {
  v1::ModelResult result;
  result.set_done(1);
  result.set_length(2);
  for (const bool ends_first : {true, false}) {
    const std::string name = ends_first ? "x" : "y";
    ASSERT_TRUE(Create(name).ok());
    ASSERT_TRUE(Append(name, {}, {1}).ok());
    HoldJobs();
    const RequestId generation = AskGenerate(5, 0, name);
    cluster_.Settle();
    v1::DeleteSessionRequest request;
    request.set_name(name);
    const RequestId deletion = cluster_.Ask(
        [&](ClusterState& state, RequestId id) { state.DeleteSession(id, request, cluster_.now()); });
    EXPECT_EQ(StatusOf(generation).code(), absl::StatusCode::kNotFound);
    if (ends_first) {
      EndHeldJob(absl::OkStatus(), result);  // By itself, while the session is struck out.
    } else {
      while (cluster_.FinishWrite()) {
      }
      EndHeldJob(absl::NotFoundError("deleted"), {});  // The workers close the session.
    }
    cluster_.Settle();
    EXPECT_TRUE(StatusOf(deletion).ok()) << StatusOf(deletion);
    EXPECT_TRUE(cluster_.serving);
    cluster_.workers[a_].rank->hold_jobs = cluster_.workers[b_].rank->hold_jobs = false;
  }
}

TEST_F(ModelStateTest, WhoIsGoneOrDeletedWhileTokensAreWrittenDownHearsNothingMore) {
  const RequestId given_up = AskAppend("s", {}, {1});
  DeliverAll();
  cluster_.Cancel(given_up);
  cluster_.Settle();
  EXPECT_EQ(Show("s")->length(), 1);
  const RequestId append = AskAppend("s", {}, {2});
  DeliverAll();
  EXPECT_TRUE(Delete("s").ok());
  EXPECT_EQ(StatusOf(append).code(), absl::StatusCode::kNotFound);
}

TEST_F(ModelStateTest, AForkGoesItsOwnWay) {
  ASSERT_TRUE(Append("s", {}, {1, 2}).ok());
  v1::ForkSessionRequest request;
  request.set_session("s");
  request.set_name("f");
  const auto fork = Get<v1::Session>(
      [&](ClusterState& state, RequestId id) { state.ForkSession(id, request, 99, cluster_.now()); });
  ASSERT_TRUE(fork.ok()) << fork.status();
  EXPECT_EQ(fork->length(), 2);
  ASSERT_TRUE(Append("f", 2, {3}).ok());
  ASSERT_TRUE(Append("s", 2, {4}).ok());
  EXPECT_EQ(Append("f", 0, {1, 2, 3})->already_stored(), 3);
  EXPECT_EQ(cluster_.stored().sessions[1].length(), 3);
}

TEST_F(ModelStateTest, EachKindOfSessionRefusesTheOthersCalls) {
  v1::PlanAppendRequest plan;
  plan.set_session("s");
  plan.set_count(1);
  EXPECT_EQ(
      cluster_.Get([&](ClusterState& state, RequestId id) { state.PlanAppend(id, plan, cluster_.now()); })
          .status()
          .code(),
      absl::StatusCode::kFailedPrecondition);
  v1::AttendRequest::Header header;
  header.set_session("s");
  EXPECT_EQ(
      cluster_.Get([&](ClusterState& state, RequestId id) { state.StartAttend(id, header, cluster_.now()); })
          .status()
          .code(),
      absl::StatusCode::kFailedPrecondition);
}

TEST_F(ModelStateTest, ARestartedCoordinatorFindsTheTokensThatItsWorkersKept) {
  ASSERT_TRUE(Append("s", {}, {1, 2}).ok());
  cluster_.Restart();
  Reform();
  EXPECT_FALSE(Show("s")->lost());
  EXPECT_EQ(Append("s", 0, {1, 2, 3})->already_stored(), 2);
  // New processes have none.
  cluster_.Restart();
  StartGroup();
  EXPECT_TRUE(Show("s")->lost());
  EXPECT_EQ(Append("s", {}, {3}).status().code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace eduba
