// Real processes of the real program. Content belongs to the workers' processes: while they live, sessions
// answer with the same bytes after the coordinator was killed or a connection broke, and nothing is appended
// again. With a data directory content belongs to the directory, and whatever is killed, it comes back. What
// a worker without one held goes with it, and with nothing else.
#include <signal.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/pages.h"
#include "client/client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/cluster/session_problem.h"
#include "tests/faults/await_epoch.h"
#include "tests/faults/process.h"

namespace eduba {
namespace {

using ::testing::ContainsRegex;
using ::testing::HasSubstr;

constexpr int kWorkers = 3;
constexpr absl::Duration kCallTimeout = absl::Seconds(60);
constexpr int64_t kPromptTokens = 700;

// What a model session says, without being changed.
struct ModelBytes {
  std::vector<float> scores;
  std::vector<float> vectors;
  std::string generated;  // Ids and log-probabilities, of a fork.

  bool operator==(const ModelBytes&) const = default;
};

class ContentResume : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = absl::StrCat(::testing::TempDir(), "/content_resume_",
                        ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(dir_);
    StartCoordinator("127.0.0.1:0");
    for (int i = 0; i < kWorkers; ++i) workers_.push_back(StartWorker(i));
    epoch_ = AwaitEpochAfter(*client_, 0);
  }

  // Whatever was killed, the rest must end as asked.
  void TearDown() override {
    coordinator_->Send(SIGTERM);
    EXPECT_EQ(coordinator_->AwaitEnd(), 0);
    for (const auto& worker : workers_) worker->Send(SIGTERM);
    for (const auto& worker : workers_) EXPECT_EQ(worker->AwaitEnd(), 0);
    std::filesystem::remove_all(dir_);
  }

  void StartCoordinator(const std::string& listen) {
    coordinator_ = std::make_unique<Process>(
        EDUBA_PROGRAM, std::vector<std::string>{"coordinator", "--listen", listen, "--group-size",
                                                absl::StrCat(kWorkers), "--data-dir", dir_ + "/coordinator"});
    ClientOptions options;
    options.server = coordinator_->AwaitReady();
    options.timeout = kCallTimeout;
    address_ = options.server;
    client_ = std::make_unique<Client>(options);
  }

  // `lasting`: with a data directory.
  std::unique_ptr<Process> StartWorker(int index, bool lasting = true) const {
    std::vector<std::string> arguments = {"worker",      "--coordinator",  address_, "--listen",
                                          "127.0.0.1:0", "--memory-bytes", "64MiB",  "--threads",
                                          "1",           "--model",        "nano"};
    if (lasting) {
      arguments.insert(arguments.end(), {"--data-dir", absl::StrCat(dir_, "/worker", index)});
    } else {
      arguments.insert(arguments.end(), {"--node-id", absl::StrCat("node", index)});
    }
    auto worker = std::make_unique<Process>(EDUBA_PROGRAM, arguments);
    worker->AwaitReady();
    return worker;
  }

  // A group of workers that keep nothing on a disk.
  void ReplaceWorkers() {
    for (const auto& worker : workers_) worker->Send(SIGTERM);
    for (const auto& worker : workers_) EXPECT_EQ(worker->AwaitEnd(), 0);
    for (int i = 0; i < kWorkers; ++i) workers_[i] = StartWorker(i, /*lasting=*/false);
    epoch_ = AwaitEpochAfter(*client_, epoch_);
  }

  void KillWorker(int index) {
    workers_[index]->Send(SIGKILL);
    EXPECT_EQ(workers_[index]->AwaitEnd(), 128 + SIGKILL);
  }

  void KillCoordinator() {
    coordinator_->Send(SIGKILL);
    EXPECT_EQ(coordinator_->AwaitEnd(), 128 + SIGKILL);
  }

  // Another coordinator in its place, and a group that works again.
  void RestartCoordinator() {
    StartCoordinator(address_);
    epoch_ = AwaitEpochAfter(*client_, epoch_);
  }

