#include "coordinator/state.h"

#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "base/pages.h"
#include "coordinator/running_clock.h"
#include "coordinator/testing/fake_cluster.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

ClusterState::Options TwoWorkers() {
  ClusterState::Options options;
  options.group_size = 2;
  options.transport = "gloo";
  options.version = "test";
  return options;
}

v1::CreateSessionRequest CreateRequest(const std::string& name) {
  v1::CreateSessionRequest request;
  request.set_name(name);
  request.mutable_spec()->set_query_heads(2);
  request.mutable_spec()->set_kv_heads(1);
  request.mutable_spec()->set_head_dim(2);
  request.mutable_spec()->set_stripe_pages(1);
  return request;
}

class StateTest : public testing::Test {
 protected:
  void TearDown() override { EXPECT_THAT(cluster_.complaints(), IsEmpty()); }

  void StartGroup() {
    a_ = cluster_.Join("a:1");
    b_ = cluster_.Join("b:1");
    cluster_.Settle();
    ASSERT_TRUE(cluster_.serving);
  }

  // The connections break, and the same processes come again.
  void Reconnect() {
    for (WorkerId* worker : {&a_, &b_}) {
      if (cluster_.workers[*worker].connected) cluster_.Leave(*worker);
      *worker = cluster_.Reconnect(*worker);
    }
    cluster_.Advance(300);
    cluster_.Settle();
    ASSERT_TRUE(cluster_.serving);
  }

  absl::StatusOr<v1::Session> Create(const v1::CreateSessionRequest& request) {
    return As<v1::Session>(cluster_.Get(
        [&](ClusterState& state, RequestId id) { state.CreateSession(id, request, 99, cluster_.now()); }));
  }
  absl::StatusOr<v1::Session> Create(const std::string& name) { return Create(CreateRequest(name)); }
  absl::StatusOr<v1::Session> Show(const std::string& name) {
    v1::GetSessionRequest request;
    request.set_name(name);
    return As<v1::Session>(
        cluster_.Get([&](ClusterState& state, RequestId id) { state.GetSession(id, request); }));
  }
  absl::Status Delete(const std::string& name) {
    v1::DeleteSessionRequest request;
    request.set_name(name);
    return cluster_
        .Get([&](ClusterState& state, RequestId id) { state.DeleteSession(id, request, cluster_.now()); })
        .status();
  }
  RequestId AskPlan(const std::string& name, std::optional<int64_t> at, int64_t count) {
    v1::PlanAppendRequest request;
    request.set_session(name);
    if (at.has_value()) request.set_at(*at);
    request.set_count(count);
    return cluster_.Ask(
        [&](ClusterState& state, RequestId id) { state.PlanAppend(id, request, cluster_.now()); });
  }
  absl::StatusOr<v1::AppendPlan> Plan(const std::string& name, std::optional<int64_t> at, int64_t count) {
    const RequestId id = AskPlan(name, at, count);
    cluster_.Settle();
    return As<v1::AppendPlan>(*cluster_.requests[id].reply);
  }
  RequestId AskCommit(uint64_t append) {
    return cluster_.Ask(
        [&](ClusterState& state, RequestId id) { state.CommitAppend(id, append, cluster_.now()); });
  }
  absl::StatusOr<v1::AppendReceipt> Commit(uint64_t append) {
    const RequestId id = AskCommit(append);
    cluster_.Settle();
    return As<v1::AppendReceipt>(*cluster_.requests[id].reply);
  }
  absl::Status Abort(uint64_t append) {
    return cluster_
        .Get([&](ClusterState& state, RequestId id) { state.AbortAppend(id, append, cluster_.now()); })
        .status();
  }
  absl::StatusOr<v1::AppendReceipt> Append(const std::string& name, std::optional<int64_t> at,
                                           int64_t count) {
    const auto plan = Plan(name, at, count);
    if (!plan.ok()) return plan.status();
    return Commit(plan->append_id());
  }

  RequestId Attend(const std::string& name, bool positions = false, v1::Policy policy = v1::POLICY_GLOBAL,
                   int layer = 0) {
    v1::AttendRequest::Header header;
    header.set_session(name);
    header.set_positions(positions);
    header.set_policy(policy);
    header.set_layer(layer);
    return cluster_.Ask(
        [&](ClusterState& state, RequestId id) { state.StartAttend(id, header, cluster_.now()); });
  }
  // `rows` rows whose values are all `value`.
  void Rows(RequestId id, int rows, float value, std::vector<int64_t> positions = {}) {
    const std::vector<float> queries(size_t{4} * rows, value);
    cluster_.state().SubmitRows(
        id, std::string(reinterpret_cast<const char*>(queries.data()), queries.size() * 4),
        std::move(positions), cluster_.now());
    cluster_.Collect();
  }
  void Finish(RequestId id) {
    cluster_.state().FinishRows(id, cluster_.now());
    cluster_.Collect();
  }
  // The group's state as clients see it. Asking lets nothing else happen.
  std::string State() {
    const RequestId id =
        cluster_.Ask([](ClusterState& state, RequestId request) { state.ListWorkers(request); });
    return As<v1::ListWorkersResponse>(*cluster_.requests[id].reply)->state();
  }
  absl::Status StatusOf(RequestId id) {
    const auto& reply = cluster_.requests[id].reply;
    return reply.has_value() ? reply->status() : absl::UnknownError("no reply yet");
  }
  AttendTotals Totals(RequestId id) { return std::get<AttendTotals>(**cluster_.requests[id].reply); }
  // Output values of a call, one per row, and whether they came in order.
  std::vector<float> Outputs(RequestId id) {
    std::vector<float> values;
    for (const v1::AttendResponse::Rows& rows : cluster_.requests[id].rows) {
      EXPECT_EQ(rows.first_row(), static_cast<int64_t>(values.size()));
      for (int row = 0; row < rows.count(); ++row) {
        float value = 0;
        std::memcpy(&value, rows.outputs().data() + 16 * row, 4);
        values.push_back(value);
      }
    }
    return values;
  }
  std::vector<int> StepsAt(WorkerId worker) {
    std::vector<int> rows;
    for (const auto& message : cluster_.workers[worker].inbox) {
      if (message->command().has_attend()) rows.push_back(message->command().attend().rows());
    }
    return rows;
  }

  template <typename T>
  static absl::StatusOr<T> As(const absl::StatusOr<Answer>& answer) {
    if (!answer.ok()) return answer.status();
    return std::get<T>(*answer);
  }

  FakeCluster cluster_{TwoWorkers()};
  WorkerId a_ = 0;
  WorkerId b_ = 0;
};

// ---- Groups

TEST_F(StateTest, AGroupFormsWhenAllWorkersAreThere) {
  a_ = cluster_.Join("a:1");
  cluster_.Settle();
  EXPECT_FALSE(cluster_.serving);
  EXPECT_EQ(cluster_.stored().epoch, 0);
  EXPECT_THAT(std::string(Create("x").status().message()), HasSubstr("1 of 2 workers"));
  b_ = cluster_.Join("b:1");
  cluster_.Settle();
  EXPECT_TRUE(cluster_.serving);
  EXPECT_EQ(cluster_.stored().epoch, 1);
  const auto list = As<v1::ListWorkersResponse>(
      cluster_.Get([](ClusterState& state, RequestId id) { state.ListWorkers(id); }));
  EXPECT_EQ(list->state(), "active");
  EXPECT_EQ(list->workers(0).rank(), 0);
  EXPECT_EQ(list->workers(1).rank(), 1);
  EXPECT_EQ(list->workers(1).address(), "b:1");
}

