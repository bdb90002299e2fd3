#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/cluster/session_problem.h"
#include "tests/cluster/test_cluster.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

// Appends the content in random chunks, over both paths, with retries and mistakes between. Returns the sum
// of the digests, which no chunking may change.
void AppendAll(Client& client, const v1::Session& session, const Content& content, Random& random,
               unsigned __int128& digest) {
  digest = 0;
  for (int64_t at = 0; at < content.length;) {
    const int64_t n = std::min(content.length - at, 1 + Below(random, 2500));
    const bool thin = Below(random, 3) == 0;
    const auto receipt = Append(client, session, content, at, n, thin, Below(random, 2) == 0);
    ASSERT_TRUE(receipt.ok()) << receipt.status();
    ASSERT_EQ(receipt->at(), at);
    ASSERT_EQ(receipt->length(), at + n);
    ASSERT_FALSE(receipt->already_stored());
    digest += (static_cast<unsigned __int128>(receipt->digest_high()) << 64) | receipt->digest_low();
    if (Below(random, 2) == 0) {
      const auto again = Append(client, session, content, at, n, Below(random, 2) == 0, true);
      ASSERT_TRUE(again.ok()) << again.status();
      ASSERT_TRUE(again->already_stored());
      ASSERT_EQ(again->digest_low(), receipt->digest_low());
      ASSERT_EQ(again->length(), at + n);
    }
    if (Below(random, 4) == 0) {
      Content other = content;
      other.values[at * content.value_row()] += 1.0f;
      ASSERT_EQ(Append(client, session, other, at, n, thin, true).status().code(),
                absl::StatusCode::kAlreadyExists);
    }
    at += n;
    if (Below(random, 4) == 0 && at + 1 < content.length) {
      const auto gap = Append(client, session, content, at + 1, 1, thin, true);
      ASSERT_EQ(gap.status().code(), absl::StatusCode::kOutOfRange) << gap.status();
    }
  }
}

// All calls at once, from a few threads.
std::vector<Answers> AskAll(Client& client, const v1::Session& session, const std::vector<Call>& calls) {
  std::vector<Answers> answers(calls.size());
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  threads.reserve(3);
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      for (size_t i = next++; i < calls.size(); i = next++) {
        auto answer = Ask(client, session, calls[i]);
        EXPECT_TRUE(answer.ok()) << answer.status();
        if (answer.ok()) answers[i] = *std::move(answer);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return answers;
}

TEST(Cluster, AnyWorkersStripesChunksBatchesAndTransportGiveTheSameBytes) {
  const TestCluster::Options sizes[] = {{1, "local"}, {2, "local"}, {3, "local"},
                                        {5, "local"}, {8, "local"}, {3, "gloo"}};
  constexpr uint64_t kSeeds = 6;
  std::vector<Problem> problems;
  problems.reserve(kSeeds);
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) problems.push_back(MakeProblem(seed));
  std::map<uint64_t, std::vector<Answers>> first;
  std::map<uint64_t, unsigned __int128> digests;
  int64_t sink_path = 0;
  int64_t maximum_path = 0;
  for (const TestCluster::Options& size : sizes) {
    TestCluster cluster(size);
    for (const Problem& problem : problems) {
      SCOPED_TRACE(absl::StrCat("workers=", size.workers, " ", size.transport, " ", problem.Text()));
      Random random(problem.seed * 1000 + size.workers);
      v1::SessionSpec spec = problem.content.spec;
      spec.set_stripe_pages(static_cast<int>(1 + Below(random, 5)));
      const auto session = cluster.client().CreateSession("s", spec);
      ASSERT_TRUE(session.ok()) << session.status();
      unsigned __int128 digest = 0;
      ASSERT_NO_FATAL_FAILURE(AppendAll(cluster.client(), *session, problem.content, random, digest));
      std::vector<Answers> answers = AskAll(cluster.client(), *session, problem.calls);
      if (!first.contains(problem.seed)) {
        for (size_t i = 0; i < answers.size(); ++i) {
          ASSERT_NO_FATAL_FAILURE(ExpectOracle(problem.content, problem.calls[i], answers[i]))
              << "call " << i;
          sink_path += answers[i].summary.row_heads_sink();
          maximum_path += answers[i].summary.row_heads_maximum();
        }
        first[problem.seed] = std::move(answers);
        digests[problem.seed] = digest;
      } else {
        EXPECT_TRUE(digests[problem.seed] == digest);
        for (size_t i = 0; i < answers.size(); ++i) {
          ASSERT_TRUE(answers[i] == first[problem.seed][i]) << "call " << i;
        }
      }
      ASSERT_EQ(cluster.client().DeleteSession("s"), absl::OkStatus());
    }
  }
  EXPECT_GT(sink_path, 100);
  EXPECT_GT(maximum_path, 100);
}

