#include "model/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "collective/gloo/gloo_communicator.h"
#include "collective/local/local_communicator.h"
#include "collective/map_rendezvous.h"
#include "collective/testing/counting_communicator.h"
#include "collective/testing/forwarding_communicator.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "model/testing/dense_attention.h"
#include "model/testing/engine_fixture.h"
#include "model/testing/random_model.h"

namespace eduba {
namespace {

using testing::DenseAttention;
using testing::Fixture;
using testing::FixtureOptions;
using ::testing::HasSubstr;
using testing::JobOutcome;
using testing::RandomModel;
using testing::RandomOptions;
using testing::RunGroup;
using testing::Session;
using testing::ToString;

double Error(const std::vector<float>& got, const std::vector<float>& wanted) {
  EXPECT_EQ(got.size(), wanted.size());
  double error = 0;
  double size = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    error = std::max(error, std::abs(static_cast<double>(got[i]) - wanted[i]));
    size = std::max(size, std::abs(static_cast<double>(wanted[i])));
  }
  return error / size;
}

// What the header says, as a predicate and as rotary positions.
DenseAttention Oracle(const ModelConfig& config, const ContextOptions& o, int64_t asks_from) {
  const auto sees = [config, o, asks_from](int layer, int64_t i, int64_t j) {
    const int64_t own = config.layers[layer].window;
    const bool in_own = own == 0 || i - own < j;
    if (o.policy == ContextPolicy::kModel) return in_own;
    if (o.policy == ContextPolicy::kStar && i >= asks_from) return in_own;
    return j < o.sink_tokens || (i - o.window < j && in_own);
  };
  const auto meets = [o](int64_t i, int64_t j) -> DenseAttention::Meeting {
    const auto query = static_cast<double>(i);
    const auto key = static_cast<double>(j);
    if (o.positions == PositionMode::kRolling) {
      // Positions in StreamingLLM's cache: sinks first, then the last `window` positions.
      const int64_t cached = std::min(i + 1, o.sink_tokens + o.window);
      return {static_cast<double>(cached - 1),
              static_cast<double>(j < o.sink_tokens ? j : cached - 1 - (i - j))};
    }
    if (o.positions == PositionMode::kClamped && j < o.sink_tokens) {
      return {static_cast<double>(std::min(i, o.clamp)), key};
    }
    return {query, key};
  };
  return DenseAttention(config, sees, meets);
}

// The mask {j < S} or {i - W < j <= i}, position by position.
TEST(ModelEngine, EveryPolicySeesExactlyItsKeysAtItsPositions) {
  int rolled = 0;  // Cases in which sinks were scored at another position than the row's.
  int clamped = 0;
  int stars = 0;
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    Fixture f(seed);
    const ContextOptions options = RandomOptions(seed);
    SCOPED_TRACE(absl::StrCat(f.random.ToString(), " ", ToString(options)));
    // Long enough for what is asked to see a page that what is appended does not.
    const bool long_star = options.policy == ContextPolicy::kStar && stars++ % 4 == 0;
    const int64_t length = long_star ? 700 : seed % 5 == 0 ? 400 : 150;
    if (options.sink_tokens > 0 && options.sink_tokens < length) {
      rolled += options.positions == PositionMode::kRolling && options.sink_tokens + options.window < length;
      clamped += options.positions == PositionMode::kClamped;
    }
    const int64_t asks_from = length - 20;
    const std::vector<int32_t> ids = f.Text(length, seed);
    const Session session = f.Open(options);
    std::vector<float> got = f.Hidden(session, absl::MakeConstSpan(ids).subspan(0, asks_from), 64);
    const std::vector<float> asked = f.Score(session, absl::MakeConstSpan(ids).subspan(asks_from)).hidden;
    got.insert(got.end(), asked.begin(), asked.end());

    DenseAttention oracle = Oracle(f.random.config, options, asks_from);
    LayerFloats wanted = f.model->NewHidden();
    const int64_t size = length * f.random.config.hidden_size;
    ASSERT_TRUE(wanted.Reserve(size).ok());
    ASSERT_TRUE(f.model->Embed(ids, wanted.host()).ok());
    std::vector<int64_t> positions(length);
    for (int64_t i = 0; i < length; ++i) positions[i] = i;
    ASSERT_TRUE(f.model->Forward({positions, {}}, oracle, wanted).ok());
    EXPECT_LE(Error(got, {wanted.host(), wanted.host() + size}), 1e-5);
    if (HasFailure()) return;
  }
  EXPECT_GE(rolled, 5);
  EXPECT_GE(clamped, 5);
  EXPECT_GE(stars, 5);
}

TEST(ModelEngine, AnyChunkingGivesTheSameBits) {
  for (uint64_t seed = 100; seed < 116; ++seed) {
    FixtureOptions how;
    how.kv_dtype = seed % 2 == 0 ? DType::kBf16 : DType::kF32;
    how.stripe_pages = 64;
    how.chunk_rows = 1000;  // What is appended at once is one step.
    Fixture f(seed, how);
    const ContextOptions options = RandomOptions(seed);
    SCOPED_TRACE(absl::StrCat(f.random.ToString(), " ", ToString(options)));
    const std::vector<int32_t> ids = f.Text(530, seed);
    const Session whole = f.Open(options);
    const std::vector<float> wanted = f.Hidden(whole, ids, ids.size());
    ASSERT_EQ(wanted.size(), ids.size() * f.random.config.hidden_size);
    for (const size_t chunk : {size_t{1}, size_t{3}, size_t{100}, size_t{256}, size_t{257}}) {
      const Session session = f.Open(options);
      ASSERT_TRUE(SameBits(f.Hidden(session, ids, chunk), wanted)) << "chunks of " << chunk;
    }
  }
}