TEST_F(StateTest, RefusesWorkersThatDoNotFit) {
  cluster_.Join("a:1", 7);
  const WorkerId other = cluster_.Join("b:1", 8);
  EXPECT_EQ(cluster_.workers[other].closed.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(cluster_.workers[other].closed.message()), HasSubstr("arithmetic differs"));
  const WorkerId same = cluster_.Join("a:1", 7, "", nullptr, "another node");
  EXPECT_EQ(cluster_.workers[same].closed.code(), absl::StatusCode::kUnavailable);
  cluster_.Join("c:1", 7);
  const WorkerId third = cluster_.Join("d:1", 7);
  EXPECT_EQ(cluster_.workers[third].closed.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(cluster_.workers[third].closed.message()), HasSubstr("come again"));
  cluster_.Settle();
  EXPECT_TRUE(cluster_.serving);

  for (const bool protocol : {false, true}) {
    const WorkerId id = 1000 + (protocol ? 1 : 0);
    v1::WorkerMessage message;
    message.mutable_hello()->set_protocol(protocol ? kGroupProtocol + 1 : kGroupProtocol);
    message.mutable_hello()->set_transport(protocol ? "gloo" : "local");
    message.mutable_hello()->set_node("n");
    cluster_.state().WorkerConnected(id, cluster_.now());
    cluster_.state().WorkerSaid(id, message, cluster_.now());
    cluster_.Collect();
    EXPECT_EQ(cluster_.workers[id].closed.code(), absl::StatusCode::kFailedPrecondition);
  }
}

TEST_F(StateTest, AWorkerThatComesAgainReplacesItsOldStream) {
  const WorkerId first = cluster_.Join("a:1", 7, "same");
  const WorkerId again = cluster_.Join("a:1", 7, "same");
  EXPECT_EQ(cluster_.workers[first].closed.code(), absl::StatusCode::kUnavailable);
  cluster_.Join("b:1");
  cluster_.Settle();
  EXPECT_TRUE(cluster_.serving);
  EXPECT_TRUE(cluster_.workers[again].connected);
  // Another process of the node, wherever it listens, takes its place for good.
  const WorkerId later = cluster_.Join("c:1", 7, "later", nullptr, "a:1");
  EXPECT_EQ(cluster_.workers[again].closed.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(cluster_.workers[again].closed.message()), HasSubstr("node a:1"));
  cluster_.Advance(300);
  cluster_.Settle();
  EXPECT_TRUE(cluster_.serving);
  EXPECT_TRUE(cluster_.workers[later].connected);
}

TEST_F(StateTest, AWorkerWithoutANodeIdIsRefused) {
  v1::WorkerMessage message;
  message.mutable_hello()->set_protocol(kGroupProtocol);
  message.mutable_hello()->set_transport("gloo");
  cluster_.state().WorkerConnected(1000, cluster_.now());
  cluster_.state().WorkerSaid(1000, message, cluster_.now());
  cluster_.Collect();
  EXPECT_EQ(cluster_.workers[1000].closed.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(cluster_.workers[1000].closed.message()), HasSubstr("node id"));
}

TEST_F(StateTest, RanksFollowNodeIdsAndNotWhoCameFirst) {
  const WorkerId last = cluster_.Join("b:1", 7, "", nullptr, "n1");
  const WorkerId first = cluster_.Join("a:1", 7, "", nullptr, "n0");
  cluster_.Settle();
  const auto list = As<v1::ListWorkersResponse>(
      cluster_.Get([](ClusterState& state, RequestId id) { state.ListWorkers(id); }));
  EXPECT_EQ(list->workers(0).address(), "b:1");
  EXPECT_EQ(list->workers(0).rank(), 1);
  EXPECT_EQ(list->workers(1).rank(), 0);
  EXPECT_TRUE(cluster_.workers[first].connected && cluster_.workers[last].connected);
}

TEST_F(StateTest, AFailedAttemptIsTriedAgainInTheSameEpoch) {
  a_ = cluster_.Join("a:1");
  cluster_.workers[a_].formation_failures = 3;
  cluster_.Join("b:1");
  cluster_.Settle();
  EXPECT_FALSE(cluster_.serving);
  for (int i = 0; i < 40 && !cluster_.serving; ++i) {
    cluster_.Advance(100);
    cluster_.Settle();
  }
  EXPECT_TRUE(cluster_.serving);
  EXPECT_EQ(cluster_.rendezvous, std::make_pair(uint64_t{1}, uint32_t{4}));
  EXPECT_EQ(cluster_.stored().epoch, 1);
}

TEST_F(StateTest, AnAttemptThatNobodyAnswersIsGivenUp) {
  a_ = cluster_.Join("a:1");
  b_ = cluster_.Join("b:1");
  cluster_.FinishWrite();
  cluster_.Deliver(a_);
  cluster_.workers[b_].inbox.clear();
  cluster_.Advance(15000);
  cluster_.Settle();
  EXPECT_TRUE(cluster_.serving);
  EXPECT_EQ(cluster_.rendezvous, std::make_pair(uint64_t{1}, uint32_t{2}));
}

TEST_F(StateTest, EpochsAreNeverUsedAgain) {
  StartGroup();
  cluster_.Leave(a_);
  a_ = cluster_.Join("a:1");
  cluster_.Advance(300);
  cluster_.Settle();
  EXPECT_TRUE(cluster_.serving);
  EXPECT_EQ(cluster_.stored().epoch, 2);
  cluster_.Restart();
  StartGroup();
  EXPECT_EQ(cluster_.stored().epoch, 3);
}

TEST_F(StateTest, AnEpochThatCannotBeWrittenDownIsNotBegun) {
  cluster_.disk_failures = 1;
  a_ = cluster_.Join("a:1");
  b_ = cluster_.Join("b:1");
  cluster_.Settle();
  EXPECT_FALSE(cluster_.serving);
  EXPECT_THAT(cluster_.workers[a_].inbox, IsEmpty());
  cluster_.Advance(3000);
  cluster_.Settle();
  EXPECT_TRUE(cluster_.serving);
}

TEST_F(StateTest, ASilentWorkerHasLeft) {
  StartGroup();
  cluster_.workers[b_].mute = true;
  cluster_.Advance(kHeartbeatTimeoutMs);
  EXPECT_TRUE(cluster_.serving);
  cluster_.Advance(200);
  EXPECT_FALSE(cluster_.serving);
  EXPECT_EQ(cluster_.workers[b_].closed.code(), absl::StatusCode::kUnavailable);
  ASSERT_FALSE(cluster_.workers[a_].inbox.empty());
  EXPECT_TRUE(cluster_.workers[a_].inbox.back()->has_abort());
}

TEST(LocalState, WorkersOfThisProcessAreNeverLostBySilence) {
  ClusterState::Options options = TwoWorkers();
  options.transport = "local";
  FakeCluster cluster(options);
  const WorkerId a = cluster.Join("a:1");
  cluster.Join("b:1");
  cluster.Settle();
  cluster.workers[a].mute = true;
  cluster.Advance(100 * kHeartbeatTimeoutMs);
  EXPECT_TRUE(cluster.serving);
  EXPECT_TRUE(cluster.workers[a].connected);
}

