// The steps of jobs on one rank, and of those that ranks share out on two. (Whole clusters:
// tests/cluster/model_cluster_test.cc.)
#include "worker/model_sessions.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "collective/local/local_communicator.h"
#include "collective/testing/counting_communicator.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

constexpr int32_t kPoison = 96;  // A token whose embedding is infinite.

// A golden model with a tokenizer (token i is "g<i>") and a poisonous last token. `head_overflows`: the
// logit of token 1 is not finite where a hidden state's first channel is larger than 1.13.
std::string ModelFolder(bool head_overflows = false) {
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / "model_sessions_test";
  std::filesystem::remove_all(folder);
  std::filesystem::copy(absl::StrCat(EDUBA_GOLDEN_MODELS, "/llama"), folder);
  std::ofstream genes(folder / "genes.txt");
  for (int i = 0; i < 97; ++i) genes << "g" << i << "\n";

  std::ifstream in(folder / "model.safetensors", std::ios::binary);
  std::string file((std::istreambuf_iterator<char>(in)), {});
  uint64_t header = 0;
  std::memcpy(&header, file.data(), 8);
  const auto tensors = nlohmann::json::parse(file.substr(8, header));
  const auto set_row = [&](const char* name, int32_t row, float first, float others) {
    const auto width = tensors[name]["shape"][1].get<size_t>();
    const size_t begin = 8 + header + tensors[name]["data_offsets"][0].get<size_t>();
    for (size_t i = 0; i < width; ++i) {
      std::memcpy(&file[begin + 4 * (row * width + i)], i == 0 ? &first : &others, 4);
    }
  };
  const float infinity = std::numeric_limits<float>::infinity();
  set_row("model.embed_tokens.weight", kPoison, infinity, infinity);
  if (head_overflows) set_row("lm_head.weight", 1, 3e38F, 0);
  std::ofstream(folder / "model.safetensors", std::ios::binary) << file;
  return folder.string();
}

// A backend that fails to copy pages when it is told to.
class CopyBackend final : public Backend {
 public:
  std::string name() const override { return own_->name(); }
  absl::StatusOr<void*> AllocateSlab(int64_t bytes) override { return own_->AllocateSlab(bytes); }
  void FreeSlab(void* slab, int64_t bytes) override { own_->FreeSlab(slab, bytes); }
  int64_t PageBytes(const AttentionShape& shape) const override { return own_->PageBytes(shape); }
  absl::Status WriteRows(const AttentionShape& shape, void* page, int row, int rows, const void* keys,
                         const void* values) override {
    return own_->WriteRows(shape, page, row, rows, keys, values);
  }
  absl::Status CopyPage(const AttentionShape& shape, const void* from, void* to) override {
    return broken ? absl::InternalError("the device is broken") : own_->CopyPage(shape, from, to);
  }
  absl::StatusOr<std::unique_ptr<AttentionStep>> StartStep(const StepArgs& args) override {
    return own_->StartStep(args);
  }
  bool broken = false;

 private:
  std::unique_ptr<Backend> own_ = MakeCpuBackend(1);
};

// One rank's sessions, and what they say.
class Rank {
 public:
  Rank(LocalHub& hub, const std::string& folder, int rank, int ranks,
       int64_t memory_bytes = int64_t{64} << 20)
      : store_(&backend_, memory_bytes),
        model_(ServedModel::Load(folder, MakeCpuLayerKernels(1)).value()),
        group_(hub.Join(1, 1, rank, ranks, absl::Now() + absl::Seconds(30)).value()),
        counting_(group_.get()) {
    ModelSessions::Options options;
    options.backend = &backend_;
    options.store = &store_;
    options.model = model_.get();
    options.group = &counting_;
    options.epoch = 1;
    options.chunk_rows = 50;
    options.send = [this](const v1::WorkerMessage& message) { said_.push_back(message); };
    sessions_ = std::make_unique<ModelSessions>(std::move(options));
    Open(1);
    Open(2);
  }

