// The steps of jobs on one rank. (Ranks beside each other: tests/cluster/model_cluster_test.cc.)
#include "worker/model_sessions.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "collective/local/local_communicator.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

constexpr int32_t kPoison = 96;  // A token whose embedding is infinite.

// A golden model with a tokenizer (token i is "g<i>") and a poisonous last token.
std::string ModelFolder() {
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / "model_sessions_test";
  std::filesystem::remove_all(folder);
  std::filesystem::copy(absl::StrCat(EDUBA_GOLDEN_MODELS, "/llama"), folder);
  std::ofstream genes(folder / "genes.txt");
  for (int i = 0; i < 97; ++i) genes << "g" << i << "\n";

  std::ifstream in(folder / "model.safetensors", std::ios::binary);
  std::string file((std::istreambuf_iterator<char>(in)), {});
  uint64_t header = 0;
  std::memcpy(&header, file.data(), 8);
  const auto tensor = nlohmann::json::parse(file.substr(8, header))["model.embed_tokens.weight"];
  const auto width = tensor["shape"][1].get<size_t>();
  const size_t begin = 8 + header + tensor["data_offsets"][0].get<size_t>();
  const float huge = std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < width; ++i) std::memcpy(&file[begin + 4 * (kPoison * width + i)], &huge, 4);
  std::ofstream(folder / "model.safetensors", std::ios::binary) << file;
  return folder.string();
}

class ModelSessionsTest : public ::testing::Test {
 protected:
  ModelSessionsTest()
      : backend_(MakeCpuBackend(1)),
        store_(backend_.get(), int64_t{64} << 20),
        model_(ServedModel::Load(ModelFolder(), MakeCpuLayerKernels(1)).value()),
        group_(hub_.Join(1, 1, 0, 1, absl::Now() + absl::Seconds(30)).value()) {
    ModelSessions::Options options;
    options.backend = backend_.get();
    options.store = &store_;
    options.model = model_.get();
    options.group = group_.get();
    options.epoch = 1;
    options.chunk_rows = 50;
    options.send = [this](const v1::WorkerMessage& message) { said_.push_back(message); };
    sessions_ = std::make_unique<ModelSessions>(std::move(options));
    Open(1);
    Open(2);
  }

  void Open(uint64_t id) {
    v1::SessionSpec spec;
    spec.set_stripe_pages(1);
    spec.mutable_model()->set_model_hash(model_->info().hash());
    spec.mutable_model()->set_sink_tokens(4);
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
  void RunAll() {
    while (sessions_->busy()) ASSERT_TRUE(sessions_->Step(ordinal_).ok());
  }
  const v1::CommandResult& ResultOf(uint64_t ordinal) {
    for (const v1::WorkerMessage& message : said_) {
      if (message.result().ordinal() == ordinal) return message.result();
    }
    static const v1::CommandResult none;
    ADD_FAILURE() << "no result of " << ordinal;
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

  std::unique_ptr<Backend> backend_;
  PageStore store_;
  std::unique_ptr<ServedModel> model_;
  LocalHub hub_;
  std::unique_ptr<Communicator> group_;
  std::vector<v1::WorkerMessage> said_;
  std::unique_ptr<ModelSessions> sessions_;
  uint64_t ordinal_ = 0;
};

TEST_F(ModelSessionsTest, AGenerationWaitsForNoMoreThanOneChunkOfAPrompt) {
  Append(1, {1, 2, 3});
  RunAll();
  const uint64_t prompt = Append(2, std::vector<int32_t>(400, 7));  // 8 chunks.
  const uint64_t generation = Generate(1, 20);
  for (int64_t step = 1; step <= 7; ++step) {
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

}  // namespace
}  // namespace eduba
