// The runtime over a disk that stands still: nobody but who waits for the disk may notice.
#include "coordinator/runtime.h"

#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "coordinator/testing/fake_rank.h"
#include "gtest/gtest.h"
#include "rpc/limits.h"

namespace eduba {
namespace {

// A disk whose writes wait while it is held.
class Disk {
 public:
  void Hold() {
    const MutexLock lock(mutex_);
    held_ = true;
  }
  void Release() {
    const MutexLock lock(mutex_);
    held_ = false;
    changed_.NotifyAll();
  }
  // Returns when a write has begun that a held disk keeps waiting.
  void AwaitWaiting() {
    const MutexLock lock(mutex_);
    while (!waiting_) changed_.Wait(mutex_);
  }
  void Write(int64_t changes) {
    const MutexLock lock(mutex_);
    waiting_ = held_;
    changed_.NotifyAll();
    while (held_) changed_.Wait(mutex_);
    waiting_ = false;
    ++writes_;
    changes_ += changes;
  }
  int64_t writes() {
    const MutexLock lock(mutex_);
    return writes_;
  }
  int64_t changes() {
    const MutexLock lock(mutex_);
    return changes_;
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  bool held_ ABSL_GUARDED_BY(mutex_) = false;
  bool waiting_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t writes_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t changes_ ABSL_GUARDED_BY(mutex_) = 0;
};

class DiskRecorder final : public Recorder {
 public:
  explicit DiskRecorder(std::shared_ptr<Disk> disk) : disk_(std::move(disk)) {}
  std::vector<absl::Status> ApplyAll(const std::vector<Change>& changes) override {
    disk_->Write(static_cast<int64_t>(changes.size()));
    return std::vector<absl::Status>(changes.size());
  }

 private:
  const std::shared_ptr<Disk> disk_;
};

// A worker that answers at once, in a thread of its own because a link must not call the runtime.
class Worker final : public WorkerLink {
 public:
  explicit Worker(Runtime* runtime)
      : runtime_(runtime), id_(*runtime->AddWorker(this)), thread_([this] { Run(); }) {
    v1::WorkerMessage hello;
    hello.mutable_hello()->set_protocol(kGroupProtocol);
    hello.mutable_hello()->set_transport("local");
    hello.mutable_hello()->set_node("n");
    runtime_->WorkerSaid(id_, hello);
  }
  ~Worker() override {
    runtime_->RemoveWorker(id_, "the test is over");
    Close(absl::OkStatus());
    thread_.join();
  }
  void Send(std::shared_ptr<const v1::GroupMessage> message) override {
    const MutexLock lock(mutex_);
    inbox_.push_back(std::move(message));
    changed_.NotifyAll();
  }
  void Close(const absl::Status&) override {
    const MutexLock lock(mutex_);
    closed_ = true;
    changed_.NotifyAll();
  }
  // Returns when the coordinator has heard the answers to so many commands.
  void AwaitAnswered(int64_t commands) {
    const MutexLock lock(mutex_);
    while (answered_ < commands) changed_.Wait(mutex_);
  }
  void Beat() {
    v1::WorkerMessage message;
    message.mutable_heartbeat()->set_memory_used_bytes(++beats_);
    runtime_->WorkerSaid(id_, message);
  }

 private:
  void Run() {
    for (;;) {
      std::shared_ptr<const v1::GroupMessage> message;
      {
        const MutexLock lock(mutex_);
        while (inbox_.empty() && !closed_) changed_.Wait(mutex_);
        if (inbox_.empty()) return;
        message = std::move(inbox_.front());
        inbox_.pop_front();
      }
      v1::WorkerMessage answer;
      if (message->has_form()) {
        rank_.emplace(message->form().rank(), &node_);
        answer.mutable_formed()->set_epoch(message->form().epoch());
        answer.mutable_formed()->set_attempt(message->form().attempt());
      } else if (message->has_command()) {
        *answer.mutable_result() = rank_->Answer(message->command());
      } else {
        continue;
      }
      runtime_->WorkerSaid(id_, answer);
      if (!answer.has_result()) continue;
      const MutexLock lock(mutex_);
      ++answered_;
      changed_.NotifyAll();
    }
  }

