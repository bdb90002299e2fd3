// The steps of jobs on one rank, and of those that ranks share out on two. (Whole clusters:
// tests/cluster/model_cluster_test.cc.)
#include "worker/model_sessions.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "collective/local/local_communicator.h"
#include "collective/testing/counting_communicator.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "kernels/testing/forwarding_backend.h"
#include "rpc/limits.h"

namespace eduba {
namespace {

using ::testing::HasSubstr;

constexpr int32_t kPoison = 96;  // A token whose embedding is infinite.

enum class Faults {
  kNone,
  kPoison,          // The last token is poisonous.
  kHeadOverflows,   // And the logit of token 1 is not finite where a hidden state's first channel is larger
                    // than 1.13.
  kLayerOverflows,  // The last token's hidden state is finite in the first layer, and NaN after it.
};

// A golden model with a tokenizer (token i is "g<i>").
std::string ModelFolder(Faults faults = Faults::kPoison) {
  // The folder is this process's own, because others of its kind may run at the same time.
  struct Root {
    const std::filesystem::path path =
        std::filesystem::path(::testing::TempDir()) / absl::StrCat("model_sessions_test_", getpid());
    ~Root() { std::filesystem::remove_all(path); }
  };
  static const Root root;
  const std::filesystem::path folder = root.path / absl::StrCat(static_cast<int>(faults));
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(root.path);
  std::filesystem::copy(absl::StrCat(EDUBA_GOLDEN_MODELS, "/llama"), folder);
  std::ofstream genes(folder / "genes.txt");
  for (int i = 0; i < 97; ++i) genes << "g" << i << "\n";
  if (faults == Faults::kNone) return folder.string();

  std::ifstream in(folder / "model.safetensors", std::ios::binary);
  std::string file((std::istreambuf_iterator<char>(in)), {});
  uint64_t header = 0;
  std::memcpy(&header, file.data(), 8);
  const auto tensors = nlohmann::json::parse(file.substr(8, header));
  const auto set_row = [&](const std::string& name, int32_t row, float first, std::optional<float> others) {
    const auto width = tensors[name]["shape"][1].get<size_t>();
    const size_t begin = 8 + header + tensors[name]["data_offsets"][0].get<size_t>() + 4 * row * width;
    std::memcpy(&file[begin], &first, 4);
    for (size_t i = 1; others && i < width; ++i) std::memcpy(&file[begin + 4 * i], &*others, 4);
  };
  const float infinity = std::numeric_limits<float>::infinity();
  if (faults == Faults::kLayerOverflows) {
    // Its first channel outweighs all others, as no other token's does: there, two products of it overflow
    // together, and what they are multiplied by is 0.
    set_row("model.embed_tokens.weight", kPoison, 1e6F, 0);
    for (const char* name : {"gate", "up"}) {
      set_row(absl::StrCat("model.layers.0.mlp.", name, "_proj.weight"), 0, 6.4e18F, 0);
    }
    for (int32_t row = 0; row < 32; ++row) set_row("model.layers.0.mlp.down_proj.weight", row, 0, {});
  } else {
    set_row("model.embed_tokens.weight", kPoison, infinity, infinity);
  }
  if (faults == Faults::kHeadOverflows) set_row("lm_head.weight", 1, 3e38F, 0);
  std::ofstream(folder / "model.safetensors", std::ios::binary) << file;
  return folder.string();
}

// A backend that fails to copy and read pages when it is told to.
class CopyBackend final : public testing::ForwardingBackend {
 public:
  CopyBackend() : ForwardingBackend(MakeCpuBackend(1)) {}

  absl::Status ReadRows(const AttentionShape& shape, const void* page, int row, int rows, void* keys,
                        void* values) override {
    return broken ? absl::InternalError("the device is broken")
                  : ForwardingBackend::ReadRows(shape, page, row, rows, keys, values);
  }
  absl::Status CopyPage(const AttentionShape& shape, const void* from, void* to) override {
    return broken ? absl::InternalError("the device is broken")
                  : ForwardingBackend::CopyPage(shape, from, to);
  }

  bool broken = false;
};

// Counts products: every forward pass has some.
class CountingKernels final : public LayerKernels {
 public:
  explicit CountingKernels(int64_t* products) : products_(products), own_(MakeCpuLayerKernels(1)) {}
  std::string name() const override { return own_->name(); }
  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(absl::Span<const MatrixView> parts) override {
    return own_->Pack(parts);
  }
  void Multiply(const MatmulArgs& args) override {
    ++*products_;
    own_->Multiply(args);
  }
  void Normalise(const NormArgs& args) override { own_->Normalise(args); }
  void Rotate(const RopeArgs& args) override { own_->Rotate(args); }
  void Activate(const ActivationArgs& args) override { own_->Activate(args); }
  void Softcap(const SoftcapArgs& args) override { own_->Softcap(args); }

 private:
  int64_t* const products_;
  const std::unique_ptr<LayerKernels> own_;
};

// One rank's sessions, and what they say.
class Rank {
 public:
  Rank(LocalHub& hub, const std::string& folder, int rank, int ranks,
       int64_t memory_bytes = int64_t{64} << 20)
      : store_(&backend_, memory_bytes),
        model_(ServedModel::Load(folder, std::make_unique<CountingKernels>(&products_)).value()),
        group_(hub.Join(1, 1, rank, ranks, absl::Now() + absl::Seconds(30)).value()),
        counting_(group_.get()) {
    ModelEngine::Options content = ModelContentOptions(&backend_, &store_, model_.get());
    content.chunk_rows = 50;
    content_ = std::make_unique<ModelContent>(content);
    JoinGroup(1);
    Open(1);
    Open(2);
  }

