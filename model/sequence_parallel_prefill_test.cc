#include "model/sequence_parallel_prefill.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "collective/testing/forwarding_communicator.h"
#include "model/engine.h"
#include "model/testing/engine_fixture.h"
#include "model/testing/random_model.h"

namespace eduba {
namespace {

using testing::Fixture;
using testing::FixtureOptions;
using testing::JobOutcome;
using testing::RandomModel;
using testing::RandomOptions;
using testing::RunGroup;
using testing::Session;
using testing::ToString;

absl::Time Far() { return absl::Now() + absl::Seconds(60); }

// Counts calls, spoils a bit of the message that it is told to, in the exponent of its last number, and fails
// in the reduce-scatter that it is told to.
class Courier final : public testing::ForwardingCommunicator {
 public:
  using ForwardingCommunicator::ForwardingCommunicator;

  absl::Status SendReceive(absl::Span<const char> send, int to, absl::Span<char> receive, int from,
                           absl::Time deadline) override {
    absl::Status status = ForwardingCommunicator::SendReceive(send, to, receive, from, deadline);
    if (!receive.empty() && received_++ == spoil) receive.back() ^= 1;
    return status;
  }

  absl::Status ReduceScatterI64(absl::Span<int64_t> data, absl::Span<const int64_t> counts,
                                absl::Time deadline) override {
    maximum_scatters_ += std::exchange(is_behind_maximum_, false) ? 1 : 0;
    if (scatters_++ == fail) return absl::DataLossError("a broken device");
    return ForwardingCommunicator::ReduceScatterI64(data, counts, deadline);
  }
  absl::Status MaxF32(absl::Span<float> data, absl::Time deadline) override {
    is_behind_maximum_ = true;
    return ForwardingCommunicator::MaxF32(data, deadline);
  }

  int64_t received() const { return received_; }
  int64_t scatters() const { return scatters_; }
  int64_t maximum_scatters() const { return maximum_scatters_; }  // Those of the maximum path.
  int64_t spoil = -1;
  int64_t fail = -1;

