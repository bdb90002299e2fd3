// Whole clusters from a seed: random clients, workers that come, die, fail and fall silent, connections that
// break, a disk that is slow or full, a coordinator that restarts; every event in any order. Processes keep
// their content over epochs and restarts of the coordinator. FakeCluster complains about whatever breaks an
// invariant; in the end every session must be whole exactly when its nodes hold it. Run one seed again with
// EDUBA_SEED=n.
#include <cstdlib>
#include <cstring>
#include <random>

#include "coordinator/testing/fake_cluster.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace eduba {
namespace {

constexpr int kGroup = 3;
constexpr int kSteps = 1500;

class Simulation {
 public:
  explicit Simulation(uint64_t seed) : random_(seed), cluster_(MakeOptions()) {}

  void Run() {
    for (int step = 0; step < kSteps; ++step) Step();
    Heal();
    Check();
  }

 private:
  struct Query {
    int submitted = 0;
    bool finished = false;
  };
  struct Upload {
    uint64_t id = 0;
    int64_t end = 0;
  };

  static ClusterState::Options MakeOptions() {
    ClusterState::Options options;
    options.group_size = kGroup;
    options.transport = "gloo";  // where silence means something
    return options;
  }

  int64_t Below(int64_t bound) { return static_cast<int64_t>(random_() % bound); }
  bool Chance(int percent) { return Below(100) < percent; }
  std::string Name() { return absl::StrCat("s", Below(4)); }
  template <typename Map>
  typename Map::iterator Pick(Map& map) {
    return map.empty() ? map.end() : std::next(map.begin(), Below(static_cast<int64_t>(map.size())));
  }

  void Step() {
    const int64_t kind = Below(100);
    if (kind < 50) {
      Progress();
    } else if (kind < 52) {
      cluster_.Advance(Below(20) == 0 ? 4000 : 100 + Below(300));
    } else if (kind < 55) {
      Membership();
    } else if (kind < 56) {
      Trouble();
    } else if (kind < 66) {
      Sessions();
    } else if (kind < 75) {
      Appends();
    } else if (kind < 85) {
      Models();
    } else {
      Queries();
    }
    ForgetEnded();
  }

  // Something that was under way goes on.
  void Progress() {
    for (int i = 0; i < 4; ++i) {
      if (Chance(20)) cluster_.FinishWrite();
      const auto worker = Pick(cluster_.workers);
      if (worker != cluster_.workers.end()) cluster_.Deliver(worker->first);
    }
  }

  // One of the nodes dies, loses its connection, comes again with what it kept, or comes as a new process.
  void Membership() {
    const std::string node = absl::StrCat("w", Below(kGroup + 1), ":1");
    WorkerId newest = 0;
    for (const auto& [id, worker] : cluster_.workers) {
      if (worker.hello.node() == node && odd_.count(id) == 0) newest = id;
    }
    const bool connected = newest != 0 && cluster_.workers[newest].connected;
    if (connected && Chance(90)) return;
    if (connected && Chance(50)) return cluster_.Leave(newest);
    if (newest != 0 && Chance(97)) {  // Also while the old connection is not seen to be broken.
      cluster_.Reconnect(newest);
      return;
    }
    const bool odd = Chance(5);
    const v1::Model model = TinyModel();
    const WorkerId id = cluster_.Join(node, odd ? 8 : 7, "", &model);
    if (odd) odd_.insert(id);
  }

  void Trouble() {
    if (Chance(10)) return Restart();
    if (Chance(20)) {
      cluster_.disk_failures += 1;
      return;
    }
    const auto worker = Pick(cluster_.workers);
    if (worker == cluster_.workers.end()) return;
    if (Chance(30)) {
      worker->second.mute = true;
    } else if (Chance(30)) {
      worker->second.formation_failures = 2;
    } else if (worker->second.rank != nullptr && Chance(20)) {
      worker->second.rank->hold_jobs = Chance(50);
    } else if (worker->second.rank != nullptr) {
      const v1::Command::KindCase kinds[] = {v1::Command::kBeginAppend, v1::Command::kSealAppend,
                                             v1::Command::kAttend};
      const absl::StatusCode codes[] = {
          absl::StatusCode::kInvalidArgument, absl::StatusCode::kResourceExhausted,
          absl::StatusCode::kFailedPrecondition, absl::StatusCode::kUnavailable};
      worker->second.rank->failures[kinds[Below(3)]] = absl::Status(codes[Below(4)], "on purpose");
    }
  }