TEST(Cluster, QueriesDuringAppendsSeeExactlyACommittedLength) {
  const Problem problem = MakeProblem(101);
  TestCluster cluster({.workers = 3});
  TestCluster judge({.workers = 1});
  const auto session = cluster.client().CreateSession("growing", problem.content.spec);
  ASSERT_TRUE(session.ok()) << session.status();
  Call call = problem.calls[0];
  call.options.positions = false;
  ASSERT_TRUE(Append(cluster.client(), *session, problem.content, 0, 1, false, false).ok());

  std::atomic<bool> done{false};
  std::vector<Answers> seen;
  std::thread asking([&] {
    do {
      auto answer = Ask(cluster.client(), *session, call);
      ASSERT_TRUE(answer.ok()) << answer.status();
      seen.push_back(*std::move(answer));
    } while (!done);
  });
  Random random(1);
  for (int64_t at = 1; at < problem.content.length;) {
    const int64_t n = std::min(problem.content.length - at, 1 + Below(random, 300));
    const auto receipt = Append(cluster.client(), *session, problem.content, at, n, false, false);
    EXPECT_TRUE(receipt.ok()) << receipt.status();
    if (!receipt.ok()) break;
    at += n;
  }
  done = true;
  asking.join();

  // The same content, and no more, on one worker.
  const auto fresh = judge.client().CreateSession("judge", problem.content.spec);
  ASSERT_TRUE(fresh.ok());
  int64_t length = 0;
  for (const Answers& answers : seen) {
    const int64_t seen_length = answers.summary.length();
    ASSERT_GE(seen_length, length);
    if (seen_length > length) {
      ASSERT_TRUE(
          Append(judge.client(), *fresh, problem.content, length, seen_length - length, false, true).ok());
      length = seen_length;
    }
    const auto wanted = Ask(judge.client(), *fresh, call);
    ASSERT_TRUE(wanted.ok()) << wanted.status();
    ASSERT_TRUE(answers == *wanted) << "at length " << seen_length;
  }
  EXPECT_GT(seen.size(), 1u);
}

TEST(Cluster, AWorkerThatLeavesTakesItsSessionsButNotTheService) {
  const Problem problem = MakeProblem(202);
  TestCluster cluster({.workers = 2});
  const auto old = StoreSession(cluster.client(), "old", problem.content);
  ASSERT_TRUE(old.ok()) << old.status();
  const auto before = Ask(cluster.client(), *old, problem.calls[0]);
  ASSERT_TRUE(before.ok()) << before.status();

  cluster.StopWorker(1);
  // Until the coordinator has seen it, an answer may still be right; never wrong.
  absl::Status status;
  do {
    const auto answer = Ask(cluster.client(), *old, problem.calls[0]);
    status = answer.status();
    EXPECT_TRUE(!answer.ok() || *answer == *before);
  } while (status.ok());
  EXPECT_TRUE(absl::IsUnavailable(status) || absl::IsDataLoss(status)) << status;

  cluster.ReplaceWorker(1);
  cluster.AwaitActive();
  const auto lost = Ask(cluster.client(), *old, problem.calls[0]);
  EXPECT_EQ(lost.status().code(), absl::StatusCode::kDataLoss) << lost.status();
  const auto fresh = StoreSession(cluster.client(), "new", problem.content);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  const auto after = Ask(cluster.client(), *fresh, problem.calls[0]);
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_TRUE(*after == *before);
}

TEST(Cluster, AFullStoreRefusesAndKeepsWhatItHas) {
  v1::SessionSpec spec;
  spec.set_query_heads(1);
  spec.set_kv_heads(1);
  spec.set_head_dim(8);
  spec.set_stripe_pages(1);
  Random random(3);
  const Content content = MakeContent(spec, 20000, random);
  // Pages are a little larger than what they hold: 2 MiB take 20000 positions of 64 bytes, not 30000.
  TestCluster cluster({.workers = 2, .memory_bytes = int64_t{1} << 20});
  const auto session = cluster.client().CreateSession("s", spec);
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE(Append(cluster.client(), *session, content, 0, 10000, false, false).ok());
  Call call = MakeCall(content, random);
  call.options = {};
  const auto before = Ask(cluster.client(), *session, call);
  ASSERT_TRUE(before.ok()) << before.status();

  Content large = MakeContent(spec, 60000, random);
  std::copy(content.keys.begin(), content.keys.end(), large.keys.begin());
  for (const bool thin : {false, true}) {
    const auto refused = Append(cluster.client(), *session, large, 10000, 50000, thin, false);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted) << refused.status();
    EXPECT_THAT(std::string(refused.status().message()), HasSubstr("free"));
  }
  const auto after = Ask(cluster.client(), *session, call);
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_TRUE(*after == *before);
  EXPECT_EQ(cluster.client().GetSession("s")->length(), 10000);
  // Memory that a deletion gives back can be used at once.
  ASSERT_EQ(cluster.client().DeleteSession("s"), absl::OkStatus());
  const auto again = cluster.client().CreateSession("s", spec);
  ASSERT_TRUE(again.ok());
  const auto receipt = Append(cluster.client(), *again, content, 0, 20000, false, false);
  EXPECT_TRUE(receipt.ok()) << receipt.status();
}

TEST(Cluster, NonFiniteNumbersAreRefusedAtTheDoor) {
  const Problem problem = MakeProblem(7);
  TestCluster cluster({.workers = 2});
  const auto session = cluster.client().CreateSession("s", problem.content.spec);
  ASSERT_TRUE(session.ok());
  Content bad = problem.content;
  bad.keys.back() = std::nanf("");
  for (const bool thin : {false, true}) {
    const auto receipt = Append(cluster.client(), *session, bad, 0, bad.length, thin, false);
    EXPECT_EQ(receipt.status().code(), absl::StatusCode::kInvalidArgument) << receipt.status();
    EXPECT_THAT(std::string(receipt.status().message()),
                HasSubstr(absl::StrCat("position ", bad.length - 1, ", layer ", bad.spec.layers() - 1)));
  }
  EXPECT_EQ(cluster.client().GetSession("s")->length(), 0);
  ASSERT_TRUE(
      Append(cluster.client(), *session, problem.content, 0, problem.content.length, false, false).ok());
  Call call = problem.calls[0];
  const auto right = Ask(cluster.client(), *session, call);
  ASSERT_TRUE(right.ok());
  call.queries[0] = -INFINITY;
  EXPECT_EQ(Ask(cluster.client(), *session, call).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(*Ask(cluster.client(), *session, problem.calls[0]) == *right);
}

}  // namespace
}  // namespace eduba
