// Model sessions on whole clusters: the same bytes for any number of workers, any chunks, alone or beside
// others, forked or not; and what bad luck and bad input get.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "client/client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/cluster/session_problem.h"
#include "tests/cluster/test_cluster.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kVocabulary = 97;  // The vocabulary of the golden models that are used here.
std::string ModelFolder(const std::string& name) { return absl::StrCat(EDUBA_GOLDEN_MODELS, "/", name); }

TestCluster::Options ClusterOf(int workers, const std::string& model,
                               const std::string& transport = "local") {
  TestCluster::Options options;
  options.workers = workers;
  options.transport = transport;
  options.model = ModelFolder(model);
  return options;
}

v1::SessionSpec ModelSession() {
  v1::SessionSpec spec;
  spec.set_stripe_pages(1);
  spec.mutable_model();
  return spec;
}

// One that generates on one worker.
v1::SessionSpec StreamingSession() {
  v1::SessionSpec spec = ModelSession();
  spec.mutable_model()->set_policy(v1::MODEL_POLICY_STREAMING);
  spec.mutable_model()->set_window(20);
  return spec;
}

std::vector<int32_t> RandomIds(Random& random, int64_t count) {
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) id = static_cast<int32_t>(Below(random, kVocabulary));
  return ids;
}

// One session and what is asked of it, from a seed.
struct ModelProblem {
  uint64_t seed = 0;
  v1::SessionSpec spec;
  std::vector<int32_t> ids;
  std::vector<int32_t> question;
  std::vector<int64_t> ranges;
  v1::GenerateRequest generate;

  std::string Text() const {
    return absl::StrCat("seed=", seed, " {", spec.model().ShortDebugString(), " length=", ids.size(),
                        " temperature=", generate.temperature(), "}");
  }
};

ModelProblem MakeModelProblem(uint64_t seed) {
  Random random(seed);
  ModelProblem problem;
  problem.seed = seed;
  problem.spec = ModelSession();
  v1::ModelSpec& model = *problem.spec.mutable_model();
  model.set_policy(static_cast<v1::ModelPolicy>(1 + seed % 3));
  model.set_sink_tokens(Below(random, 3) == 0 ? 0 : Below(random, 20));
  if (model.policy() != v1::MODEL_POLICY_MODEL) model.set_window(1 + Below(random, 300));
  if (model.policy() == v1::MODEL_POLICY_STREAMING && Below(random, 2) == 0) {
    model.set_positions(v1::POSITION_MODE_ROLLING);
  }
  problem.ids = RandomIds(random, 300 + Below(random, 800));
  problem.question = RandomIds(random, 1 + Below(random, 300));
  for (int64_t at = 0; at + 60 < static_cast<int64_t>(problem.ids.size()); at += 50 + Below(random, 60)) {
    problem.ranges.insert(problem.ranges.end(), {at, at + 1 + Below(random, 50)});
  }
  problem.generate.set_max_tokens(12);
  problem.generate.set_sink_mass(true);
  if (Below(random, 2) == 0) {
    problem.generate.set_temperature(0.8F);
    problem.generate.set_seed(seed);
  }
  return problem;
}

struct ModelAnswers {
  std::vector<float> scores;
  std::vector<float> vectors;
  std::string ids, log_probs;  // generated, as they came
  std::vector<float> scores_behind;
  std::vector<float> score_mass;  // [layers, query_heads], as the next
  std::string generate_mass;
  bool operator==(const ModelAnswers&) const = default;
};

absl::StatusOr<v1::GenerateSummary> Generate(Client& client, const std::string& session,
                                             v1::GenerateRequest request, ModelAnswers* answers) {
  request.set_session(session);
  auto summary = client.Generate(request, [&](const v1::GenerateResponse::Tokens& tokens) {
    answers->ids += tokens.ids();
    answers->log_probs += tokens.log_probs();
    return absl::OkStatus();
  });
  if (summary.ok()) answers->generate_mass = summary->sink_mass();
  return summary;
}