  void Restart() {
    while (Chance(50) && cluster_.FinishWriteUnheard()) {
    }
    cluster_.Restart();
    queries_.clear();
    plans_.clear();
    commits_.clear();
    uploads_.clear();
    models_.clear();
  }

  void Sessions() {
    const std::string name = Name();
    const int64_t kind = Below(10);
    cluster_.Ask([&](ClusterState& state, RequestId id) {
      if (kind < 6) {
        v1::CreateSessionRequest request;
        request.set_name(name);
        request.mutable_spec()->set_stripe_pages(1);
        if (kind < 2) {
          v1::ModelSpec& model = *request.mutable_spec()->mutable_model();
          if (kind == 1) {
            model.set_policy(v1::MODEL_POLICY_STREAMING);
            model.set_window(5);
          }
        } else {
          request.mutable_spec()->set_query_heads(2);
          request.mutable_spec()->set_kv_heads(1);
          request.mutable_spec()->set_head_dim(2);
          request.mutable_spec()->set_window(5);
        }
        state.CreateSession(id, request, 0, cluster_.now());
      } else if (kind < 8) {
        v1::GetSessionRequest request;
        request.set_name(name);
        state.GetSession(id, request);
      } else if (kind < 9) {
        state.ListSessions(id, {});
      } else {
        v1::DeleteSessionRequest request;
        request.set_name(name);
        state.DeleteSession(id, request, cluster_.now());
      }
    });
  }

  void Appends() {
    const auto upload =
        uploads_.empty() ? uploads_.end() : std::next(uploads_.begin(), Below(uploads_.size()));
    if (upload == uploads_.end() || Chance(40)) {
      v1::PlanAppendRequest request;
      request.set_session(Name());
      request.set_count(1 + Below(2000));
      if (Chance(30)) request.set_at(Below(1500));
      plans_.insert(cluster_.Ask(
          [&](ClusterState& state, RequestId id) { state.PlanAppend(id, request, cluster_.now()); }));
      return;
    }
    const uint64_t append = upload->id;
    const int64_t end = upload->end;
    const bool commit = Chance(80);
    if (!Chance(20)) uploads_.erase(upload);
    const RequestId request = cluster_.Ask([&](ClusterState& state, RequestId id) {
      if (commit) {
        state.CommitAppend(id, append, cluster_.now());
      } else {
        state.AbortAppend(id, append, cluster_.now());
      }
    });
    if (commit) commits_[request] = end;
    if (Chance(10)) Cancel(request);
  }

  static v1::Model TinyModel() {
    v1::Model model;
    model.set_hash(3);
    model.set_vocab_size(10);
    model.set_hidden_size(4);
    model.set_query_heads(2);
    model.set_kv_heads(1);
    model.set_head_dim(2);
    model.set_dtype(v1::DTYPE_F32);
    model.add_layer_windows(0);
    return model;
  }

  // Calls on sessions of the model; many ask a session of the other kind, or one that is not there.
  void Models() {
    const int64_t kind = Below(10);
    const std::string name = Name();
    const std::vector<int32_t> ids(1 + Below(5), static_cast<int32_t>(Below(10)));
    const RequestId request = cluster_.Ask([&](ClusterState& state, RequestId id) {
      if (kind < 4) {
        const auto at = Chance(30) ? std::optional<int64_t>(Below(10)) : std::nullopt;
        state.AppendTokens(id, name, at, ids, cluster_.now());
      } else if (kind < 7) {
        v1::GenerateRequest args;
        args.set_session(name);
        args.set_max_tokens(1 + Below(5));
        if (Chance(70)) args.set_time_limit_ms(1 + Below(500));
        state.Generate(id, args, cluster_.now());
      } else if (kind < 9) {
        v1::ScoreRequest args;
        args.set_session(name);
        args.set_ids(ids.data(), ids.size() * 4);
        state.Score(id, args, cluster_.now());
      } else {
        v1::ForkSessionRequest args;
        args.set_session(name);
        args.set_name(Name());
        state.ForkSession(id, args, 0, cluster_.now());
      }
    });
    models_.insert(request);
    // A held job without a limit ends only so.
    const auto other = Below(3) == 0 ? std::next(models_.begin(), Below(static_cast<int64_t>(models_.size())))
                                     : models_.end();
    if (other == models_.end()) return;
    Cancel(*other);
    models_.erase(other);
  }