TEST_F(StateTest, AWorkerThatSwallowsACommandHasLeft) {
  StartGroup();
  v1::CreateSessionRequest request = CreateRequest("x");
  const RequestId create = cluster_.Ask(
      [&](ClusterState& state, RequestId id) { state.CreateSession(id, request, 0, cluster_.now()); });
  cluster_.Deliver(a_);
  cluster_.workers[b_].inbox.clear();
  cluster_.Advance(30000);
  EXPECT_TRUE(cluster_.serving);
  cluster_.Advance(3000);
  EXPECT_FALSE(cluster_.serving);
  EXPECT_EQ(StatusOf(create).code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(cluster_.workers[b_].connected);
}

TEST_F(StateTest, ACommandsTimeBeginsWhenTheOneBeforeItIsAnswered) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 10).ok());
  const RequestId first = Attend("x");
  Rows(first, 1, 1);
  const RequestId second = Attend("x");
  Rows(second, 1, 2);
  const auto plan = AskPlan("x", 10, 5);
  for (int i = 0; i < 3; ++i) {
    cluster_.Advance(29000);
    EXPECT_TRUE(cluster_.serving);
    cluster_.Deliver(a_);
    cluster_.Deliver(b_);
  }
  for (const RequestId id : {first, second}) Finish(id);
  EXPECT_TRUE(StatusOf(first).ok());
  EXPECT_TRUE(StatusOf(second).ok());
  EXPECT_TRUE(StatusOf(plan).ok());
}

TEST_F(StateTest, AStepsTimeGrowsWithItsWork) {
  StartGroup();
  v1::CreateSessionRequest request = CreateRequest("long");
  request.mutable_spec()->set_query_heads(1);
  request.mutable_spec()->set_head_dim(512);
  request.mutable_spec()->set_value_dim(512);
  request.mutable_spec()->set_stripe_pages(64);
  ASSERT_TRUE(Create(request).ok());
  ASSERT_TRUE(Append("long", 0, 1 << 29).ok());
  const RequestId call = Attend("long");
  cluster_.state().SubmitRows(call, std::string(2048, '\0'), {}, cluster_.now());
  Finish(call);
  // 2^28 positions on each rank, 2^10 multiply-adds each: 2^38 for this one row, at 2^28 a second or more.
  const v1::Command& command = cluster_.workers[a_].inbox.front()->command();
  EXPECT_GE(command.timeout_ms(), 30000 + 1024 * 1000);
  cluster_.Advance(1024 * 1000);
  EXPECT_TRUE(cluster_.serving);
  cluster_.Settle();
  EXPECT_TRUE(StatusOf(call).ok());
}

TEST_F(StateTest, AnAnswerThatWasNotAskedForExpelsTheWorker) {
  StartGroup();
  v1::WorkerMessage message;
  message.mutable_result()->set_epoch(1);
  message.mutable_result()->set_ordinal(5);
  cluster_.state().WorkerSaid(a_, message, cluster_.now());
  cluster_.Collect();
  EXPECT_EQ(cluster_.workers[a_].closed.code(), absl::StatusCode::kInternal);
  EXPECT_FALSE(cluster_.serving);
}

// ---- Sessions

TEST_F(StateTest, ASessionIsOpenedEverywhereAndWrittenDown) {
  StartGroup();
  const auto session = Create("x");
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_EQ(session->spec().value_dim(), 2);
  EXPECT_EQ(session->created_unix_ms(), 99);
  EXPECT_EQ(cluster_.workers[a_].rank->sessions(), 1);
  EXPECT_EQ(cluster_.workers[b_].rank->sessions(), 1);
  ASSERT_EQ(cluster_.stored().sessions.size(), 1);
  EXPECT_EQ(Create("x").status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(Create("bad name").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Show("y").status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(Delete("x").ok());
  EXPECT_EQ(Delete("x").code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(cluster_.workers[a_].rank->sessions(), 0);
  EXPECT_TRUE(cluster_.stored().sessions.empty());
  EXPECT_TRUE(Create("x").ok());
  EXPECT_EQ(cluster_.stored().sessions[0].id, 2);
}

TEST_F(StateTest, ARefusedOrUnwrittenSessionLeavesNothing) {
  StartGroup();
  cluster_.workers[b_].rank->failures[v1::Command::kOpenSession] = absl::ResourceExhaustedError("no room");
  const auto refused = Create("x");
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("worker 1 (b:1): no room"));
  cluster_.workers[a_].rank->complaints.clear();  // It closes on b, which never opened it.
  cluster_.workers[b_].rank->complaints.clear();
  cluster_.disk_failures = 1;
  EXPECT_EQ(Create("x").status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(cluster_.workers[a_].rank->sessions(), 0);
  EXPECT_EQ(cluster_.workers[b_].rank->sessions(), 0);
  EXPECT_TRUE(Create("x").ok());
}

TEST_F(StateTest, ListsInPagesByName) {
  StartGroup();
  for (const char* name : {"c", "a", "b"}) ASSERT_TRUE(Create(name).ok());
  v1::ListSessionsRequest request;
  request.set_page_size(2);
  const auto list = [&] {
    return *As<v1::ListSessionsResponse>(
        cluster_.Get([&](ClusterState& state, RequestId id) { state.ListSessions(id, request); }));
  };
  v1::ListSessionsResponse page = list();
  ASSERT_EQ(page.sessions_size(), 2);
  EXPECT_EQ(page.sessions(1).name(), "b");
  request.set_page_token(page.next_page_token());
  page = list();
  ASSERT_EQ(page.sessions_size(), 1);
  EXPECT_EQ(page.sessions(0).name(), "c");
  EXPECT_EQ(page.next_page_token(), "");
}

TEST_F(StateTest, SessionsBeginOnDifferentNodes) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Create("y").ok());
  const auto x = Plan("x", 0, 10);
  const auto y = Plan("y", 0, 10);
  EXPECT_EQ(x->extents(0).worker(), 1);
  EXPECT_EQ(y->extents(0).worker(), 0);
}

// ---- Content outlives epochs

TEST_F(StateTest, ContentOutlivesItsEpochAndTheCoordinator) {
  StartGroup();
  ASSERT_TRUE(Create("empty").ok());
  ASSERT_TRUE(Create("full").ok());
  ASSERT_TRUE(Append("full", 0, 300).ok());
  ASSERT_TRUE(Append("full", 300, 700).ok());
  for (const bool restart : {false, true}) {
    if (restart) cluster_.Restart();
    if (!restart) cluster_.Leave(a_);
    Reconnect();
    EXPECT_FALSE(Show("full")->lost());
    EXPECT_EQ(Show("full")->length(), 1000);
    const RequestId call = Attend("full");
    Rows(call, 2, 3);
    Finish(call);
    cluster_.Settle();
    EXPECT_TRUE(StatusOf(call).ok()) << StatusOf(call);
    EXPECT_THAT(Outputs(call), ElementsAre(6, 6));
    EXPECT_TRUE(Append("full", 300, 700)->already_stored());
    const auto plan = Plan("empty", 0, 5);
    ASSERT_TRUE(plan.ok()) << plan.status();
    ASSERT_TRUE(Abort(plan->append_id()).ok());
  }
  EXPECT_TRUE(Append("full", 1000, 5).ok());
}

TEST_F(StateTest, WhatADeadNodeHeldIsLostUntilItComesBackWithIt) {
  StartGroup();
  ASSERT_TRUE(Create("empty").ok());
  ASSERT_TRUE(Create("full").ok());
  ASSERT_TRUE(Append("full", 0, 1000).ok());
  cluster_.Leave(a_);
  const WorkerId with_content = a_;
  a_ = cluster_.Join("a:1");
  cluster_.Advance(300);
  cluster_.Settle();
  ASSERT_TRUE(cluster_.serving);
  EXPECT_TRUE(Show("full")->lost());
  EXPECT_EQ(Show("full")->length(), 1000);
  // Session 2 begins on node 0: stripes 0 and 2, of 256 positions each.
  const absl::Status status = StatusOf(Attend("full"));
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("is without 512 of its 1000 positions: "
                        "node a:1 does not hold its part, with 2 of 4 stripes (512 positions)"));
  EXPECT_EQ(Append("full", 1000, 1).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(Append("empty", 0, 5).ok());

  // Its first process was not dead after all.
  cluster_.Leave(a_);
  a_ = cluster_.Reconnect(with_content);
  cluster_.Advance(300);
  cluster_.Settle();
  EXPECT_FALSE(Show("full")->lost());
  EXPECT_TRUE(Append("full", 1000, 1).ok());
  EXPECT_TRUE(Show("empty")->lost());  // This is what the second process held.
  EXPECT_TRUE(Delete("empty").ok());
  EXPECT_EQ(cluster_.workers[a_].rank->sessions(), 1);
}

TEST_F(StateTest, AnotherNodeGetsTheEmptySessionsAndNotTheFullOnes) {
  StartGroup();
  ASSERT_TRUE(Create("empty").ok());
  ASSERT_TRUE(Create("full").ok());
  ASSERT_TRUE(Append("full", 0, 1000).ok());
  cluster_.Leave(b_);
  const WorkerId old = b_;
  b_ = cluster_.Join("c:1");
  cluster_.Advance(300);
  cluster_.Settle();
  ASSERT_TRUE(cluster_.serving);
  EXPECT_THAT(std::string(StatusOf(Attend("full")).message()),
              HasSubstr("node b:1 is not in the group, with 2 of 4 stripes (488 positions)"));
  EXPECT_TRUE(Append("empty", 0, 5).ok());
  EXPECT_EQ(cluster_.stored().sessions[0].placement.version, 2);
  EXPECT_THAT(cluster_.stored().sessions[0].placement.nodes, ElementsAre("a:1", "c:1"));
  EXPECT_EQ(cluster_.stored().sessions[1].placement.version, 1);
  // It is kept for the node that has gone, and then it is whole.
  cluster_.Leave(b_);
  b_ = cluster_.Reconnect(old);
  cluster_.Advance(300);
  cluster_.Settle();
  EXPECT_TRUE(Append("full", 1000, 5).ok());
  EXPECT_TRUE(Show("empty")->lost());
}

TEST_F(StateTest, AnEmptySessionThatCouldNotBePlacedIsPlacedLater) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  cluster_.Leave(b_);
  b_ = cluster_.Join("c:1");
  cluster_.Advance(300);
  cluster_.FinishWrite();  // The epoch is.
  cluster_.disk_failures = 1;
  cluster_.Settle();
  EXPECT_TRUE(cluster_.serving);
  EXPECT_EQ(Append("x", 0, 1).status().code(), absl::StatusCode::kUnavailable);
  cluster_.Advance(2100);
  cluster_.Settle();
  EXPECT_TRUE(Append("x", 0, 1).ok());
}