  // Until the coordinator has seen that a worker is gone.
  void AwaitInactive() {
    while (true) {
      const auto workers = client_->ListWorkers();
      ASSERT_TRUE(workers.ok()) << workers.status();
      if (workers->state() != "active") return;
      absl::SleepFor(absl::Milliseconds(20));
    }
  }

  void ExpectAllRun() {
    for (const auto& worker : workers_) EXPECT_TRUE(worker->Runs());
  }

  // Stripes of one page, so that every worker has some.
  static Problem SpreadProblem(uint64_t seed) {
    Problem problem = MakeProblem(seed);
    while (problem.content.length < 4 * kPageRows) problem = MakeProblem(seed += 1000);
    problem.content.spec.set_stripe_pages(1);
    return problem;
  }

  // Stores the content in several appends.
  v1::Session Store(const std::string& name, const Content& content) {
    const auto session = client_->CreateSession(name, content.spec);
    EXPECT_TRUE(session.ok()) << session.status();
    const int64_t piece = content.length / 5 + 1;
    for (int64_t at = 0; at < content.length; at += piece) {
      const auto receipt =
          Append(*client_, *session, content, at, std::min(piece, content.length - at), at == 0, true);
      EXPECT_TRUE(receipt.ok()) << receipt.status();
    }
    return *session;
  }

  std::vector<Answers> AskAll(const v1::Session& session, const std::vector<Call>& calls) {
    std::vector<Answers> all;
    for (const Call& call : calls) {
      auto answers = Ask(*client_, session, call);
      EXPECT_TRUE(answers.ok()) << answers.status();
      if (answers.ok()) all.push_back(*std::move(answers));
    }
    return all;
  }

  // Tokens are distinct enough that one that is missing or moved shows.
  static std::vector<int32_t> Prompt() {
    std::vector<int32_t> ids;
    for (int32_t i = 0; i < kPromptTokens; ++i) ids.push_back(1 + (i * i + 3 * i) % 60);
    return ids;
  }

  void StorePrompt(const std::string& name, bool streaming) {
    v1::SessionSpec spec;
    spec.set_stripe_pages(1);
    spec.mutable_model()->set_policy(streaming ? v1::MODEL_POLICY_STREAMING : v1::MODEL_POLICY_MODEL);
    if (streaming) spec.mutable_model()->set_window(50);
    const auto session = client_->CreateSession(name, spec);
    ASSERT_TRUE(session.ok()) << session.status();
    const std::vector<int32_t> ids = Prompt();
    ASSERT_TRUE(client_->AppendTokens(name, absl::MakeConstSpan(ids).first(300), {}).ok());
    const auto receipt = client_->AppendTokens(name, absl::MakeConstSpan(ids).subspan(300), {});
    ASSERT_TRUE(receipt.ok()) << receipt.status();
    prompt_length_ = receipt->length();
  }

  absl::StatusOr<v1::GenerateSummary> Generate(const std::string& name, int64_t tokens, std::string* said) {
    v1::GenerateRequest request;
    request.set_session(name);
    request.set_max_tokens(tokens);
    return client_->Generate(request, [said](const v1::GenerateResponse::Tokens& some) {
      *said += some.ids() + some.log_probs();
      return absl::OkStatus();
    });
  }

  ModelBytes AskModel(const std::string& name) {
    ModelBytes bytes;
    const auto scores = client_->Score(name, {5, 9, 2, 33, 7});
    EXPECT_TRUE(scores.ok()) << scores.status();
    if (scores.ok()) bytes.scores = *scores;
    const auto vectors = client_->Embed(name, {0, 100, 250, 260, 400, 650}, v1::POOL_MEAN);
    EXPECT_TRUE(vectors.ok()) << vectors.status();
    if (vectors.ok()) bytes.vectors = *vectors;
    const std::string fork = name + "-fork";
    EXPECT_TRUE(client_->ForkSession(name, fork).ok());
    const auto generated = Generate(fork, 12, &bytes.generated);
    EXPECT_TRUE(generated.ok()) << generated.status();
    EXPECT_EQ(client_->DeleteSession(fork), absl::OkStatus());
    return bytes;
  }