  void Queries() {
    const auto query = Pick(queries_);
    if (query == queries_.end() || Chance(25)) {
      v1::AttendRequest::Header header;
      header.set_session(Name());
      if (Chance(20)) header.set_policy(v1::POLICY_WINDOW);
      queries_[cluster_.Ask(
          [&](ClusterState& state, RequestId id) { state.StartAttend(id, header, cluster_.now()); })];
      return;
    }
    const RequestId id = query->first;
    if (!cluster_.requests[id].started) return;
    if (Chance(10)) {
      queries_.erase(query);
      return Cancel(id);
    }
    if (query->second.finished) return;
    if (Chance(30)) {
      query->second.finished = true;
      cluster_.state().FinishRows(id, cluster_.now());
    } else {
      // A row's values are its number.
      const int rows = static_cast<int>(1 + Below(30));
      std::vector<float> values;
      for (int row = 0; row < rows; ++row) {
        values.insert(values.end(), 4, static_cast<float>(query->second.submitted++));
      }
      cluster_.state().SubmitRows(
          id, std::string(reinterpret_cast<const char*>(values.data()), values.size() * 4), {},
          cluster_.now());
    }
    cluster_.Collect();
  }

  void Cancel(RequestId id) {
    if (cluster_.requests[id].reply.has_value()) return;
    cluster_.Cancel(id);
  }

  void ForgetEnded() {
    for (auto it = models_.begin(); it != models_.end();) {
      const auto& reply = cluster_.requests[*it].reply;
      if (!reply.has_value()) {
        ++it;
        continue;
      }
      if (reply->ok()) ++modelled;
      it = models_.erase(it);
    }
    for (auto it = plans_.begin(); it != plans_.end();) {
      const auto& reply = cluster_.requests[*it].reply;
      if (!reply.has_value()) {
        ++it;
        continue;
      }
      if (reply->ok()) {
        const auto& plan = std::get<v1::AppendPlan>(**reply);
        int64_t next = plan.at();
        for (const v1::Extent& extent : plan.extents()) {
          EXPECT_EQ(extent.first_position(), next);
          next += extent.count();
        }
        EXPECT_EQ(next, plan.at() + plan.count());
        uploads_.push_back({plan.append_id(), next});
      }
      it = plans_.erase(it);
    }
    for (auto it = queries_.begin(); it != queries_.end();) {
      const auto& request = cluster_.requests[it->first];
      if (!request.reply.has_value()) {
        ++it;
        continue;
      }
      if (request.reply->ok()) {
        int next = 0;
        for (const v1::AttendResponse::Rows& rows : request.rows) {
          EXPECT_EQ(rows.first_row(), next);
          for (int row = 0; row < rows.count(); ++row) {
            float value = 0;
            std::memcpy(&value, rows.outputs().data() + 16 * row, 4);
            EXPECT_EQ(value, 2.0f * static_cast<float>(next++));
          }
        }
        EXPECT_EQ(next, it->second.submitted);
        ++answered;
      }
      it = queries_.erase(it);
    }
    for (auto it = commits_.begin(); it != commits_.end();) {
      const auto& request = cluster_.requests[it->first];
      if (!request.reply.has_value() && !request.cancelled) {
        ++it;
        continue;
      }
      if (request.reply.has_value() && request.reply->ok()) {
        const auto& receipt = std::get<v1::AppendReceipt>(**request.reply);
        EXPECT_EQ(receipt.at() + receipt.count(), it->second);
        EXPECT_GE(receipt.length(), it->second);
        ++committed;
      }
      it = commits_.erase(it);
    }
  }