  // Begins a membership, whose commands count from 1.
  void JoinGroup(uint64_t epoch) {
    ModelSessions::Options options;
    options.content = content_.get();
    options.model = model_.get();
    options.group = &counting_;
    options.epoch = epoch;
    options.node = Placement::OfRanks(group_->size()).nodes[group_->rank()];
    options.send = [this](const v1::WorkerMessage& message, const std::shared_ptr<FrameLog>& /*unsynced*/) {
      said_.push_back(message);
    };
    sessions_ = std::make_unique<ModelSessions>(std::move(options));
  }
  v1::OpenSession OpenRequest(uint64_t id, int64_t window = 0, int64_t stripe_pages = 1,
                              int64_t sink_tokens = 4,
                              v1::ModelPolicy policy = v1::MODEL_POLICY_STREAMING) const {
    v1::OpenSession open;
    open.set_session_id(id);
    v1::SessionSpec& spec = *open.mutable_spec();
    spec.set_stripe_pages(stripe_pages);
    spec.mutable_model()->set_model_hash(model_->info().hash());
    spec.mutable_model()->set_sink_tokens(sink_tokens);
    if (window > 0) spec.mutable_model()->set_policy(policy);
    spec.mutable_model()->set_window(window);
    v1::PagePlacement& placement = *open.mutable_placement();
    placement.set_version(1);
    for (const std::string& node : Placement::OfRanks(group_->size()).nodes) placement.add_nodes(node);
    placement.set_replicas(1);
    placement.set_stripe_pages(stripe_pages);
    return open;
  }
  void Open(uint64_t id, int64_t window = 0, int64_t stripe_pages = 1, int64_t sink_tokens = 4,
            v1::ModelPolicy policy = v1::MODEL_POLICY_STREAMING) {
    EXPECT_TRUE(sessions_->Open(OpenRequest(id, window, stripe_pages, sink_tokens, policy)).ok());
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
    // Appends of one session come one after another, and the coordinator knows how long it is.
    command.mutable_model_append()->set_at(content_->Find(session).value()->ids.size());
    EXPECT_TRUE(sessions_->Start(command).ok());
    return ordinal_;
  }
  uint64_t Generate(uint64_t session, int64_t tokens, const std::vector<std::string>& stop = {},
                    std::optional<int> owner = {}) {
    v1::GenerateRequest request;
    request.set_max_tokens(tokens);
    for (const std::string& string : stop) request.add_stop_strings(string);
    return Generate(session, request, owner);
  }
  // `owner`: the owner rank, modulo the ranks; none: all generate.
  uint64_t Generate(uint64_t session, const v1::GenerateRequest& request, std::optional<int> owner) {
    v1::Command command = NewCommand();
    command.mutable_model_generate()->set_session_id(session);
    *command.mutable_model_generate()->mutable_request() = request;
    if (owner) command.mutable_model_generate()->set_owner_rank(*owner % group_->size());
    EXPECT_TRUE(sessions_->Start(command).ok());
    return ordinal_;
  }
  uint64_t Score(uint64_t session, const std::vector<int32_t>& ids, bool sink_mass = false) {
    v1::Command command = NewCommand();
    command.mutable_model_score()->set_session_id(session);
    command.mutable_model_score()->set_ids(ids.data(), ids.size() * 4);
    command.mutable_model_score()->set_sink_mass(sink_mass);
    EXPECT_TRUE(sessions_->Start(command).ok());
    return ordinal_;
  }
  // Every position of the session by itself.
  uint64_t Embed(uint64_t session, int64_t positions) {
    std::vector<int64_t> ranges;
    for (int64_t i = 0; i < positions; ++i) ranges.insert(ranges.end(), {i, i + 1});
    return Embed(session, ranges);
  }
  uint64_t Embed(uint64_t session, const std::vector<int64_t>& ranges, v1::Pool pool = v1::POOL_MEAN) {
    v1::Command command = NewCommand();
    command.mutable_model_embed()->set_pool(pool);
    command.mutable_model_embed()->set_session_id(session);
    command.mutable_model_embed()->set_ranges(ranges.data(), ranges.size() * 8);
    EXPECT_TRUE(sessions_->Start(command).ok());
    return ordinal_;
  }
  void Fork(uint64_t session, uint64_t fork_id) {
    v1::ForkSession fork;
    fork.set_session_id(session);
    fork.set_fork_id(fork_id);
    EXPECT_TRUE(sessions_->Fork(fork).ok());
  }
  void RunAll() {
    while (sessions_->busy()) ASSERT_TRUE(sessions_->Step(ordinal_).ok());
  }
  void RunSteps(int steps) {
    for (int i = 0; i < steps; ++i) ASSERT_TRUE(sessions_->Step(ordinal_).ok());
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
  std::string IdsOf(uint64_t ordinal) {
    std::string ids;
    for (const v1::WorkerMessage& message : said_) {
      if (message.progress().ordinal() == ordinal) ids += message.progress().tokens().ids();
    }
    return ids;
  }
  std::string VectorsOf(uint64_t ordinal) {
    std::string vectors;
    for (const v1::WorkerMessage& message : said_) {
      if (message.progress().ordinal() == ordinal) vectors += message.progress().embeddings().vectors();
    }
    return vectors;
  }
  std::string TextOf(uint64_t ordinal) {
    std::string text;
    for (const v1::WorkerMessage& message : said_) {
      if (message.progress().ordinal() == ordinal) text += message.progress().tokens().text();
    }
    return text;
  }

  int64_t products_ = 0;
  CopyBackend backend_;
  PageStore store_;
  std::unique_ptr<ServedModel> model_;
  std::unique_ptr<Communicator> group_;
  testing::CountingCommunicator counting_;
  std::vector<v1::WorkerMessage> said_;
  std::unique_ptr<ModelContent> content_;
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
  Rank rank(hub, ModelFolder(Faults::kHeadOverflows), 0, 1);
  const auto fails = [&](uint64_t session) {
    const uint64_t generation = rank.Generate(session, 1);
    rank.RunAll();
    return rank.ResultOf(generation).code() != 0;
  };
  // One session after which the logits are finite, and one after which they are not.
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
  Fork(1, 3);
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

// The stop string is as long as one may be, and much text comes before its end.
TEST(ModelSessions, AStopStringMayBeginLongBeforeItEnds) {
  LocalHub hub;
  Rank rank(hub, ModelFolder(Faults::kNone), 0, 1);
  rank.Append(1, {1, 2, 3});
  rank.RunAll();
  rank.Fork(1, 3);
  v1::GenerateRequest request;
  request.set_max_tokens(200);
  request.set_temperature(1);
  const uint64_t whole = rank.Generate(1, request, std::nullopt);
  rank.RunAll();
  const std::string text = rank.TextOf(whole);
  request.add_stop_strings(text.substr(100, kStopStringBytesMax));
  const uint64_t stopped = rank.Generate(3, request, std::nullopt);
  rank.RunAll();
  EXPECT_EQ(rank.ResultOf(stopped).model().finish_reason(), v1::FINISH_REASON_STOP);
  const std::string got = rank.TextOf(stopped);
  EXPECT_EQ(got, text.substr(0, got.size()));
  EXPECT_GE(got.size(), 100 + kStopStringBytesMax);
  EXPECT_LT(got.size(), 100 + kStopStringBytesMax + 4);  // "g96 "
}

// More than have their logits at once.
TEST_F(ModelSessionsTest, ManyGenerationsAtOnceChooseTheTokensThatEachChoosesAlone) {
  constexpr uint64_t kSessions = 70;
  std::vector<std::string> alone;
  for (uint64_t i = 0; i < kSessions; ++i) {
    Open(100 + i);
    Append(100 + i, {static_cast<int32_t>(i), 5});
    RunAll();
    Fork(100 + i, 200 + i);
    const uint64_t generation = Generate(200 + i, 2);
    RunAll();
    alone.push_back(IdsOf(generation));
  }
  std::vector<uint64_t> together;
  for (uint64_t i = 0; i < kSessions; ++i) together.push_back(Generate(100 + i, 2));
  RunAll();
  for (uint64_t i = 0; i < kSessions; ++i) EXPECT_EQ(IdsOf(together[i]), alone[i]) << i;
}

TEST_F(ModelSessionsTest, SinkMassIsAnAverageOverRows) {
  Open(3, /*window=*/0, /*stripe_pages=*/1, /*sink_tokens=*/64);
  Append(3, {1, 2, 3});
  RunAll();
  const uint64_t score = Score(3, {4, 5, 6, 7}, /*sink_mass=*/true);  // They see nothing but sinks.
  RunAll();
  const v1::Model& model = model_->info();
  const std::vector<float> ones(int64_t{model.layer_windows_size()} * model.query_heads(), 1);
  EXPECT_EQ(ResultOf(score).model().sink_mass(),
            std::string(reinterpret_cast<const char*>(ones.data()), ones.size() * sizeof(float)));
}

TEST_F(ModelSessionsTest, AnEmbeddingReadsTheTokensOfALongAppendAndOfManyShortOnesAlike) {
  std::vector<int32_t> ids(170);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i % kPoison);
  Append(1, ids);  // In 4 chunks.
  for (auto next = ids.begin(); next != ids.end(); next += 17) {
    Append(2, {next, next + 17});
    RunAll();
  }
  const uint64_t at_once = Embed(1, {0, 60, 169, 170});
  const uint64_t in_pieces = Embed(2, {0, 60, 169, 170});
  RunAll();
  EXPECT_FALSE(VectorsOf(at_once).empty());
  EXPECT_EQ(VectorsOf(at_once), VectorsOf(in_pieces));
}

TEST_F(ModelSessionsTest, TheLastOfARangeIsOneState) {
  Append(1, {1, 2, 3, 4, 5, 6});
  RunAll();
  const uint64_t mean = Embed(1, {0, 6});
  const uint64_t last = Embed(1, {0, 6}, v1::POOL_LAST);
  const uint64_t alone = Embed(1, {5, 6}, v1::POOL_LAST);
  RunAll();
  EXPECT_EQ(VectorsOf(last), VectorsOf(alone));
  EXPECT_NE(VectorsOf(last), VectorsOf(mean));
}

// What is scored is asked.
TEST_F(ModelSessionsTest, AStarSessionsScoreSeesAllKeys) {
  Open(3, /*window=*/20, /*stripe_pages=*/1, /*sink_tokens=*/4, v1::MODEL_POLICY_STAR);
  const std::vector<int32_t> ids(60, 9);
  for (const uint64_t session : {1, 3}) Append(session, {1, 2, 3, 4, 5, 6});
  RunAll();
  const uint64_t wanted = Score(1, ids);
  const uint64_t got = Score(3, ids);
  RunAll();
  EXPECT_EQ(ResultOf(got).model().log_probs(), ResultOf(wanted).model().log_probs());
}

TEST_F(ModelSessionsTest, CommandsThatContradictTheSessionsAreRefused) {
  Append(1, {1, 2, 3});
  RunAll();
  v1::OpenSession open = OpenRequest(3);
  open.mutable_spec()->mutable_model()->set_model_hash(model_->info().hash() + 1);
  EXPECT_EQ(sessions_->Open(open).status().code(), absl::StatusCode::kFailedPrecondition);
  open = OpenRequest(3);
  open.mutable_placement()->set_nodes(0, "another node");
  EXPECT_EQ(sessions_->Open(open).status().code(), absl::StatusCode::kInvalidArgument);
  v1::ForkSession fork;
  fork.set_session_id(1);
  fork.set_fork_id(2);
  EXPECT_EQ(sessions_->Fork(fork).code(), absl::StatusCode::kAlreadyExists);
  fork.set_session_id(9);
  fork.set_fork_id(10);
  EXPECT_EQ(sessions_->Fork(fork).code(), absl::StatusCode::kNotFound);

  const auto start = [&](const std::function<void(v1::Command&)>& fill) {
    v1::Command command = NewCommand();
    fill(command);
    return sessions_->Start(command).code();
  };
  for (const int32_t id : {-1, 97, std::numeric_limits<int32_t>::max()}) {
    EXPECT_EQ(start([&](v1::Command& c) {
                c.mutable_model_append()->set_session_id(1);
                c.mutable_model_append()->set_ids(&id, 4);
              }),
              absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(start([&](v1::Command& c) {
                c.mutable_model_score()->set_session_id(1);
                c.mutable_model_score()->set_ids(&id, 4);
              }),
              absl::StatusCode::kInvalidArgument);
  }
  for (const std::vector<int64_t>& range : std::vector<std::vector<int64_t>>{{0, 4}, {-1, 2}, {2, 1}, {}}) {
    EXPECT_NE(start([&](v1::Command& c) {
                c.mutable_model_embed()->set_session_id(1);
                c.mutable_model_embed()->set_ranges(range.data(), range.size() * 8);
              }),
              absl::StatusCode::kOk);
  }
  const float nan = std::nanf("");
  for (const auto& change : std::vector<std::function<void(v1::GenerateRequest&)>>{
           [&](auto& r) { r.set_temperature(nan); },
           [&](auto& r) { r.set_temperature(-1); },
           [&](auto& r) { r.set_top_p(nan); },
           [&](auto& r) { r.set_top_p(1.5F); },
           [&](auto& r) { r.set_top_p(-0.5F); },
           [&](auto& r) { r.set_top_k(-1); },
           [&](auto& r) { r.set_max_tokens(0); },
       }) {
    EXPECT_EQ(start([&](v1::Command& c) {
                c.mutable_model_generate()->set_session_id(1);
                c.mutable_model_generate()->mutable_request()->set_max_tokens(1);
                change(*c.mutable_model_generate()->mutable_request());
              }),
              absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(start([&](v1::Command& c) { c.mutable_model_generate()->set_session_id(2); }),
            absl::StatusCode::kFailedPrecondition);  // It is empty.
  EXPECT_FALSE(sessions_->busy());
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

TEST_F(ModelSessionsTest, SessionsOutliveTheMembershipAndAreFoundInTheNextOne) {
  Append(1, {1, 2, 3});
  Append(2, {4, 5});
  RunAll();
  const uint64_t wanted = Score(1, {7, 8, 9});
  RunAll();
  const std::string log_probs = ResultOf(wanted).model().log_probs();
  sessions_->FailAll(absl::AbortedError("the epoch is over"));
  JoinGroup(2);
  v1::RetainSessions retain;
  retain.add_session_ids(1);
  sessions_->Retain(retain);
  EXPECT_FALSE(sessions_->Holds(2));
  const auto held = sessions_->Open(OpenRequest(1));
  ASSERT_TRUE(held.ok()) << held.status();
  EXPECT_EQ(held->length(), 3);
  EXPECT_NE(held->digest_low(), 0U);
  v1::Command command = NewCommand();
  command.mutable_settle_session()->set_session_id(2);
  EXPECT_FALSE(sessions_->IsJob(command));
  for (const bool read_again : {false, true}) {
    command = NewCommand();
    command.mutable_settle_session()->set_session_id(1);
    command.mutable_settle_session()->set_length(3);
    command.mutable_settle_session()->set_read_again(read_again);
    ASSERT_TRUE(sessions_->IsJob(command));
    ASSERT_TRUE(sessions_->Start(command).ok());
    RunAll();
    EXPECT_EQ(ResultOf(ordinal_).code(), 0) << ResultOf(ordinal_).message();
    EXPECT_EQ(ResultOf(ordinal_).epoch(), 2U);
    EXPECT_EQ(ResultOf(ordinal_).model().done(), read_again ? 3 : 0);
    const uint64_t score = Score(1, {7, 8, 9});
    RunAll();
    EXPECT_EQ(ResultOf(score).model().log_probs(), log_probs);
  }
  // What is there is compared, and the rest is read.
  command = NewCommand();
  const std::vector<int32_t> ids = {2, 3, 6};
  command.mutable_model_append()->set_session_id(1);
  command.mutable_model_append()->set_ids(ids.data(), ids.size() * 4);
  command.mutable_model_append()->set_at(1);
  ASSERT_TRUE(sessions_->Start(command).ok());
  RunAll();
  EXPECT_EQ(ResultOf(ordinal_).model().done(), 3);
  EXPECT_EQ(ResultOf(ordinal_).model().already_stored(), 2);
  EXPECT_EQ(ResultOf(ordinal_).model().length(), 4);
  // Under another placement or spec it is another session.
  EXPECT_EQ(sessions_->Open(OpenRequest(1, 0, /*stripe_pages=*/2))->length(), 0);
}

TEST(ServedModel, SaysWhichTokenizerItHas) {
  const std::string folder = ModelFolder(Faults::kNone);
  const auto info = [&] { return ServedModel::Load(folder, MakeCpuLayerKernels(1)).value()->info(); };
  const v1::Model first = info();
  EXPECT_NE(first.tokenizer_hash(), 0U);
  std::ofstream(folder + "/genes.txt", std::ios::app) << "another\n";
  const v1::Model other = info();
  EXPECT_NE(other.tokenizer_hash(), first.tokenizer_hash());
  EXPECT_EQ(other.hash(), first.hash());
  std::filesystem::remove(folder + "/genes.txt");
  EXPECT_EQ(info().tokenizer_hash(), 0U);
}

constexpr int64_t kPlenty = int64_t{64} << 20;

// Runs body(rank) as each of some ranks, which make the same calls; `memory_bytes` of each.
void OnRanksWith(const std::vector<int64_t>& memory_bytes, const std::function<void(Rank&)>& body,
                 Faults faults = Faults::kPoison) {
  const std::string folder = ModelFolder(faults);
  LocalHub hub;
  const int ranks = static_cast<int>(memory_bytes.size());
  std::vector<std::thread> threads;
  threads.reserve(ranks);
  for (int i = 0; i < ranks; ++i) {
    threads.emplace_back([&, i] {
      Rank rank(hub, folder, i, ranks, memory_bytes[i]);
      body(rank);
    });
  }
  for (std::thread& thread : threads) thread.join();
}
void OnRanks(int ranks, const std::function<void(Rank&)>& body, int64_t memory_bytes = kPlenty) {
  OnRanksWith(std::vector<int64_t>(ranks, memory_bytes), body);
}
void OnTwoRanks(const std::function<void(Rank&)>& body, int64_t memory_bytes = kPlenty) {
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

TEST(ModelSessionsOfTwo, AStepSaysWhatRankZeroHasReceived) {
  OnTwoRanks([](Rank& rank) {
    rank.Append(1, {1, 2, 3});
    const absl::StatusOr<uint64_t> agreed = rank.sessions_->Step(rank.group_->rank() == 0 ? 7 : 9);
    ASSERT_TRUE(agreed.ok()) << agreed.status();
    EXPECT_EQ(*agreed, 7U);
  });
}

TEST(ModelSessionsOfTwo, OnePromptAtATimeHoldsTheMemoryOfAPrefill) {
  OnTwoRanks([](Rank& rank) {
    for (const uint64_t id : {3, 4}) rank.Open(id, /*window=*/20, /*stripe_pages=*/8);
    rank.Append(3, std::vector<int32_t>(5000, 7));
    rank.RunSteps(1);
    const int64_t used = rank.store_.used_bytes();
    const uint64_t other = rank.Append(4, std::vector<int32_t>(5000, 7));
    rank.RunSteps(1);
    EXPECT_LT(rank.store_.used_bytes(), 3 * used / 2);
    rank.RunAll();
    EXPECT_EQ(rank.ResultOf(other).model().done(), 5000);
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

TEST(ModelSessionsOfTwo, AJobThatIsCancelledInMidPrefillLeavesTheSessionAsItWas) {
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
    // Two pages by a prefill; of the next one nothing.
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
  for (const int64_t length : {300, 1500}) {  // By a chunk, by a prefill.
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
        EXPECT_THAT(result.message(), HasSubstr(scarce ? absl::StrCat("needs ", bytes, " bytes")
                                                       : "on 1 of the other workers"));
        EXPECT_THAT(result.message(), HasSubstr("more --memory-bytes"));
      }
      EXPECT_EQ(rank.ResultOf(generated).model().length(), kLength + 3);
      *taken = ReservedBytes();
      EXPECT_LT(rank.store_.used_bytes() - used, bytes / 4);
    });
  }
}

// A prompt of 5000 tokens is read by prefills; then `ask` wants `done` tokens of another session, for which
// rank 1 has nothing left in the second run.
void ExpectThatPrefillsGiveWay(const std::function<uint64_t(Rank&)>& ask, int64_t done) {
  const auto run = [&](Rank& rank, int64_t* used_in_prefill) {
    rank.Open(3, /*window=*/20, /*stripe_pages=*/8);
    rank.Append(1, std::vector<int32_t>(250, 5));
    rank.RunAll();
    const uint64_t prompt = rank.Append(3, std::vector<int32_t>(5000, 7));
    ASSERT_TRUE(rank.sessions_->Step(rank.ordinal_).ok());
    if (rank.group_->rank() == 1 && used_in_prefill != nullptr) *used_in_prefill = rank.store_.used_bytes();
    const uint64_t asked = ask(rank);
    rank.RunAll();
    EXPECT_EQ(rank.ResultOf(asked).code(), 0) << rank.ResultOf(asked).message();
    EXPECT_EQ(rank.ResultOf(asked).model().done(), done);
    EXPECT_EQ(rank.ResultOf(prompt).code(), 0) << rank.ResultOf(prompt).message();
    EXPECT_EQ(rank.ResultOf(prompt).model().done(), 5000);
  };
  int64_t used_in_prefill = 0;
  OnTwoRanks([&](Rank& rank) { run(rank, &used_in_prefill); });
  OnTwoRanks([&](Rank& rank) { run(rank, nullptr); }, used_in_prefill);
}

// It soon needs a page in each layer.
TEST(ModelSessionsOfTwo, PrefillsGiveWayToAGenerationThatNeedsTheirMemory) {
  ExpectThatPrefillsGiveWay([](Rank& rank) { return rank.Generate(1, 30); }, 30);
}

// Its memory is taken when a prefill has given way, not at the start alone.
TEST(ModelSessionsOfTwo, PrefillsGiveWayToAnEmbeddingThatNeedsTheirMemory) {
  ExpectThatPrefillsGiveWay([](Rank& rank) { return rank.Embed(1, 250); }, 250);
}

// What a client hears of every job, and what all ranks must agree on.
std::map<uint64_t, std::string> Answers(const std::vector<std::vector<v1::WorkerMessage>>& said) {
  std::map<uint64_t, std::string> answers;
  std::map<uint64_t, v1::CommandResult> results;
  for (const std::vector<v1::WorkerMessage>& by_rank : said) {
    for (const v1::WorkerMessage& message : by_rank) {
      if (message.has_progress()) {
        const v1::ModelProgress& progress = message.progress();
        answers[progress.ordinal()] += progress.tokens().SerializeAsString();
        answers[progress.ordinal()] += progress.embeddings().SerializeAsString();
        continue;
      }
      // Between them, the ranks have all parts; those that two of them have are equal.
      v1::CommandResult result = message.result();
      const auto [it, first] = results.emplace(result.ordinal(), result);
      if (first) continue;
      EXPECT_EQ(it->second.code(), result.code()) << result.ordinal();
      EXPECT_EQ(it->second.model().done(), result.model().done()) << result.ordinal();
      EXPECT_EQ(it->second.model().length(), result.model().length()) << result.ordinal();
      EXPECT_EQ(it->second.model().finish_reason(), result.model().finish_reason()) << result.ordinal();
      EXPECT_EQ(it->second.model().cancelled(), result.model().cancelled()) << result.ordinal();
      if (it->second.model().digest() != 0 && result.model().digest() != 0) {
        EXPECT_EQ(it->second.model().digest(), result.model().digest()) << result.ordinal();
      }
      it->second.MergeFrom(result);
    }
  }
  for (auto& [ordinal, result] : results) {
    result.clear_message();
    answers[ordinal] += result.SerializeAsString();
  }
  return answers;
}

// Runs body on one rank without owner ranks, and then on 1 to 4 with them: the answers are the same.
void ExpectAnswersOfOneRank(const std::function<void(Rank&, std::function<std::optional<int>(int)>)>& body,
                            Faults faults = Faults::kNone) {
  std::map<uint64_t, std::string> wanted;
  for (int ranks = 0; ranks <= 4; ++ranks) {
    const auto owner = [&](int any) { return ranks == 0 ? std::nullopt : std::optional(any); };
    std::vector<std::vector<v1::WorkerMessage>> said(std::max(1, ranks));
    OnRanksWith(
        std::vector<int64_t>(said.size(), kPlenty),
        [&](Rank& rank) {
          body(rank, owner);
          said[rank.group_->rank()] = rank.said_;
        },
        faults);
    const std::map<uint64_t, std::string> answers = Answers(said);
    if (ranks == 0) wanted = answers;
    EXPECT_EQ(answers.size(), wanted.size());
    for (const auto& [ordinal, answer] : wanted) {
      EXPECT_TRUE(answers.at(ordinal) == answer) << "command " << ordinal << " on " << ranks << " ranks";
    }
  }
}

TEST(ModelSessionsWithOwnerRanks, ManyGenerationsAtOnceGiveTheAnswersOfOneRank) {
  ExpectAnswersOfOneRank([](Rank& rank, const auto& owner) {
    rank.Open(3, /*window=*/20);
    rank.Open(4, /*window=*/300);
    rank.Open(5, /*window=*/9, /*stripe_pages=*/1, /*sink_tokens=*/64);
    rank.Append(1, {5, 6, 7});
    rank.Append(3, std::vector<int32_t>(255, 5));
    rank.Append(4, std::vector<int32_t>(700, 9));
    rank.Append(5, {1, 2, 3});  // It is shorter than its sinks.
    rank.RunAll();
    v1::GenerateRequest request;
    request.set_max_tokens(30);
    request.set_sink_mass(true);
    rank.Generate(3, request, owner(0));
    rank.Generate(5, request, owner(1));
    rank.Generate(1, request, std::nullopt);  // Sees all keys.
    request.set_max_tokens(330);
    request.set_temperature(1);
    request.set_seed(4);
    rank.Generate(4, request, owner(1));
    rank.RunSteps(3);
    rank.Append(2, std::vector<int32_t>(500, 3));  // A prompt beside them.
    rank.RunAll();

    // Afterwards the sessions are like any others, for every rank.
    rank.Fork(4, 14);
    rank.Fork(5, 15);
    rank.Score(3, {1, 2, 3, 4}, /*sink_mass=*/true);
    rank.Embed(4, {0, 10, 900, 1030});
    rank.Append(4, std::vector<int32_t>(600, 2));
    rank.Score(5, std::vector<int32_t>(80, 6));
    rank.RunAll();
    request.set_max_tokens(50);
    for (const uint64_t session : {3, 4, 5, 14, 15}) {
      rank.Generate(session, request, owner(static_cast<int>(session)));
    }
    rank.RunAll();
    for (const uint64_t session : {1, 2, 3, 4, 5, 14, 15}) {
      rank.Score(session, {9, 8, 7});
      rank.Generate(session, 3);
      rank.RunAll();
    }
  });
}

TEST(ModelSessionsWithOwnerRanks, WhatPrefillsReadGivesTheAnswersOfOneRank) {
  ExpectAnswersOfOneRank([](Rank& rank, const auto& /*owner*/) {
    std::vector<int32_t> ids(900);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * i % 97);
    rank.Open(3, /*window=*/20, /*stripe_pages=*/1, /*sink_tokens=*/4, v1::MODEL_POLICY_STAR);
    rank.Open(4, /*window=*/30);
    for (const uint64_t session : {1, 3, 4}) {
      rank.Append(session, {5, 6, 7});
      rank.RunAll();
      rank.Score(session, ids);
      rank.Append(session, ids);
      rank.RunAll();
      rank.Embed(session, {0, 1, 200, 800, 850, 903});
      rank.Embed(session, {0, 1, 200, 800, 850, 902}, v1::POOL_LAST);
      rank.RunAll();
    }
  });
}

TEST(ModelSessionsWithOwnerRanks, OnlyTheOwnerRankComputes) {
  OnRanks(3, [](Rank& rank) {
    rank.Open(3, /*window=*/20);
    rank.Append(3, {5, 6, 7});
    rank.RunAll();
    const int64_t before = rank.products_;
    const uint64_t generation = rank.Generate(3, 40, {}, /*owner=*/1);
    rank.RunAll();
    EXPECT_EQ(rank.ResultOf(generation).model().done(), 40);
    const bool is_owner = rank.group_->rank() == 1;
    EXPECT_EQ(rank.products_ > before, is_owner);
    EXPECT_EQ(rank.TokensOf(generation), is_owner ? 40 : 0);
  });
}

TEST(ModelSessionsWithOwnerRanks, AnOwnerRankMustBeARankAndTheSessionOneOfWindows) {
  OnTwoRanks([](Rank& rank) {
    rank.Open(3, /*window=*/20);
    for (const uint64_t session : {1, 3}) rank.Append(session, {5, 6, 7});
    rank.RunAll();
    v1::Command command = rank.NewCommand();
    command.mutable_model_generate()->mutable_request()->set_max_tokens(1);
    command.mutable_model_generate()->set_session_id(3);
    for (const int no_rank : {2, -1}) {
      command.mutable_model_generate()->set_owner_rank(no_rank);
      EXPECT_EQ(rank.sessions_->Start(command).code(), absl::StatusCode::kInvalidArgument);
    }
    command.mutable_model_generate()->set_session_id(1);
    command.mutable_model_generate()->set_owner_rank(0);
    EXPECT_EQ(rank.sessions_->Start(command).code(), absl::StatusCode::kInvalidArgument);
    EXPECT_FALSE(rank.sessions_->busy());
  });
}

TEST(ModelSessionsWithOwnerRanks, ACancelledGenerationLeavesItsTokensWithAllRanks) {
  for (const int steps : {0, 1, 9}) {
    ExpectAnswersOfOneRank([steps](Rank& rank, const auto& owner) {
      rank.Open(3, /*window=*/6);
      rank.Append(3, {5, 6, 7});
      rank.RunAll();
      const uint64_t generation = rank.Generate(3, 20, {}, owner(1));
      rank.RunSteps(steps);
      rank.sessions_->Cancel(generation);
      rank.sessions_->Cancel(generation);
      rank.RunAll();
      EXPECT_EQ(rank.ResultOf(generation).model().done(), steps);
      EXPECT_TRUE(rank.ResultOf(generation).model().cancelled());
      rank.Score(3, {1, 2, 3});
      rank.RunAll();
      // One that has ended already, of which the others have not heard yet.
      const uint64_t ended = rank.Generate(3, 4, {}, owner(0));
      rank.RunSteps(4);
      rank.sessions_->Cancel(ended);
      rank.RunAll();
      EXPECT_EQ(rank.ResultOf(ended).model().finish_reason(), v1::FINISH_REASON_LENGTH);
      EXPECT_FALSE(rank.ResultOf(ended).model().cancelled());
      rank.Score(3, {1, 2, 3});
      rank.RunAll();
    });
  }
}

TEST(ModelSessionsWithOwnerRanks, AClosedSessionsGenerationEndsWithNothing) {
  OnRanks(3, [](Rank& rank) {
    for (const int64_t tokens : {3, 100}) {  // It has ended on its owner rank, or not.
      rank.Open(3, /*window=*/20);
      rank.Append(3, {5, 6, 7});
      rank.RunAll();
      const uint64_t generation = rank.Generate(3, tokens, {}, /*owner=*/2);
      rank.RunSteps(3);
      rank.sessions_->Close(3);
      EXPECT_FALSE(rank.sessions_->busy());
      EXPECT_EQ(rank.ResultOf(generation).code(), static_cast<int>(absl::StatusCode::kNotFound));
      EXPECT_EQ(rank.ResultOf(generation).model().done(), 0);
      EXPECT_EQ(rank.store_.used_bytes(), 0);
    }
  });
}

TEST(ModelSessionsWithOwnerRanks, StopsEndIt) {
  std::string stop;
  OnRanks(1, [&](Rank& rank) {
    rank.Open(3, /*window=*/20);
    rank.Append(3, {5, 6, 7});
    rank.RunAll();
    const uint64_t whole = rank.Generate(3, 12);
    rank.RunAll();
    const std::string text = rank.TextOf(whole);
    stop = text.substr(text.size() / 2 - 2, 4);
  });
  ExpectAnswersOfOneRank([&](Rank& rank, const auto& owner) {
    rank.Open(3, /*window=*/20);
    rank.Append(3, {5, 6, 7});
    rank.RunAll();
    rank.Fork(3, 4);
    const uint64_t by_string = rank.Generate(3, 12, {"never", stop}, owner(2));
    v1::GenerateRequest request;
    request.set_max_tokens(12);
    for (int id = 0; id < 97; ++id) request.add_stop_ids(id);
    const uint64_t by_id = rank.Generate(4, request, owner(1));
    rank.RunAll();
    EXPECT_EQ(rank.ResultOf(by_string).model().finish_reason(), v1::FINISH_REASON_STOP);
    EXPECT_LT(rank.ResultOf(by_string).model().done(), 12);
    EXPECT_EQ(rank.ResultOf(by_id).model().finish_reason(), v1::FINISH_REASON_STOP);
    EXPECT_EQ(rank.ResultOf(by_id).model().done(), 1);
    for (const uint64_t session : {3, 4}) {
      rank.Score(session, {1, 2, 3});
      rank.RunAll();
    }
  });
}

TEST(ModelSessionsWithOwnerRanks, AGenerationWhoseArithmeticLeavesTheFiniteNumbersEndsAlone) {
  const auto body = [](Rank& rank, const auto& owner) {
    for (const uint64_t session : {3, 4, 5}) {
      rank.Open(session, /*window=*/2);
      rank.Append(session, {5, 6, 7});
    }
    rank.Append(1, {1, 2, 3});
    rank.RunAll();
    v1::GenerateRequest request;
    request.set_max_tokens(1000);
    request.set_temperature(1e6F);  // Any token, the poison among them.
    request.set_seed(1);
    const uint64_t poisoned = rank.Generate(3, request, owner(1));
    v1::GenerateRequest plain;
    plain.set_max_tokens(20);
    plain.set_sink_mass(true);
    const uint64_t same_owner = rank.Generate(4, plain, owner(1));
    const uint64_t other_owner = rank.Generate(5, plain, owner(0));
    const uint64_t everywhere = rank.Generate(1, plain, std::nullopt);
    rank.RunAll();
    EXPECT_EQ(rank.ResultOf(poisoned).code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
    EXPECT_GT(rank.ResultOf(poisoned).model().done(), 0);
    EXPECT_LT(rank.ResultOf(poisoned).model().done(), 20);
    for (const uint64_t job : {same_owner, other_owner, everywhere}) {
      EXPECT_EQ(rank.ResultOf(job).code(), 0)
          << rank.ResultOf(job).message() << " " << rank.ResultOf(job).model().done();
    }
    // What failed has left no trace, on any rank.
    rank.Append(3, {5, 6});
    rank.RunAll();
    rank.Score(3, {1, 2, 3});
    rank.RunAll();
  };
  // Before all messages, and between those that the ranks exchange.
  for (const Faults faults : {Faults::kPoison, Faults::kLayerOverflows}) ExpectAnswersOfOneRank(body, faults);
}

TEST(ModelSessionsWithOwnerRanks, AGenerationWhoseLogitsAreNotFiniteKeepsItsLastRow) {
  ExpectAnswersOfOneRank(
      [](Rank& rank, const auto& owner) {
        rank.Open(3, /*window=*/2);
        rank.Append(3, {5, 6, 7});
        rank.RunAll();
        for (const uint64_t fork : {4, 5}) rank.Fork(3, fork);
        v1::GenerateRequest request;
        request.set_max_tokens(50);
        request.set_temperature(1e6F);
        request.set_seed(2);
        const uint64_t failed = rank.Generate(3, request, owner(1));
        rank.RunAll();
        EXPECT_EQ(rank.ResultOf(failed).code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
        EXPECT_GT(rank.ResultOf(failed).model().done(), 1);
        if (rank.TokensOf(failed) > 0) {
          EXPECT_THAT(rank.ResultOf(failed).message(), HasSubstr("a logit is not finite"));
        }
        // One that ended there, or was cancelled there, does not hear of it.
        const int64_t done = rank.ResultOf(failed).model().done();
        request.set_max_tokens(done);
        const uint64_t ended = rank.Generate(4, request, owner(1));
        request.set_max_tokens(50);
        const uint64_t cancelled = rank.Generate(5, request, owner(1));
        rank.RunSteps(static_cast<int>(done));
        rank.sessions_->Cancel(cancelled);
        rank.RunAll();
        EXPECT_EQ(rank.ResultOf(ended).code(), 0) << rank.ResultOf(ended).message();
        EXPECT_EQ(rank.ResultOf(ended).model().finish_reason(), v1::FINISH_REASON_LENGTH);
        EXPECT_EQ(rank.ResultOf(cancelled).code(), 0) << rank.ResultOf(cancelled).message();
        EXPECT_TRUE(rank.ResultOf(cancelled).model().cancelled());
        EXPECT_EQ(rank.ResultOf(cancelled).model().done(), done);
        rank.Append(3, {5, 6});
        rank.Embed(3, {0, rank.ResultOf(failed).model().length()});
        rank.RunAll();
      },
      Faults::kHeadOverflows);
}

TEST(ModelSessionsWithOwnerRanks, ADeviceThatFailsWhileRowsAreSharedEndsTheGroup) {
  OnTwoRanks([](Rank& rank) {
    rank.Open(3, /*window=*/20);
    rank.Append(3, {5, 6, 7});
    rank.RunAll();
    rank.Generate(3, 4, {}, /*owner=*/1);
    rank.RunSteps(4);
    rank.backend_.broken = rank.group_->rank() == 1;
    const absl::Status status = rank.sessions_->Step(rank.ordinal_).status();
    EXPECT_THAT(std::string(status.message()), HasSubstr("the device is broken"));
  });
}

TEST(ModelSessionsWithOwnerRanks, OneThatAnyRankHasNoMemoryForEndsWithWhatItHas) {
  const auto run = [](Rank& rank, int owner, int64_t* used) {
    rank.Open(3, /*window=*/5000);
    rank.Append(1, {1, 2, 3});
    rank.Append(3, std::vector<int32_t>(250, 5));
    rank.RunAll();
    if (used != nullptr) *used = rank.store_.used_bytes();
    const uint64_t generation = rank.Generate(3, 20, {}, owner);
    rank.RunAll();
    if (used != nullptr) return;
    EXPECT_EQ(rank.ResultOf(generation).code(), static_cast<int>(absl::StatusCode::kResourceExhausted));
    EXPECT_EQ(rank.ResultOf(generation).model().done(), 6);
    rank.sessions_->Close(1);
    const uint64_t more = rank.Generate(3, 14, {}, owner + 1);
    rank.RunAll();
    EXPECT_EQ(rank.ResultOf(more).code(), 0) << rank.ResultOf(more).message();
    EXPECT_EQ(rank.ResultOf(more).model().length(), 270);
  };
  int64_t used = 0;
  std::string wanted;
  OnRanks(1, [&](Rank& rank) {
    run(rank, 0, &used);
    wanted = rank.IdsOf(rank.ordinal_);
  });
  for (const int owner : {0, 1}) {
    for (const std::vector<int64_t>& memory : {std::vector{used, kPlenty}, std::vector{kPlenty, used}}) {
      std::vector<std::string> first(2);
      std::vector<std::string> second(2);
      OnRanksWith(memory, [&](Rank& rank) {
        run(rank, owner, nullptr);
        first[rank.group_->rank()] = rank.IdsOf(rank.ordinal_ - 1);
        second[rank.group_->rank()] = rank.IdsOf(rank.ordinal_);
      });
      EXPECT_EQ(first[owner] + second[1 - owner], wanted);
      EXPECT_EQ(first[1 - owner] + second[owner], "");
    }
  }
}

TEST(ModelSessionsWithOwnerRanks, PrefillsGiveWayToAGenerationThatNeedsTheirMemory) {
  const auto run = [](Rank& rank, int64_t* used_in_prefill) {
    rank.Open(3, /*window=*/20, /*stripe_pages=*/8);
    rank.Open(4, /*window=*/5000);
    rank.Append(4, std::vector<int32_t>(250, 5));
    rank.RunAll();
    const uint64_t prompt = rank.Append(3, std::vector<int32_t>(5000, 7));
    ASSERT_TRUE(rank.sessions_->Step(rank.ordinal_).ok());
    if (rank.group_->rank() == 1 && used_in_prefill != nullptr) *used_in_prefill = rank.store_.used_bytes();
    const uint64_t generation = rank.Generate(4, 30, {}, /*owner=*/0);
    rank.RunAll();
    EXPECT_EQ(rank.ResultOf(generation).code(), 0) << rank.ResultOf(generation).message();
    EXPECT_EQ(rank.ResultOf(generation).model().done(), 30);
    EXPECT_EQ(rank.ResultOf(prompt).model().done(), 5000);
  };
  int64_t used_in_prefill = 0;
  OnTwoRanks([&](Rank& rank) { run(rank, &used_in_prefill); });
  OnRanksWith({kPlenty, used_in_prefill}, [&](Rank& rank) { run(rank, nullptr); });
}

}  // namespace
}  // namespace eduba