TEST_F(StateTest, TheCoordinatorServesWhenItsSessionsAreThere) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 300).ok());
  for (WorkerId* worker : {&a_, &b_}) {
    cluster_.Leave(*worker);
    *worker = cluster_.Reconnect(*worker);
  }
  cluster_.Advance(300);
  cluster_.FinishWrite();
  for (int message = 0; message < 4; ++message) {  // FormGroup, RetainSessions, OpenSession, SettleSession
    EXPECT_FALSE(cluster_.serving);
    EXPECT_EQ(State(), "forming");
    EXPECT_EQ(StatusOf(Attend("x")).code(), absl::StatusCode::kUnavailable);
    cluster_.Deliver(a_);
    cluster_.Deliver(b_);
  }
  EXPECT_TRUE(cluster_.serving);
  EXPECT_EQ(State(), "active");
  EXPECT_EQ(StatusOf(Attend("x")).code(), absl::StatusCode::kUnknown);
}

// ---- Appends

TEST_F(StateTest, APlanTilesTheAppendAndEveryRankGetsItsShare) {
  StartGroup();
  v1::CreateSessionRequest request = CreateRequest("x");
  request.mutable_spec()->set_sink_tokens(10);
  ASSERT_TRUE(Create(request).ok());
  const auto plan = Plan("x", std::nullopt, 1000);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->at(), 0);
  EXPECT_EQ(plan->replicate_below(), 10);
  EXPECT_THAT(plan->workers(), ElementsAre("a:1", "b:1"));
  int64_t next = 0;
  for (const v1::Extent& extent : plan->extents()) {
    EXPECT_EQ(extent.first_position(), next);
    EXPECT_EQ(extent.worker(), (next / 256 + 1) % 2);  // Session 1 begins on node 1.
    next += extent.count();
  }
  EXPECT_EQ(next, 1000);
  const auto receipt = Commit(plan->append_id());
  ASSERT_TRUE(receipt.ok()) << receipt.status();
  EXPECT_EQ(receipt->length(), 1000);
  EXPECT_FALSE(receipt->already_stored());
  // Element-wise maxima of what ranks 0 and 1 sealed: 0, 1 and 0, -1 in turn.
  const int16_t want[2] = {1, 0};
  EXPECT_EQ(cluster_.workers[a_].rank->exponents, std::string(reinterpret_cast<const char*>(want), 4));
  EXPECT_EQ(Show("x")->bytes(), 1000 * 16);
  EXPECT_EQ(Plan("x", std::nullopt, 5)->replicate_below(), 0);
}

TEST_F(StateTest, ARepeatedAppendSucceedsWithTheSameContentOnly) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 300).ok());
  ASSERT_TRUE(Append("x", 300, 200).ok());
  for (const auto& [at, count] : {std::pair{0, 300}, {300, 200}, {0, 500}}) {
    const auto plan = Plan("x", at, count);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_TRUE(plan->already_stored());
    const auto receipt = Commit(plan->append_id());
    ASSERT_TRUE(receipt.ok()) << receipt.status();
    EXPECT_TRUE(receipt->already_stored());
    EXPECT_EQ(receipt->length(), 500);
  }
  cluster_.workers[a_].rank->content = 2;
  const auto other = Append("x", 300, 200);
  EXPECT_EQ(other.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(other.status().message()),
              HasSubstr("[300, 500) are already stored with other content"));
  EXPECT_EQ(cluster_.workers[a_].rank->appends(), 0);
  EXPECT_TRUE(Append("x", 500, 1).ok());
}