  // Faults stop: everybody who waits must get an answer, the group must come back, and what clients left
  // unfinished must be gone in the end. Sometimes the workers are new processes, mostly they are those that
  // were there.
  void Heal() {
    cluster_.disk_failures = 0;
    const bool all_new = Chance(20);
    const v1::Model model = TinyModel();
    std::map<std::string, WorkerId> newest;
    for (auto& [id, worker] : cluster_.workers) {
      worker.mute = false;
      worker.formation_failures = 0;
      if (worker.rank != nullptr) {
        worker.rank->failures.clear();
        worker.rank->hold_jobs = false;
      }
      if (odd_.count(id) == 0) newest[worker.hello.node()] = id;
    }
    std::vector<WorkerId> leaving;
    for (const auto& [id, worker] : cluster_.workers) {
      const bool extra = worker.hello.node() == absl::StrCat("w", kGroup, ":1");
      if (worker.connected && (odd_.count(id) > 0 || extra)) leaving.push_back(id);
    }
    for (const WorkerId id : leaving) cluster_.Leave(id);
    for (int i = 0; i < kGroup; ++i) {
      const std::string node = absl::StrCat("w", i, ":1");
      if (all_new || newest.count(node) == 0) {
        cluster_.Join(node, 7, "", &model);
      } else if (!cluster_.workers[newest[node]].connected) {
        cluster_.Reconnect(newest[node]);
      }
    }
    for (const RequestId id : std::exchange(models_, {})) Cancel(id);
    for (const auto& [id, query] : queries_) cluster_.state().FinishRows(id, cluster_.now());
    cluster_.Collect();
    for (int i = 0; i < 50; ++i) {
      cluster_.Settle();
      cluster_.Advance(100);
    }
    cluster_.Advance(70000);  // Appends that nobody commits have been idle for too long.
    cluster_.Settle();
    ForgetEnded();
  }

  void Check() {
    EXPECT_THAT(cluster_.complaints(), testing::IsEmpty());
    EXPECT_TRUE(cluster_.serving);
    for (const auto& [id, request] : cluster_.requests) {
      EXPECT_NE(request.reply.has_value(), request.cancelled) << "request " << id;
    }
    const auto answer = cluster_.Get([](ClusterState& state, RequestId id) { state.ListSessions(id, {}); });
    const auto& list = std::get<v1::ListSessionsResponse>(*answer);
    EXPECT_EQ(static_cast<size_t>(list.sessions_size()), cluster_.stored().sessions.size());
    for (const v1::Session& session : list.sessions()) {
      for (const SessionRecord& stored : cluster_.stored().sessions) {
        if (stored.name == session.name()) CheckContent(session, stored);
      }
      TryOut(session);
    }
    for (const auto& [id, worker] : cluster_.workers) {
      if (!worker.connected) continue;
      for (const auto& [session_id, content] : worker.node->sessions) {
        const auto& all = cluster_.stored().sessions;
        EXPECT_TRUE(std::any_of(all.begin(), all.end(), [id = session_id](const auto& s) {
          return s.id == id;
        })) << "a deleted session is held";
      }
      EXPECT_EQ(worker.rank->appends(), 0);
    }
  }

  // A session is whole exactly when all nodes of its placement are there and hold what is on record.
  void CheckContent(const v1::Session& session, const SessionRecord& stored) {
    const bool model = session.spec().has_model();
    // Tokens that the disk had no room for are written with the next ones.
    EXPECT_LE(stored.length(), session.length());
    EXPECT_TRUE(model || stored.length() == session.length());
    std::map<std::string, const FakeNode*> there;
    for (const auto& [id, worker] : cluster_.workers) {
      if (worker.connected) there[worker.hello.node()] = worker.node.get();
    }
    bool whole = true;
    Digest recorded;
    Digest held;
    for (const AppendRecord& append : stored.appends) recorded += append.digest;
    std::set<std::vector<int32_t>> ids;
    for (const std::string& node : stored.placement.nodes) {
      if (there.count(node) == 0 || there[node]->sessions.count(stored.id) == 0) {
        whole = false;
        continue;
      }
      const FakeNode::Session& content = there[node]->sessions.at(stored.id);
      const int64_t length = model ? static_cast<int64_t>(content.ids.size()) : content.length;
      whole = whole && length == session.length();
      held += content.digest;
      ids.insert(content.ids);
    }
    EXPECT_EQ(session.lost(), !whole) << session.name();
    if (!whole) return;
    EXPECT_EQ(ids.size(), 1U);
    EXPECT_TRUE(model || held == recorded);
    if (session.length() > 0) ++kept;
  }