// Random chunks, with repetitions and mistakes between.
void AppendInChunks(Client& client, const std::string& session, const ModelProblem& problem, Random& random) {
  const absl::Span<const int32_t> ids = problem.ids;
  for (size_t at = 0; at < ids.size();) {
    const size_t count = std::min<size_t>(ids.size() - at, 1 + Below(random, 500));
    AppendOptions options;
    if (Below(random, 2) == 0) options.at = at;
    const auto receipt = client.AppendTokens(session, ids.subspan(at, count), options);
    ASSERT_TRUE(receipt.ok()) << receipt.status();
    ASSERT_EQ(receipt->length(), at + count);
    ASSERT_EQ(receipt->already_stored(), 0);
    if (Below(random, 2) == 0) {
      // A repetition may have other borders.
      options.at = Below(random, static_cast<int64_t>(at + count));
      const auto again =
          client.AppendTokens(session, ids.subspan(*options.at, at + count - *options.at), options);
      ASSERT_TRUE(again.ok()) << again.status();
      ASSERT_EQ(again->already_stored(), again->count());
      ASSERT_EQ(again->length(), at + count);
      const std::vector<int32_t> other = {(ids[*options.at] + 1) % static_cast<int32_t>(kVocabulary)};
      ASSERT_EQ(client.AppendTokens(session, other, options).status().code(),
                absl::StatusCode::kAlreadyExists);
      options.at = at + count + 1;
      ASSERT_EQ(client.AppendTokens(session, other, options).status().code(), absl::StatusCode::kOutOfRange);
    }
    at += count;
  }
}

ModelAnswers AskAll(Client& client, const std::string& session, const ModelProblem& problem) {
  ModelAnswers answers;
  const auto scores = client.Score(session, problem.question);
  EXPECT_TRUE(scores.ok()) << scores.status();
  if (scores.ok()) answers.scores = *scores;
  // Asking for sink mass changes nothing else.
  EXPECT_EQ(*client.Score(session, problem.question, &answers.score_mass), answers.scores);
  const auto vectors =
      client.Embed(session, problem.ranges, problem.seed % 2 == 0 ? v1::POOL_MEAN : v1::POOL_LAST);
  EXPECT_TRUE(vectors.ok()) << vectors.status();
  if (vectors.ok()) answers.vectors = *vectors;
  const auto summary = Generate(client, session, problem.generate, &answers);
  EXPECT_TRUE(summary.ok()) << summary.status();
  if (summary.ok()) {
    EXPECT_EQ(summary->tokens() * 4, static_cast<int64_t>(answers.ids.size()));
  }
  const auto behind = client.Score(session, problem.question);
  EXPECT_TRUE(behind.ok()) << behind.status();
  if (behind.ok()) answers.scores_behind = *behind;
  return answers;
}