TEST_F(StateTest, RefusesGapsAndOverlapsByName) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 300).ok());
  const auto refused = [&](std::optional<int64_t> at, int64_t count) {
    const absl::Status status = Plan("x", at, count).status();
    return absl::StrCat(absl::StatusCodeToString(status.code()), " ", std::string(status.message()));
  };
  EXPECT_THAT(refused(301, 5), testing::AllOf(HasSubstr("OUT_OF_RANGE"), HasSubstr("300 positions")));
  EXPECT_THAT(refused(299, 2), testing::AllOf(HasSubstr("OUT_OF_RANGE"), HasSubstr("crosses")));
  EXPECT_THAT(refused(0, 299), testing::AllOf(HasSubstr("ALREADY_EXISTS"), HasSubstr("other borders")));
  EXPECT_THAT(refused(1, 299), HasSubstr("ALREADY_EXISTS"));
  EXPECT_THAT(refused(-1, 5), HasSubstr("INVALID_ARGUMENT"));
  EXPECT_THAT(refused(300, 0), HasSubstr("INVALID_ARGUMENT"));
  EXPECT_THAT(refused(300, kMaxPositions), HasSubstr("OUT_OF_RANGE"));
  EXPECT_THAT(refused(300, std::numeric_limits<int64_t>::max()), HasSubstr("OUT_OF_RANGE"));
  EXPECT_THAT(refused(std::numeric_limits<int64_t>::max(), 5), HasSubstr("OUT_OF_RANGE"));
  EXPECT_THAT(refused(300, kMaxPositions - 300), HasSubstr("stripes"));
  EXPECT_EQ(cluster_.workers[a_].rank->appends(), 0);
}

TEST_F(StateTest, OneRefusalUndoesThePlanEverywhere) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  cluster_.workers[b_].rank->failures[v1::Command::kBeginAppend] =
      absl::ResourceExhaustedError("0 of 3 pages free");
  const auto plan = Plan("x", 0, 1000);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(plan.status().message()), HasSubstr("worker 1 (b:1): 0 of 3 pages free"));
  EXPECT_EQ(cluster_.workers[a_].rank->appends(), 0);
  EXPECT_EQ(Show("x")->length(), 0);
  EXPECT_TRUE(Append("x", 0, 1000).ok());
}

TEST_F(StateTest, OneAppendAtATimeForEachSession) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Create("y").ok());
  const auto plan = Plan("x", 0, 10);
  EXPECT_EQ(Plan("x", 0, 10).status().code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(Plan("y", 0, 10).ok());
  EXPECT_TRUE(Abort(plan->append_id()).ok());
  EXPECT_EQ(Commit(plan->append_id()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(Append("x", 0, 10).ok());
}

TEST_F(StateTest, MissingRowsLeaveTheAppendOpenAndBadOnesEndIt) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  auto plan = Plan("x", 0, 10);
  cluster_.workers[a_].rank->failures[v1::Command::kSealAppend] =
      absl::FailedPreconditionError("missing [3, 4)");
  EXPECT_EQ(Commit(plan->append_id()).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(Commit(plan->append_id()).ok());
  plan = Plan("x", 10, 10);
  cluster_.workers[a_].rank->failures[v1::Command::kSealAppend] = absl::InvalidArgumentError("NaN at 12");
  EXPECT_EQ(Commit(plan->append_id()).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Commit(plan->append_id()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(cluster_.workers[b_].rank->appends(), 0);
  EXPECT_EQ(Show("x")->length(), 10);
}

TEST_F(StateTest, ACommitAskedTwiceGivesOneReceipt) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  const auto plan = Plan("x", 0, 10);
  const RequestId first = AskCommit(plan->append_id());
  const RequestId second = AskCommit(plan->append_id());
  cluster_.Settle();
  const auto later = Commit(plan->append_id());
  ASSERT_TRUE(later.ok()) << later.status();
  for (const RequestId id : {first, second}) {
    EXPECT_EQ(As<v1::AppendReceipt>(*cluster_.requests[id].reply)->SerializeAsString(),
              later->SerializeAsString());
  }
  EXPECT_EQ(Show("x")->length(), 10);
}

TEST_F(StateTest, AnAppendThatCannotBeWrittenDownIsUndone) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  const auto plan = Plan("x", 0, 10);
  cluster_.disk_failures = 1;
  EXPECT_EQ(Commit(plan->append_id()).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(cluster_.workers[a_].rank->appends(), 0);
  EXPECT_EQ(Show("x")->length(), 0);
  EXPECT_TRUE(Append("x", 0, 10).ok());
}

TEST_F(StateTest, AnIdleAppendIsUndone) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  const auto plan = Plan("x", 0, 1 << 20);  // 16 MiB: their number buys it no time.
  cluster_.Advance(59000);
  cluster_.Settle();
  EXPECT_EQ(cluster_.workers[a_].rank->appends(), 1);
  // A piece has come in, at one of the workers: 60 s from here, and not from the other's last.
  cluster_.Beat(b_, plan->append_id());
  cluster_.Beat(a_, plan->append_id() + 1);
  cluster_.Advance(59000);
  cluster_.Settle();
  EXPECT_EQ(cluster_.workers[a_].rank->appends(), 1);
  EXPECT_EQ(Append("x", 0, 10).status().code(), absl::StatusCode::kAborted);
  cluster_.Advance(2000);
  cluster_.Settle();
  EXPECT_EQ(cluster_.workers[a_].rank->appends(), 0);
  EXPECT_EQ(Commit(plan->append_id()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(Append("x", 0, 10).ok());
}

TEST_F(StateTest, AnAppendThatNeverWasIsNotFoundAndOneOfAnEarlierEpochIsToBeRetried) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  const auto plan = Plan("x", 0, 10);
  cluster_.Leave(a_);
  EXPECT_EQ(Commit(plan->append_id()).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Commit(plan->append_id() + 1).status().code(), absl::StatusCode::kNotFound);
  a_ = cluster_.Join("a:1");
  cluster_.Advance(300);
  cluster_.Settle();
  ASSERT_TRUE(cluster_.serving);
  EXPECT_EQ(Commit(plan->append_id()).status().code(), absl::StatusCode::kUnavailable);
  for (const uint64_t id : {uint64_t{0}, uint64_t{12345}, uint64_t{1} << 32, uint64_t{2} << 32 | 7,
                            uint64_t{9} << 32 | 1, UINT64_MAX}) {
    EXPECT_EQ(Commit(id).status().code(), absl::StatusCode::kNotFound) << id;
  }
}

TEST_F(StateTest, ACancelledPlanGivesItsMemoryBack) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  const RequestId plan = AskPlan("x", 0, 10);
  cluster_.Cancel(plan);
  cluster_.Settle();
  EXPECT_EQ(cluster_.workers[a_].rank->appends(), 0);
  EXPECT_TRUE(Append("x", 0, 10).ok());
}

TEST_F(StateTest, ADeletedSessionTakesItsOpenAppendAndCallsAlong) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 10).ok());
  const auto plan = Plan("x", 10, 10);
  const RequestId call = Attend("x");
  Rows(call, 3, 1);
  EXPECT_TRUE(Delete("x").ok());
  EXPECT_EQ(StatusOf(call).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Commit(plan->append_id()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(cluster_.workers[a_].rank->appends(), 0);
  EXPECT_EQ(cluster_.workers[a_].rank->sessions(), 0);
}

// ---- A worker is lost in each phase of an append.

TEST_F(StateTest, AWorkerLostWhilePlanningOrUploadingOrSealingLeavesAnEmptySession) {
  for (const int phase : {0, 1, 2}) {
    StartGroup();
    const std::string name = absl::StrCat("x", phase);
    ASSERT_TRUE(Create(name).ok());
    RequestId request = AskPlan(name, 0, 10);
    uint64_t append = uint64_t{cluster_.stored().epoch} << 32 | 1;
    if (phase > 0) cluster_.Settle();
    if (phase > 1) {
      request = AskCommit(append);
      cluster_.Deliver(a_);
    }
    cluster_.Leave(b_);
    cluster_.Settle();
    if (phase != 1) {
      EXPECT_EQ(StatusOf(request).code(), absl::StatusCode::kUnavailable) << phase;
      EXPECT_THAT(std::string(StatusOf(request).message()), HasSubstr("worker 1 (b:1) left")) << phase;
      EXPECT_THAT(std::string(StatusOf(request).message()),
                  HasSubstr(absl::StrCat("epoch ", cluster_.stored().epoch, " is over")));
    }
    EXPECT_EQ(Commit(append).status().code(), absl::StatusCode::kUnavailable) << phase;
    EXPECT_FALSE(Show(name)->lost()) << phase;
    cluster_.Leave(a_);
    cluster_.Advance(300);
  }
}

// What is on record is published in the next epoch by those that have not done so, with the same exponents.
TEST_F(StateTest, AConnectionThatBreaksWhilePublishingLosesNothing) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 300).ok());
  const auto plan = Plan("x", 300, 10);
  const RequestId commit = AskCommit(plan->append_id());
  cluster_.Deliver(a_);
  cluster_.Deliver(b_);
  ASSERT_TRUE(cluster_.FinishWrite());
  cluster_.Deliver(a_);
  cluster_.Leave(b_);
  EXPECT_EQ(StatusOf(commit).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(cluster_.workers[a_].node->sessions.at(1).length, 310);
  EXPECT_EQ(cluster_.workers[b_].node->sessions.at(1).length, 300);
  Reconnect();
  EXPECT_FALSE(Show("x")->lost());
  EXPECT_EQ(Show("x")->length(), 310);
  for (const WorkerId worker : {a_, b_}) EXPECT_EQ(cluster_.workers[worker].node->sessions.at(1).length, 310);
  EXPECT_EQ(cluster_.workers[a_].node->sessions.at(1).exponents,
            cluster_.workers[b_].node->sessions.at(1).exponents);
  EXPECT_TRUE(Append("x", 300, 10)->already_stored());
  EXPECT_TRUE(Append("x", 310, 10).ok());
}

