// Real processes of the real program, really killed: a query gets the right bytes or an error in time, never
// a wrong answer, and nobody else goes down.
#include <signal.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/client.h"
#include "gtest/gtest.h"
#include "tests/cluster/session_problem.h"
#include "tests/faults/await_epoch.h"
#include "tests/faults/process.h"

namespace eduba {
namespace {

constexpr int kWorkers = 3;
// The timeout of every client call. A lost worker must be told well before it ends: the coordinator gives a
// worker up after 3 s of silence.
constexpr absl::Duration kCallTimeout = absl::Seconds(30);

class WorkerKill : public ::testing::Test {
 protected:
  void SetUp() override {
    coordinator_ = std::make_unique<Process>(
        EDUBA_PROGRAM, std::vector<std::string>{"coordinator", "--listen", "127.0.0.1:0", "--group-size",
                                                absl::StrCat(kWorkers)});
    ClientOptions options;
    options.server = coordinator_->AwaitReady();
    options.timeout = kCallTimeout;
    for (int i = 0; i < kWorkers; ++i) workers_.push_back(StartWorker(options.server));
    address_ = options.server;
    client_ = std::make_unique<Client>(options);
    AwaitEpochAfter(*client_, 0);
  }

  // Whatever was killed, the rest must end as asked.
  void TearDown() override {
    coordinator_->Send(SIGTERM);
    EXPECT_EQ(coordinator_->AwaitEnd(), 0);
    for (const auto& worker : workers_) worker->Send(SIGTERM);
    for (const auto& worker : workers_) EXPECT_EQ(worker->AwaitEnd(), 0);
  }

  static std::unique_ptr<Process> StartWorker(const std::string& coordinator) {
    auto worker = std::make_unique<Process>(
        EDUBA_PROGRAM, std::vector<std::string>{"worker", "--coordinator", coordinator, "--listen",
                                                "127.0.0.1:0", "--memory-bytes", "64MiB", "--threads", "1"});
    worker->AwaitReady();
    return worker;
  }

