#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/reference/attention.h"
#include "rpc/spec.h"
#include "tests/cluster/test_cluster.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;
using Random = std::mt19937_64;

int64_t Below(Random& random, int64_t n) { return static_cast<int64_t>(random() % n); }

// Keys and values of all layers: [layers, length, kv_heads, dim], as the caller has them (f32).
struct Content {
  v1::SessionSpec spec;  // completed
  int64_t length = 0;
  std::vector<float> keys;
  std::vector<float> values;

  int64_t key_row() const { return int64_t{spec.kv_heads()} * spec.head_dim(); }
  int64_t value_row() const { return int64_t{spec.kv_heads()} * spec.value_dim(); }
};

// One attend call.
struct Call {
  AttendOptions options;
  int64_t rows = 0;
  std::vector<float> queries;  // [rows, query_heads, head_dim]
  std::vector<int64_t> positions;
};

// What a call was told.
struct Answers {
  std::vector<float> outputs;
  std::vector<float> lse;
  std::vector<float> sink_mass;
  v1::AttendSummary summary;

  bool operator==(const Answers& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return same(outputs, other.outputs) && same(lse, other.lse) && same(sink_mass, other.sink_mass) &&
           summary.row_heads_sink() == other.summary.row_heads_sink() &&
           summary.row_heads_maximum() == other.summary.row_heads_maximum();
  }
};

// A session's content and the calls made on it. Everything follows from the seed.
struct Problem {
  uint64_t seed = 0;
  Content content;
  std::vector<Call> calls;

  std::string Text() const {
    std::string spec = content.spec.ShortDebugString();
    return absl::StrCat("seed=", seed, " {length=", content.length, " ", spec, "}");
  }
};

Content MakeContent(const v1::SessionSpec& given, int64_t length, Random& random) {
  Content content;
  content.spec = *CompleteSpec(given);
  content.length = length;
  content.keys.resize(content.spec.layers() * length * content.key_row());
  content.values.resize(content.spec.layers() * length * content.value_row());
  std::normal_distribution<float> normal;
  for (float& x : content.keys) x = normal(random);
  // Values that grow along the sequence, so that later appends raise the exponents.
  for (size_t i = 0; i < content.values.size(); ++i) {
    content.values[i] = normal(random) * (1.0f + static_cast<float>(i % 4096) / 512.0f);
  }
  return content;
}

Call MakeCall(const Content& content, Random& random) {
  const v1::SessionSpec& spec = content.spec;
  Call call;
  call.options.layer = static_cast<int>(Below(random, spec.layers()));
  call.options.policy = spec.window() > 0 && Below(random, 2) == 0 ? v1::POLICY_WINDOW : v1::POLICY_GLOBAL;
  call.options.positions = Below(random, 2) == 0;
  call.rows = 1 + Below(random, Below(random, 4) == 0 ? 600 : 12);
  std::normal_distribution<float> normal;
  call.queries.resize(call.rows * spec.query_heads() * spec.head_dim());
  for (float& x : call.queries) x = normal(random);
  for (int64_t r = 0; r < call.rows; ++r) call.positions.push_back(Below(random, content.length));
  return call;
}

Problem MakeProblem(uint64_t seed) {
  Random random(seed);
  v1::SessionSpec spec;
  spec.set_layers(static_cast<int>(1 + Below(random, 2)));
  spec.set_kv_heads(static_cast<int>(1 + Below(random, 2)));
  spec.set_query_heads(spec.kv_heads() * static_cast<int>(1 + Below(random, 3)));
  spec.set_head_dim(static_cast<int>(1 + Below(random, 20)));
  spec.set_value_dim(static_cast<int>(1 + Below(random, 20)));
  spec.set_dtype(static_cast<v1::DType>(1 + Below(random, 3)));
  spec.set_sink_tokens(Below(random, 2) == 0 ? 0 : Below(random, 300));
  for (int h = 0; Below(random, 2) == 0 && h < spec.query_heads(); ++h) {
    while (spec.sink_logits_size() < spec.query_heads()) {
      spec.add_sink_logits(static_cast<float>(Below(random, 9)) - 2.0f);
    }
  }
  spec.set_window(Below(random, 3) == 0 ? 0 : 1 + Below(random, 700));
  spec.set_softcap(Below(random, 4) == 0 ? 8.0f : 0.0f);
  const float scales[] = {0.3f, 1.0f, 3.0f};
  spec.set_scale(scales[Below(random, 3)] / std::sqrt(static_cast<float>(spec.head_dim())));

  Problem problem;
  problem.seed = seed;
  problem.content = MakeContent(spec, 1 + Below(random, 4000), random);
  const int64_t calls = 3 + Below(random, 5);
  for (int64_t i = 0; i < calls; ++i) problem.calls.push_back(MakeCall(problem.content, random));
  return problem;
}