 private:
  int64_t received_ = 0;
  int64_t scatters_ = 0;
  int64_t maximum_scatters_ = 0;
  bool is_behind_maximum_ = false;
};

// A random model whose windows are of all sizes beside a page's, and none in some layers.
RandomModel ModelOf(uint64_t seed) {
  ModelConfig config = RandomModel::RandomConfig(seed);
  std::mt19937_64 random(seed * 31);
  for (LayerConfig& layer : config.layers) {
    const int64_t windows[] = {0, 0, 1, 5, 40, 257, 700};
    layer.window = windows[random() % std::size(windows)];
  }
  return RandomModel(config, seed % 2 == 0 ? DType::kBf16 : DType::kF32, seed);
}

struct Answers {
  std::vector<float> floats;      // The last hidden states, in order.
  std::vector<uint64_t> digests;  // Every job's digest.
  std::vector<float> reported;    // What the reporting rank alone has: log-probabilities and embeddings.
  std::vector<int32_t> ids;       // Generated.
};

// Long and short appends in pieces that `chunking` draws, with a fork between, then every kind of question to
// both. The answers are a function of `seed` and `options` alone.
Answers RunAll(Fixture& f, const ContextOptions& options, uint64_t seed, uint64_t chunking) {
  Answers answers;
  std::mt19937_64 random(chunking);
  const auto add = [&](const JobOutcome& outcome) {
    ASSERT_TRUE(outcome.ok()) << outcome.status();
    answers.digests.push_back(outcome.result.digest);
    for (const auto* more : {&outcome.result.log_probs, &outcome.result.vectors}) {
      answers.reported.insert(answers.reported.end(), more->begin(), more->end());
    }
  };
  const auto append = [&](const Session& session, absl::Span<const int32_t> ids, bool scores) {
    if (scores) add(f.jobs->Score(session, ids));
    while (!ids.empty()) {
      const size_t count = std::min<size_t>(ids.size(), 1 + random() % 1400);
      f.Append(session, ids.first(count));
      ids.remove_prefix(count);
    }
    answers.floats.insert(answers.floats.end(), session.last().begin(), session.last().end());
  };
  const auto ask = [&](const Session& session) {
    add(f.jobs->Score(session, f.Text(900, seed + 5)));
    const int64_t at = session.length() - 1100;
    for (const Pool pool : {Pool::kMean, Pool::kLast}) {
      add(f.jobs->Run(session, EmbedJob{{{at, at + 3}, {at + 200, at + 900}, {at + 900, at + 1100}}, pool}));
    }
    GenerateJob generate;
    generate.max_tokens = 5;
    generate.sampling = {/*temperature=*/1, /*top_k=*/0, /*top_p=*/1, seed};
    add(f.jobs->Run(session, generate));
    for (const int32_t id : session.Ids(session.length() - 5)) answers.ids.push_back(id);
  };
  const std::vector<int32_t> ids = f.Text(3600, seed);
  const absl::Span<const int32_t> all = ids;
  const Session session = f.Open(options);
  append(session, all.subspan(0, 1900), false);
  const Session fork = session.Fork();
  append(session, all.subspan(1900, 1000), true);
  ask(session);
  append(fork, all.subspan(2500, 700), true);
  append(fork, all.subspan(3200), false);
  ask(fork);
  append(session, all.subspan(2900), true);
  return answers;
}

TEST(SequenceParallelPrefill, AnyNumberOfWorkersAndAnyChunksGiveTheBitsOfOneWorker) {
  for (uint64_t seed = 1; seed <= 9; ++seed) {
    const ContextOptions options = RandomOptions(seed + 700);
    FixtureOptions how;
    how.kv_dtype = seed % 4 == 0 ? DType::kBf16 : DType::kF32;
    Fixture alone(ModelOf(seed), how);
    SCOPED_TRACE(absl::StrCat("seed ", seed, " ", alone.random.ToString(), " ", ToString(options)));
    const Answers wanted = RunAll(alone, options, seed, 1);
    if (HasFatalFailure()) return;
    const int size = 2 + static_cast<int>(seed % 3);
    RunGroup(size, [&](int rank, Communicator* communicator) {
      Courier courier(communicator);
      FixtureOptions here = how;
      here.group = &courier;
      here.stripe_pages = 1 + static_cast<int64_t>(seed % 2);
      Fixture f(ModelOf(seed), here);
      const Answers got = RunAll(f, options, seed, size);
      EXPECT_TRUE(SameBits(got.floats, wanted.floats)) << "rank " << rank << " of " << size;
      EXPECT_EQ(got.digests, wanted.digests) << "rank " << rank << " of " << size;
      EXPECT_EQ(got.ids, wanted.ids) << "rank " << rank << " of " << size;
      if (rank == 0) {
        EXPECT_TRUE(SameBits(got.reported, wanted.reported));
      }
      EXPECT_GT(courier.received(), 5) << "no prefill was shared out?";
    });
    if (HasFailure()) return;
  }
}

// The test above would notice: one bit of a halo that is wrong is seen in the answer.
TEST(SequenceParallelPrefill, WhatARankIsSentIsWhatItSees) {
  ModelConfig config = RandomModel::RandomConfig(2);
  config.layers.resize(2);
  config.layers[0].window = config.layers[1].window = 100;
  const auto last = [&](Communicator* communicator) {
    Fixture f(RandomModel(config, DType::kF32, 2), {.group = communicator});
    const Session context = f.Open();
    f.Append(context, f.Text(2 * kPageRows - 190));
    return std::vector<float>(context.last().begin(), context.last().end());
  };
  const std::vector<float> wanted = last(nullptr);
  for (const int64_t spoil : {-1, 0}) {
    RunGroup(2, [&](int rank, Communicator* communicator) {
      Courier courier(communicator);
      courier.spoil = rank == 1 ? spoil : -1;  // What it is sent first: the halo of layer 0.
      EXPECT_EQ(SameBits(last(&courier), wanted), spoil < 0) << "rank " << rank;
    });
  }
}

// All layers see all keys, each of which counts about as much as a sink: beyond 1024 of them a row takes the
// maximum path, and without a sink it always does.
RandomModel ModelOfEqualKeys() {
  ModelConfig config = RandomModel::RandomConfig(7);
  config.attention_scale = 1e-3F;
  config.attention_softcap = 0;
  config.layers.resize(2, config.layers[0]);
  for (LayerConfig& layer : config.layers) layer.window = 0;
  return RandomModel(config, DType::kF32, 7);
}

// Rounds of a prefill with rows of the one path, of the other, and of both.
TEST(SequenceParallelPrefill, RowsOfBothPathsGiveTheBitsOfOneWorker) {
  for (const int64_t sinks : {0, 4}) {
    ContextOptions options;
    options.sink_tokens = sinks;
    Fixture alone(ModelOfEqualKeys());
    const std::vector<int32_t> ids = alone.Text(2300);
    const Session judge = alone.Open(options);
    alone.Hidden(judge, ids, 100);
    for (const int ranks : {2, 3, 4}) {
      SCOPED_TRACE(absl::StrCat(sinks, " sinks, ", ranks, " ranks"));
      RunGroup(ranks, [&](int rank, Communicator* communicator) {
        Courier courier(communicator);
        Fixture f(ModelOfEqualKeys(), {.group = &courier});
        const Session context = f.Open(options);
        f.Append(context, ids);
        EXPECT_TRUE(SameBits(context.last(), judge.last())) << "rank " << rank;
        const int64_t sink_scatters = courier.scatters() - courier.maximum_scatters();
        EXPECT_GT(courier.maximum_scatters(), 0);
        if (sinks > 0) {
          EXPECT_GT(sink_scatters, courier.maximum_scatters());
        } else {
          EXPECT_EQ(sink_scatters, 0);
        }
      });
      if (HasFailure()) return;
    }
  }
}

// Whichever round it is in: in a sink path's sum, or in a maximum path's.
TEST(SequenceParallelPrefill, ARankThatFailsInARoundIsAnErrorOnAll) {
  for (const int64_t fail : {0, 1, 40, 61}) {
    SCOPED_TRACE(absl::StrCat("reduce-scatter ", fail));
    RunGroup(3, [&](int rank, Communicator* communicator) {
      Courier courier(communicator);
      if (rank == 1) courier.fail = fail;
      Fixture f(ModelOfEqualKeys(), {.group = &courier});
      const Session context = f.Open();
      const absl::Status status = f.jobs->Append(context, f.Text(2300)).status();
      if (rank == 1) {
        EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
      } else {
        EXPECT_TRUE(absl::IsUnavailable(status) || absl::IsAborted(status)) << status;
      }
      EXPECT_EQ(courier.scatters(), fail + 1);
    });
    if (HasFailure()) return;
  }
}

// A prefill of a session unit by unit, for what happens between two of them.
class PrefillStepper {
 public:
  PrefillStepper(Fixture& f, const Session& session, absl::Span<const int32_t> ids)
      : f_(f),
        context_(session.context()),
        prefill(f.jobs->engine().StartPrefill(context_, ids, false, false, nullptr, f.jobs->group())) {
    EXPECT_TRUE(prefill != nullptr);
    const absl::Status reserved = prefill->Reserve();
    EXPECT_TRUE(reserved.ok()) << reserved;
  }
  bool Step() {
    const absl::Status status = prefill->Run(1, Far());
    EXPECT_TRUE(status.ok()) << status;
    return status.ok() && !prefill->done();
  }
  void Finish() {
    ASSERT_EQ(prefill->status(), absl::OkStatus());
    f_.jobs->engine().FinishPrefill(*prefill, context_, nullptr);
  }