TEST_F(StateTest, AnAppendThatIsOnRecordIsPublishedAlsoWhenItsEpochEndsDuringTheWrite) {
  for (const int when : {0, 1, 2}) {
    StartGroup();
    const std::string name = absl::StrCat("x", when);
    ASSERT_TRUE(Create(name).ok());
    const auto plan = Plan(name, 0, 10);
    AskCommit(plan->append_id());
    cluster_.Deliver(a_);
    cluster_.Deliver(b_);
    if (when < 2) {
      cluster_.Leave(b_);
      cluster_.disk_failures = when;
      ASSERT_TRUE(cluster_.FinishWrite());
    } else {
      ASSERT_TRUE(cluster_.FinishWriteUnheard());
      cluster_.Restart();
    }
    Reconnect();
    EXPECT_FALSE(Show(name)->lost());
    // What is not on record is dropped.
    EXPECT_EQ(Show(name)->length(), when == 1 ? 0 : 10);
    EXPECT_EQ(Append(name, 0, 10)->already_stored(), when != 1);
    cluster_.Leave(a_);
    cluster_.Leave(b_);
    cluster_.Advance(300);
  }
}

TEST_F(StateTest, ANodeThatDiesWithASealedAppendLosesTheSession) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  const auto plan = Plan("x", 0, 10);
  AskCommit(plan->append_id());
  cluster_.Deliver(a_);
  cluster_.Deliver(b_);
  cluster_.Leave(b_);
  ASSERT_TRUE(cluster_.FinishWrite());
  b_ = cluster_.Join("b:1");
  cluster_.Advance(300);
  cluster_.Settle();
  EXPECT_TRUE(Show("x")->lost());
  EXPECT_EQ(Show("x")->length(), 10);
}

TEST_F(StateTest, AWorkerLostDuringCreationOrDeletionEndsItCleanly) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  v1::DeleteSessionRequest request;
  request.set_name("x");
  const RequestId deletion = cluster_.Ask(
      [&](ClusterState& state, RequestId id) { state.DeleteSession(id, request, cluster_.now()); });
  cluster_.FinishWrite();
  const v1::CreateSessionRequest create = CreateRequest("y");
  const RequestId creation = cluster_.Ask(
      [&](ClusterState& state, RequestId id) { state.CreateSession(id, create, 0, cluster_.now()); });
  cluster_.Leave(b_);
  EXPECT_TRUE(StatusOf(deletion).ok());
  EXPECT_EQ(StatusOf(creation).code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(cluster_.stored().sessions.empty());
  EXPECT_EQ(Show("y").status().code(), absl::StatusCode::kNotFound);
}

// ---- Queries

TEST_F(StateTest, RowsComeBackInOrderWithTheirTotals) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 10).ok());
  const RequestId call = Attend("x", true);
  Rows(call, 2, 1, {3, 4});
  Rows(call, 1, 2, {9});
  Finish(call);
  cluster_.Settle();
  EXPECT_THAT(Outputs(call), ElementsAre(2, 2, 4));
  const AttendTotals totals = Totals(call);
  EXPECT_EQ(totals.rows, 3);
  EXPECT_EQ(totals.workers, 2);
  EXPECT_EQ(totals.row_heads_maximum, 3);
  EXPECT_EQ(totals.row_heads_sink, 3);
  EXPECT_EQ(totals.collectives, 2);
  EXPECT_EQ(totals.bytes_read, 400);
  EXPECT_EQ(totals.length, 10);
  float lse = 0;
  std::memcpy(&lse, cluster_.requests[call].rows[1].lse().data(), 4);
  EXPECT_EQ(lse, 9);
}

TEST_F(StateTest, RefusesQueriesThatCannotBe) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  const auto code = [&](RequestId id) { return StatusOf(id).code(); };
  EXPECT_EQ(code(Attend("y")), absl::StatusCode::kNotFound);
  EXPECT_EQ(code(Attend("x")), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(Append("x", 0, 10).ok());
  EXPECT_EQ(code(Attend("x", false, v1::POLICY_WINDOW)), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code(Attend("x", false, static_cast<v1::Policy>(7))), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Attend("x", false, v1::POLICY_GLOBAL, 1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Attend("x", false, v1::POLICY_GLOBAL, -1)), absl::StatusCode::kInvalidArgument);
  for (const int64_t position : {int64_t{-1}, int64_t{10}, std::numeric_limits<int64_t>::max()}) {
    const RequestId call = Attend("x", true);
    Rows(call, 2, 1, {3, position});
    EXPECT_EQ(code(call), absl::StatusCode::kOutOfRange);
    EXPECT_THAT(std::string(StatusOf(call).message()), HasSubstr("row 1"));
  }
  RequestId call = Attend("x", true);
  Rows(call, 2, 1, {3});
  EXPECT_EQ(code(call), absl::StatusCode::kInvalidArgument);
  call = Attend("x");
  Rows(call, 1, 1, {3});
  EXPECT_EQ(code(call), absl::StatusCode::kInvalidArgument);
  call = Attend("x");
  cluster_.state().SubmitRows(call, std::string(17, 'x'), {}, cluster_.now());
  cluster_.Collect();
  EXPECT_EQ(code(call), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(cluster_.workers[a_].inbox, IsEmpty());
}

TEST_F(StateTest, AtMostTwoStepsAreUnderWayAndTheRestIsPackedTogether) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 10).ok());
  std::vector<RequestId> calls;
  for (int i = 0; i < 5; ++i) {
    calls.push_back(Attend("x"));
    Rows(calls.back(), 2, static_cast<float>(i));
    Finish(calls.back());
  }
  EXPECT_THAT(StepsAt(a_), ElementsAre(2, 2));
  EXPECT_THAT(StepsAt(b_), ElementsAre(2, 2));
  cluster_.Deliver(a_);
  cluster_.Deliver(b_);
  EXPECT_THAT(StepsAt(a_), ElementsAre(2, 6));
  cluster_.Settle();
  for (int i = 0; i < 5; ++i) {
    const float value = 2.0f * static_cast<float>(i);
    EXPECT_THAT(Outputs(calls[i]), ElementsAre(value, value));
    EXPECT_TRUE(StatusOf(calls[i]).ok());
  }
}