  // Asks from several threads until one has been refused; meanwhile, when `count` answers are in, `hurt` is
  // called once. Every answer must be `wanted`; every refusal must say that a worker is gone, within the
  // call's deadline.
  void AskWhileHurt(const v1::Session& session, const Call& call, const Answers& wanted, int count,
                    const std::function<void()>& hurt) {
    std::atomic<int> answered{0};
    std::atomic<int> refused{0};
    std::once_flag once;
    std::vector<std::thread> threads;
    threads.reserve(3);
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&] {
        while (refused == 0) {
          const auto answers = Ask(*client_, session, call);
          if (answers.ok()) {
            EXPECT_TRUE(*answers == wanted) << "a wrong answer";
            if (++answered >= count) std::call_once(once, hurt);
          } else {
            EXPECT_TRUE(absl::IsUnavailable(answers.status()) || absl::IsDataLoss(answers.status()))
                << answers.status();
            ++refused;
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_GE(answered, count);
  }

  std::string address_;
  std::unique_ptr<Process> coordinator_;
  std::vector<std::unique_ptr<Process>> workers_;
  std::unique_ptr<Client> client_;
};

TEST_F(WorkerKill, ASigkillDuringQueriesGivesErrorsInTimeAndANewWorkerServesAgain) {
  const uint64_t seed = 31;
  const Problem problem = MakeProblem(seed);
  const Call& call = problem.calls[0];
  Random random(seed);
  int64_t epoch = AwaitEpochAfter(*client_, 0);
  std::optional<Answers> wanted;
  for (int round = 0; round < 5; ++round) {
    const int victim = static_cast<int>(Below(random, kWorkers));
    const int count = static_cast<int>(1 + Below(random, 30));
    SCOPED_TRACE(absl::StrCat("round=", round, " victim=", victim, " count=", count, " ", problem.Text()));
    const std::string name = absl::StrCat("s", round);
    const auto session = StoreSession(*client_, name, problem.content);
    ASSERT_TRUE(session.ok()) << session.status();
    const auto before = Ask(*client_, *session, call);
    ASSERT_TRUE(before.ok()) << before.status();
    if (!wanted.has_value()) {
      ASSERT_NO_FATAL_FAILURE(ExpectOracle(problem.content, call, *before));
      wanted = *before;
    }
    // After every recovery the same bytes, from other processes.
    ASSERT_TRUE(*before == *wanted);

    AskWhileHurt(*session, call, *wanted, count, [&] { workers_[victim]->Send(SIGKILL); });
    EXPECT_EQ(workers_[victim]->AwaitEnd(), 128 + SIGKILL);
    for (int i = 0; i < kWorkers; ++i) {
      EXPECT_TRUE(i == victim || workers_[i]->Runs()) << "worker " << i << " went down too";
    }
    EXPECT_TRUE(coordinator_->Runs());

    workers_[victim] = StartWorker(address_);
    epoch = AwaitEpochAfter(*client_, epoch);
    EXPECT_EQ(Ask(*client_, *session, call).status().code(), absl::StatusCode::kDataLoss);
    EXPECT_EQ(client_->DeleteSession(name), absl::OkStatus());
  }
}

TEST_F(WorkerKill, AWorkerThatStandsStillIsLeftOutAndComesBackWithItsContent) {
  const Problem problem = MakeProblem(32);
  const Call& call = problem.calls[0];
  const auto session = StoreSession(*client_, "s", problem.content);
  ASSERT_TRUE(session.ok()) << session.status();
  const auto wanted = Ask(*client_, *session, call);
  ASSERT_TRUE(wanted.ok()) << wanted.status();
  const int64_t epoch = AwaitEpochAfter(*client_, 0);

  AskWhileHurt(*session, call, *wanted, 5, [&] { workers_[1]->Send(SIGSTOP); });
  EXPECT_FALSE(Ask(*client_, *session, call).ok());
  workers_[1]->Send(SIGCONT);
  AwaitEpochAfter(*client_, epoch);
  const auto again = Ask(*client_, *session, call);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(*again == *wanted);
  for (const auto& worker : workers_) EXPECT_TRUE(worker->Runs());
}

TEST_F(WorkerKill, ASigkillDuringAppendsStoresAllOrNothing) {
  const Problem problem = MakeProblem(33);
  int64_t epoch = AwaitEpochAfter(*client_, 0);
  for (int round = 0; round < 3; ++round) {
    const std::string name = absl::StrCat("s", round);
    const auto session = client_->CreateSession(name, problem.content.spec);
    ASSERT_TRUE(session.ok()) << session.status();
    std::thread killer;
    absl::Status status;
    int64_t at = 0;
    // Small appends until one fails.
    while (status.ok() && at < problem.content.length) {
      if (at >= 20 + 10 * round && !killer.joinable()) {
        killer = std::thread([&] { workers_[round]->Send(SIGKILL); });
      }
      status = Append(*client_, *session, problem.content, at, 1, round % 2 == 0, true).status();
      if (status.ok()) ++at;
    }
    ASSERT_TRUE(killer.joinable());
    killer.join();
    ASSERT_TRUE(absl::IsUnavailable(status) || absl::IsDataLoss(status)) << status;
    EXPECT_EQ(workers_[round]->AwaitEnd(), 128 + SIGKILL);
    workers_[round] = StartWorker(address_);
    epoch = AwaitEpochAfter(*client_, epoch);
    const auto after = client_->GetSession(name);
    ASSERT_TRUE(after.ok()) << after.status();
    EXPECT_TRUE(after->lost());
    EXPECT_GE(after->length(), at);      // What was acknowledged is still known of,
    EXPECT_LE(after->length(), at + 1);  // and nothing that was not sent.
    EXPECT_EQ(client_->DeleteSession(name), absl::OkStatus());
  }
}

}  // namespace
}  // namespace eduba