  std::string dir_;
  std::string address_;
  std::unique_ptr<Process> coordinator_;
  std::vector<std::unique_ptr<Process>> workers_;
  std::unique_ptr<Client> client_;
  int64_t epoch_ = 0;
  // The length of a session with the prompt: the model has sink tokens of its own before the prompt.
  int64_t prompt_length_ = 0;
};

TEST_F(ContentResume, AKilledCoordinatorOrABrokenConnectionChangesNoByte) {
  const Problem problem = SpreadProblem(41);
  const v1::Session session = Store("tensors", problem.content);
  ASSERT_NO_FATAL_FAILURE(StorePrompt("model", false));
  ASSERT_NO_FATAL_FAILURE(StorePrompt("streaming", true));
  const std::vector<Answers> answers = AskAll(session, problem.calls);
  ASSERT_NO_FATAL_FAILURE(ExpectOracle(problem.content, problem.calls[0], answers[0]));
  const ModelBytes model = AskModel("model");
  const ModelBytes streaming = AskModel("streaming");
  const auto expect_the_same = [&] {
    EXPECT_TRUE(AskAll(session, problem.calls) == answers);
    EXPECT_TRUE(AskModel("model") == model);
    EXPECT_TRUE(AskModel("streaming") == streaming);
    EXPECT_EQ(client_->GetSession("tensors")->length(), problem.content.length);
    EXPECT_EQ(client_->GetSession("streaming")->length(), prompt_length_);
    ExpectAllRun();
  };

  KillCoordinator();
  RestartCoordinator();
  expect_the_same();

  // Its connections break when the coordinator has heard nothing from it for too long.
  workers_[1]->Send(SIGSTOP);
  AwaitInactive();
  workers_[1]->Send(SIGCONT);
  epoch_ = AwaitEpochAfter(*client_, epoch_);
  expect_the_same();

  // Sessions go on where they stood.
  EXPECT_EQ(client_->DeleteSession("tensors"), absl::OkStatus());
  ASSERT_TRUE(client_->AppendTokens("model", {1, 2, 3}, {}).ok());
  EXPECT_EQ(client_->GetSession("model")->length(), prompt_length_ + 3);
}

TEST_F(ContentResume, ACoordinatorKilledDuringAppendsLeavesEachWhollyOrNotAtAll) {
  const Problem problem = SpreadProblem(42);
  const Content& content = problem.content;
  const v1::Session whole = Store("whole", content);
  const std::vector<Answers> wanted = AskAll(whole, problem.calls);
  const auto session = client_->CreateSession("grown", content.spec);
  ASSERT_TRUE(session.ok()) << session.status();
  int64_t at = 0;
  for (int round = 0; round < 4; ++round) {
    // Small appends until one fails, because the coordinator was killed meanwhile.
    const int64_t kill_at = at + 10 + 7 * round;
    std::thread killer;
    absl::Status status;
    while (status.ok() && at < content.length) {
      if (at >= kill_at && !killer.joinable()) killer = std::thread([this] { coordinator_->Send(SIGKILL); });
      status = Append(*client_, *session, content, at, 1, round % 2 == 0, true).status();
      if (status.ok()) ++at;
    }
    ASSERT_TRUE(killer.joinable());
    killer.join();
    EXPECT_EQ(coordinator_->AwaitEnd(), 128 + SIGKILL);
    RestartCoordinator();
    const auto after = client_->GetSession("grown");
    ASSERT_TRUE(after.ok()) << after.status();
    EXPECT_FALSE(after->lost());
    EXPECT_GE(after->length(), at);      // What was acknowledged is there,
    EXPECT_LE(after->length(), at + 1);  // and nothing that was not sent.
    at = after->length();
  }
  ASSERT_TRUE(Append(*client_, *session, content, at, content.length - at, false, true).ok());
  EXPECT_TRUE(AskAll(*session, problem.calls) == wanted);
  EXPECT_TRUE(AskAll(whole, problem.calls) == wanted);
  ExpectAllRun();
}

TEST_F(ContentResume, AKilledCoordinatorLeavesAGenerationWhereItStood) {
  for (const bool streaming : {false, true}) {
    SCOPED_TRACE(streaming);
    const std::string name = streaming ? "streaming" : "model";
    ASSERT_NO_FATAL_FAILURE(StorePrompt(name, streaming));
    ASSERT_NO_FATAL_FAILURE(StorePrompt(name + "-judge", streaming));
    v1::GenerateRequest request;
    request.set_session(name);
    request.set_max_tokens(1000000);
    int64_t tokens = 0;
    const auto summary = client_->Generate(request, [&](const v1::GenerateResponse::Tokens& some) {
      tokens += static_cast<int64_t>(some.ids().size() / sizeof(int32_t));
      if (tokens >= 20 && coordinator_->Runs()) coordinator_->Send(SIGKILL);
      return absl::OkStatus();
    });
    ASSERT_FALSE(summary.ok());
    ASSERT_GE(tokens, 20);
    RestartCoordinator();
    const auto after = client_->GetSession(name);
    ASSERT_TRUE(after.ok()) << after.status();
    EXPECT_FALSE(after->lost());
    ASSERT_GE(after->length(), prompt_length_);
    // The same session where nothing happened.
    const int64_t generated = after->length() - prompt_length_;
    std::string said;
    if (generated > 0) {
      ASSERT_TRUE(Generate(name + "-judge", generated, &said).ok());
    }
    EXPECT_TRUE(AskModel(name) == AskModel(name + "-judge")) << generated;
    ExpectAllRun();
  }
}

TEST_F(ContentResume, WhateverIsKilledComesBackWithTheSameBytes) {
  const Problem problem = SpreadProblem(44);
  const v1::Session session = Store("tensors", problem.content);
  ASSERT_NO_FATAL_FAILURE(StorePrompt("model", false));
  ASSERT_NO_FATAL_FAILURE(StorePrompt("streaming", true));
  // Generated tokens are read again as they were read first, in a fork too.
  std::string said;
  ASSERT_TRUE(Generate("model", 9, &said).ok());
  ASSERT_TRUE(Generate("streaming", 9, &said).ok());
  ASSERT_TRUE(client_->ForkSession("model", "fork").ok());
  ASSERT_TRUE(client_->AppendTokens("fork", {7, 8, 9}, {}).ok());
  const std::vector<Answers> answers = AskAll(session, problem.calls);
  ASSERT_NO_FATAL_FAILURE(ExpectOracle(problem.content, problem.calls[0], answers[0]));
  const ModelBytes model = AskModel("model");
  const ModelBytes streaming = AskModel("streaming");
  const ModelBytes fork = AskModel("fork");
  const auto expect_the_same = [&] {
    EXPECT_TRUE(AskAll(session, problem.calls) == answers);
    EXPECT_TRUE(AskModel("model") == model);
    EXPECT_TRUE(AskModel("streaming") == streaming);
    EXPECT_TRUE(AskModel("fork") == fork);
  };

  KillWorker(1);
  AwaitInactive();
  EXPECT_EQ(Ask(*client_, session, problem.calls[0]).status().code(), absl::StatusCode::kUnavailable);
  workers_[1] = StartWorker(1);
  epoch_ = AwaitEpochAfter(*client_, epoch_);
  expect_the_same();

  for (int i = 0; i < kWorkers; ++i) KillWorker(i);
  KillCoordinator();
  StartCoordinator(address_);
  for (int i = 0; i < kWorkers; ++i) workers_[i] = StartWorker(i);
  epoch_ = AwaitEpochAfter(*client_, epoch_);
  expect_the_same();

  // What is deleted is gone from the disks.
  for (const char* name : {"tensors", "model", "streaming"}) {
    EXPECT_EQ(client_->DeleteSession(name), absl::OkStatus());
  }
  for (int i = 0; i < kWorkers; ++i) {
    int64_t sessions = 0;
    for (const auto& entry :
         std::filesystem::directory_iterator(absl::StrCat(dir_, "/worker", i, "/content"))) {
      if (entry.is_directory()) ++sessions;
    }
    EXPECT_EQ(sessions, 1) << i;  // The fork.
  }
}

TEST_F(ContentResume, WorkersKilledDuringAppendsLeaveEachWhollyOrNotAtAll) {
  const Problem problem = SpreadProblem(45);
  const Content& content = problem.content;
  const v1::Session whole = Store("whole", content);
  const std::vector<Answers> wanted = AskAll(whole, problem.calls);
  const auto session = client_->CreateSession("grown", content.spec);
  ASSERT_TRUE(session.ok()) << session.status();
  int64_t at = 0;
  for (int round = 0; round < 6; ++round) {
    const int victim = round % kWorkers;
    const int64_t kill_at = at + 10 + 7 * round;
    std::thread killer;
    absl::Status status;
    while (status.ok() && at < content.length) {
      if (at >= kill_at && !killer.joinable()) {
        killer = std::thread([this, victim] { workers_[victim]->Send(SIGKILL); });
      }
      status = Append(*client_, *session, content, at, 1, round % 2 == 0, true).status();
      if (status.ok()) ++at;
    }
    ASSERT_TRUE(killer.joinable());
    killer.join();
    EXPECT_EQ(workers_[victim]->AwaitEnd(), 128 + SIGKILL);
    workers_[victim] = StartWorker(victim);
    epoch_ = AwaitEpochAfter(*client_, epoch_);
    const auto after = client_->GetSession("grown");
    ASSERT_TRUE(after.ok()) << after.status();
    EXPECT_FALSE(after->lost());
    EXPECT_GE(after->length(), at);
    EXPECT_LE(after->length(), at + 1);
    at = after->length();
  }
  ASSERT_TRUE(Append(*client_, *session, content, at, content.length - at, false, true).ok());
  EXPECT_TRUE(AskAll(*session, problem.calls) == wanted);
  EXPECT_TRUE(AskAll(whole, problem.calls) == wanted);
}

// A bit that flips on a disk is never served: the session says whose part is missing, and others answer.
TEST_F(ContentResume, ADamagedFileIsNamedAndNeverServed) {
  const Problem problem = SpreadProblem(46);
  const v1::Session session = Store("tensors", problem.content);
  const v1::Session other = Store("other", problem.content);
  const std::vector<Answers> answers = AskAll(session, problem.calls);
  KillWorker(0);
  {
    const std::string path = dir_ + "/worker0/content/session-1/00000001.frames";
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(std::filesystem::file_size(path) / 2));
    const auto byte = static_cast<char>(file.peek() ^ 4);
    file.put(byte);
    ASSERT_TRUE(file.good());
  }
  workers_[0] = StartWorker(0);
  epoch_ = AwaitEpochAfter(*client_, epoch_);
  const absl::Status lost = Ask(*client_, session, problem.calls[0]).status();
  EXPECT_EQ(lost.code(), absl::StatusCode::kDataLoss) << lost;
  EXPECT_THAT(std::string(lost.message()), HasSubstr("does not hold its part"));
  EXPECT_TRUE(AskAll(other, problem.calls) == answers);
}