 private:
  Fixture& f_;
  Context& context_;

 public:
  std::unique_ptr<SequenceParallelPrefill> prefill;
};

TEST(SequenceParallelPrefill, LeavesThePagesThatChunksWouldHaveLeft) {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    const ContextOptions options = RandomOptions(seed + 900);
    SCOPED_TRACE(absl::StrCat("seed ", seed, " ", ToString(options)));
    RunGroup(3, [&](int /*rank*/, Communicator* communicator) {
      Fixture f(ModelOf(seed), {.group = communicator});
      const std::vector<int32_t> ids = f.Text(2100, seed);
      const Session chunks = f.Open(options);
      f.Hidden(chunks, ids, 100);
      const Session prefilled = f.Open(options);
      f.Append(prefilled, absl::MakeConstSpan(ids).subspan(0, 300));
      f.Append(prefilled, absl::MakeConstSpan(ids).subspan(300));
      EXPECT_EQ(prefilled.page_bytes(), chunks.page_bytes());
      EXPECT_EQ(f.store->used_bytes(), 2 * chunks.page_bytes());
      EXPECT_TRUE(SameBits(prefilled.last(), chunks.last()));
    });
    if (HasFailure()) return;
  }
}

TEST(SequenceParallelPrefill, OneThatIsGivenUpAtAnyMomentLeavesNoTrace) {
  const ContextOptions options;
  Fixture alone(ModelOf(6));
  const std::vector<int32_t> ids = alone.Text(1500);
  const Session judge = alone.Open(options);
  alone.Hidden(judge, ids, ids.size());
  RunGroup(3, [&](int /*rank*/, Communicator* communicator) {
    Fixture f(ModelOf(6), {.group = communicator});
    const Session context = f.Open(options);
    f.Hidden(context, absl::MakeConstSpan(ids).subspan(0, 300), 100);
    const int64_t used = f.store->used_bytes();
    const std::vector<int32_t> rest(ids.begin() + 300, ids.end());
    for (int units = 0;; units += 3) {
      PrefillStepper stepper(f, context, rest);
      EXPECT_GT(f.store->used_bytes(), used);
      bool more = true;
      for (int i = 0; i < units && more; ++i) more = stepper.Step();
      stepper.prefill.reset();
      EXPECT_EQ(f.store->used_bytes(), used);
      EXPECT_EQ(context.length(), 300);
      if (!more) break;
    }
    f.Append(context, rest);
    EXPECT_TRUE(SameBits(context.last(), judge.last()));
  });
}

TEST(SequenceParallelPrefill, OtherContextsAndForksGoOnBetweenItsUnits) {
  for (const ContextPolicy policy :
       {ContextPolicy::kModel, ContextPolicy::kStreaming, ContextPolicy::kStar}) {
    ContextOptions options;
    options.policy = policy;
    if (policy != ContextPolicy::kModel) options.window = 300;
    Fixture alone(ModelOf(3));
    const std::vector<int32_t> ids = alone.Text(1800);
    const std::vector<int32_t> other = alone.Text(400, 2);
    const Session judge = alone.Open(options);
    alone.Hidden(judge, absl::MakeConstSpan(ids).subspan(0, 400), 400);
    const Session forked_judge = judge.Fork();
    alone.Hidden(judge, absl::MakeConstSpan(ids).subspan(400, kPageRows * 4 - 400), 1000);
    const std::vector<float> wanted = alone.Hidden(forked_judge, other, 400);
    RunGroup(3, [&](int rank, Communicator* communicator) {
      Fixture f(ModelOf(3), {.group = communicator});
      const Session context = f.Open(options);
      f.Hidden(context, absl::MakeConstSpan(ids).subspan(0, 400), 100);
      PrefillStepper stepper(f, context, absl::MakeConstSpan(ids).subspan(400));
      std::vector<float> got;
      std::optional<Session> fork;
      for (size_t at = 0; stepper.Step();) {
        if (!fork) fork.emplace(context.Fork());
        const size_t count = std::min<size_t>(19, other.size() - at);
        if (count == 0) continue;
        const auto some = f.Hidden(*fork, absl::MakeConstSpan(other).subspan(at, count), count);
        got.insert(got.end(), some.begin(), some.end());
        at += count;
      }
      stepper.Finish();
      EXPECT_EQ(context.length(), 4 * kPageRows);
      EXPECT_TRUE(SameBits(context.last(), judge.last())) << "rank " << rank;
      EXPECT_GT(got.size(), 0U);
      EXPECT_TRUE(SameBits(got, absl::MakeConstSpan(wanted).subspan(0, got.size()))) << "rank " << rank;
    });
    if (HasFailure()) return;
  }
}

TEST(SequenceParallelPrefill, NeedsAShareOfAllKeysAndOfWindowsNoMoreThanTheStripeOfOneLayer) {
  ModelConfig config = RandomModel::RandomConfig(1);
  config.layers.resize(3, config.layers[0]);
  for (LayerConfig& layer : config.layers) layer.window = 0;
  RunGroup(4, [&](int /*rank*/, Communicator* communicator) {
    Fixture f(RandomModel(config, DType::kF32, 1), {.group = communicator, .stripe_pages = 4});
    AttentionShape shape{config.query_heads, config.kv_heads, config.head_dim, config.head_dim, DType::kF32};
    const int64_t page = f.backend->PageBytes(shape);
    const std::vector<int32_t> ids = f.Text(32 * kPageRows);
    const auto most_while_reading = [&](const ContextOptions& options) {
      const Session context = f.Open(options);
      int64_t most = 0;
      while (context.length() < 32 * kPageRows) {
        PrefillStepper stepper(f, context, absl::MakeConstSpan(ids).subspan(context.length()));
        const auto page_bytes = [&] { return f.store->used_bytes() - stepper.prefill->buffer_bytes(); };
        most = std::max(most, page_bytes());
        while (stepper.Step()) most = std::max(most, page_bytes());
        stepper.Finish();
      }
      EXPECT_EQ(f.store->used_bytes(), context.page_bytes());
      return most / page;
    };
    // 8 of 32 pages and a copy of the one with the sinks, in each of three layers.
    EXPECT_LE(most_while_reading({}), 3 * 9);
    ContextOptions streaming;
    streaming.policy = ContextPolicy::kStreaming;
    streaming.window = 300;
    // In each layer sinks, two windows (the last and the next) of two pages; in one of them a stripe and its
    // halo.
    EXPECT_LE(most_while_reading(streaming), 3 * 5 + 4 + 2);
  });
}

// One byte makes the difference between a prefill and chunks, and not for want of pages.
TEST(SequenceParallelPrefill, WithoutRoomForItsBuffersAnAppendGoesOnInChunksToTheSameBits) {
  ModelConfig config = RandomModel::RandomConfig(4);
  config.layers.resize(1);
  Fixture alone(RandomModel(config, DType::kF32, 4));
  const std::vector<int32_t> ids = alone.Text(8 * kPageRows);  // One prefill.
  const Session judge = alone.Open();
  alone.Append(judge, ids);
  int64_t needed = 0;  // By rank 1.
  for (const int64_t short_of : {-1, 0, 1}) {
    RunGroup(2, [&](int rank, Communicator* communicator) {
      Courier courier(communicator);
      const bool small = rank == 1 && short_of >= 0;
      FixtureOptions how;
      if (small) how.store_bytes = needed - short_of;
      how.group = &courier;
      how.stripe_pages = 4;
      Fixture f(RandomModel(config, DType::kF32, 4), how);
      const Session context = f.Open();
      if (short_of < 0 && rank == 1) {
        const auto prefill =
            f.jobs->engine().StartPrefill(context.context(), ids, false, false, nullptr, courier);
        ASSERT_TRUE(prefill->Reserve().ok());
        needed = f.store->used_bytes();
        EXPECT_GT(prefill->buffer_bytes(),
                  4 * kPageRows * 4 * (config.hidden_size + config.query_heads * config.head_dim));
      }
      f.Append(context, ids);
      EXPECT_TRUE(SameBits(context.last(), judge.last()));
      EXPECT_EQ(courier.received() > 0, short_of <= 0) << "short of " << short_of;
    });
  }
}

TEST(SequenceParallelPrefill, WithoutRoomForItAnAppendGoesOnInChunksToTheSameBits) {
  ModelConfig config = RandomModel::RandomConfig(4);
  config.layers.resize(1);
  ContextOptions options;
  options.policy = ContextPolicy::kStreaming;
  options.window = 20;
  Fixture alone(RandomModel(config, DType::kF32, 4));
  const std::vector<int32_t> ids = alone.Text(20 * kPageRows);
  const Session judge = alone.Open(options);
  alone.Append(judge, ids);
  RunGroup(2, [&](int rank, Communicator* communicator) {
    Courier courier(communicator);
    // 8 pages of a stripe do not fit, sinks and a window do.
    const int64_t small = int64_t{1} << 20;
    FixtureOptions how;
    how.store_bytes = rank == 1 ? small : 64 * small;
    how.group = &courier;
    how.stripe_pages = 8;
    Fixture f(RandomModel(config, DType::kF32, 4), how);
    AttentionShape shape{config.query_heads, config.kv_heads, config.head_dim, config.head_dim, DType::kF32};
    ASSERT_GT(8 * f.backend->PageBytes(shape), small);
    const Session context = f.Open(options);
    f.Append(context, ids);
    EXPECT_TRUE(SameBits(context.last(), judge.last()));
    EXPECT_EQ(courier.received(), 0);
  });
}

TEST(SequenceParallelPrefill, NumbersThatOverflowOnOneRankAreAnErrorOnAllAndTheGroupLivesOn) {
  for (const int64_t window : {0, 30}) {
    const auto model = [&] {
      ModelConfig config = RandomModel::RandomConfig(5);
      config.layers.resize(2, config.layers[0]);
      for (LayerConfig& layer : config.layers) layer.window = window;
      RandomModel random(config, DType::kF32, 5);
      auto* embeddings = static_cast<float*>(const_cast<void*>(random.weights.embeddings.data));
      embeddings[0] = std::numeric_limits<float>::infinity();  // This is in token 0's embedding.
      return random;
    };
    RunGroup(3, [&](int /*rank*/, Communicator* communicator) {
      Fixture f(model(), {.group = communicator});
      std::vector<int32_t> ids = f.Text(1000);
      for (int32_t& id : ids) id = std::max(id, 1);
      const Session whole = f.Open();
      f.Append(whole, ids);
      const Session context = f.Open();
      std::vector<int32_t> poisoned = ids;
      poisoned[600] = 0;
      const absl::Status status = f.jobs->Append(context, poisoned).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
      EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("layer 0"));
      EXPECT_EQ(context.length(), 512);  // In chunks, as far as there is nothing wrong.
      f.Append(context, absl::MakeConstSpan(ids).subspan(512));
      EXPECT_TRUE(SameBits(context.last(), whole.last()));
    });
  }
}