TEST_F(StateTest, RowsOfDifferentLengthsOrPoliciesDoNotShareAStep) {
  StartGroup();
  v1::CreateSessionRequest request = CreateRequest("x");
  request.mutable_spec()->set_window(4);
  ASSERT_TRUE(Create(request).ok());
  ASSERT_TRUE(Append("x", 0, 10).ok());
  const RequestId busy = Attend("x");
  Rows(busy, 1, 0);
  Rows(busy, 1, 0);
  const RequestId early = Attend("x");
  Rows(early, 1, 1);
  const RequestId window = Attend("x", false, v1::POLICY_WINDOW);
  Rows(window, 1, 2);
  // The commit's commands follow the two steps; the length is captured by each call.
  const auto plan_id = AskPlan("x", 10, 5);
  const auto deliver = [&] {
    cluster_.Deliver(a_);
    cluster_.Deliver(b_);
  };
  deliver();
  deliver();
  deliver();
  ASSERT_TRUE(cluster_.requests[plan_id].reply.has_value());
  AskCommit(As<v1::AppendPlan>(*cluster_.requests[plan_id].reply)->append_id());
  cluster_.Settle();
  const RequestId late = Attend("x");
  Rows(late, 1, 3);
  for (const RequestId id : {busy, early, window, late}) Finish(id);
  cluster_.Settle();
  EXPECT_EQ(Totals(early).length, 10);
  EXPECT_EQ(Totals(late).length, 15);
  float lse = 0;
  std::memcpy(&lse, cluster_.requests[late].rows[0].lse().data(), 4);
  EXPECT_EQ(lse, 14);
  std::memcpy(&lse, cluster_.requests[window].rows[0].lse().data(), 4);
  EXPECT_EQ(lse, 9);
}

TEST_F(StateTest, AHugeCallDoesNotStarveASmallOne) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 10).ok());
  const RequestId huge = Attend("x");
  for (int i = 0; i < 10; ++i) Rows(huge, kStepRowsMax, 1);
  const RequestId small = Attend("x");
  Rows(small, 3, 2);
  Finish(small);
  // The two steps under way, and one more that both share.
  for (int i = 0; i < 3; ++i) {
    cluster_.Deliver(a_);
    cluster_.Deliver(b_);
  }
  EXPECT_TRUE(StatusOf(small).ok());
  EXPECT_THAT(Outputs(small), ElementsAre(4, 4, 4));
  Finish(huge);
  cluster_.Settle();
  EXPECT_EQ(Totals(huge).rows, 10 * kStepRowsMax);
}

TEST_F(StateTest, KindsOfRowsTakeTurns) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Create("y").ok());
  ASSERT_TRUE(Append("x", 0, 10).ok());
  ASSERT_TRUE(Append("y", 0, 10).ok());
  const RequestId huge = Attend("x");
  for (int i = 0; i < 10; ++i) Rows(huge, kStepRowsMax, 1);
  const RequestId other = Attend("y");
  Rows(other, 3, 2);
  Finish(other);
  // The two steps under way, one of the huge call that was queued before, and then the other session's.
  for (int i = 0; i < 4; ++i) {
    cluster_.Deliver(a_);
    cluster_.Deliver(b_);
  }
  EXPECT_THAT(Outputs(other), ElementsAre(4, 4, 4));
}

TEST_F(StateTest, StepsAreBoundedByMessagesAndByPartials) {
  StartGroup();
  v1::CreateSessionRequest request = CreateRequest("wide");
  request.mutable_spec()->set_head_dim(1);
  request.mutable_spec()->set_value_dim(1);
  request.mutable_spec()->set_query_heads(1000);
  request.mutable_spec()->set_kv_heads(1000);
  ASSERT_TRUE(Create(request).ok());
  ASSERT_TRUE(Append("wide", 0, 10).ok());
  RequestId call = Attend("wide");
  const auto submit = [&](int rows) {
    cluster_.state().SubmitRows(call, std::string(size_t{4000} * rows, '\0'), {}, cluster_.now());
    cluster_.Collect();
  };
  submit(500);
  for (const int rows : StepsAt(a_)) EXPECT_EQ(rows, kPayloadBytesMax / (4 * 3001));
  cluster_.Cancel(call);
  cluster_.Settle();

  // 2^22 positions on two ranks are 2^13 pages each; 12000 B of partials for each page and row.
  ASSERT_TRUE(Append("wide", 10, 1 << 22).ok());
  call = Attend("wide");
  submit(500);
  EXPECT_THAT(StepsAt(a_), ElementsAre(2, 2));
}

TEST_F(StateTest, StepsAreBoundedByTheirWork) {
  StartGroup();
  v1::CreateSessionRequest request = CreateRequest("deep");
  request.mutable_spec()->set_query_heads(1);
  request.mutable_spec()->set_head_dim(255);
  request.mutable_spec()->set_value_dim(1);
  request.mutable_spec()->set_stripe_pages(64);
  request.mutable_spec()->set_window(1024);
  ASSERT_TRUE(Create(request).ok());
  ASSERT_TRUE(Append("deep", 0, 1 << 23).ok());
  const auto steps = [&](v1::Policy policy) {
    const RequestId call = Attend("deep", false, policy);
    for (int i = 0; i < 2; ++i) {
      cluster_.state().SubmitRows(call, std::string(size_t{1020} * 700, '\0'), {}, cluster_.now());
      cluster_.Collect();
    }
    std::vector<int> rows = StepsAt(a_);
    cluster_.Cancel(call);
    cluster_.Settle();
    return rows;
  };
  // 2^22 positions on each rank, 2^8 multiply-adds each: 2^30 for every row.
  EXPECT_THAT(steps(v1::POLICY_GLOBAL), ElementsAre(64, 64));
  EXPECT_THAT(steps(v1::POLICY_WINDOW), ElementsAre(700, 700));
}