TEST(ModelEngine, ThreadsDoNotChangeABit) {
  for (uint64_t seed = 200; seed < 206; ++seed) {
    Fixture one(seed);
    FixtureOptions how;
    how.threads = 3;
    Fixture three(seed, how);
    const std::vector<int32_t> ids = one.Text(300, seed);
    const Session a = one.Open();
    const Session b = three.Open();
    ASSERT_TRUE(SameBits(one.Hidden(a, ids, 200), three.Hidden(b, ids, 200))) << seed;
  }
}

// Sessions of every kind, which append, generate and score in random company.
TEST(ModelEngine, ASessionIsTheSameAloneAndInABatch) {
  for (uint64_t seed = 300; seed < 308; ++seed) {
    Fixture f(seed);
    SCOPED_TRACE(f.random.ToString());
    constexpr uint64_t kSessions = 5;
    constexpr size_t kJobs = 5;
    const auto job = [&](uint64_t s, size_t n) -> JobRequest {
      if (n == 0) return AppendJob{f.Text(90 + 40 * static_cast<int64_t>(s), seed + s), 0};
      if (n == 2) return ScoreJob{f.Text(120, seed + s + 9), false};
      if (n == 3) return AppendJob{f.Text(150, seed + s + 20), 90 + 40 * static_cast<int64_t>(s) + 70};
      GenerateJob generate;
      generate.max_tokens = n == 1 ? 70 : 20;
      generate.sampling = {/*temperature=*/1, /*top_k=*/0, /*top_p=*/1, seed + s};
      return generate;
    };
    std::vector<std::vector<JobOutcome>> wanted(kSessions);
    std::vector<Session> sessions;
    for (uint64_t s = 0; s < kSessions; ++s) {
      const ContextOptions options = RandomOptions(seed * kSessions + s);
      const Session alone = f.Open(options);
      for (size_t n = 0; n < kJobs; ++n) wanted[s].push_back(f.jobs->Run(alone, job(s, n)));
      sessions.push_back(f.Open(options));
    }
    std::mt19937_64 random(seed);
    std::vector<uint64_t> under_way(kSessions);
    std::vector<size_t> next(kSessions);
    for (size_t ended = 0; ended < kSessions * kJobs;) {
      for (uint64_t s = 0; s < kSessions; ++s) {
        if (under_way[s] != 0 || next[s] == kJobs || random() % 3 != 0) continue;
        under_way[s] = f.jobs->Start(sessions[s], job(s, next[s]));
      }
      if (f.jobs->busy()) {
        ASSERT_EQ(f.jobs->Step(), absl::OkStatus());
      }
      for (uint64_t s = 0; s < kSessions; ++s) {
        if (under_way[s] == 0 || !f.jobs->OutcomeOf(under_way[s]).ended) continue;
        const JobOutcome& got = f.jobs->OutcomeOf(std::exchange(under_way[s], 0));
        const JobOutcome& alone = wanted[s][next[s]++];
        ++ended;
        ASSERT_TRUE(got.ok() && alone.ok()) << got.status() << alone.status();
        ASSERT_EQ(got.result.digest, alone.result.digest) << "session " << s << " job " << next[s];
        ASSERT_EQ(got.ids(), alone.ids());
        ASSERT_TRUE(SameBits(got.result.log_probs, alone.result.log_probs));
      }
    }
  }
}

TEST(ModelEngine, AForkAndItsOriginalGoOnAsIfAlone) {
  for (uint64_t seed = 400; seed < 416; ++seed) {
    Fixture f(seed);
    const ContextOptions options = RandomOptions(seed);
    const int64_t split = std::vector<int64_t>{0, 1, 100, 255, 256, 257, 400}[seed % 7];
    SCOPED_TRACE(absl::StrCat(f.random.ToString(), " ", ToString(options), " split ", split));
    const std::vector<int32_t> text = f.Text(split + 300, seed);
    std::vector<int32_t> other = text;
    for (int64_t i = split; i < split + 300; ++i) other[i] = (text[i] + 1) % f.random.config.vocab_size;

    const auto alone = [&](const std::vector<int32_t>& ids) {
      const Session session = f.Open(options);
      return f.Hidden(session, ids, 90);
    };
    const std::vector<float> wanted_text = alone(text);
    const std::vector<float> wanted_other = alone(other);

    const Session original = f.Open(options);
    f.Hidden(original, absl::MakeConstSpan(text).subspan(0, split), 90);
    const int64_t used = f.store->used_bytes();
    const Session fork = original.Fork();
    EXPECT_EQ(f.store->used_bytes(), used);
    const auto width = static_cast<size_t>(f.random.config.hidden_size);
    std::vector<float> got_text;
    std::vector<float> got_other;
    for (int64_t at = split; at < split + 300; at += 50) {
      const auto a = f.Hidden(original, absl::MakeConstSpan(text).subspan(at, 50), 50);
      const auto b = f.Hidden(fork, absl::MakeConstSpan(other).subspan(at, 50), 50);
      got_text.insert(got_text.end(), a.begin(), a.end());
      got_other.insert(got_other.end(), b.begin(), b.end());
    }
    EXPECT_TRUE(SameBits(got_text, absl::MakeConstSpan(wanted_text).subspan(split * width)));
    EXPECT_TRUE(SameBits(got_other, absl::MakeConstSpan(wanted_other).subspan(split * width)));
  }
}