// Three ways for arithmetic to fail at one token: its embedding, its attention, the logits after it.
TEST(SequenceParallelPrefill, AnAppendThatFailsAtATokenHasReadAsMuchOnAnyNumberOfRanks) {
  enum class Poison { kEmbedding, kAttention, kLogits };
  const auto model = [](Poison poison, int64_t window) {
    ModelConfig config = RandomModel::RandomConfig(5);
    config.norm = NormKind::kRms;
    config.norm_plus_one = config.qk_norm = config.parallel_residual = false;
    config.attention_softcap = config.logit_softcap = 0;
    config.layers.resize(1);
    config.layers[0].window = window;
    RandomModel random(config, DType::kF32, 5);
    const auto column = [&](const WeightView& weights, int64_t first, int64_t last, float value) {
      for (int64_t row = first; row < last; ++row) {
        static_cast<float*>(const_cast<void*>(weights.data))[row * weights.shape[1]] = value;
      }
    };
    const WeightView& embeddings = random.weights.embeddings;
    const LayerWeights& layer = random.weights.layers[0];
    switch (poison) {
      case Poison::kEmbedding:
        column(embeddings, 0, 1, std::numeric_limits<float>::infinity());
        break;
      case Poison::kAttention:
        // Only token 0 has a first channel, and its product with itself is too large.
        column(embeddings, 0, 1, 1);
        column(embeddings, 1, config.vocab_size, 0);
        column(layer.q.weight, 0, layer.q.weight.shape[0], 1e22F);
        column(layer.k.weight, 0, layer.k.weight.shape[0], 1e22F);
        break;
      case Poison::kLogits:
        // Only token 0 has a first channel, which nothing else adds to.
        column(embeddings, 0, 1, 30);
        column(embeddings, 1, config.vocab_size, 0);
        for (const LinearWeights* linear : {&layer.o_proj, &layer.down}) {
          std::fill_n(static_cast<float*>(const_cast<void*>(linear->weight.data)), linear->weight.shape[1],
                      0);
          if (!linear->bias.present()) continue;
          static_cast<float*>(const_cast<void*>(linear->bias.data))[0] = 0;
        }
        column(random.weights.head, 0, 1, 3e38F);
        break;
    }
    return random;
  };
  for (const Poison poison : {Poison::kEmbedding, Poison::kAttention, Poison::kLogits}) {
    for (const int64_t window : {0, 30}) {
      for (const int64_t at : {5, 300, 563, 1000, 1279}) {
        SCOPED_TRACE(absl::StrCat("poison ", static_cast<int>(poison), " window ", window, " at ", at));
        int64_t length = 0;
        std::string message;
        for (const int ranks : {1, 2, 3}) {
          RunGroup(ranks, [&](int rank, Communicator* communicator) {
            Courier courier(communicator);
            Fixture f(model(poison, window), {.group = ranks == 1 ? nullptr : &courier});
            std::vector<int32_t> ids = f.Text(1400);
            for (int32_t& id : ids) id = std::max(id, 1);
            const Session context = f.Open();
            f.Append(context, absl::MakeConstSpan(ids).first(3));
            ids[at] = 0;
            const auto rest = absl::MakeConstSpan(ids).subspan(3);
            const absl::Status status = poison == Poison::kLogits ? f.jobs->Score(context, rest).status()
                                                                  : f.jobs->Append(context, rest).status();
            ASSERT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
            if (ranks == 1) {
              length = context.length();
              message = std::string(status.message());
            }
            // (A score leaves the session as it was.)
            EXPECT_EQ(context.length(), length) << "rank " << rank << " of " << ranks;
            // A rank that others told says so.
            if (poison != Poison::kAttention) {
              EXPECT_EQ(std::string(status.message()), message);
            }
            // (A prefill that fails in its first units is given up before any message.)
            if (ranks > 1 && at >= 1000) {
              EXPECT_GT(courier.received(), 0) << "no prefill was shared out?";
            }
          });
          if (HasFailure()) return;
        }
      }
    }
  }
}

