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
using ::testing::HasSubstr;
using testing::RandomModel;
using testing::RandomOptions;
using testing::RunGroup;
using testing::SameBits;
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
    Context context = f.Open(options);
    std::vector<float> got = f.Hidden(context, absl::MakeConstSpan(ids).subspan(0, asks_from), 64);
    const std::vector<float> asked =
        f.Hidden(context, absl::MakeConstSpan(ids).subspan(asks_from), 64, /*asks=*/true);
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
    Fixture f(seed, seed % 2 == 0 ? DType::kBf16 : DType::kF32);
    const ContextOptions options = RandomOptions(seed);
    SCOPED_TRACE(absl::StrCat(f.random.ToString(), " ", ToString(options)));
    const std::vector<int32_t> ids = f.Text(530, seed);
    Context whole = f.Open(options);
    const std::vector<float> wanted = f.Hidden(whole, ids, ids.size());
    for (const size_t chunk : {size_t{1}, size_t{3}, size_t{100}, size_t{256}, size_t{257}}) {
      Context context = f.Open(options);
      ASSERT_TRUE(SameBits(f.Hidden(context, ids, chunk), wanted)) << "chunks of " << chunk;
    }
  }
}

TEST(ModelEngine, ThreadsDoNotChangeABit) {
  for (uint64_t seed = 200; seed < 206; ++seed) {
    Fixture one(seed);
    Fixture three(seed, DType::kF32, 3);
    const std::vector<int32_t> ids = one.Text(300, seed);
    Context a = one.Open();
    Context b = three.Open();
    ASSERT_TRUE(SameBits(one.Hidden(a, ids, 200), three.Hidden(b, ids, 200))) << seed;
  }
}