TEST(ModelEngine, AnyNumberOfWorkersGivesTheSameBits) {
  for (uint64_t seed = 500; seed < 512; ++seed) {
    const ContextOptions options = RandomOptions(seed);
    SCOPED_TRACE(absl::StrCat("seed ", seed, " ", ToString(options)));
    // Appends, a fork in the middle of a page, and questions to both.
    const auto run = [&](Fixture& f, size_t chunk) {
      const std::vector<int32_t> ids = f.Text(900, seed);
      const auto part = [&](int64_t begin, int64_t count) {
        return absl::MakeConstSpan(ids).subspan(begin, count);
      };
      const Session session = f.Open(options);
      std::vector<float> hidden = f.Hidden(session, part(0, 600), chunk);
      const Session fork = session.Fork();
      const auto generate = [&](const Session& from, int64_t tokens) {
        f.Generate(from, tokens);
        return std::vector<float>(from.last().begin(), from.last().end());
      };
      for (const auto& more :
           {generate(session, 20), f.Hidden(fork, part(700, 200), chunk), f.Score(fork, part(650, 9)).hidden,
            generate(fork, 9), f.Hidden(session, part(620, 50), chunk)}) {
        hidden.insert(hidden.end(), more.begin(), more.end());
      }
      return hidden;
    };
    Fixture alone(seed);
    const std::vector<float> wanted = run(alone, 170);
    for (const int size : {1, 2, 3, 4}) {
      RunGroup(size, [&](int rank, Communicator* communicator) {
        Fixture f(seed, {.group = communicator});
        EXPECT_TRUE(SameBits(run(f, 100), wanted)) << "rank " << rank << " of " << size;
      });
      if (HasFailure()) return;
    }
  }
}

