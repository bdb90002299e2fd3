// What an interruption leaves of a session, and how a group goes on from it. (Single steps and their bits:
// engine_test.cc.)
#include "model/job_loop.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "collective/local/local_communicator.h"
#include "collective/testing/forwarding_communicator.h"
#include "model/testing/engine_fixture.h"

namespace eduba {
namespace {

using testing::Fixture;
using testing::JobOutcome;
using testing::RandomModel;
using testing::Session;

constexpr int kRanks = 2;

ContextOptions Options(ContextPolicy policy) {
  ContextOptions options;
  options.policy = policy;
  if (policy != ContextPolicy::kModel) options.window = 30;
  return options;
}

// A model whose layers have no window of their own, so that policies differ in what rows see.
RandomModel ModelThatSeesAllKeys() {
  ModelConfig config = RandomModel::RandomConfig(7);
  config.layers.resize(2, config.layers[0]);
  for (LayerConfig& layer : config.layers) layer.window = 0;
  return RandomModel(config, DType::kF32, 7);
}

absl::Time Far() { return absl::Now() + absl::Seconds(60); }

// Runs body(rank, fixture, next_group) as every rank; next_group() ends the membership of the rank that calls
// it and begins the next one of all ranks.
void OnRanks(const std::function<void(int, Fixture&, const std::function<void()>&)>& body) {
  LocalHub hub;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      uint64_t epoch = 1;
      auto group = hub.Join(epoch, 0, rank, kRanks, Far()).value();
      Fixture f(ModelThatSeesAllKeys(), {.group = group.get(), .chunk_rows = 50});
      const auto next_group = [&] {
        f.jobs->LeaveGroup(absl::AbortedError("the epoch is over"));
        auto next = hub.Join(++epoch, 0, rank, kRanks, Far()).value();
        f.jobs->JoinGroup(next.get());
        group = std::move(next);
      };
      body(rank, f, next_group);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Whether all ranks give the same number.
bool Agree(Fixture& f, uint64_t number) {
  std::vector<int64_t> words(kRanks, 0);
  words[f.jobs->group().rank()] = static_cast<int64_t>(number);
  EXPECT_TRUE(f.jobs->group().SumI64(absl::MakeSpan(words), Far()).ok());
  return std::all_of(words.begin(), words.end(), [&](int64_t word) { return word == words[0]; });
}

ModelContent::Description Describe(Fixture& f, const Session& session) {
  return f.jobs->content().Describe(session.id()).value();
}

// The answer to a question about the session, as a digest that covers every bit of it.
uint64_t Ask(Fixture& f, const Session& session) { return f.Score(session, f.Text(90, 3)).result.digest; }

TEST(JobLoop, AMembershipThatEndsInAnyStepOfAnAppendLeavesRanksAtOnePlaceFromWhichItGoesOn) {
  for (const ContextPolicy policy : {ContextPolicy::kModel, ContextPolicy::kStreaming}) {
    for (const int steps : {0, 1, 3, 9}) {
      OnRanks([&](int /*rank*/, Fixture& f, const auto& next_group) {
        const std::vector<int32_t> ids = f.Text(1000);
        const Session whole = f.Open(Options(policy));
        f.Append(whole, ids);
        const Session session = f.Open(Options(policy));
        f.Append(session, absl::MakeConstSpan(ids).first(20));
        const uint64_t job =
            f.jobs->Start(session, AppendJob{{ids.begin() + 20, ids.end()}, session.length()});
        for (int i = 0; i < steps && f.jobs->busy(); ++i) ASSERT_EQ(f.jobs->Step(), absl::OkStatus());
        next_group();
        EXPECT_EQ(f.jobs->OutcomeOf(job).status().code(), absl::StatusCode::kAborted);
        const ModelContent::Description held = Describe(f, session);
        EXPECT_TRUE(Agree(f, held.digest));
        EXPECT_EQ(held.length, session.length());
        EXPECT_EQ(held.length, 20 + f.jobs->OutcomeOf(job).result.done);
        const std::vector<float> last(session.last().begin(), session.last().end());
        // Ranks stand at the same place: nothing is computed again.
        const JobOutcome settled = f.jobs->Run(session, SettleJob{held.length, /*read_again=*/false});
        EXPECT_TRUE(settled.ok()) << settled.status();
        EXPECT_EQ(settled.result.done, 0);
        EXPECT_TRUE(settled.hidden.empty());
        EXPECT_TRUE(SameBits(session.last(), last));
        // The same append again: what is there is compared, and the rest is read.
        const JobOutcome again = f.jobs->Run(session, AppendJob{ids, 0});
        EXPECT_TRUE(again.ok()) << again.status();
        EXPECT_EQ(again.result.done, 1000);
        EXPECT_EQ(again.result.already_stored, held.length);
        EXPECT_TRUE(SameBits(session.last(), whole.last()));
        EXPECT_EQ(session.Ids(0), ids);
        EXPECT_EQ(session.page_bytes(), whole.page_bytes());
        EXPECT_EQ(Ask(f, session), Ask(f, whole));
      });
      if (HasFailure()) return;
    }
  }
}

// A generation that one rank computed, interrupted after so many steps: the ranks stand at different places,
// but for the first.
TEST(JobLoop, RanksThatStoppedAtDifferentPlacesReadTheirIdsAgainToTheSameBits) {
  for (const int steps : {0, 1, 2, 60}) {
    OnRanks([&](int rank, Fixture& f, const auto& next_group) {
      const Session session = f.Open(Options(ContextPolicy::kStreaming));
      f.Append(session, f.Text(600));
      const Session before = session.Fork();
      GenerateJob generate;
      generate.max_tokens = 100;
      generate.owner_rank = 1;
      f.jobs->Start(session, generate);
      for (int i = 0; i < steps; ++i) ASSERT_EQ(f.jobs->Step(), absl::OkStatus());
      next_group();
      const ModelContent::Description held = Describe(f, session);
      EXPECT_EQ(held.length, rank == 1 ? 600 + steps : 600);
      EXPECT_EQ(Agree(f, held.digest), steps == 0);
      EXPECT_TRUE(session.length() == held.length || session.length() == 0);
      const uint64_t settle = f.jobs->Start(session, SettleJob{600, /*read_again=*/true});
      // The next job of the session waits for it.
      const uint64_t waiting = f.jobs->Start(session, AppendJob{{1, 2, 3}, 600});
      ASSERT_EQ(f.jobs->Step(), absl::OkStatus());
      EXPECT_FALSE(f.jobs->OutcomeOf(settle).ended || f.jobs->OutcomeOf(waiting).ended);
      ASSERT_EQ(f.jobs->RunAll(), absl::OkStatus());
      EXPECT_TRUE(f.jobs->OutcomeOf(settle).ok()) << f.jobs->OutcomeOf(settle).status();
      EXPECT_EQ(f.jobs->OutcomeOf(settle).result.done, 600);
      EXPECT_TRUE(f.jobs->OutcomeOf(waiting).ok()) << f.jobs->OutcomeOf(waiting).status();
      f.Append(before, {1, 2, 3});
      EXPECT_TRUE(SameBits(session.last(), before.last()));
      EXPECT_EQ(session.page_bytes(), before.page_bytes());
      EXPECT_EQ(Describe(f, session), Describe(f, before));
      EXPECT_EQ(Ask(f, session), Ask(f, before));
    });
    if (HasFailure()) return;
  }
}

// A star session's generated rows saw all keys, and see them when they are read again.
TEST(JobLoop, GeneratedTokensAreReadAgainAsTheyWereGenerated) {
  for (const ContextPolicy policy : {ContextPolicy::kModel, ContextPolicy::kStar}) {
    OnRanks([&](int /*rank*/, Fixture& f, const auto& next_group) {
      const Session session = f.Open(Options(policy));
      f.Append(session, f.Text(300));
      f.Generate(session, 40);
      f.Append(session, f.Text(400, 2));
      f.Generate(session, 3);
      const Session before = session.Fork();
      next_group();
      // Interrupted once more, while it reads: the ids stay, and the ranks agree on how far they came.
      f.jobs->Start(session, SettleJob{743, /*read_again=*/true});
      for (int i = 0; i < 5; ++i) ASSERT_EQ(f.jobs->Step(), absl::OkStatus());
      next_group();
      EXPECT_LT(session.length(), 743);
      EXPECT_GT(session.length(), 0);
      const ModelContent::Description held = Describe(f, session);
      EXPECT_EQ(held.length, 743);
      EXPECT_TRUE(Agree(f, held.digest));
      EXPECT_NE(held.digest, Describe(f, before).digest);
      const int64_t left = 743 - session.length();
      const JobOutcome settled = f.jobs->Run(session, SettleJob{743, /*read_again=*/false});
      EXPECT_TRUE(settled.ok()) << settled.status();
      EXPECT_EQ(settled.result.done, left);
      EXPECT_TRUE(SameBits(session.last(), before.last()));
      EXPECT_EQ(session.page_bytes(), before.page_bytes());
      EXPECT_EQ(Ask(f, session), Ask(f, before));
    });
    if (HasFailure()) return;
  }
}

// Fails the call that it is told to, as a broken connection does.
class BreakingCommunicator final : public testing::ForwardingCommunicator {
 public:
  using ForwardingCommunicator::ForwardingCommunicator;
  absl::Status SumI64(absl::Span<int64_t> data, absl::Time deadline) override {
    return Broken() ? absl::UnavailableError("broken") : ForwardingCommunicator::SumI64(data, deadline);
  }
  absl::Status SendReceive(absl::Span<const char> send, int to, absl::Span<char> receive, int from,
                           absl::Time deadline) override {
    return Broken() ? absl::UnavailableError("broken")
                    : ForwardingCommunicator::SendReceive(send, to, receive, from, deadline);
  }
  int64_t calls_until_broken = -1;

 private:
  bool Broken() {
    if (calls_until_broken < 0 || calls_until_broken-- > 0) return false;
    Abort(absl::UnavailableError("broken"));
    return true;
  }
};

// A prompt that is read in chunks, one by prefill, and two generations, of which one has an owner rank.
TEST(JobLoop, AConnectionThatBreaksInAnyCallLeavesSessionsThatGoOnToTheSameBits) {
  bool is_broken = true;
  for (int64_t call = 0; is_broken; call += 3) {
    OnRanks([&](int rank, Fixture& f, const auto& next_group) {
      const Session generating = f.Open(Options(ContextPolicy::kStreaming));
      const Session asking = f.Open(Options(ContextPolicy::kStar));
      const Session reading = f.Open(Options(ContextPolicy::kModel));
      for (const Session* session : {&generating, &asking, &reading}) f.Append(*session, f.Text(250));
      BreakingCommunicator breaking(&f.jobs->group());
      f.jobs->JoinGroup(&breaking);
      if (rank == 1) breaking.calls_until_broken = call;
      GenerateJob generate;
      generate.max_tokens = 12;
      f.jobs->Start(asking, generate);
      generate.owner_rank = 0;
      f.jobs->Start(generating, generate);
      f.jobs->Start(reading, AppendJob{f.Text(800, 2), 250});
      const absl::Status status = f.jobs->RunAll();
      if (rank == 0) is_broken = !status.ok();
      next_group();
      const auto page_bytes = [&] {
        return generating.page_bytes() + asking.page_bytes() + reading.page_bytes();
      };
      EXPECT_EQ(f.store->used_bytes(), page_bytes());
      for (const Session* session : {&generating, &asking, &reading}) {
        const ModelContent::Description held = Describe(f, *session);
        std::vector<int64_t> lengths(kRanks, 0);
        lengths[rank] = held.length;
        ASSERT_TRUE(f.jobs->group().SumI64(absl::MakeSpan(lengths), Far()).ok());
        const int64_t length = *std::min_element(lengths.begin(), lengths.end());
        const bool read_again = !Agree(f, held.digest);
        const JobOutcome settled = f.jobs->Run(*session, SettleJob{length, read_again});
        ASSERT_TRUE(settled.ok()) << settled.status();
        // Another session, which reads and generates the same tokens without an interruption.
        const Session judge = f.Open(session->context().options());
        const std::vector<int32_t> ids = session->Ids(0);
        if (session == &asking) {
          f.Append(judge, absl::MakeConstSpan(ids).first(250));
          if (length > 250) f.Generate(judge, length - 250);
        } else {
          f.Append(judge, ids);
        }
        EXPECT_EQ(judge.Ids(0), ids);
        EXPECT_TRUE(SameBits(session->last(), judge.last())) << "broken in call " << call;
        EXPECT_EQ(session->page_bytes(), judge.page_bytes()) << "broken in call " << call;
        EXPECT_EQ(Ask(f, *session), Ask(f, judge));
      }
    });
    if (HasFailure()) return;
  }
}

TEST(JobLoop, AnAppendOfIdsThatAreThereIsComparedAndNotRead) {
  Fixture f(7);
  const std::vector<int32_t> ids = f.Text(300);
  const Session session = f.Open();
  f.Append(session, ids);
  const JobOutcome same = f.jobs->Run(session, AppendJob{{ids.begin() + 100, ids.begin() + 200}, 100});
  EXPECT_TRUE(same.ok()) << same.status();
  EXPECT_EQ(same.result.already_stored, 100);
  EXPECT_EQ(same.result.done, 100);
  EXPECT_TRUE(same.hidden.empty());
  std::vector<int32_t> other(ids.begin() + 100, ids.end());
  other.resize(250, 1);
  other[57] = ids[157] == 0 ? 1 : 0;
  const JobOutcome differs = f.jobs->Run(session, AppendJob{other, 100});
  EXPECT_EQ(differs.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(differs.status().message()), ::testing::HasSubstr("position 157"));
  for (const int64_t at : {int64_t{-1}, int64_t{301}}) {
    EXPECT_EQ(f.jobs->Run(session, AppendJob{{1}, at}).status().code(), absl::StatusCode::kOutOfRange);
  }
  EXPECT_EQ(session.length(), 300);
}

TEST(JobLoop, ASettlementThatDoesNotFitIsRefused) {
  Fixture f(7);
  const Session session = f.Open();
  f.Append(session, f.Text(10));
  const auto settle = [&](int64_t length, bool read_again) {
    return f.jobs->Run(session, SettleJob{length, read_again}).status().code();
  };
  EXPECT_EQ(settle(11, false), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(settle(11, true), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(settle(9, false), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(session.length(), 10);
  EXPECT_EQ(settle(0, true), absl::StatusCode::kOk);
  EXPECT_EQ(session.length(), 0);
  EXPECT_EQ(f.store->used_bytes(), 0);
}

}  // namespace
}  // namespace eduba