// Whoever puts an earlier copy of the records back, or runs two coordinators with copies, is refused by the
// workers, and nothing is lost.
TEST_F(ContentResume, AnEarlierCopyOfTheRecordsIsNotObeyed) {
  const std::string records = dir_ + "/coordinator";
  KillCoordinator();
  std::filesystem::copy(records, records + ".old", std::filesystem::copy_options::recursive);
  RestartCoordinator();
  const Problem problem = SpreadProblem(47);
  const v1::Session session = Store("tensors", problem.content);
  const std::vector<Answers> answers = AskAll(session, problem.calls);
  KillCoordinator();
  std::filesystem::rename(records, records + ".new");
  std::filesystem::rename(records + ".old", records);

  // All three workers leave it for good.
  StartCoordinator(address_);
  for (const auto& worker : workers_) EXPECT_EQ(worker->AwaitEnd(), 1);
  KillCoordinator();
  std::filesystem::remove_all(records);
  std::filesystem::rename(records + ".new", records);

  StartCoordinator(address_);
  for (int i = 0; i < kWorkers; ++i) workers_[i] = StartWorker(i);
  epoch_ = AwaitEpochAfter(*client_, epoch_);
  EXPECT_TRUE(AskAll(session, problem.calls) == answers);
}

TEST_F(ContentResume, AKilledWorkerWithoutADiskTakesItsStripesAndNothingElse) {
  ReplaceWorkers();
  const Problem problem = SpreadProblem(43);
  const v1::Session session = Store("tensors", problem.content);
  ASSERT_NO_FATAL_FAILURE(StorePrompt("model", false));
  const std::vector<Answers> answers = AskAll(session, problem.calls);
  workers_[2]->Send(SIGKILL);
  EXPECT_EQ(workers_[2]->AwaitEnd(), 128 + SIGKILL);
  AwaitInactive();
  EXPECT_EQ(Ask(*client_, session, problem.calls[0]).status().code(), absl::StatusCode::kUnavailable);

  workers_[2] = StartWorker(2, /*lasting=*/false);  // The same node, which holds nothing.
  epoch_ = AwaitEpochAfter(*client_, epoch_);
  const absl::Status lost = Ask(*client_, session, problem.calls[0]).status();
  EXPECT_EQ(lost.code(), absl::StatusCode::kDataLoss) << lost;
  EXPECT_THAT(std::string(lost.message()),
              ContainsRegex("node node2 does not hold its part, with [0-9]+ of [0-9]+ stripes"));
  EXPECT_EQ(client_->Score("model", {1, 2}).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(client_->GetSession("tensors")->lost());

  const v1::Session fresh = Store("fresh", problem.content);
  EXPECT_TRUE(AskAll(fresh, problem.calls) == answers);
  ASSERT_NO_FATAL_FAILURE(StorePrompt("fresh-model", false));
  EXPECT_TRUE(client_->Score("fresh-model", {1, 2}).ok());

  // The lost ones stay lost, and the others stay, whatever becomes of the coordinator.
  KillCoordinator();
  RestartCoordinator();
  EXPECT_EQ(Ask(*client_, session, problem.calls[0]).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(AskAll(fresh, problem.calls) == answers);
  EXPECT_EQ(client_->DeleteSession("tensors"), absl::OkStatus());
}

TEST_F(ContentResume, TwoLiveWorkersCannotShareADataFolder) {
  const std::string errors = dir_ + "/errors";
  Process second(EDUBA_PROGRAM,
                 {"worker", "--coordinator", address_, "--listen", "127.0.0.1:0", "--memory-bytes", "64MiB",
                  "--data-dir", dir_ + "/worker0"},
                 errors);
  EXPECT_EQ(second.AwaitEnd(), 1);
  std::string text;
  std::ifstream file(errors);
  std::getline(file, text, '\0');
  EXPECT_THAT(text, HasSubstr("another worker that runs has data folder"));
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1) << text;
}

}  // namespace
}  // namespace eduba