  Runtime* const runtime_;
  const WorkerId id_;
  int64_t beats_ = 0;
  FakeNode node_;
  std::optional<FakeRank> rank_;
  Mutex mutex_;
  CondVar changed_;
  std::deque<std::shared_ptr<const v1::GroupMessage>> inbox_ ABSL_GUARDED_BY(mutex_);
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t answered_ ABSL_GUARDED_BY(mutex_) = 0;
  std::thread thread_;
};

// A caller that keeps its answer.
class Waiter final : public Caller {
 public:
  void OnReply(absl::StatusOr<Answer> answer) override {
    const MutexLock lock(mutex_);
    answer_ = std::move(answer);
    changed_.NotifyAll();
  }
  absl::StatusOr<Answer> Await() {
    const MutexLock lock(mutex_);
    while (!answer_.has_value()) changed_.Wait(mutex_);
    return *answer_;
  }
  bool answered() {
    const MutexLock lock(mutex_);
    return answer_.has_value();
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  std::optional<absl::StatusOr<Answer>> answer_ ABSL_GUARDED_BY(mutex_);
};

class RuntimeTest : public testing::Test {
 protected:
  void SetUp() override {
    runtime_ = std::make_unique<Runtime>(ClusterState::Options(), std::make_unique<DiskRecorder>(disk_),
                                         StoredState(), [](bool) {});
    worker_ = std::make_unique<Worker>(runtime_.get());
    ASSERT_TRUE(runtime_->WaitUntilActive(absl::InfiniteFuture()).ok());
  }
  void TearDown() override { disk_->Release(); }

  static Runtime::Event Create(const std::string& name) {
    v1::CreateSessionRequest request;
    request.set_name(name);
    request.mutable_spec()->set_query_heads(2);
    request.mutable_spec()->set_kv_heads(1);
    request.mutable_spec()->set_head_dim(2);
    return [request](ClusterState& state, RequestId id, int64_t now) {
      state.CreateSession(id, request, 0, now);
    };
  }
  absl::StatusOr<Answer> Call(const Runtime::Event& event) {
    Waiter waiter;
    runtime_->Start(&waiter, event);
    return waiter.Await();
  }

  const std::shared_ptr<Disk> disk_ = std::make_shared<Disk>();
  std::unique_ptr<Runtime> runtime_;
  std::unique_ptr<Worker> worker_;
};

TEST_F(RuntimeTest, ASlowDiskHoldsUpNeitherQueriesNorHeartbeats) {
  ASSERT_TRUE(Call(Create("x")).ok());
  v1::PlanAppendRequest plan;
  plan.set_session("x");
  plan.set_count(10);
  const auto planned =
      Call([&plan](ClusterState& state, RequestId id, int64_t now) { state.PlanAppend(id, plan, now); });
  ASSERT_TRUE(planned.ok()) << planned.status();
  const uint64_t append = std::get<v1::AppendPlan>(*planned).append_id();
  const Runtime::Event commit = [append](ClusterState& state, RequestId id, int64_t now) {
    state.CommitAppend(id, append, now);
  };
  ASSERT_TRUE(Call(commit).ok());

  disk_->Hold();
  Waiter creation;
  runtime_->Start(&creation, Create("y"));
  disk_->AwaitWaiting();
  // All this returns although the disk does not.
  worker_->Beat();
  const auto list = Call([](ClusterState& state, RequestId id, int64_t) { state.ListWorkers(id); });
  EXPECT_EQ(std::get<v1::ListWorkersResponse>(*list).workers(0).memory_used_bytes(), 1);
  v1::AttendRequest::Header header;
  header.set_session("x");
  const auto totals = Call([&header](ClusterState& state, RequestId id, int64_t now) {
    state.StartAttend(id, header, now);
    state.SubmitRows(id, std::string(16, '\0'), {}, now);
    state.FinishRows(id, now);
  });
  ASSERT_TRUE(totals.ok()) << totals.status();
  EXPECT_EQ(std::get<AttendTotals>(*totals).rows, 1);
  EXPECT_FALSE(creation.answered());
  disk_->Release();
  EXPECT_TRUE(creation.Await().ok());
}

TEST_F(RuntimeTest, WhatCameInWhileTheDiskWasBusyIsWrittenTogether) {
  disk_->Hold();
  Waiter first;
  runtime_->Start(&first, Create("first"));
  disk_->AwaitWaiting();
  const int64_t writes = disk_->writes();
  const int64_t changes = disk_->changes();
  Waiter others[5];
  for (int i = 0; i < 5; ++i) runtime_->Start(&others[i], Create(absl::StrCat("s", i)));
  worker_->AwaitAnswered(
      7);  // RetainSessions, and six sessions are opened: their writes have been asked for.
  disk_->Release();
  EXPECT_TRUE(first.Await().ok());
  for (Waiter& other : others) EXPECT_TRUE(other.Await().ok());
  EXPECT_EQ(disk_->changes(), changes + 6);
  EXPECT_EQ(disk_->writes(), writes + 2);
}

TEST_F(RuntimeTest, StopsWhenAllIsWrittenDown) {
  disk_->Hold();
  Waiter creation;
  runtime_->Start(&creation, Create("y"));
  disk_->AwaitWaiting();
  const int64_t changes = disk_->changes();
  std::atomic<bool> stopped{false};
  std::thread stopping([&] {
    runtime_->Stop();
    stopped = true;
  });
  EXPECT_EQ(creation.Await().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(stopped);
  disk_->Release();
  stopping.join();
  EXPECT_EQ(disk_->changes(), changes + 1);
}

}  // namespace
}  // namespace eduba