// All problems at once, each from a thread of its own, half of them on a fork.
std::vector<ModelAnswers> SolveTogether(TestCluster& cluster, const std::vector<ModelProblem>& problems) {
  std::vector<ModelAnswers> answers(problems.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < problems.size(); ++i) {
    threads.emplace_back([&, i] {
      Random random(problems[i].seed * 31 + static_cast<uint64_t>(cluster.workers()));
      Client& client = cluster.client();
      std::string name = absl::StrCat("s", problems[i].seed);
      const auto session = client.CreateSession(name, problems[i].spec);
      ASSERT_TRUE(session.ok()) << session.status();
      AppendInChunks(client, name, problems[i], random);
      if (Below(random, 2) == 0) {
        const auto fork = client.ForkSession(name, name + "-fork");
        ASSERT_TRUE(fork.ok()) << fork.status();
        ASSERT_EQ(fork->length(), static_cast<int64_t>(problems[i].ids.size()));
        // The origin goes its own way meanwhile.
        ASSERT_TRUE(client.AppendTokens(name, {1, 2, 3}, {}).ok());
        name += "-fork";
      }
      answers[i] = AskAll(client, name, problems[i]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return answers;
}

TEST(ModelCluster, AnyWorkersChunksNeighboursForksAndTransportGiveTheSameBytes) {
  const std::pair<int, const char*> clusters[] = {{2, "local"}, {3, "local"}, {4, "local"}, {3, "gloo"}};
  for (const std::string model : {"llama", "gemma3"}) {
    std::vector<ModelProblem> problems;
    std::vector<ModelAnswers> alone;
    {
      TestCluster cluster(ClusterOf(1, model));
      for (uint64_t seed = 1; seed <= 5; ++seed) {
        problems.push_back(MakeModelProblem(seed));
        alone.push_back(SolveTogether(cluster, {problems.back()})[0]);
      }
    }
    for (const auto& [workers, transport] : clusters) {
      TestCluster cluster(ClusterOf(workers, model, transport));
      const std::vector<ModelAnswers> together = SolveTogether(cluster, problems);
      for (size_t i = 0; i < problems.size(); ++i) {
        EXPECT_EQ(together[i].scores, alone[i].scores)
            << model << " on " << workers << ", " << problems[i].Text();
        EXPECT_EQ(together[i].vectors, alone[i].vectors)
            << model << " on " << workers << ", " << problems[i].Text();
        EXPECT_TRUE(together[i] == alone[i])
            << model << " on " << workers << " over " << transport << ", " << problems[i].Text();
      }
    }
  }
}

// More of them than workers, each on one; and one that all compute.
TEST(ModelCluster, StreamingSessionsBesideEachOtherGiveTheBytesOfOneWorker) {
  std::vector<ModelProblem> problems;
  for (const uint64_t seed : {22, 25, 28, 31, 34, 24}) {
    problems.push_back(MakeModelProblem(seed));
    ASSERT_EQ(problems.back().spec.model().policy(),
              seed == 24 ? v1::MODEL_POLICY_MODEL : v1::MODEL_POLICY_STREAMING);
    problems.back().generate.set_max_tokens(60);
  }
  // It generates while it is shorter than its sinks.
  problems[0].spec.mutable_model()->set_sink_tokens(20);
  problems[0].ids.resize(5);
  problems[0].ranges = {0, 2};
  std::vector<ModelAnswers> alone;
  {
    TestCluster cluster(ClusterOf(1, "llama"));
    for (const ModelProblem& problem : problems) alone.push_back(SolveTogether(cluster, {problem})[0]);
  }
  const std::pair<int, const char*> clusters[] = {{1, "local"}, {2, "local"}, {3, "local"},
                                                  {4, "local"}, {2, "gloo"},  {3, "gloo"}};
  for (const auto& [workers, transport] : clusters) {
    TestCluster cluster(ClusterOf(workers, "llama", transport));
    const std::vector<ModelAnswers> together = SolveTogether(cluster, problems);
    for (size_t i = 0; i < problems.size(); ++i) {
      EXPECT_TRUE(together[i] == alone[i])
          << "on " << workers << " over " << transport << ", " << problems[i].Text();
    }
  }
}

// Appends and questions of many stripes, read by sequence-parallel prefill: windows need halos from the
// worker before, layers without one the sums of all. One session generates all the while.
TEST(ModelCluster, LongPromptsAreSharedOutToTheBytesOfOneWorker) {
  struct Case {
    const char* model;
    v1::ModelPolicy policy;
    v1::PositionMode positions;
    int64_t window;
  };
  const Case cases[] = {{"gemma3", v1::MODEL_POLICY_MODEL, v1::POSITION_MODE_ABSOLUTE, 0},
                        {"gemma3", v1::MODEL_POLICY_STAR, v1::POSITION_MODE_ABSOLUTE, 300},
                        {"llama", v1::MODEL_POLICY_STREAMING, v1::POSITION_MODE_ROLLING, 400},
                        {"llama", v1::MODEL_POLICY_MODEL, v1::POSITION_MODE_ABSOLUTE, 0}};
  for (const Case& c : cases) {
    Random random(static_cast<uint64_t>(c.window) + 1);
    const std::vector<int32_t> ids = RandomIds(random, 3000);
    ModelProblem problem;
    problem.question = RandomIds(random, 900);
    problem.ranges = {5, 6, 100, 1300, 2000, 3000};
    problem.generate.set_max_tokens(6);
    v1::SessionSpec spec = ModelSession();
    spec.mutable_model()->set_policy(c.policy);
    spec.mutable_model()->set_positions(c.positions);
    spec.mutable_model()->set_window(c.window);
    spec.mutable_model()->set_sink_tokens(4);
    const auto ask = [&](int workers, const std::string& transport, size_t piece) {
      TestCluster cluster(ClusterOf(workers, c.model, transport));
      Client& client = cluster.client();
      EXPECT_TRUE(client.CreateSession("s", spec).ok());
      EXPECT_TRUE(client.CreateSession("beside", ModelSession()).ok());
      EXPECT_TRUE(client.AppendTokens("beside", {1, 2, 3}, {}).ok());
      std::atomic<bool> over{false};
      ModelAnswers beside;
      std::thread generation([&] {
        v1::GenerateRequest request;
        request.set_max_tokens(1);
        while (!over) EXPECT_TRUE(Generate(client, "beside", request, &beside).ok());
      });
      for (size_t at = 0; at < ids.size(); at += piece) {
        const auto receipt = client.AppendTokens("s", absl::MakeConstSpan(ids).subspan(at, piece), {});
        EXPECT_TRUE(receipt.ok()) << receipt.status();
      }
      ModelAnswers answers = AskAll(client, "s", problem);
      over = true;
      generation.join();
      EXPECT_FALSE(beside.ids.empty());
      return answers;
    };
    const ModelAnswers wanted = ask(1, "local", ids.size());
    EXPECT_TRUE(ask(2, "local", ids.size()) == wanted) << c.model << " " << c.policy;
    EXPECT_TRUE(ask(3, "gloo", 1100) == wanted) << c.model << " " << c.policy;
    EXPECT_TRUE(ask(4, "local", 2999) == wanted) << c.model << " " << c.policy;
  }
}

TEST(ModelCluster, SinkMassIsTheSinksShareOfEachHead) {
  TestCluster cluster(ClusterOf(3, "gemma3"));
  Client& client = cluster.client();
  const auto model = client.GetModel();
  ASSERT_TRUE(model.ok()) << model.status();
  const int64_t heads = model->query_heads();
  v1::SessionSpec spec = ModelSession();
  ASSERT_TRUE(client.CreateSession("s", spec).ok());
  spec.mutable_model()->set_sink_tokens(65536);
  ASSERT_TRUE(client.CreateSession("all", spec).ok());
  Random random(3);
  const std::vector<int32_t> ids = RandomIds(random, 700);
  std::vector<float> some;
  std::vector<float> all;
  for (const char* name : {"s", "all"}) ASSERT_TRUE(client.AppendTokens(name, ids, {}).ok());
  ASSERT_TRUE(client.Score("s", absl::MakeConstSpan(ids).first(300), &some).ok());
  ASSERT_TRUE(client.Score("all", absl::MakeConstSpan(ids).first(300), &all).ok());
  ASSERT_EQ(static_cast<int64_t>(some.size()), model->layer_windows_size() * heads);
  for (size_t i = 0; i < some.size(); ++i) {
    // A layer's own window keeps no sinks; where all that is seen is a sink, they have all the weight.
    const bool windowed = model->layer_windows(static_cast<int>(i) / static_cast<int>(heads)) > 0;
    EXPECT_EQ(all[i], windowed ? 0 : 1) << i;
    EXPECT_TRUE(windowed ? some[i] == 0 : some[i] > 0 && some[i] < 1) << i << " " << some[i];
  }
}

TEST(ModelCluster, DedicatedSinksAreTheSameAsTokensThatTheClientSends) {
  for (const int workers : {1, 3}) {
    TestCluster cluster(ClusterOf(workers, "llama"));
    Client& client = cluster.client();
    ModelProblem problem = MakeModelProblem(7);
    v1::ModelSpec& model = *problem.spec.mutable_model();
    model.set_sink_tokens(300);  // More than one chunk.
    model.clear_sink_token();
    ASSERT_TRUE(client.CreateSession("sent", problem.spec).ok());
    model.set_sink_token(11);
    const auto session = client.CreateSession("dedicated", problem.spec);
    ASSERT_TRUE(session.ok()) << session.status();
    EXPECT_EQ(session->length(), 0);
    v1::GenerateRequest request = problem.generate;
    ModelAnswers nothing;
    EXPECT_EQ(Generate(client, "dedicated", request, &nothing).status().code(),
              absl::StatusCode::kFailedPrecondition);
    ASSERT_TRUE(client.AppendTokens("sent", std::vector<int32_t>(300, 11), {}).ok());
    ASSERT_TRUE(client.AppendTokens("sent", problem.ids, {}).ok());
    const auto receipt = client.AppendTokens("dedicated", problem.ids, {});
    ASSERT_TRUE(receipt.ok()) << receipt.status();
    EXPECT_EQ(receipt->at(), 300);
    EXPECT_EQ(receipt->count(), static_cast<int64_t>(problem.ids.size()));
    EXPECT_EQ(receipt->length(), 300 + receipt->count());
    EXPECT_TRUE(AskAll(client, "dedicated", problem) == AskAll(client, "sent", problem)) << problem.Text();
  }
}

TEST(ModelCluster, AnAppendThatEndsAmongTheSinksGoesOnBehindThem) {
  TestCluster::Options options = ClusterOf(1, "llama");
  options.memory_bytes = int64_t{4} << 20;
  TestCluster cluster(options);
  Client& client = cluster.client();
  v1::SessionSpec spec = ModelSession();
  spec.mutable_model()->set_sink_tokens(4096);
  spec.mutable_model()->set_sink_token(11);
  ASSERT_TRUE(client.CreateSession("filler", ModelSession()).ok());
  ASSERT_TRUE(client.CreateSession("s", spec).ok());
  int64_t filled = 0;
  while (client.AppendTokens("filler", std::vector<int32_t>(256, 3), {}).ok()) filled += 256;
  // Room for some of the sinks.
  ASSERT_TRUE(client.DeleteSession("filler").ok());
  ASSERT_TRUE(client.CreateSession("filler", ModelSession()).ok());
  ASSERT_GT(filled, 4352);
  ASSERT_TRUE(client.AppendTokens("filler", std::vector<int32_t>(filled - 1024, 3), {}).ok());
  EXPECT_EQ(client.AppendTokens("s", {1, 2}, {}).status().code(), absl::StatusCode::kResourceExhausted);
  const int64_t length = client.GetSession("s")->length();
  ASSERT_GT(length, 0);
  ASSERT_LT(length, 4096);
  EXPECT_THAT(std::string(client.Score("s", {1}).status().message()),
              HasSubstr("of its 4096 sink tokens only"));
  ASSERT_TRUE(client.DeleteSession("filler").ok());
  const auto receipt = client.AppendTokens("s", {1, 2}, {});
  ASSERT_TRUE(receipt.ok()) << receipt.status();
  EXPECT_EQ(receipt->at(), 4096);
  EXPECT_EQ(receipt->count(), 2);
  EXPECT_EQ(receipt->length(), 4098);
  AppendOptions again;
  again.at = 0;
  std::vector<int32_t> all(4096, 11);
  all.insert(all.end(), {1, 2});
  EXPECT_EQ(client.AppendTokens("s", all, again)->already_stored(), 4098);
}

TEST(ModelCluster, GenerationGoesOnBehindADeadlineAsIfThereHadBeenNone) {
  TestCluster cluster(ClusterOf(2, "llama"));
  Client& client = cluster.client();
  for (const v1::SessionSpec& spec : {ModelSession(), StreamingSession()}) {
    for (const char* name : {"whole", "cut"}) {
      ASSERT_TRUE(client.CreateSession(name, spec).ok());
      ASSERT_TRUE(client.AppendTokens(name, {5, 6, 7}, {}).ok());
    }
    v1::GenerateRequest request;
    request.set_max_tokens(1 << 20);
    request.set_time_limit_ms(200);
    ModelAnswers cut;
    const auto summary = Generate(client, "cut", request, &cut);
    ASSERT_TRUE(summary.ok()) << summary.status();
    EXPECT_EQ(summary->finish_reason(), v1::FINISH_REASON_DEADLINE);
    ASSERT_GT(summary->tokens(), 0);
    EXPECT_EQ(summary->length(), 3 + summary->tokens());
    EXPECT_EQ(client.GetSession("cut")->length(), summary->length());

    request.set_time_limit_ms(0);
    request.set_max_tokens(5);
    ASSERT_TRUE(Generate(client, "cut", request, &cut).ok());
    request.set_max_tokens(summary->tokens() + 5);
    ModelAnswers whole;
    ASSERT_TRUE(Generate(client, "whole", request, &whole).ok());
    EXPECT_EQ(cut.ids, whole.ids);
    EXPECT_EQ(cut.log_probs, whole.log_probs);
    // What was generated is kept like what was sent.
    std::vector<int32_t> ids(whole.ids.size() / 4);
    std::memcpy(ids.data(), whole.ids.data(), whole.ids.size());
    AppendOptions at_prompt;
    at_prompt.at = 3;
    EXPECT_EQ(client.AppendTokens("cut", ids, at_prompt)->already_stored(), summary->tokens() + 5);
    for (const char* name : {"whole", "cut"}) ASSERT_TRUE(client.DeleteSession(name).ok());
  }
}

TEST(ModelCluster, AClientThatGoesAwayLeavesWhatWasGenerated) {
  TestCluster cluster(ClusterOf(2, "llama"));
  Client& client = cluster.client();
  for (const v1::SessionSpec& spec : {ModelSession(), StreamingSession()}) {
    ASSERT_TRUE(client.CreateSession("s", spec).ok());
    ASSERT_TRUE(client.AppendTokens("s", {5, 6, 7}, {}).ok());
    v1::GenerateRequest request;
    request.set_session("s");
    request.set_max_tokens(1 << 20);
    const auto given_up = client.Generate(
        request, [](const v1::GenerateResponse::Tokens&) { return absl::CancelledError("enough"); });
    EXPECT_EQ(given_up.status().message(), "enough");
    // The session is free again as soon as the job has ended.
    absl::StatusOr<v1::AppendTokensReceipt> receipt;
    do {
      receipt = client.AppendTokens("s", {1}, {});
    } while (absl::IsAborted(receipt.status()));
    ASSERT_TRUE(receipt.ok()) << receipt.status();
    EXPECT_GT(receipt->at(), 3);
    ASSERT_TRUE(client.DeleteSession("s").ok());
  }
}

TEST(ModelCluster, ASessionThatIsDeletedInMidGenerationLeavesTheOthersGoing) {
  TestCluster cluster(ClusterOf(3, "llama"));
  Client& client = cluster.client();
  for (const char* name : {"doomed", "other"}) {
    ASSERT_TRUE(client.CreateSession(name, StreamingSession()).ok());
    ASSERT_TRUE(client.AppendTokens(name, {5, 6, 7}, {}).ok());
  }
  const auto generate = [&](const char* name, absl::Notification* began) {
    v1::GenerateRequest request;
    request.set_session(name);
    request.set_max_tokens(1 << 20);
    request.set_time_limit_ms(name == std::string("doomed") ? 0 : 500);
    return client
        .Generate(request,
                  [&](const v1::GenerateResponse::Tokens&) {
                    if (!began->HasBeenNotified()) began->Notify();
                    return absl::OkStatus();
                  })
        .status();
  };
  absl::Notification began[2];
  absl::Status status[2];
  std::thread doomed([&] { status[0] = generate("doomed", &began[0]); });
  began[0].WaitForNotification();
  std::thread other([&] { status[1] = generate("other", &began[1]); });
  began[1].WaitForNotification();
  EXPECT_TRUE(client.DeleteSession("doomed").ok());
  doomed.join();
  other.join();
  EXPECT_EQ(status[0].code(), absl::StatusCode::kNotFound) << status[0];
  EXPECT_TRUE(status[1].ok()) << status[1];
  EXPECT_TRUE(client.Score("other", {1, 2}).ok());
}

TEST(ModelCluster, AWorkerThatDiesInMidGenerationMakesItUnavailable) {
  struct Case {
    v1::SessionSpec spec;
    int victim;
  };
  // Worker 0 owns the only generation.
  for (const Case& c : {Case{ModelSession(), 1}, Case{StreamingSession(), 0}, Case{StreamingSession(), 1}}) {
    TestCluster cluster(ClusterOf(3, "llama"));
    Client& client = cluster.client();
    ASSERT_TRUE(client.CreateSession("s", c.spec).ok());
    ASSERT_TRUE(client.AppendTokens("s", {5, 6, 7}, {}).ok());
    v1::GenerateRequest request;
    request.set_session("s");
    request.set_max_tokens(1 << 20);
    absl::Notification began;
    absl::Status status;
    std::thread caller([&] {
      status = client
                   .Generate(request,
                             [&](const v1::GenerateResponse::Tokens&) {
                               if (!began.HasBeenNotified()) began.Notify();
                               return absl::OkStatus();
                             })
                   .status();
    });
    began.WaitForNotification();
    cluster.StopWorker(c.victim);
    caller.join();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;

    cluster.ReplaceWorker(c.victim);
    cluster.AwaitActive();
    EXPECT_EQ(client.AppendTokens("s", {1}, {}).status().code(), absl::StatusCode::kDataLoss);
    ASSERT_TRUE(client.CreateSession("t", ModelSession()).ok());
    EXPECT_TRUE(client.AppendTokens("t", {1}, {}).ok());
  }
}

TEST(ModelCluster, AnAppendWithoutMemorySaysHowFarItCameAndLeavesTheSessionUsable) {
  TestCluster::Options options = ClusterOf(2, "llama");
  options.memory_bytes = int64_t{1} << 20;
  TestCluster cluster(options);
  Client& client = cluster.client();
  ASSERT_TRUE(client.CreateSession("s", ModelSession()).ok());
  const std::vector<int32_t> ids(100000, 3);
  const auto receipt = client.AppendTokens("s", ids, {});
  EXPECT_EQ(receipt.status().code(), absl::StatusCode::kResourceExhausted) << receipt.status();
  const int64_t length = client.GetSession("s")->length();
  EXPECT_GT(length, 0);
  EXPECT_THAT(std::string(receipt.status().message()), HasSubstr(absl::StrCat("has ", length, " now")));
  AppendOptions again;
  again.at = 0;
  const auto stored = client.AppendTokens("s", absl::MakeConstSpan(ids).first(length), again);
  ASSERT_TRUE(stored.ok()) << stored.status();
  EXPECT_EQ(stored->already_stored(), length);
  ASSERT_TRUE(client.DeleteSession("s").ok());
  ASSERT_TRUE(client.CreateSession("s", ModelSession()).ok());
  EXPECT_TRUE(client.AppendTokens("s", {1}, {}).ok());
}

TEST(ModelCluster, BadInputIsRefused) {
  TestCluster cluster(ClusterOf(2, "llama"));
  Client& client = cluster.client();
  ASSERT_TRUE(client.CreateSession("s", ModelSession()).ok());
  v1::SessionSpec tensors;
  tensors.set_query_heads(1);
  tensors.set_kv_heads(1);
  tensors.set_head_dim(4);
  ASSERT_TRUE(client.CreateSession("tensors", tensors).ok());
  v1::GenerateRequest request;
  request.set_max_tokens(1);
  ModelAnswers answers;

  using absl::StatusCode;
  const std::vector<int32_t> unknown = {0, static_cast<int32_t>(kVocabulary)};
  EXPECT_EQ(client.AppendTokens("s", unknown, {}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(client.AppendTokens("s", {-1}, {}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(client.AppendTokens("s", {}, {}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(client.AppendTokens("none", {1}, {}).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(client.AppendTokens("tensors", {1}, {}).status().code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(Generate(client, "s", request, &answers).status().code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(client.Score("s", {1}).status().code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(client.Embed("s", {0, 1}, v1::POOL_MEAN).status().code(), StatusCode::kOutOfRange);

  ASSERT_TRUE(client.AppendTokens("s", {1, 2, 3}, {}).ok());
  EXPECT_EQ(client.Score("s", unknown).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(client.Score("s", std::vector<int32_t>(196609, 1)).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(client.Embed("s", {1, 1}, v1::POOL_MEAN).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(client.Embed("s", {1, 3, 0, 1}, v1::POOL_MEAN).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(client.ForkSession("s", "s").status().code(), StatusCode::kAlreadyExists);
  EXPECT_EQ(client.ForkSession("tensors", "t").status().code(), StatusCode::kFailedPrecondition);
  request.set_max_tokens(0);
  EXPECT_EQ(Generate(client, "s", request, &answers).status().code(), StatusCode::kInvalidArgument);
  request.set_max_tokens(1);
  request.set_temperature(-1);
  EXPECT_EQ(Generate(client, "s", request, &answers).status().code(), StatusCode::kInvalidArgument);
  request.set_temperature(0);
  request.add_stop_strings("x");
  EXPECT_EQ(Generate(client, "s", request, &answers).status().code(), StatusCode::kFailedPrecondition);

  v1::SessionSpec spec = ModelSession();
  spec.mutable_model()->set_policy(v1::MODEL_POLICY_STREAMING);
  EXPECT_EQ(client.CreateSession("t", spec).status().code(), StatusCode::kInvalidArgument);  // No window.
  spec = ModelSession();
  spec.set_head_dim(8);
  EXPECT_EQ(client.CreateSession("t", spec).status().code(), StatusCode::kInvalidArgument);
  // All the refusals left the session as it was.
  EXPECT_EQ(client.GetSession("s")->length(), 3);
}

TEST(ModelCluster, WithoutAModelItsSessionsAreRefused) {
  TestCluster cluster(TestCluster::Options{});
  EXPECT_EQ(cluster.client().GetModel().status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(cluster.client().CreateSession("s", ModelSession()).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace eduba