// Rows [at, ...) of a content.
class ContentSource : public RowSource {
 public:
  ContentSource(const Content& content, int64_t at) : content_(content), at_(at) {}
  DType dtype() const override { return DType::kF32; }
  absl::Status Read(int layer, int64_t first, int64_t count, void* keys, void* values) const override {
    const int64_t row = layer * content_.length + at_ + first;
    std::memcpy(keys, content_.keys.data() + row * content_.key_row(),
                count * content_.key_row() * sizeof(float));
    std::memcpy(values, content_.values.data() + row * content_.value_row(),
                count * content_.value_row() * sizeof(float));
    return absl::OkStatus();
  }

 private:
  const Content& content_;
  const int64_t at_;
};

absl::StatusOr<v1::AppendReceipt> Append(Client& client, const v1::Session& session, const Content& content,
                                         int64_t at, int64_t count, bool thin, bool say_at) {
  AppendOptions options;
  if (say_at) options.at = at;
  const ContentSource source(content, at);
  return thin ? client.AppendThin(session, count, source, options)
              : client.Append(session, count, source, options);
}

absl::StatusOr<Answers> Ask(Client& client, const v1::Session& session, const Call& call) {
  const int64_t query_row = int64_t{session.spec().query_heads()} * session.spec().head_dim();
  Answers answers;
  const auto queries = [&](int64_t first, absl::Span<float> rows, absl::Span<int64_t> positions) {
    std::copy_n(call.queries.begin() + first * query_row, rows.size(), rows.begin());
    std::copy_n(call.positions.begin() + first, positions.size(), positions.begin());
    return absl::OkStatus();
  };
  const auto take = [&](const AnsweredRows& rows) {
    answers.outputs.insert(answers.outputs.end(), rows.outputs.begin(), rows.outputs.end());
    answers.lse.insert(answers.lse.end(), rows.lse.begin(), rows.lse.end());
    answers.sink_mass.insert(answers.sink_mass.end(), rows.sink_mass.begin(), rows.sink_mass.end());
    return absl::OkStatus();
  };
  auto summary = client.Attend(session, call.rows, queries, take, call.options);
  if (!summary.ok()) return summary.status();
  answers.summary = *std::move(summary);
  return answers;
}

void ExpectOracle(const Content& content, const Call& call, const Answers& answers) {
  const v1::SessionSpec& spec = content.spec;
  const DType dtype = *DTypeFromProto(spec.dtype());
  const auto stored = [&](const std::vector<float>& rows, int64_t row) {
    std::vector<float> layer(rows.begin() + call.options.layer * content.length * row,
                             rows.begin() + (call.options.layer + 1) * content.length * row);
    for (float& x : layer) {
      uint32_t element = 0;
      StoreElement(&element, dtype, 0, x);
      x = LoadElement(&element, dtype, 0);
    }
    return layer;
  };
  DenseAttention dense;
  dense.rows = static_cast<int>(std::min<int64_t>(call.rows, 16));
  dense.query_heads = spec.query_heads();
  dense.kv_heads = spec.kv_heads();
  dense.head_dim = spec.head_dim();
  dense.value_dim = spec.value_dim();
  dense.scale = spec.scale();
  dense.softcap = spec.softcap();
  dense.queries.assign(call.queries.begin(),
                       call.queries.begin() + int64_t{dense.rows} * spec.query_heads() * spec.head_dim());
  dense.keys = stored(content.keys, content.key_row());
  dense.values = stored(content.values, content.value_row());
  dense.sink_logits.assign(spec.sink_logits().begin(), spec.sink_logits().end());
  dense.sink_tokens = static_cast<int>(spec.sink_tokens());
  dense.sees = [&](int row, int64_t j) {
    const int64_t p = call.options.positions ? call.positions[row] : content.length - 1;
    return j <= p &&
           (call.options.policy == v1::POLICY_GLOBAL || j < spec.sink_tokens() || p - spec.window() < j);
  };
  const DenseResult oracle = ReferenceAttention(dense);
  float size = 0;
  for (const float v : content.values) size = std::max(size, std::abs(v));
  for (size_t i = 0; i < oracle.outputs.size(); ++i) {
    ASSERT_NEAR(answers.outputs[i], oracle.outputs[i], 5e-6 * size) << "output " << i;
  }
  for (size_t i = 0; i < oracle.lse.size(); ++i) {
    ASSERT_NEAR(answers.lse[i], oracle.lse[i], 1e-5 * (1 + std::abs(oracle.lse[i]))) << "row and head " << i;
    ASSERT_NEAR(answers.sink_mass[i], oracle.sink_mass[i], 5e-6) << "row and head " << i;
  }
}

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
  const auto old = cluster.client().CreateSession("old", problem.content.spec);
  ASSERT_TRUE(old.ok());
  ASSERT_TRUE(Append(cluster.client(), *old, problem.content, 0, problem.content.length, false, false).ok());
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
  const auto fresh = cluster.client().CreateSession("new", problem.content.spec);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  ASSERT_TRUE(
      Append(cluster.client(), *fresh, problem.content, 0, problem.content.length, false, false).ok());
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