// The last product overflows after some rows. All ranks say so, whoever computed them, and leave the context
// as it was; a softcap does not hide it.
TEST(SequenceParallelPrefill, LogitsThatAreNotFiniteAreAnErrorOnAllRanks) {
  for (const float softcap : {0.0F, 30.0F}) {
    const auto model = [&] {
      ModelConfig config = RandomModel::RandomConfig(5);
      config.logit_softcap = softcap;
      RandomModel random(config, DType::kF32, 5);
      auto* head = static_cast<float*>(const_cast<void*>(random.weights.head.data));
      head[0] = 3e38F;  // Times the hidden state's first channel, for token 0.
      return random;
    };
    std::string alone;
    for (const int ranks : {1, 3}) {
      RunGroup(ranks, [&](int rank, Communicator* communicator) {
        Fixture f(model(), {.group = ranks == 1 ? nullptr : communicator});
        const std::vector<int32_t> ids = f.Text(1000);
        const Session context = f.Open();
        f.Append(context, absl::MakeConstSpan(ids).first(1));
        int64_t at = 0;  // The number of tokens after which the logits are not finite.
        while (at < 1000 && f.NextLogits(context).ok()) {
          f.Append(context, absl::MakeConstSpan(ids).subspan(++at, 1));
        }
        ASSERT_LT(at, 20);
        const absl::Status next = f.NextLogits(context).status();
        EXPECT_EQ(next.code(), absl::StatusCode::kInvalidArgument) << next;
        EXPECT_THAT(std::string(next.message()), ::testing::HasSubstr("a logit is not finite"));
        GenerateJob generate;
        generate.max_tokens = 3;
        EXPECT_EQ(f.jobs->Run(context, generate).status().code(), absl::StatusCode::kInvalidArgument);
        const absl::Status score = f.jobs->Score(context, ids).status();
        EXPECT_EQ(score.code(), absl::StatusCode::kInvalidArgument) << score;
        EXPECT_THAT(std::string(score.message()), ::testing::HasSubstr("a logit is not finite"));
        EXPECT_EQ(context.length(), at + 1);
        f.Append(context, absl::MakeConstSpan(ids).subspan(at + 1));
        EXPECT_EQ(context.length(), 1000);
        if (ranks == 1) alone = std::string(score.message());
        EXPECT_EQ(std::string(score.message()), alone) << "rank " << rank;
      });
    }
  }
}

}  // namespace
}  // namespace eduba