// RunGroup over sockets.
void RunGlooGroup(int size, const std::function<void(int, Communicator*)>& body) {
  MapRendezvous rendezvous;
  std::vector<std::thread> threads;
  threads.reserve(size);
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      const auto communicator = ConnectGloo(rank, size, rendezvous, {}, absl::Now() + absl::Seconds(60));
      ASSERT_TRUE(communicator.ok()) << communicator.status();
      body(rank, communicator->get());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Sessions of every kind generate in one step: the sums of all those that see all keys come in one message a
// layer.
TEST(ModelEngine, TheEntriesOfAStepShareTheirCollectives) {
  constexpr uint64_t kSeed = 3;
  constexpr int kSteps = 4;
  ModelConfig config = RandomModel::RandomConfig(kSeed);
  config.layers[0].window = 0;
  config.layers.resize(3, config.layers[0]);
  config.layers[1].window = 30;
  config.attention_scale = 1e-3F;  // Sinks and keys count alike, which is the sink path's ground.
  std::vector<ContextOptions> kinds(7);
  kinds[1].sink_tokens = 1;
  kinds[2] = {ContextPolicy::kStreaming, PositionMode::kRolling, 4, 20, 0};
  kinds[3] = {ContextPolicy::kStar, PositionMode::kAbsolute, 4, 40, 0};
  kinds[4].sink_tokens = 260;
  kinds[6].sink_tokens = 0;  // No sinks: everything takes the maximum path.
  GenerateJob generate;
  generate.max_tokens = kSteps;
  // What has been read before differs in length, too.
  const auto open = [&](Fixture& f, size_t kind) {
    Session session = f.Open(kinds[kind]);
    f.Append(session, f.Text(200 + 90 * kind, kind));
    return session;
  };
  std::vector<JobOutcome> wanted;
  {
    Fixture f(RandomModel(config, DType::kF32, kSeed));
    for (size_t kind = 0; kind < kinds.size(); ++kind) {
      const Session session = open(f, kind);
      wanted.push_back(f.Generate(session, generate));
    }
  }
  const auto check = [&](int rank, Communicator* communicator) {
    testing::CountingCommunicator counting(communicator);
    Fixture f(RandomModel(config, DType::kF32, kSeed), {.group = &counting});
    for (const size_t count : {kinds.size() - 1, kinds.size()}) {
      std::vector<Session> sessions;
      std::vector<uint64_t> jobs;
      for (size_t kind = 0; kind < count; ++kind) sessions.push_back(open(f, kind));
      for (const Session& session : sessions) jobs.push_back(f.jobs->Start(session, generate));
      counting.TakeReductions();
      for (int step = 0; step < kSteps; ++step) {
        ASSERT_EQ(f.jobs->Step(), absl::OkStatus());
        // The step's own, and one for each of two layers; three where anything takes the maximum path.
        EXPECT_EQ(counting.TakeReductions(), count == kinds.size() ? 1 + 2 * 3 : 1 + 2);
      }
      for (size_t kind = 0; kind < count; ++kind) {
        const JobOutcome& got = f.jobs->OutcomeOf(jobs[kind]);
        ASSERT_TRUE(got.ok()) << got.status();
        EXPECT_EQ(got.result.digest, wanted[kind].result.digest) << "session " << kind;
        if (rank == 0) {
          EXPECT_EQ(got.ids(), wanted[kind].ids());
        }
      }
    }
  };
  for (const int size : {1, 2, 3, 4}) {
    SCOPED_TRACE(absl::StrCat(size, " ranks"));
    RunGroup(size, check);
    RunGlooGroup(size, check);
    if (HasFailure()) return;
  }
}

// Tokens that an owner rank of the group generates alone, greedily; then all ranks have them.
std::vector<int32_t> GenerateOn(Fixture& f, const Session& session, int64_t count, int owner_rank) {
  const int64_t begin = session.length();
  GenerateJob job;
  job.max_tokens = count;
  job.owner_rank = owner_rank % f.jobs->group().size();
  f.Generate(session, job);
  return session.Ids(begin);
}

TEST(ModelEngine, WhatOneRankGeneratedAloneIsTheSameOnAllRanksAfterwards) {
  int windowed_by_themselves = 0;
  for (uint64_t seed = 700; seed < 724; ++seed) {
    ContextOptions options = RandomOptions(seed);
    RandomModel drawn(seed);
    ModelConfig config = drawn.config;
    if (options.policy != ContextPolicy::kStreaming) {
      for (LayerConfig& layer : config.layers) layer.window = 1 + static_cast<int64_t>(seed % 40);
      ++windowed_by_themselves;
    }
    // Also prompts that are shorter than the sinks, and generations longer than any window.
    const int64_t prompt = std::vector<int64_t>{1, 3, 100, 250, 530}[seed % 5];
    const int64_t count = std::vector<int64_t>{1, 7, 40, 290}[seed % 4];
    SCOPED_TRACE(absl::StrCat("seed ", seed, " ", ToString(options), " ", prompt, " + ", count));
    struct Answers {
      std::vector<int32_t> ids, more_ids, fork_ids;
      std::vector<float> last, hidden;
      std::vector<uint64_t> scores;  // Digests.
      int64_t page_bytes = 0;
      bool operator==(const Answers&) const = default;
    };
    const auto run = [&](Communicator* group) {
      Fixture f(RandomModel(config, DType::kF32, seed), {.group = group});
      const int owner = static_cast<int>(seed);
      Answers answers;
      const Session session = f.Open(options);
      EXPECT_TRUE(session.context().every_layer_sees_a_window());
      f.Hidden(session, f.Text(prompt, seed), 100);
      const Session before = session.Fork();
      answers.ids = GenerateOn(f, session, count, owner);
      answers.page_bytes = session.page_bytes();
      answers.last.assign(session.last().begin(), session.last().end());
      answers.scores.push_back(f.Score(session, f.Text(20, 2)).result.digest);
      const Session fork = session.Fork();
      answers.hidden = f.Hidden(session, f.Text(30, 3), 100);
      // Another owner rank, and several generations into one page.
      answers.more_ids = GenerateOn(f, session, 5, owner + 1);
      answers.fork_ids = GenerateOn(f, fork, 3, owner + 2);
      const std::vector<int32_t> more = GenerateOn(f, fork, 4, owner + 2);
      answers.fork_ids.insert(answers.fork_ids.end(), more.begin(), more.end());
      // A session that shared pages with one that has grown is as it was.
      answers.scores.push_back(f.Score(before, f.Text(10, 4)).result.digest);
      return answers;
    };
    Answers wanted;
    RunGroup(1, [&](int /*rank*/, Communicator* group) { wanted = run(group); });
    for (const int size : {2, 3, 4}) {
      RunGroup(size, [&](int rank, Communicator* group) {
        EXPECT_TRUE(run(group) == wanted) << "rank " << rank << " of " << size;
      });
      if (HasFailure()) return;
    }
  }
  EXPECT_GT(windowed_by_themselves, 0);
}

// Knows the longest message.
class MeasuringCommunicator final : public testing::ForwardingCommunicator {
 public:
  using ForwardingCommunicator::ForwardingCommunicator;
  absl::Status SendReceive(absl::Span<const char> send, int to, absl::Span<char> receive, int from,
                           absl::Time deadline) override {
    longest = std::max({longest, send.size(), receive.size()});
    return ForwardingCommunicator::SendReceive(send, to, receive, from, deadline);
  }
  size_t longest = 0;
};

// Nobody has counted the memory that they pass through.
TEST(ModelEngine, ManyRowsAreSharedInMessagesOfSome) {
  ModelConfig config = RandomModel::RandomConfig(1);
  config.layers.resize(1);
  ContextOptions options;
  options.policy = ContextPolicy::kStreaming;
  options.window = 6000;
  config.layers[0].window = 0;
  const auto run = [&](Communicator* group) {
    Fixture f(RandomModel(config, DType::kF32, 1), {.group = group});
    const Session session = f.Open(options);
    f.Hidden(session, f.Text(10), 10);
    GenerateOn(f, session, 5000, group->size() - 1);
    return f.Hidden(session, f.Text(9), 9);
  };
  std::vector<float> wanted;
  RunGroup(1, [&](int /*rank*/, Communicator* group) { wanted = run(group); });
  RunGroup(2, [&](int /*rank*/, Communicator* group) {
    MeasuringCommunicator measuring(group);
    EXPECT_TRUE(SameBits(run(&measuring), wanted));
    EXPECT_EQ(measuring.longest, size_t{4096} * config.kv_heads * 2 * config.head_dim * sizeof(float));
  });
}

TEST(ModelEngine, ASkippedRowThatIsTakenBackLeavesNoTrace) {
  ContextOptions options;
  options.policy = ContextPolicy::kStreaming;
  options.sink_tokens = 0;
  options.window = 2;
  RunGroup(2, [&](int rank, Communicator* group) {
    Fixture f(5, {.group = group});
    const ModelEngine& engine = f.jobs->engine();
    const Session session = f.Open(options);
    Context& context = session.context();
    // Around the end of a page, which the row after it does not see any more.
    f.Hidden(session, f.Text(kPageRows), 100);
    for (int64_t length = kPageRows; length < kPageRows + 4; ++length) {
      const std::vector<int32_t> ids = {3};
      const int64_t bytes = context.page_bytes();
      ASSERT_TRUE(engine.Prepare({&context, ids, true}).ok());
      if (rank == 0) {
        engine.ReleaseReservation(context);
      } else {
        engine.SkipRow(context);
        ASSERT_TRUE(engine.Prepare({&context, ids, true}).ok());
        engine.UnskipRow(context);
      }
      EXPECT_EQ(context.length(), length);
      EXPECT_EQ(context.page_bytes(), bytes);
      GenerateOn(f, session, 1, /*owner_rank=*/0);
      int64_t difference = rank == 0 ? context.page_bytes() : -context.page_bytes();
      ASSERT_TRUE(group->SumI64(absl::MakeSpan(&difference, 1), absl::Now() + absl::Seconds(60)).ok());
      EXPECT_EQ(difference, 0);
    }
    const std::vector<float> got = f.Hidden(session, f.Text(9), 9);
    Fixture alone(5);
    const Session other = alone.Open(options);
    alone.Hidden(other, alone.Text(kPageRows), 100);
    alone.Generate(other, 4);
    EXPECT_TRUE(SameBits(got, alone.Hidden(other, alone.Text(9), 9)));
  });
}

TEST(ModelEngine, WorkersShareThePagesOfLayersThatSeeAll) {
  ModelConfig config = RandomModel::RandomConfig(1);
  config.layers.resize(1);
  config.layers[0].window = 0;
  const auto bytes_for = [&](Communicator* communicator) {
    Fixture f(RandomModel(config, DType::kF32, 1), {.group = communicator});
    const Session session = f.Open();
    f.Hidden(session, f.Text(12 * kPageRows), 512);
    return session.page_bytes();
  };
  const int64_t page = bytes_for(nullptr) / 12;
  RunGroup(3, [&](int rank, Communicator* communicator) {
    EXPECT_EQ(bytes_for(communicator),
              rank == 0 ? 4 * page : 5 * page);  // The others' copy of the sinks' page.
  });
}

TEST(ModelEngine, AWorkerWithoutRoomEndsTheJobForAllAndTheGroupLivesOn) {
  ModelConfig config = RandomModel::RandomConfig(9);
  config.layers.resize(1);
  config.layers[0].window = 0;
  config.query_heads = 2;
  config.kv_heads = 1;
  RunGroup(3, [&](int rank, Communicator* communicator) {
    FixtureOptions how;
    how.store_bytes = rank == 1 ? int64_t{1} << 18 : int64_t{1} << 26;
    how.group = communicator;
    Fixture f(RandomModel(config, DType::kF32, 9), how);
    const Session session = f.Open();
    f.Append(session, f.Text(100));
    {
      const Session large = f.Open();
      const JobOutcome outcome = f.jobs->Append(large, f.Text(20'000));
      EXPECT_EQ(outcome.status().code(), absl::StatusCode::kResourceExhausted) << outcome.status();
      EXPECT_THAT(std::string(outcome.status().message()),
                  HasSubstr(rank == 1 ? "bytes free" : "1 of the other workers"));
      EXPECT_GT(outcome.result.done, 0);
      EXPECT_EQ(large.length(), outcome.result.done);
      int64_t sum = large.length();
      ASSERT_TRUE(communicator->SumI64(absl::MakeSpan(&sum, 1), absl::Now() + absl::Seconds(60)).ok());
      EXPECT_EQ(sum, 3 * large.length());
      EXPECT_EQ(large.Ids(0).size(), static_cast<size_t>(large.length()));
    }
    f.Append(session, f.Text(100));
    EXPECT_EQ(session.length(), 200);
  });
}

TEST(ModelEngine, StreamingKeepsItsMemoryConstant) {
  Fixture f(3);
  ContextOptions options;
  options.policy = ContextPolicy::kStreaming;
  options.positions = PositionMode::kRolling;
  options.window = 300;
  const Session session = f.Open(options);
  f.Append(session, f.Text(1000));
  int64_t most = 0;
  for (int i = 0; i < 30; ++i) {
    f.Append(session, f.Text(111, i));
    most = std::max(most, f.store->used_bytes());
  }
  EXPECT_EQ(session.length(), 4330);
  // A page of sinks, and what a window of 300 and a chunk of 100 can touch, in each layer.
  AttentionShape shape{f.random.config.query_heads, f.random.config.kv_heads, f.random.config.head_dim,
                       f.random.config.head_dim, DType::kF32};
  const auto layers = static_cast<int64_t>(f.random.config.layers.size());
  EXPECT_LE(most, 4 * layers * f.backend->PageBytes(shape));
  EXPECT_EQ(f.store->used_bytes(), session.page_bytes());
}

TEST(ModelEngine, GreedyGenerationTakesTheLikeliestTokenAndItsLogProb) {
  Fixture f(5);
  const Session session = f.Open();
  f.Append(session, f.Text(40));
  const Session again = session.Fork();
  const Session prompt = session.Fork();
  const JobOutcome generation = f.Generate(session, 30);
  ASSERT_EQ(generation.tokens.size(), 30U);
  EXPECT_EQ(generation.result.finish_reason, FinishReason::kLength);
  EXPECT_EQ(session.length(), 70);
  for (const TokenChoice& token : generation.tokens) {
    const std::vector<float> logits = f.NextLogits(again).value();
    EXPECT_EQ(token.id, std::max_element(logits.begin(), logits.end()) - logits.begin());
    f.Append(again, {token.id});
  }
  EXPECT_EQ(session.Ids(40), generation.ids());
  // Score says the same bits of the same tokens, and leaves the session as it is.
  const JobOutcome scores = f.Score(prompt, generation.ids());
  EXPECT_EQ(prompt.length(), 40);
  ASSERT_EQ(scores.result.log_probs.size(), 30U);
  for (size_t i = 0; i < 30; ++i) EXPECT_EQ(scores.result.log_probs[i], generation.tokens[i].log_prob);
}

TEST(ModelEngine, GenerationIsTheSameInOneJobAndInMany) {
  Fixture f(6);
  GenerateJob job;
  job.sampling = {/*temperature=*/1.5F, /*top_k=*/20, /*top_p=*/0.95F, /*seed=*/42};
  const Session whole = f.Open();
  f.Append(whole, f.Text(10));
  const Session parts = whole.Fork();
  const Session other = whole.Fork();
  job.max_tokens = 60;
  const std::vector<int32_t> wanted = f.Generate(whole, job).ids();
  std::vector<int32_t> got;
  for (const int count : {1, 20, 39}) {
    job.max_tokens = count;
    for (const int32_t id : f.Generate(parts, job).ids()) got.push_back(id);
  }
  EXPECT_EQ(got, wanted);
  job.max_tokens = 60;
  job.sampling.seed = 43;
  EXPECT_NE(f.Generate(other, job).ids(), wanted);
}

TEST(ModelEngine, GenerationEndsAtStopTokensAndWhenItIsCancelled) {
  Fixture f(6);
  const Session session = f.Open();
  f.Append(session, f.Text(10));
  GenerateJob job;
  job.max_tokens = 50;
  job.sampling.temperature = 1;
  const Session first = session.Fork();
  const JobOutcome all = f.Generate(first, job);

  job.stop_ids = {all.tokens[7].id};
  const Session second = session.Fork();
  const JobOutcome stopped = f.Generate(second, job);
  EXPECT_EQ(stopped.result.finish_reason, FinishReason::kStop);
  EXPECT_EQ(stopped.tokens.back().id, job.stop_ids[0]);
  EXPECT_LE(stopped.tokens.size(), 8U);
  EXPECT_EQ(second.length(), 10 + static_cast<int64_t>(stopped.tokens.size()));

  job.stop_ids.clear();
  const Session third = session.Fork();
  const uint64_t cancelled = f.jobs->Start(third, job);
  for (int step = 0; step < 5; ++step) ASSERT_EQ(f.jobs->Step(), absl::OkStatus());
  f.jobs->loop().Cancel(cancelled);
  EXPECT_FALSE(f.jobs->busy());
  EXPECT_TRUE(f.jobs->OutcomeOf(cancelled).result.cancelled);
  EXPECT_EQ(f.jobs->OutcomeOf(cancelled).tokens.size(), 5U);
  EXPECT_EQ(third.length(), 15);
}

TEST(ModelEngine, PooledStatesAreThoseOfThePositions) {
  Fixture f(8);
  const std::vector<int32_t> ids = f.Text(250);
  const Session session = f.Open();
  const std::vector<float> hidden = f.Hidden(session, ids, ids.size());
  const int64_t width = f.random.config.hidden_size;
  const std::vector<PositionRange> ranges = {{0, 1}, {3, 120}, {120, 121}, {249, 250}};
  const auto embed = [&](std::vector<PositionRange> some, Pool pool) {
    return f.jobs->Run(session, EmbedJob{std::move(some), pool});
  };
  const JobOutcome last = embed(ranges, Pool::kLast);
  const JobOutcome mean = embed(ranges, Pool::kMean);
  ASSERT_TRUE(last.ok() && mean.ok());
  EXPECT_EQ(session.length(), 250);
  for (size_t r = 0; r < ranges.size(); ++r) {
    for (int64_t c = 0; c < width; ++c) {
      EXPECT_EQ(last.result.vectors[r * width + c], hidden[(ranges[r].end - 1) * width + c]);
      double sum = 0;
      for (int64_t i = ranges[r].begin; i < ranges[r].end; ++i) sum += hidden[i * width + c];
      // (An element that cancels out keeps what is left of the others' size.)
      const double wanted = sum / static_cast<double>(ranges[r].size());
      EXPECT_NEAR(mean.result.vectors[r * width + c], wanted, std::abs(wanted) * std::ldexp(1, -23) + 1e-12);
    }
  }
  EXPECT_THAT(std::string(embed({{5, 5}}, Pool::kMean).status().message()), HasSubstr("range 0 is [5, 5)"));
  EXPECT_THAT(std::string(embed({{5, 9}, {8, 10}}, Pool::kMean).status().message()),
              HasSubstr("range 1 is [8, 10)"));
  EXPECT_EQ(embed({{240, 260}}, Pool::kMean).status().code(), absl::StatusCode::kOutOfRange);
}

TEST(ModelEngine, AJobThatFailsKeepsWhatWasReadAndNothingElse) {
  ModelConfig config = RandomModel::RandomConfig(9);
  for (LayerConfig& layer : config.layers) layer.window = 0;  // Nothing is given back on the way.
  FixtureOptions how;
  how.store_bytes = int64_t{1} << 20;
  Fixture f(RandomModel(config, DType::kF32, 9), how);
  const std::vector<int32_t> ids = f.Text(200);
  const Session session = f.Open();
  f.Hidden(session, ids, 50);
  std::vector<float> wanted;
  {
    const Session judge = session.Fork();
    wanted = f.Hidden(judge, f.Text(60, 2), 60);
  }
  const int64_t used = f.store->used_bytes();
  std::vector<int32_t> bad = f.Text(400);
  bad[399] = static_cast<int32_t>(f.random.config.vocab_size);
  const absl::Status unknown = f.jobs->Append(session, bad).status();
  EXPECT_EQ(unknown.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(unknown.message()), HasSubstr("token 399"));
  bad[399] = -1;
  EXPECT_EQ(f.jobs->Append(session, bad).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(session.length(), 200);
  EXPECT_EQ(f.store->used_bytes(), used);
  {
    // A long append keeps as many tokens as it had memory for, and says how many.
    const Session large = session.Fork();
    const JobOutcome part = f.jobs->Append(large, f.Text(100'000));
    EXPECT_EQ(part.status().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_GT(part.result.done, 0);
    EXPECT_EQ(part.result.length, 200 + part.result.done);
    EXPECT_EQ(large.length(), part.result.length);
    // (They share no page, because the first is not full.)
    EXPECT_EQ(f.store->used_bytes(), large.page_bytes() + session.page_bytes());
  }
  // Forks of what failed share nothing that is not filled.
  const Session fork = session.Fork();
  EXPECT_TRUE(SameBits(f.Hidden(fork, f.Text(60, 2), 60), wanted));
  EXPECT_TRUE(SameBits(f.Hidden(session, f.Text(60, 2), 60), wanted));
  EXPECT_GE(f.store->used_bytes(), used);
}

TEST(ModelEngine, WeightsThatOverflowAreAnErrorNamingTheLayer) {
  RandomModel random(RandomModel::RandomConfig(4), DType::kF32, 4);
  auto* weight = static_cast<float*>(const_cast<void*>(random.weights.layers[0].k.weight.data));
  weight[0] = std::numeric_limits<float>::infinity();
  Fixture f(std::move(random));
  const Session session = f.Open();
  const absl::Status status = f.jobs->Append(session, f.Text(3)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 0"));
  EXPECT_EQ(session.length(), 0);
  EXPECT_EQ(f.store->used_bytes(), 0);
}

TEST(ModelEngine, OptionsThatContradictAreRefusedByName) {
  Fixture f(4);
  const auto refused = [&](const ContextOptions& options) {
    const auto session = f.jobs->Open(options);
    EXPECT_EQ(session.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(session.status().message());
  };
  ContextOptions options;
  options.sink_tokens = -1;
  EXPECT_THAT(refused(options), HasSubstr("sink_tokens is -1"));
  options = {};
  options.window = 5;
  EXPECT_THAT(refused(options), HasSubstr("window is 5"));
  options = {};
  options.policy = ContextPolicy::kStreaming;
  EXPECT_THAT(refused(options), HasSubstr("window is 0"));
  options.policy = ContextPolicy::kStar;
  options.window = 5;
  options.positions = PositionMode::kRolling;
  EXPECT_THAT(refused(options), HasSubstr("need the streaming policy"));
  options.policy = ContextPolicy::kStreaming;
  options.positions = PositionMode::kClamped;
  options.clamp = -3;
  EXPECT_THAT(refused(options), HasSubstr("clamp is -3"));

  const Session empty = f.Open();
  GenerateJob generate;
  generate.max_tokens = 1;
  EXPECT_EQ(f.jobs->Run(empty, generate).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(f.jobs->Score(empty, f.Text(2)).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(f.jobs->Append(empty, {}).status().code(), absl::StatusCode::kInvalidArgument);
}

// The merge's unit for values comes from weights alone: no input may exceed it.
TEST(Transformer, ValuesStayBelowTheirExponents) {
  class Judge final : public LayerAttention {
   public:
    explicit Judge(const Transformer* model) : model_(model) {}
    absl::Status Attend(const LayerRows& rows, float* outputs) override {
      const absl::Span<const int16_t> exponents = model_->value_exponents(rows.layer);
      for (size_t i = 0; i < rows.rows * exponents.size(); ++i) {
        const double bound = std::ldexp(1, exponents[i % exponents.size()]);
        EXPECT_LE(std::abs(rows.values[i]), bound);
        closest = std::max(closest, std::abs(rows.values[i]) / bound);
      }
      const auto& config = model_->config();
      std::fill_n(outputs, rows.rows * config.query_heads * config.head_dim, 1e6F);
      return absl::OkStatus();
    }
    double closest = 0;

   private:
    const Transformer* model_;
  };
  double closest = 0;
  for (uint64_t seed = 1; seed < 60; ++seed) {
    Fixture f(seed);
    Judge judge(f.model.get());
    const std::vector<int32_t> ids = f.Text(200, seed);
    std::vector<int64_t> positions(ids.size());
    LayerFloats hidden = f.model->NewHidden();
    ASSERT_TRUE(hidden.Reserve(static_cast<int64_t>(ids.size()) * f.random.config.hidden_size).ok());
    ASSERT_TRUE(f.model->Embed(ids, hidden.host()).ok());
    // Along a row of the weights a value is as large as it gets.
    const WeightView& v = f.random.weights.layers[0].v.weight;
    for (int64_t c = 0; c < f.random.config.hidden_size; ++c) {
      hidden.host()[c] = 1e3F * LoadElement(v.data, v.dtype, c);
    }
    ASSERT_TRUE(f.model->Forward({positions, {}}, judge, hidden).ok());
    closest = std::max(closest, judge.closest);
  }
  EXPECT_GT(closest, 0.5);  // The bound is near enough to be worth something.
}

TEST(Sampler, ChoosesAsOftenAsTheProbabilitiesSay) {
  const std::vector<float> logits = {std::log(0.5F), std::log(0.1F), std::log(0.25F), std::log(0.15F)};
  const auto shares = [&](const SamplingOptions& options) {
    std::vector<double> counts(4);
    for (int64_t position = 0; position < 40000; ++position) {
      counts[ChooseToken(logits, options, position).id] += 1.0 / 40000;
    }
    return counts;
  };
  using ::testing::DoubleNear;
  using ::testing::ElementsAre;
  EXPECT_THAT(shares({1, 0, 1, 7}), ElementsAre(DoubleNear(0.5, 0.01), DoubleNear(0.1, 0.01),
                                                DoubleNear(0.25, 0.01), DoubleNear(0.15, 0.01)));
  EXPECT_THAT(shares({1, 2, 1, 7}), ElementsAre(DoubleNear(2.0 / 3, 0.01), 0, DoubleNear(1.0 / 3, 0.01), 0));
  EXPECT_THAT(shares({1, 0, 0.74F, 7}),
              ElementsAre(DoubleNear(2.0 / 3, 0.01), 0, DoubleNear(1.0 / 3, 0.01), 0));
  EXPECT_THAT(shares({0.5F, 0, 1, 7}),
              ElementsAre(DoubleNear(0.25 / 0.345, 0.01), DoubleNear(0.01 / 0.345, 0.01),
                          DoubleNear(0.0625 / 0.345, 0.01), DoubleNear(0.0225 / 0.345, 0.01)));
  EXPECT_THAT(shares({0, 0, 1, 7}), ElementsAre(DoubleNear(1, 1e-9), 0, 0, 0));
  EXPECT_NEAR(ChooseToken(logits, {}, 0).log_prob, std::log(0.5), 1e-6);
  EXPECT_NEAR(LogProb(logits, 1), std::log(0.1), 1e-6);
  const std::vector<float> equal(5, 1.0F);
  EXPECT_EQ(ChooseToken(equal, {}, 3).id, 0);
}

TEST(Sampler, RefusesOptionsOutOfRange) {
  EXPECT_TRUE(CheckSampling({}).ok());
  EXPECT_THAT(std::string(CheckSampling({-1, 0, 1, 0}).message()), HasSubstr("temperature"));
  EXPECT_THAT(std::string(CheckSampling({std::nanf(""), 0, 1, 0}).message()), HasSubstr("temperature"));
  EXPECT_THAT(std::string(CheckSampling({1, -1, 1, 0}).message()), HasSubstr("top_k"));
  EXPECT_THAT(std::string(CheckSampling({1, 0, 0, 0}).message()), HasSubstr("top_p"));
  EXPECT_THAT(std::string(CheckSampling({1, 0, 1.5F, 0}).message()), HasSubstr("top_p"));
}

}  // namespace
}  // namespace eduba