  void Open(uint64_t id, int64_t window = 0, int64_t stripe_pages = 1) {
    v1::SessionSpec spec;
    spec.set_stripe_pages(stripe_pages);
    spec.mutable_model()->set_model_hash(model_->info().hash());
    spec.mutable_model()->set_sink_tokens(4);
    if (window > 0) spec.mutable_model()->set_policy(v1::MODEL_POLICY_STREAMING);
    spec.mutable_model()->set_window(window);
    EXPECT_TRUE(sessions_->Open(id, spec).ok());
  }
  v1::Command NewCommand() {
    v1::Command command;
    command.set_ordinal(++ordinal_);
    command.set_timeout_ms(30000);
    return command;
  }
  uint64_t Append(uint64_t session, const std::vector<int32_t>& ids) {
    v1::Command command = NewCommand();
    command.mutable_model_append()->set_session_id(session);
    command.mutable_model_append()->set_ids(ids.data(), ids.size() * 4);
    EXPECT_TRUE(sessions_->Start(command).ok());
    return ordinal_;
  }
  uint64_t Generate(uint64_t session, int64_t tokens, const std::vector<std::string>& stop = {}) {
    v1::Command command = NewCommand();
    command.mutable_model_generate()->set_session_id(session);
    command.mutable_model_generate()->mutable_request()->set_max_tokens(tokens);
    for (const std::string& string : stop) {
      command.mutable_model_generate()->mutable_request()->add_stop_strings(string);
    }
    EXPECT_TRUE(sessions_->Start(command).ok());
    return ordinal_;
  }
  uint64_t Score(uint64_t session, const std::vector<int32_t>& ids) {
    v1::Command command = NewCommand();
    command.mutable_model_score()->set_session_id(session);
    command.mutable_model_score()->set_ids(ids.data(), ids.size() * 4);
    EXPECT_TRUE(sessions_->Start(command).ok());
    return ordinal_;
  }
  // Every position of the session by itself.
  uint64_t Embed(uint64_t session, int64_t positions) {
    std::vector<int64_t> ranges;
    for (int64_t i = 0; i < positions; ++i) ranges.insert(ranges.end(), {i, i + 1});
    v1::Command command = NewCommand();
    command.mutable_model_embed()->set_session_id(session);
    command.mutable_model_embed()->set_ranges(ranges.data(), ranges.size() * 8);
    EXPECT_TRUE(sessions_->Start(command).ok());
    return ordinal_;
  }
  void RunAll() {
    while (sessions_->busy()) ASSERT_TRUE(sessions_->Step(ordinal_).ok());
  }
  // An empty one if there is none, which may be `wanted`.
  const v1::CommandResult& ResultOf(uint64_t ordinal, bool wanted = true) {
    for (const v1::WorkerMessage& message : said_) {
      if (message.result().ordinal() == ordinal) return message.result();
    }
    static const v1::CommandResult none;
    if (wanted) ADD_FAILURE() << "no result of " << ordinal;
    return none;
  }
  int64_t TokensOf(uint64_t ordinal) {
    int64_t tokens = 0;
    for (const v1::WorkerMessage& message : said_) {
      if (message.progress().ordinal() == ordinal) tokens += message.progress().tokens().ids().size() / 4;
    }
    return tokens;
  }
  std::string TextOf(uint64_t ordinal) {
    std::string text;
    for (const v1::WorkerMessage& message : said_) {
      if (message.progress().ordinal() == ordinal) text += message.progress().tokens().text();
    }
    return text;
  }

  CopyBackend backend_;
  PageStore store_;
  std::unique_ptr<ServedModel> model_;
  std::unique_ptr<Communicator> group_;
  testing::CountingCommunicator counting_;
  std::vector<v1::WorkerMessage> said_;
  std::unique_ptr<ModelSessions> sessions_;
  uint64_t ordinal_ = 0;
};

struct Hub {
  LocalHub hub;
};
class ModelSessionsTest : private Hub, public Rank, public ::testing::Test {
 protected:
  ModelSessionsTest() : Rank(hub, ModelFolder(), 0, 1) {}
};

TEST_F(ModelSessionsTest, AGenerationWaitsForNoMoreThanOneChunkOfAPrompt) {
  Append(1, {1, 2, 3});
  RunAll();
  const uint64_t prompt = Append(2, std::vector<int32_t>(400, 7));  // 6 chunks to the end of a stripe, and 3.
  const uint64_t generation = Generate(1, 20);
  for (int64_t step = 1; step <= 8; ++step) {
    ASSERT_TRUE(sessions_->Step(ordinal_).ok());
    EXPECT_EQ(TokensOf(generation), step);
  }
  ASSERT_TRUE(sessions_->Step(ordinal_).ok());
  EXPECT_EQ(ResultOf(prompt).model().done(), 400);
  EXPECT_TRUE(sessions_->busy());
}