// Contexts of every kind, going on together in random company.
TEST(ModelEngine, AContextIsTheSameAloneAndInABatch) {
  for (uint64_t seed = 300; seed < 308; ++seed) {
    Fixture f(seed);
    SCOPED_TRACE(f.random.ToString());
    constexpr int kContexts = 5;
    std::vector<Context> contexts;
    std::vector<std::vector<int32_t>> texts;
    std::vector<std::vector<float>> wanted;
    for (int c = 0; c < kContexts; ++c) {
      const ContextOptions options = RandomOptions(seed * kContexts + c);
      texts.push_back(f.Text(290 + c, seed + c));
      Context alone = f.Open(options);
      wanted.push_back(f.Hidden(alone, texts.back(), 64));
      contexts.push_back(f.Open(options));
    }
    std::mt19937_64 random(seed);
    const auto width = static_cast<size_t>(f.random.config.hidden_size);
    std::vector<size_t> done(kContexts);
    for (bool more = true; more;) {
      more = false;
      std::vector<Turn> turns;
      for (int c = 0; c < kContexts; ++c) {
        const size_t left = texts[c].size() - done[c];
        more |= left > 0;
        const size_t count = std::min<size_t>(left, random() % 3 == 0 ? 0 : 1 + random() % 90);
        if (count > 0) turns.push_back({&contexts[c], absl::MakeConstSpan(texts[c]).subspan(done[c], count)});
      }
      ASSERT_TRUE(f.engine->Step(turns).ok());
      size_t row = 0;
      for (const Turn& turn : turns) {
        const size_t c = turn.context - contexts.data();
        ASSERT_TRUE(
            SameBits(f.engine->hidden().subspan(row * width, turn.ids.size() * width),
                     absl::MakeConstSpan(wanted[c]).subspan(done[c] * width, turn.ids.size() * width)))
            << "context " << c << " at " << done[c];
        row += turn.ids.size();
        done[c] += turn.ids.size();
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

    Context alone = f.Open(options);
    const std::vector<float> wanted_text = f.Hidden(alone, text, 90);
    alone = f.Open(options);
    const std::vector<float> wanted_other = f.Hidden(alone, other, 90);

    Context original = f.Open(options);
    const auto begin = absl::MakeConstSpan(text).subspan(0, split);
    f.Hidden(original, begin, 90);
    const int64_t used = f.store->used_bytes();
    Context fork = original.Fork();
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
      Context context = f.Open(options);
      std::vector<float> hidden = f.Hidden(context, part(0, 600), chunk);
      Context fork = context.Fork();
      for (const auto& more :
           {f.Hidden(context, part(600, 20), 1, true), f.Hidden(fork, part(700, 200), chunk),
            f.Hidden(fork, part(650, 9), 3, true), f.Hidden(context, part(620, 50), chunk)}) {
        hidden.insert(hidden.end(), more.begin(), more.end());
      }
      return hidden;
    };
    Fixture alone(seed);
    const std::vector<float> wanted = run(alone, 170);
    for (const int size : {1, 2, 3, 4}) {
      RunGroup(size, [&](int rank, Communicator* communicator) {
        Fixture f(seed, DType::kF32, 1, int64_t{256} << 20, communicator);
        EXPECT_TRUE(SameBits(run(f, 100), wanted)) << "rank " << rank << " of " << size;
      });
      if (HasFailure()) return;
    }
  }
}

// RunGroup over sockets.
void RunGlooGroup(int size, const std::function<void(int, Communicator*)>& body) {
  MapRendezvous board;
  std::vector<std::thread> threads;
  threads.reserve(size);
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      const auto communicator = ConnectGloo(rank, size, board, {}, absl::Now() + absl::Seconds(60));
      ASSERT_TRUE(communicator.ok()) << communicator.status();
      body(rank, communicator->get());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Contexts of every kind in one step: the sums of all those that see all keys come in one message a layer.
TEST(ModelEngine, TheTurnsOfAStepShareTheirCollectives) {
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
  const auto new_fixture = [&](Communicator* communicator) {
    return Fixture(RandomModel(config, DType::kF32, kSeed), DType::kF32, 1, int64_t{256} << 20, communicator);
  };
  // What has been read before differs in length, too.
  const auto open = [&](Fixture& f, size_t kind) {
    Context context = f.Open(kinds[kind]);
    EXPECT_TRUE(f.engine->Append(context, f.Text(200 + 90 * kind, kind)).ok());
    return context;
  };
  std::vector<std::vector<float>> wanted;
  {
    Fixture f = new_fixture(nullptr);
    for (size_t kind = 0; kind < kinds.size(); ++kind) {
      Context context = open(f, kind);
      wanted.push_back(f.Hidden(context, f.Text(kSteps, 50 + kind), 1, true));
    }
  }
  const auto check = [&](int /*rank*/, Communicator* communicator) {
    testing::CountingCommunicator counting(communicator);
    Fixture f = new_fixture(&counting);
    const auto width = static_cast<size_t>(config.hidden_size);
    for (const size_t count : {kinds.size() - 1, kinds.size()}) {
      std::vector<Context> contexts;
      std::vector<std::vector<int32_t>> texts;
      for (size_t kind = 0; kind < count; ++kind) {
        contexts.push_back(open(f, kind));
        texts.push_back(f.Text(kSteps, 50 + kind));
      }
      counting.TakeReductions();
      for (int step = 0; step < kSteps; ++step) {
        std::vector<Turn> turns;
        for (size_t kind = 0; kind < count; ++kind) {
          turns.push_back({&contexts[kind], absl::MakeConstSpan(texts[kind]).subspan(step, 1), true});
        }
        ASSERT_TRUE(f.engine->Step(turns).ok());
        // The step's own, and one for each of two layers; three where anything takes the maximum path.
        EXPECT_EQ(counting.TakeReductions(), count == kinds.size() ? 1 + 2 * 3 : 1 + 2);
        for (size_t kind = 0; kind < count; ++kind) {
          ASSERT_TRUE(SameBits(f.engine->hidden().subspan(kind * width, width),
                               absl::MakeConstSpan(wanted[kind]).subspan(step * width, width)))
              << "context " << kind << " at " << step;
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

// Tokens that rank `home` of the group chooses and computes, while the others follow; then all have them.
std::vector<int32_t> GoOnAtHome(Fixture& f, Context& context, int64_t count, int home, Communicator& group) {
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) {
    const Turn turn{&context, absl::MakeConstSpan(&id, 1), /*asks=*/true};
    if (group.rank() == home) id = ChooseToken(*f.engine->NextLogits(context), {}, context.length()).id;
    EXPECT_TRUE(f.engine->Prepare(turn).ok());
    if (group.rank() != home) {
      f.engine->Follow(context);
    } else {
      const absl::Status status = f.engine->StepPrepared({turn}, absl::Now() + absl::Seconds(60));
      EXPECT_TRUE(status.ok()) << status;
    }
  }
  if (group.rank() != home) ids.assign(count, -1);
  const absl::Status status =
      f.engine->HandOver(context, home, absl::MakeSpan(ids), absl::Now() + absl::Seconds(60));
  EXPECT_TRUE(status.ok()) << status;
  return ids;
}

TEST(ModelEngine, WhatOneRankComputedAloneIsTheSameOnAllBehindTheHandOver) {
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
      std::vector<float> last, scores, hidden;
      int64_t page_bytes = 0;
      bool operator==(const Answers&) const = default;
    };
    const auto run = [&](Communicator* group) {
      Fixture f(RandomModel(config, DType::kF32, seed), DType::kF32, 1, int64_t{256} << 20, group);
      const auto go_on = [&](Context& context, int64_t tokens, int home) {
        return GoOnAtHome(f, context, tokens, home % group->size(), *group);
      };
      Answers answers;
      Context context = f.Open(options);
      EXPECT_TRUE(context.windowed());
      f.Hidden(context, f.Text(prompt, seed), 100);
      const Context before = context.Fork();
      answers.ids = go_on(context, count, static_cast<int>(seed));
      answers.page_bytes = context.page_bytes();
      answers.last.assign(context.last().begin(), context.last().end());
      answers.scores = *f.engine->Score(context, f.Text(20, 2));
      Context fork = context.Fork();
      answers.hidden = f.Hidden(context, f.Text(30, 3), 100);
      // Another home, and several hand-overs into one page.
      answers.more_ids = go_on(context, 5, static_cast<int>(seed) + 1);
      answers.fork_ids = go_on(fork, 3, static_cast<int>(seed) + 2);
      const std::vector<int32_t> more = go_on(fork, 4, static_cast<int>(seed) + 2);
      answers.fork_ids.insert(answers.fork_ids.end(), more.begin(), more.end());
      // Who shared pages with what has gone on is as it was.
      const std::vector<float> old_scores = *f.engine->Score(before, f.Text(10, 4));
      answers.scores.insert(answers.scores.end(), old_scores.begin(), old_scores.end());
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
TEST(ModelEngine, AHandOverOfManyRowsGoesInMessagesOfSome) {
  ModelConfig config = RandomModel::RandomConfig(1);
  config.layers.resize(1);
  ContextOptions options;
  options.policy = ContextPolicy::kStreaming;
  options.window = 6000;
  config.layers[0].window = 0;
  const auto run = [&](Communicator* group) {
    Fixture f(RandomModel(config, DType::kF32, 1), DType::kF32, 1, int64_t{256} << 20, group);
    Context context = f.Open(options);
    f.Hidden(context, f.Text(10), 10);
    GoOnAtHome(f, context, 5000, group->size() - 1, *group);
    return f.Hidden(context, f.Text(9), 9);
  };
  std::vector<float> wanted;
  RunGroup(1, [&](int /*rank*/, Communicator* group) { wanted = run(group); });
  RunGroup(2, [&](int /*rank*/, Communicator* group) {
    MeasuringCommunicator measuring(group);
    EXPECT_TRUE(SameBits(run(&measuring), wanted));
    EXPECT_EQ(measuring.longest, size_t{4096} * config.kv_heads * 2 * config.head_dim * sizeof(float));
  });
}

TEST(ModelEngine, AFollowedRowThatDidNotComeAboutLeavesNoTrace) {
  ContextOptions options;
  options.policy = ContextPolicy::kStreaming;
  options.sink_tokens = 0;
  options.window = 2;
  RunGroup(2, [&](int rank, Communicator* group) {
    Fixture f(5, DType::kF32, 1, int64_t{256} << 20, group);
    Context context = f.Open(options);
    // Around the end of a page, which the row behind it does not see any more.
    f.Hidden(context, f.Text(kPageRows), 100);
    for (int64_t length = kPageRows; length < kPageRows + 4; ++length) {
      const std::vector<int32_t> ids = {3};
      const int64_t bytes = context.page_bytes();
      ASSERT_TRUE(f.engine->Prepare({&context, ids, true}).ok());
      if (rank == 0) {
        f.engine->Unprepare(context);
      } else {
        f.engine->Follow(context);
        ASSERT_TRUE(f.engine->Prepare({&context, ids, true}).ok());
        f.engine->Unfollow(context);
      }
      EXPECT_EQ(context.length(), length);
      EXPECT_EQ(context.page_bytes(), bytes);
      GoOnAtHome(f, context, 1, /*home=*/0, *group);
      int64_t difference = rank == 0 ? context.page_bytes() : -context.page_bytes();
      ASSERT_TRUE(group->SumI64(absl::MakeSpan(&difference, 1), absl::Now() + absl::Seconds(60)).ok());
      EXPECT_EQ(difference, 0);
    }
    const std::vector<float> got = f.Hidden(context, f.Text(9), 9);
    RunGroup(1, [&](int /*rank*/, Communicator* self) {
      Fixture other(5, DType::kF32, 1, int64_t{256} << 20, self);
      Context alone = other.Open(options);
      other.Hidden(alone, other.Text(kPageRows), 100);
      GoOnAtHome(other, alone, 4, 0, *self);
      EXPECT_TRUE(SameBits(got, other.Hidden(alone, other.Text(9), 9)));
    });
  });
}

TEST(ModelEngine, WorkersShareThePagesOfLayersThatSeeAll) {
  ModelConfig config = RandomModel::RandomConfig(1);
  config.layers.resize(1);
  config.layers[0].window = 0;
  const auto bytes_for = [&](Communicator* communicator) {
    Fixture f(RandomModel(config, DType::kF32, 1), DType::kF32, 1, int64_t{256} << 20, communicator);
    Context context = f.Open();
    f.Hidden(context, f.Text(12 * kPageRows), 512);
    return context.page_bytes();
  };
  const int64_t page = bytes_for(nullptr) / 12;
  RunGroup(3, [&](int rank, Communicator* communicator) {
    EXPECT_EQ(bytes_for(communicator),
              rank == 0 ? 4 * page : 5 * page);  // The others' copy of the sinks' page.
  });
}

TEST(ModelEngine, AWorkerWithoutRoomEndsTheStepForAllAndTheGroupLivesOn) {
  ModelConfig config = RandomModel::RandomConfig(9);
  config.layers.resize(1);
  config.layers[0].window = 0;
  config.query_heads = 2;
  config.kv_heads = 1;
  RunGroup(3, [&](int rank, Communicator* communicator) {
    Fixture f(RandomModel(config, DType::kF32, 9), DType::kF32, 1,
              rank == 1 ? int64_t{1} << 18 : int64_t{1} << 26, communicator);
    Context context = f.Open();
    f.Hidden(context, f.Text(100), 100);
    const absl::Status status = f.engine->Step({Turn{&context, f.Text(20'000)}});
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    EXPECT_THAT(std::string(status.message()),
                HasSubstr(rank == 1 ? "bytes free" : "1 of the other workers"));
    EXPECT_EQ(context.length(), 100);
    f.Hidden(context, f.Text(100), 100);
    EXPECT_EQ(context.length(), 200);
  });
}

TEST(ModelEngine, StreamingKeepsItsMemoryConstant) {
  Fixture f(3);
  ContextOptions options;
  options.policy = ContextPolicy::kStreaming;
  options.positions = PositionMode::kRolling;
  options.window = 300;
  Context context = f.Open(options);
  ASSERT_TRUE(f.engine->Append(context, f.Text(1000)).ok());
  int64_t most = 0;
  for (int i = 0; i < 30; ++i) {
    ASSERT_TRUE(f.engine->Append(context, f.Text(111, i)).ok());
    most = std::max(most, f.store->used_bytes());
  }
  EXPECT_EQ(context.length(), 4330);
  // A page of sinks, and what a window of 300 and a chunk of 100 can touch, in each layer.
  AttentionShape shape{f.random.config.query_heads, f.random.config.kv_heads, f.random.config.head_dim,
                       f.random.config.head_dim, DType::kF32};
  const auto layers = static_cast<int64_t>(f.random.config.layers.size());
  EXPECT_LE(most, 4 * layers * f.backend->PageBytes(shape));
  EXPECT_EQ(f.store->used_bytes(), context.page_bytes());
}

TEST(ModelEngine, GreedyGenerationTakesTheLikeliestTokenAndItsLogProb) {
  Fixture f(5);
  Context context = f.Open();
  ASSERT_TRUE(f.engine->Append(context, f.Text(40)).ok());
  Context again = context.Fork();
  GenerateOptions options;
  options.max_tokens = 30;
  const auto generation = f.engine->Generate(context, options);
  ASSERT_TRUE(generation.ok()) << generation.status();
  ASSERT_EQ(generation->tokens.size(), 30U);
  EXPECT_EQ(generation->reason, FinishReason::kLength);
  EXPECT_EQ(context.length(), 70);
  std::vector<int32_t> ids;
  for (const TokenChoice& token : generation->tokens) {
    const std::vector<float> logits = f.engine->NextLogits(again).value();
    EXPECT_EQ(token.id, std::max_element(logits.begin(), logits.end()) - logits.begin());
    f.Hidden(again, {token.id}, 1);
    ids.push_back(token.id);
  }
  // Score says the same bits of the same tokens, and leaves the context as it is.
  Context prompt = f.Open();
  ASSERT_TRUE(f.engine->Append(prompt, f.Text(40)).ok());
  const auto scores = f.engine->Score(prompt, ids);
  ASSERT_TRUE(scores.ok()) << scores.status();
  EXPECT_EQ(prompt.length(), 40);
  for (size_t i = 0; i < ids.size(); ++i) EXPECT_EQ((*scores)[i], generation->tokens[i].log_prob);
}

TEST(ModelEngine, GenerationIsTheSameInOneCallAndInMany) {
  Fixture f(6);
  GenerateOptions options;
  options.sampling = {/*temperature=*/1.5F, /*top_k=*/20, /*top_p=*/0.95F, /*seed=*/42};
  Context whole = f.Open();
  ASSERT_TRUE(f.engine->Append(whole, f.Text(10)).ok());
  Context parts = whole.Fork();
  Context other = whole.Fork();
  options.max_tokens = 60;
  const auto all = f.engine->Generate(whole, options);
  ASSERT_TRUE(all.ok());
  std::vector<int32_t> got;
  for (const int count : {1, 0, 20, 39}) {
    options.max_tokens = count;
    const auto some = f.engine->Generate(parts, options);
    ASSERT_TRUE(some.ok());
    for (const TokenChoice& token : some->tokens) got.push_back(token.id);
  }
  std::vector<int32_t> wanted;
  for (const TokenChoice& token : all->tokens) wanted.push_back(token.id);
  EXPECT_EQ(got, wanted);
  options.max_tokens = 60;
  options.sampling.seed = 43;
  const auto differently = f.engine->Generate(other, options);
  ASSERT_TRUE(differently.ok());
  std::vector<int32_t> others;
  for (const TokenChoice& token : differently->tokens) others.push_back(token.id);
  EXPECT_NE(others, wanted);
}

TEST(ModelEngine, GenerationEndsAtStopTokensCallersAndDeadlines) {
  Fixture f(6);
  Context context = f.Open();
  ASSERT_TRUE(f.engine->Append(context, f.Text(10)).ok());
  GenerateOptions options;
  options.max_tokens = 50;
  options.sampling.temperature = 1;
  Context first = context.Fork();
  const auto all = f.engine->Generate(first, options);
  ASSERT_TRUE(all.ok());

  options.stop_ids = {all->tokens[7].id};
  Context second = context.Fork();
  const auto stopped = f.engine->Generate(second, options);
  ASSERT_TRUE(stopped.ok());
  EXPECT_EQ(stopped->reason, FinishReason::kStop);
  EXPECT_EQ(stopped->tokens.back().id, options.stop_ids[0]);
  EXPECT_LE(stopped->tokens.size(), 8U);
  EXPECT_EQ(second.length(), 10 + static_cast<int64_t>(stopped->tokens.size()));

  options.stop_ids.clear();
  int seen = 0;
  options.on_token = [&](const TokenChoice&) { return ++seen < 5; };
  Context third = context.Fork();
  const auto cancelled = f.engine->Generate(third, options);
  ASSERT_TRUE(cancelled.ok());
  EXPECT_EQ(cancelled->reason, FinishReason::kCancelled);
  EXPECT_EQ(cancelled->tokens.size(), 5U);
  EXPECT_EQ(third.length(), 15);

  options.on_token = nullptr;
  options.deadline = absl::InfinitePast();
  Context fourth = context.Fork();
  const auto late = f.engine->Generate(fourth, options);
  ASSERT_TRUE(late.ok());
  EXPECT_EQ(late->reason, FinishReason::kDeadline);
  EXPECT_EQ(fourth.length(), 10);
}

TEST(ModelEngine, PooledStatesAreThoseOfThePositions) {
  Fixture f(8);
  const std::vector<int32_t> ids = f.Text(250);
  Context context = f.Open();
  const std::vector<float> hidden = f.Hidden(context, ids, ids.size());
  const int64_t width = f.random.config.hidden_size;
  const std::vector<PositionRange> ranges = {{0, 1}, {3, 120}, {120, 121}, {249, 250}};
  Context empty = f.Open();
  const auto last = f.engine->Embed(empty, ids, ranges, Pool::kLast);
  const auto mean = f.engine->Embed(empty, ids, ranges, Pool::kMean);
  ASSERT_TRUE(last.ok() && mean.ok());
  EXPECT_EQ(empty.length(), 0);
  for (size_t r = 0; r < ranges.size(); ++r) {
    for (int64_t c = 0; c < width; ++c) {
      EXPECT_EQ((*last)[r * width + c], hidden[(ranges[r].end - 1) * width + c]);
      double sum = 0;
      for (int64_t i = ranges[r].begin; i < ranges[r].end; ++i) sum += hidden[i * width + c];
      // (An element that cancels out keeps what is left of the others' size.)
      const double wanted = sum / static_cast<double>(ranges[r].size());
      EXPECT_NEAR((*mean)[r * width + c], wanted, std::abs(wanted) * std::ldexp(1, -23) + 1e-12);
    }
  }
  EXPECT_THAT(std::string(f.engine->Embed(empty, ids, {{5, 5}}, Pool::kMean).status().message()),
              HasSubstr("range 0 is [5, 5)"));
  EXPECT_THAT(std::string(f.engine->Embed(empty, ids, {{5, 9}, {8, 10}}, Pool::kMean).status().message()),
              HasSubstr("range 1 is [8, 10)"));
  EXPECT_THAT(std::string(f.engine->Embed(empty, ids, {{240, 260}}, Pool::kMean).status().message()),
              HasSubstr("10 of its positions"));
}

TEST(ModelEngine, AStepThatFailsChangesNothing) {
  ModelConfig config = RandomModel::RandomConfig(9);
  for (LayerConfig& layer : config.layers) layer.window = 0;  // Nothing is given back on the way.
  Fixture f(RandomModel(config, DType::kF32, 9), DType::kF32, 1, int64_t{1} << 20);
  const std::vector<int32_t> ids = f.Text(200);
  Context context = f.Open();
  f.Hidden(context, ids, 50);
  Context judge = context.Fork();
  const std::vector<float> wanted = f.Hidden(judge, f.Text(60, 2), 60);

  const int64_t used = f.store->used_bytes();
  std::vector<int32_t> bad = f.Text(400);
  bad[399] = static_cast<int32_t>(f.random.config.vocab_size);
  const absl::Status unknown = f.engine->Step({Turn{&context, bad}});
  EXPECT_EQ(unknown.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(unknown.message()), HasSubstr("token 399"));
  bad[399] = -1;
  EXPECT_EQ(f.engine->Step({Turn{&context, bad}}).code(), absl::StatusCode::kInvalidArgument);
  const absl::Status full = f.engine->Step({Turn{&context, f.Text(100'000)}});
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(context.length(), 200);

  // Forks of what failed share nothing that is not filled.
  Context fork = context.Fork();
  EXPECT_TRUE(SameBits(f.Hidden(fork, f.Text(60, 2), 60), wanted));
  EXPECT_TRUE(SameBits(f.Hidden(context, f.Text(60, 2), 60), wanted));
  EXPECT_GE(f.store->used_bytes(), used);

  // A long append says how far it came.
  Context big = f.Open();
  const absl::Status part = f.engine->Append(big, f.Text(100'000)).status();
  EXPECT_EQ(part.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(part.message()),
              HasSubstr(absl::StrCat(big.length(), " of which are in the context")));
  EXPECT_GT(big.length(), 0);
}

TEST(ModelEngine, WeightsThatOverflowAreAnErrorNamingTheLayer) {
  RandomModel random(RandomModel::RandomConfig(4), DType::kF32, 4);
  auto* weight = static_cast<float*>(const_cast<void*>(random.weights.layers[0].k.weight.data));
  weight[0] = std::numeric_limits<float>::infinity();
  Fixture f(std::move(random), DType::kF32, 1, int64_t{1} << 24);
  Context context = f.Open();
  const absl::Status status = f.engine->Append(context, f.Text(3)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 0"));
  EXPECT_EQ(context.length(), 0);
  EXPECT_EQ(f.store->used_bytes(), 0);
}

TEST(ModelEngine, OptionsThatContradictAreRefusedByName) {
  Fixture f(4);
  const auto refused = [&](const ContextOptions& options) {
    const auto context = f.engine->Open(options);
    EXPECT_EQ(context.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(context.status().message());
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

  Context empty = f.Open();
  EXPECT_EQ(f.engine->Generate(empty, {}).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(f.engine->Score(empty, f.Text(2)).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(f.engine->Append(empty, {}).ok());
  ContextAppendOptions late;
  late.deadline = absl::InfinitePast();
  EXPECT_EQ(f.engine->Append(empty, f.Text(2), late).status().code(), absl::StatusCode::kDeadlineExceeded);
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