TEST_F(StateTest, OnlyTheCallToBlameFailsAndItsOwnRowIsNamed) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 10).ok());
  for (const WorkerId id : {a_, b_}) cluster_.workers[id].rank->overflowing = 13;
  const RequestId busy = Attend("x");
  Rows(busy, 1, 0);
  Rows(busy, 1, 0);
  Finish(busy);
  // These share the third step, and the rows that follow it share the fourth.
  const RequestId good = Attend("x", true);
  const RequestId bad = Attend("x", true);
  const RequestId other = Attend("x", true);
  Rows(good, 2, 1, {1, 2});
  Rows(bad, 2, 2, {3, 4});
  Rows(bad, 1, 13, {5});
  Rows(other, 1, 3, {6});
  cluster_.Deliver(a_);
  cluster_.Deliver(b_);
  EXPECT_THAT(StepsAt(a_), ElementsAre(1, 6));
  Rows(good, 1, 4, {7});
  Rows(other, 2, 5, {8, 9});
  Finish(good);
  Finish(bad);
  Finish(other);
  cluster_.Settle();
  EXPECT_THAT(Outputs(good), ElementsAre(2, 2, 8));
  EXPECT_THAT(Outputs(other), ElementsAre(6, 10, 10));
  EXPECT_TRUE(StatusOf(good).ok()) << StatusOf(good);
  EXPECT_TRUE(StatusOf(other).ok()) << StatusOf(other);
  EXPECT_EQ(Totals(good).rows, 3);
  EXPECT_EQ(StatusOf(bad).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(StatusOf(bad).message()), HasSubstr("row 2 overflows"));
  float lse = 0;
  std::memcpy(&lse, cluster_.requests[other].rows[0].lse().data(), 4);
  EXPECT_EQ(lse, 6);
  EXPECT_TRUE(StatusOf(busy).ok());
}

TEST_F(StateTest, ACallThatGoesAwayWhileItIsAskedAgainHoldsUpNobody) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 10).ok());
  for (const WorkerId id : {a_, b_}) cluster_.workers[id].rank->overflowing = 13;
  const RequestId busy = Attend("x");
  Rows(busy, 1, 0);
  Rows(busy, 1, 0);
  std::vector<RequestId> calls;
  for (int i = 0; i < 4; ++i) {
    calls.push_back(Attend("x"));
    Rows(calls.back(), 1, i == 2 ? 13 : static_cast<float>(i));
    Finish(calls.back());
  }
  for (int i = 0; i < 3; ++i) {
    cluster_.Deliver(a_);
    cluster_.Deliver(b_);
  }
  EXPECT_THAT(StepsAt(a_), ElementsAre(1, 1));
  cluster_.Cancel(calls[0]);  // under way again
  cluster_.Cancel(calls[3]);  // about to be
  cluster_.Settle();
  EXPECT_THAT(Outputs(calls[1]), ElementsAre(2));
  EXPECT_TRUE(StatusOf(calls[1]).ok());
  EXPECT_EQ(StatusOf(calls[2]).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(StateTest, CancelledCallsGiveTheirPlacesToOthers) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 10).ok());
  const RequestId busy = Attend("x");
  Rows(busy, 1, 0);
  Rows(busy, 1, 0);
  const RequestId gone = Attend("x");
  Rows(gone, 5, 1);
  const RequestId stays = Attend("x");
  Rows(stays, 1, 2);
  Finish(stays);
  cluster_.Cancel(gone);
  cluster_.Cancel(busy);
  cluster_.Deliver(a_);
  cluster_.Deliver(b_);
  EXPECT_THAT(StepsAt(a_), ElementsAre(1, 1));
  cluster_.Settle();
  EXPECT_THAT(Outputs(stays), ElementsAre(4));
}

TEST_F(StateTest, ABadNumberFailsTheCallsAndNotTheGroup) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 10).ok());
  cluster_.workers[a_].rank->failures[v1::Command::kAttend] =
      absl::InvalidArgumentError("the arithmetic left the finite numbers on another rank");
  cluster_.workers[b_].rank->failures[v1::Command::kAttend] = absl::InvalidArgumentError("page 3 gives Inf");
  const RequestId call = Attend("x");
  Rows(call, 1, 1);
  cluster_.Settle();
  EXPECT_EQ(StatusOf(call).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(StatusOf(call).message()), HasSubstr("worker 1 (b:1): page 3 gives Inf"));
  const RequestId next = Attend("x");
  Rows(next, 1, 1);
  Finish(next);
  cluster_.Settle();
  EXPECT_TRUE(StatusOf(next).ok());
}

TEST_F(StateTest, ABrokenCollectiveEndsTheEpochAndEveryCall) {
  for (const absl::StatusCode code :
       {absl::StatusCode::kUnavailable, absl::StatusCode::kDeadlineExceeded, absl::StatusCode::kAborted}) {
    StartGroup();
    const std::string name = absl::StrCat("x", static_cast<int>(code));
    ASSERT_TRUE(Create(name).ok());
    ASSERT_TRUE(Append(name, 0, 10).ok());
    const RequestId call = Attend(name);
    Rows(call, 1, 1);
    const RequestId idle = Attend(name);
    cluster_.workers[b_].rank->failures[v1::Command::kAttend] = absl::Status(code, "rank 0 is gone");
    cluster_.Deliver(b_);
    for (const RequestId id : {call, idle}) {
      EXPECT_EQ(StatusOf(id).code(), absl::StatusCode::kUnavailable);
      EXPECT_THAT(std::string(StatusOf(id).message()), HasSubstr("worker 1 (b:1) reported: rank 0 is gone"));
    }
    EXPECT_FALSE(cluster_.serving);
    // Both are still there: they make the next group.
    cluster_.Advance(300);
    cluster_.Settle();
    EXPECT_TRUE(cluster_.serving);
    EXPECT_FALSE(Show(name)->lost());
    cluster_.Leave(a_);
    cluster_.Leave(b_);
    cluster_.Advance(300);
  }
}

TEST_F(StateTest, AnAnswerOfTheWrongSizeExpelsTheWorker) {
  StartGroup();
  ASSERT_TRUE(Create("x").ok());
  ASSERT_TRUE(Append("x", 0, 10).ok());
  const RequestId call = Attend("x");
  Rows(call, 1, 1);
  cluster_.Deliver(b_);
  v1::WorkerMessage message;
  const v1::Command& command = cluster_.workers[a_].inbox.front()->command();
  message.mutable_result()->set_epoch(command.epoch());
  message.mutable_result()->set_ordinal(command.ordinal());
  cluster_.state().WorkerSaid(a_, message, cluster_.now());
  cluster_.Collect();
  EXPECT_EQ(cluster_.workers[a_].closed.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(StatusOf(call).code(), absl::StatusCode::kUnavailable);
}

// ---- Time

TEST(RunningClock, CountsNoTimeInWhichNobodyAsked) {
  RunningClock clock;
  EXPECT_EQ(clock.At(1'000'000), 0);
  EXPECT_EQ(clock.At(1'000'100), 100);
  EXPECT_EQ(clock.At(1'000'600), 600);
  EXPECT_EQ(clock.At(1'004'600), 600 + RunningClock::kGapMaxMs);
  EXPECT_EQ(clock.At(1'004'600), 600 + RunningClock::kGapMaxMs);
  EXPECT_EQ(clock.At(1'004'700), 700 + RunningClock::kGapMaxMs);
  // A pause of an hour is not the silence of anybody.
  EXPECT_LT(clock.At(5'000'000) + 5 * 100, 700 + kHeartbeatTimeoutMs);
}

TEST(Digest, AddsModulo2To128) {
  Digest sum{~uint64_t{0}, 1};
  sum += Digest{1, 2};
  EXPECT_EQ(sum, (Digest{0, 4}));
  sum += Digest{5, ~uint64_t{0}};
  EXPECT_EQ(sum, (Digest{5, 3}));
}

}  // namespace
}  // namespace eduba