  // A session that is not lost takes appends and answers queries.
  void TryOut(const v1::Session& session) {
    if (session.spec().has_model()) return TryOutModel(session);
    v1::PlanAppendRequest request;
    request.set_session(session.name());
    request.set_count(10);
    const auto plan = cluster_.Get(
        [&](ClusterState& state, RequestId id) { state.PlanAppend(id, request, cluster_.now()); });
    EXPECT_EQ(plan.status().code(), session.lost() ? absl::StatusCode::kDataLoss : absl::StatusCode::kOk);
    if (!plan.ok()) return;
    const uint64_t append = std::get<v1::AppendPlan>(*plan).append_id();
    const auto receipt = cluster_.Get(
        [&](ClusterState& state, RequestId id) { state.CommitAppend(id, append, cluster_.now()); });
    EXPECT_TRUE(receipt.ok()) << receipt.status();
    v1::AttendRequest::Header header;
    header.set_session(session.name());
    const auto totals = cluster_.Get([&](ClusterState& state, RequestId id) {
      state.StartAttend(id, header, cluster_.now());
      state.SubmitRows(id, std::string(16, '\0'), {}, cluster_.now());
      state.FinishRows(id, cluster_.now());
    });
    ASSERT_TRUE(totals.ok()) << totals.status();
    EXPECT_EQ(std::get<AttendTotals>(*totals).rows, 1);
  }

  void TryOutModel(const v1::Session& session) {
    const auto receipt = cluster_.Get([&](ClusterState& state, RequestId id) {
      state.AppendTokens(id, session.name(), session.length(), {1, 2}, cluster_.now());
    });
    EXPECT_EQ(receipt.status().code(), session.lost() ? absl::StatusCode::kDataLoss : absl::StatusCode::kOk)
        << receipt.status();
    if (!receipt.ok()) return;
    EXPECT_EQ(std::get<v1::AppendTokensReceipt>(*receipt).length(), session.length() + 2);
    v1::GenerateRequest request;
    request.set_session(session.name());
    request.set_max_tokens(3);
    const auto summary =
        cluster_.Get([&](ClusterState& state, RequestId id) { state.Generate(id, request, cluster_.now()); });
    ASSERT_TRUE(summary.ok()) << summary.status();
    EXPECT_EQ(std::get<v1::GenerateSummary>(*summary).length(), session.length() + 5);
  }

  std::mt19937_64 random_;
  FakeCluster cluster_;
  std::set<WorkerId> odd_;  // workers of other arithmetic
  std::map<RequestId, Query> queries_;
  std::set<RequestId> plans_;
  std::vector<Upload> uploads_;
  std::map<RequestId, int64_t> commits_;  // to the end of the append
  std::set<RequestId> models_;            // calls on sessions of the model

 public:
  int answered = 0;   // calls that ended well
  int committed = 0;  // appends
  int modelled = 0;   // calls on sessions of the model
  int kept = 0;       // sessions with content that are whole in the end
};

TEST(Simulation, KeepsItsInvariantsWhateverHappens) {
  const char* one = std::getenv("EDUBA_SEED");
  const uint64_t first = one == nullptr ? 1 : std::strtoull(one, nullptr, 10);
  const uint64_t last = one == nullptr ? 1000 : first;
  int answered = 0;
  int committed = 0;
  int modelled = 0;
  int kept = 0;
  for (uint64_t seed = first; seed <= last; ++seed) {
    SCOPED_TRACE(absl::StrCat("EDUBA_SEED=", seed));
    Simulation simulation(seed);
    simulation.Run();
    answered += simulation.answered;
    committed += simulation.committed;
    modelled += simulation.modelled;
    kept += simulation.kept;
    ASSERT_FALSE(testing::Test::HasFailure());
  }
  if (one != nullptr) return;
  // A simulation in which nothing succeeds proves nothing.
  EXPECT_GT(answered, 1000);
  EXPECT_GT(committed, 1000);
  EXPECT_GT(modelled, 500);
  EXPECT_GT(kept, 100);
}

}  // namespace
}  // namespace eduba