TEST_F(ModelSessionsTest, PromptsTakeTurns) {
  const uint64_t long_one = Append(1, std::vector<int32_t>(500, 7));
  const uint64_t short_one = Append(2, {1});
  ASSERT_TRUE(sessions_->Step(ordinal_).ok());
  ASSERT_TRUE(sessions_->Step(ordinal_).ok());
  EXPECT_EQ(ResultOf(short_one).model().done(), 1);
  RunAll();
  EXPECT_EQ(ResultOf(long_one).model().done(), 500);
}

TEST_F(ModelSessionsTest, AJobWhoseArithmeticLeavesTheFiniteNumbersEndsAlone) {
  Append(1, {1, 2, 3});
  RunAll();
  const uint64_t generation = Generate(1, 5);
  const uint64_t poisoned = Append(2, {5, 6, kPoison});
  RunAll();
  EXPECT_EQ(ResultOf(poisoned).code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
  EXPECT_EQ(ResultOf(poisoned).model().done(), 0);
  EXPECT_EQ(ResultOf(generation).code(), 0);
  EXPECT_EQ(ResultOf(generation).model().done(), 5);
  // What failed has left no trace.
  const uint64_t again = Append(2, {5, 6});
  RunAll();
  EXPECT_EQ(ResultOf(again).model().length(), 2);
}

TEST(ModelSessions, AJobWhoseLogitsAreNotFiniteEndsAloneAndItsSessionGoesOn) {
  LocalHub hub;
  Rank rank(hub, ModelFolder(/*head_overflows=*/true), 0, 1);
  const auto fails = [&](uint64_t session) {
    const uint64_t generation = rank.Generate(session, 1);
    rank.RunAll();
    return rank.ResultOf(generation).code() != 0;
  };
  // One session behind which the logits are finite, and one behind which they are not.
  uint64_t good = 0;
  uint64_t bad = 0;
  for (int32_t token = 1; good == 0 || bad == 0; ++token) {
    ASSERT_LT(token, kPoison);
    for (const uint64_t session : {100 + token, 200 + token}) {
      rank.Open(session);
      rank.Append(session, {token});
    }
    rank.RunAll();
    (fails(100 + token) ? bad : good) = 200 + token;
  }
  const uint64_t reading = rank.Append(1, std::vector<int32_t>(120, 7));
  const uint64_t failed = rank.Generate(bad, 3);
  const uint64_t generated = rank.Generate(good, 1);
  rank.RunAll();
  EXPECT_EQ(rank.ResultOf(failed).code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(rank.ResultOf(failed).message(), HasSubstr("a logit is not finite"));
  EXPECT_EQ(rank.ResultOf(failed).model().done(), 0);
  EXPECT_EQ(rank.ResultOf(failed).model().length(), 1);
  EXPECT_EQ(rank.ResultOf(generated).code(), 0) << rank.ResultOf(generated).message();
  EXPECT_EQ(rank.TokensOf(generated), 1);
  EXPECT_EQ(rank.ResultOf(reading).model().done(), 120);
  // A score of it says the same; what needs no logits goes on.
  const uint64_t scored = rank.Score(bad, {5, 6});
  const uint64_t appended = rank.Append(bad, {5, 6});
  rank.RunAll();
  EXPECT_EQ(rank.ResultOf(scored).code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(rank.ResultOf(scored).message(), HasSubstr("a logit is not finite"));
  EXPECT_EQ(rank.ResultOf(appended).model().length(), 3);
}

TEST_F(ModelSessionsTest, AStopStringEndsItWhereTheTextHasIt) {
  Append(1, {1, 2, 3});
  RunAll();
  v1::ForkSession fork;
  fork.set_session_id(1);
  fork.set_fork_id(3);
  ASSERT_TRUE(sessions_->Fork(fork).ok());
  const uint64_t whole = Generate(1, 12);
  RunAll();
  // From the middle of one word into the next.
  const std::string text = TextOf(whole);
  const std::string stop = text.substr(text.size() / 2 - 2, 4);
  const uint64_t stopped = Generate(3, 12, {"never", stop});
  RunAll();
  EXPECT_EQ(ResultOf(stopped).model().finish_reason(), v1::FINISH_REASON_STOP);
  const std::string got = TextOf(stopped);
  EXPECT_EQ(got, text.substr(0, got.size()));
  EXPECT_THAT(got, HasSubstr(stop));
  EXPECT_EQ(got.substr(0, got.rfind(' ')).find(stop), std::string::npos);
}

TEST_F(ModelSessionsTest, ACancelledJobSaysHowFarItCame) {
  const uint64_t append = Append(1, std::vector<int32_t>(500, 7));
  ASSERT_TRUE(sessions_->Step(ordinal_).ok());
  sessions_->Cancel(append);
  EXPECT_FALSE(sessions_->busy());
  EXPECT_TRUE(ResultOf(append).model().cancelled());
  EXPECT_EQ(ResultOf(append).model().done(), 50);
  sessions_->Cancel(append);  // It has ended.
}

TEST_F(ModelSessionsTest, AClosedSessionsJobsEnd) {
  const uint64_t append = Append(1, std::vector<int32_t>(500, 7));
  sessions_->Close(1);
  EXPECT_EQ(ResultOf(append).code(), static_cast<int>(absl::StatusCode::kNotFound));
  EXPECT_EQ(store_.used_bytes(), 0);
}

// Runs body(rank) as each of some ranks, which make the same calls.
void OnRanks(int ranks, const std::function<void(Rank&)>& body, int64_t memory_bytes = int64_t{64} << 20) {
  const std::string folder = ModelFolder();
  LocalHub hub;
  std::vector<std::thread> threads;
  threads.reserve(ranks);
  for (int i = 0; i < ranks; ++i) {
    threads.emplace_back([&, i] {
      Rank rank(hub, folder, i, ranks, memory_bytes);
      body(rank);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void OnTwoRanks(const std::function<void(Rank&)>& body, int64_t memory_bytes = int64_t{64} << 20) {
  OnRanks(2, body, memory_bytes);
}

TEST(ModelSessionsOfTwo, AGenerationGetsATokenInEveryStepOfALongPrompt) {
  OnTwoRanks([](Rank& rank) {
    rank.Append(1, {1, 2, 3});
    rank.RunAll();
    const uint64_t prompt = rank.Append(2, std::vector<int32_t>(2000, 7));
    const uint64_t generation = rank.Generate(1, 30);
    int64_t steps = 0;
    while (rank.ResultOf(prompt, false).ordinal() == 0) {
      ASSERT_TRUE(rank.sessions_->Step(rank.ordinal_).ok());
      ++steps;
      EXPECT_EQ(rank.TokensOf(generation), rank.group_->rank() == 0 ? std::min<int64_t>(steps, 30) : 0);
    }
    EXPECT_EQ(rank.ResultOf(prompt).model().done(), 2000);
    // A step is never more than a chunk's work, and this was not done by the chunk.
    EXPECT_GT(steps, 20);
    EXPECT_NE(steps, 47);
    rank.RunAll();
  });
}

TEST(ModelSessionsOfTwo, SessionsThatGenerateTogetherShareTheirCollectives) {
  OnTwoRanks([](Rank& rank) {
    constexpr uint64_t kSessions = 8;
    for (uint64_t id = 3; id <= kSessions; ++id) rank.Open(id);
    for (uint64_t id = 1; id <= kSessions; ++id) {
      rank.Append(id, std::vector<int32_t>(100 * id, static_cast<int32_t>(id)));
      rank.RunAll();
      v1::ForkSession fork;
      fork.set_session_id(id);
      fork.set_fork_id(100 + id);
      ASSERT_TRUE(rank.sessions_->Fork(fork).ok());
    }
    std::vector<uint64_t> alone;
    std::vector<uint64_t> together;
    for (uint64_t id = 1; id <= kSessions; ++id) {
      alone.push_back(rank.Generate(100 + id, 10));
      rank.RunAll();
    }
    for (uint64_t id = 1; id <= kSessions; ++id) together.push_back(rank.Generate(id, 10));
    const int layers = rank.model_->info().layer_windows_size();
    for (int step = 0; step < 10; ++step) {
      rank.counting_.TakeReductions();
      ASSERT_TRUE(rank.sessions_->Step(rank.ordinal_).ok());
      EXPECT_LE(rank.counting_.TakeReductions(), 1 + 3 * layers);
    }
    for (uint64_t i = 0; i < kSessions; ++i) {
      EXPECT_EQ(rank.TextOf(together[i]), rank.TextOf(alone[i]));
      EXPECT_EQ(rank.ResultOf(together[i]).model().digest(), rank.ResultOf(alone[i]).model().digest());
    }
  });
}

TEST(ModelSessionsOfTwo, AJobThatIsCancelledInMidWaveLeavesTheSessionAsItWas) {
  OnTwoRanks([](Rank& rank) {
    rank.Append(1, std::vector<int32_t>(300, 5));
    rank.RunAll();
    const int64_t used = rank.store_.used_bytes();
    for (int steps = 1; steps <= 4; ++steps) {
      const uint64_t append = rank.Append(1, std::vector<int32_t>(700, 7));
      for (int i = 0; i < steps; ++i) ASSERT_TRUE(rank.sessions_->Step(rank.ordinal_).ok());
      EXPECT_GT(rank.store_.used_bytes(), used);
      rank.sessions_->Cancel(append);
      EXPECT_TRUE(rank.ResultOf(append).model().cancelled());
      EXPECT_EQ(rank.ResultOf(append).model().done(), 0);
      EXPECT_EQ(rank.ResultOf(append).model().length(), 300);
      EXPECT_EQ(rank.store_.used_bytes(), used);
    }
    const uint64_t append = rank.Append(1, std::vector<int32_t>(700, 7));
    rank.sessions_->Step(rank.ordinal_).IgnoreError();
    rank.sessions_->Close(1);
    EXPECT_EQ(rank.ResultOf(append).code(), static_cast<int>(absl::StatusCode::kNotFound));
    EXPECT_EQ(rank.store_.used_bytes(), 0);
  });
}

TEST(ModelSessionsOfTwo, AJobWhoseArithmeticLeavesTheFiniteNumbersSaysHowFarItCame) {
  OnTwoRanks([](Rank& rank) {
    std::vector<int32_t> ids(800, 7);
    ids[520] = kPoison;
    const uint64_t append = rank.Append(1, ids);
    rank.RunAll();
    EXPECT_EQ(rank.ResultOf(append).code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
    // Two pages as a wave; of the next one, the third rank-wise, nothing.
    EXPECT_EQ(rank.ResultOf(append).model().done(), 512);
    EXPECT_EQ(rank.ResultOf(append).model().length(), 512);
  });
}

TEST(ModelSessionsOfAny, AnAppendThatFailsHasReadAsMuchOnAnyNumberOfRanksAndSaysTheSame) {
  for (const int64_t at : {40, 560, 1100}) {
    int64_t length = 0;
    std::string message;
    for (const int ranks : {1, 2, 3}) {
      OnRanks(ranks, [&](Rank& rank) {
        rank.Append(1, {1, 2, 3});
        rank.RunAll();
        std::vector<int32_t> ids(1400, 7);
        ids[at] = kPoison;
        const uint64_t append = rank.Append(1, ids);
        rank.RunAll();
        const v1::CommandResult& result = rank.ResultOf(append);
        if (ranks == 1) {
          length = result.model().length();
          message = result.message();
        }
        EXPECT_EQ(result.code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
        EXPECT_EQ(result.model().length(), length) << ranks << " ranks, poison at " << at;
        EXPECT_EQ(result.model().done(), length - 3);
        EXPECT_EQ(result.message(), message);
      });
    }
  }
}

// Whoever has no memory says so in a step; who has a broken device ends the group, with that error.
TEST(ModelSessionsOfTwo, ABrokenDeviceIsNotAWantOfMemory) {
  for (const int64_t length : {300, 1500}) {  // By a chunk, by a wave.
    OnTwoRanks([&](Rank& rank) {
      rank.Append(1, std::vector<int32_t>(300, 5));
      rank.RunAll();
      v1::ForkSession fork;
      fork.set_session_id(1);
      fork.set_fork_id(3);
      ASSERT_TRUE(rank.sessions_->Fork(fork).ok());
      const uint64_t append = rank.Append(3, std::vector<int32_t>(length - 200, 7));
      const bool broken = rank.group_->rank() == 1;
      rank.backend_.broken = broken;
      const absl::Status status = rank.sessions_->Step(rank.ordinal_).status();
      EXPECT_FALSE(status.ok());
      if (broken) {
        EXPECT_THAT(std::string(status.message()), HasSubstr("the device is broken"));
      }
      EXPECT_EQ(rank.ResultOf(append, false).ordinal(), 0U) << "the group's end is the caller's to tell";
      rank.sessions_->FailAll(status);
    });
  }
}

TEST(ModelSessionsOfTwo, AnEmbeddingNeedsMemoryForWhatItAnswers) {
  constexpr int64_t kLength = 5000;
  for (const bool fits : {false, true}) {
    OnTwoRanks([&](Rank& rank) {
      const bool scarce = rank.group_->rank() == 1;
      rank.Open(3, /*window=*/20);
      rank.Append(3, std::vector<int32_t>(kLength, 7));
      rank.RunAll();
      // Ids, sums with a count, and the answer. Pages of a window are little beside it.
      const int64_t bytes = 4 * kLength + kLength * (12 * rank.model_->info().hidden_size() + 8);
      const int64_t used = rank.store_.used_bytes();
      const int64_t left = fits ? bytes + (int64_t{1} << 20) : bytes - 1;
      auto taken = rank.store_.ReserveBytes(scarce ? rank.store_.memory_bytes() - used - left : 0);
      ASSERT_TRUE(taken.ok()) << taken.status();
      const uint64_t embedded = rank.Embed(3, kLength);
      const uint64_t generated = rank.Generate(3, 3);
      rank.RunAll();
      const v1::CommandResult& result = rank.ResultOf(embedded);
      const auto code = static_cast<absl::StatusCode>(result.code());
      EXPECT_EQ(code, fits ? absl::StatusCode::kOk : absl::StatusCode::kResourceExhausted)
          << result.message();
      EXPECT_EQ(result.model().done(), fits ? kLength : 0);
      if (!fits) {
        EXPECT_THAT(result.message(),
                    HasSubstr(scarce ? absl::StrCat("needs ", bytes, " bytes") : "1 other ranks"));
      }
      EXPECT_EQ(rank.ResultOf(generated).model().length(), kLength + 3);
      *taken = ReservedBytes();
      EXPECT_LT(rank.store_.used_bytes() - used, bytes / 4);
    });
  }
}

TEST(ModelSessionsOfTwo, WavesGiveWayToAGenerationThatNeedsTheirMemory) {
  const auto run = [](Rank& rank, int64_t* used_in_wave) {
    rank.Open(3, /*window=*/20, /*stripe_pages=*/8);
    rank.Append(1, std::vector<int32_t>(250, 5));
    rank.RunAll();
    const uint64_t prompt = rank.Append(3, std::vector<int32_t>(5000, 7));
    ASSERT_TRUE(rank.sessions_->Step(rank.ordinal_).ok());
    if (rank.group_->rank() == 1 && used_in_wave != nullptr) *used_in_wave = rank.store_.used_bytes();
    // Rank 1 has nothing left in the second run, and needs a page in each layer soon.
    const uint64_t generation = rank.Generate(1, 30);
    rank.RunAll();
    EXPECT_EQ(rank.ResultOf(generation).code(), 0) << rank.ResultOf(generation).message();
    EXPECT_EQ(rank.ResultOf(generation).model().done(), 30);
    EXPECT_EQ(rank.ResultOf(prompt).code(), 0) << rank.ResultOf(prompt).message();
    EXPECT_EQ(rank.ResultOf(prompt).model().done(), 5000);
  };
  int64_t used_in_wave = 0;
  OnTwoRanks([&](Rank& rank) { run(rank, &used_in_wave); });
  OnTwoRanks([&](Rank& rank) { run(rank, nullptr); }, used_in_wave);
}

}  // namespace
}  // namespace eduba
