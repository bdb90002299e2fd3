// Models of every family against what Hugging Face transformers computes with them (README.md,
// make_models.py).

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/testing/same_bits.h"
#include "gtest/gtest.h"
#include "ingest/npy.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "kernels/reference/reference_backend.h"
#include "kernels/reference/reference_layer_kernels.h"
#include "model/testing/job_driver.h"
#include "model/transformer.h"
#include "model/weights.h"

namespace eduba {
namespace {

constexpr int64_t kBytes = int64_t{64} << 20;

std::vector<std::string> Families() {
  std::vector<std::string> families;
  for (const auto& entry : std::filesystem::directory_iterator(EDUBA_GOLDEN_MODELS)) {
    families.push_back(entry.path().filename().string());
  }
  std::sort(families.begin(), families.end());
  return families;
}

template <class T>
std::vector<T> ReadNpy(const std::string& path) {
  const auto file = NpyFile::Open(path);
  EXPECT_TRUE(file.ok()) << file.status();
  std::vector<T> values((*file)->elements());
  EXPECT_TRUE((*file)->Read(0, (*file)->elements(), values.data()).ok());
  return values;
}

using Session = eduba::testing::JobDriver::Session;

// A model folder and everything to run it with.
struct Fixture {
  std::string folder;
  LoadedModel loaded;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<LayerKernels> kernels;
  std::unique_ptr<PageStore> store;
  std::unique_ptr<Transformer> model;
  std::unique_ptr<eduba::testing::JobDriver> jobs;

  explicit Fixture(const std::string& family, int threads = 2, bool reference = false)
      : Fixture(std::string(EDUBA_GOLDEN_MODELS) + "/" + family,
                reference ? MakeReferenceBackend() : MakeCpuBackend(threads),
                reference ? MakeReferenceLayerKernels() : MakeCpuLayerKernels(threads), std::nullopt) {}

  Fixture(std::string model_folder, std::unique_ptr<Backend> some_backend,
          std::unique_ptr<LayerKernels> some_kernels, std::optional<DType> kv_dtype)
      : folder(std::move(model_folder)), backend(std::move(some_backend)), kernels(std::move(some_kernels)) {
    auto read = LoadModel(folder);
    EXPECT_TRUE(read.ok()) << read.status();
    loaded = std::move(read).value();
    store = std::make_unique<PageStore>(backend.get(), kBytes);
    auto made = Transformer::Create(loaded.config, loaded.weights, kernels.get());
    EXPECT_TRUE(made.ok()) << made.status();
    model = std::move(made).value();
    ModelEngine::Options options;
    options.backend = backend.get();
    options.store = store.get();
    options.model = model.get();
    options.kv_dtype = kv_dtype.value_or(model->weight_dtype());
    options.chunk_rows = 300;
    jobs = std::make_unique<eduba::testing::JobDriver>(options, nullptr, /*stripe_pages=*/64);
  }

  Session Open(const ContextOptions& options = {}) {
    auto session = jobs->Open(options);
    EXPECT_TRUE(session.ok()) << session.status();
    return std::move(session).value();
  }
  // Appends ids, `chunk` at a time. Returns the hidden states of their rows.
  std::vector<float> Hidden(const Session& session, const std::vector<int32_t>& ids, size_t chunk) {
    std::vector<float> hidden;
    for (size_t at = 0; at < ids.size(); at += chunk) {
      const auto outcome = jobs->Append(session, absl::MakeConstSpan(ids).subspan(at, chunk));
      EXPECT_TRUE(outcome.ok()) << outcome.status();
      hidden.insert(hidden.end(), outcome.hidden.begin(), outcome.hidden.end());
    }
    return hidden;
  }
  // Likewise the logits [ids, vocabulary].
  std::vector<float> Logits(const Session& session, const std::vector<int32_t>& ids, size_t chunk) {
    const auto logits = jobs->engine().Logits(Hidden(session, ids, chunk));
    EXPECT_TRUE(logits.ok()) << logits.status();
    return *logits;
  }
};

// The largest difference, relative to the largest number.
double Error(const float* got, const std::vector<float>& wanted) {
  double error = 0;
  double size = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    error = std::max(error, std::abs(static_cast<double>(got[i]) - wanted[i]));
    size = std::max(size, std::abs(static_cast<double>(wanted[i])));
  }
  return std::isfinite(error) ? error / size : 1e30;
}

class Golden : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Families, Golden, ::testing::ValuesIn(Families()),
                         [](const auto& info) { return info.param; });

TEST(Golden, EveryFamilyIsHere) {
  const std::vector<std::string> families = Families();
  for (const char* family : {"gemma2", "gemma3", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"}) {
    EXPECT_NE(std::find(families.begin(), families.end(), family), families.end()) << family;
  }
}

TEST_P(Golden, LogitsOfThePromptEqualTransformers) {
  Fixture f(GetParam());
  const auto ids = ReadNpy<int32_t>(f.folder + "/ids.npy");
  const auto wanted = ReadNpy<float>(f.folder + "/logits_f64.npy");
  const Session session = f.Open();
  const std::vector<float> logits = f.Logits(session, ids, ids.size());
  ASSERT_EQ(logits.size(), wanted.size());
  const double error = Error(logits.data(), wanted);
  EXPECT_LE(error, 1e-4);
  RecordProperty("relative_error", std::to_string(error));
  std::printf("%s: %.2g of the largest logit\n", GetParam().c_str(), error);
}

TEST_P(Golden, TheReferenceKernelsAgree) {
  Fixture f(GetParam(), 1, /*reference=*/true);
  const auto ids = ReadNpy<int32_t>(f.folder + "/ids.npy");
  const auto wanted = ReadNpy<float>(f.folder + "/logits_f64.npy");
  const Session session = f.Open();
  EXPECT_LE(Error(f.Logits(session, ids, ids.size()).data(), wanted), 1e-4);
}

TEST_P(Golden, TheGreedyContinuationEqualsTransformers) {
  Fixture f(GetParam());
  const auto ids = ReadNpy<int32_t>(f.folder + "/ids.npy");
  const auto wanted = ReadNpy<int32_t>(f.folder + "/continuation.npy");
  const Session session = f.Open();
  f.Hidden(session, ids, ids.size());
  GenerateJob generate;
  generate.max_tokens = static_cast<int64_t>(wanted.size());
  const auto generation = f.jobs->Run(session, generate);
  ASSERT_TRUE(generation.ok()) << generation.status();
  EXPECT_EQ(generation.ids(), wanted);
}

TEST_P(Golden, LogitsFarBehindThePromptEqualTransformers) {
  Fixture f(GetParam());
  auto ids = ReadNpy<int32_t>(f.folder + "/ids.npy");
  const auto more = ReadNpy<int32_t>(f.folder + "/continuation.npy");
  ids.insert(ids.end(), more.begin(), more.end());
  const auto wanted = ReadNpy<float>(f.folder + "/tail_logits_f64.npy");
  const Session session = f.Open();
  const std::vector<float> logits = f.Logits(session, ids, 50);
  EXPECT_LE(Error(logits.data() + logits.size() - wanted.size(), wanted), 1e-4);
}

TEST_P(Golden, PooledHiddenStatesEqualTransformers) {
  Fixture f(GetParam());
  const auto ids = ReadNpy<int32_t>(f.folder + "/ids.npy");
  const auto wanted = ReadNpy<float>(f.folder + "/hidden_mean_f64.npy");
  const Session session = f.Open();
  f.Hidden(session, ids, ids.size());
  const auto pooled =
      f.jobs->Run(session, EmbedJob{{{0, static_cast<int64_t>(ids.size())}}, Pool::kMean}).result;
  ASSERT_TRUE(pooled.status.ok()) << pooled.status;
  ASSERT_EQ(pooled.vectors.size(), wanted.size());
  EXPECT_LE(Error(pooled.vectors.data(), wanted), 1e-4);
}

// Any chunking, any number of threads: the same bits.
TEST_P(Golden, ChunksAndThreadsDoNotChangeABit) {
  Fixture one(GetParam(), 1);
  Fixture three(GetParam(), 3);
  auto ids = ReadNpy<int32_t>(one.folder + "/ids.npy");
  const auto more = ReadNpy<int32_t>(one.folder + "/continuation.npy");
  ids.insert(ids.end(), more.begin(), more.end());
  const Session session = one.Open();
  const std::vector<float> whole = one.Logits(session, ids, ids.size());
  for (const size_t chunk : {1, 7, 64, 255, 257}) {
    const Session a = one.Open();
    const Session b = three.Open();
    EXPECT_TRUE(SameBits(one.Logits(a, ids, chunk), whole)) << "chunks of " << chunk;
    EXPECT_TRUE(SameBits(three.Logits(b, ids, chunk), whole)) << "chunks of " << chunk << ", 3 threads";
  }
}

// eduba-nano far beyond its window: token sinks, window and rolling positions, by the definition in
// model/nano/nano_model.py.
struct NanoErrors {
  double hidden = 0;
  double mean = 0;
  double logits = 0;
};

NanoErrors ErrorsOfNano(DType kv_dtype, Activations activations) {
  Fixture f(EDUBA_NANO_WEIGHTS, MakeCpuBackend(2, activations), MakeCpuLayerKernels(2, activations),
            kv_dtype);
  const std::string golden = std::string(EDUBA_GOLDEN_MODELS) + "/../nano/";
  const auto ids = ReadNpy<int32_t>(golden + "ids.npy");
  const auto positions = ReadNpy<int32_t>(golden + "positions.npy");
  const auto top_ids = ReadNpy<int32_t>(golden + "top_ids.npy");
  ContextOptions options;
  options.policy = ContextPolicy::kStreaming;
  options.positions = PositionMode::kRolling;
  options.sink_tokens = 4;
  options.window = 256;
  const Session session = f.Open(options);
  const std::vector<int32_t> sinks(4, 0);
  f.Hidden(session, sinks, sinks.size());

  const int64_t width = f.model->config().hidden_size;
  const std::vector<float> hidden = f.Hidden(session, ids, 200);
  std::vector<float> chosen;
  for (const int32_t position : positions) {
    chosen.insert(chosen.end(), hidden.begin() + position * width, hidden.begin() + (position + 1) * width);
  }
  std::vector<float> mean;
  for (int64_t c = 0; c < width; ++c) {
    double sum = 0;
    for (size_t i = 0; i < ids.size(); ++i) sum += hidden[i * width + c];
    mean.push_back(static_cast<float>(sum / static_cast<double>(ids.size())));
  }
  const std::vector<float> logits = f.jobs->engine().Logits(chosen).value();
  const int64_t vocab = f.model->config().vocab_size;
  const auto top = static_cast<int64_t>(top_ids.size() / positions.size());
  std::vector<float> top_logits;
  top_logits.reserve(top_ids.size());
  for (size_t i = 0; i < top_ids.size(); ++i) {
    top_logits.push_back(logits[static_cast<int64_t>(i) / top * vocab + top_ids[i]]);
  }
  return {Error(chosen.data(), ReadNpy<float>(golden + "hidden_f64.npy")),
          Error(mean.data(), ReadNpy<float>(golden + "hidden_mean_f64.npy")),
          Error(top_logits.data(), ReadNpy<float>(golden + "top_logits_f64.npy"))};
}

TEST(GoldenNano, EqualsItsDefinitionFarBeyondTheWindow) {
  const NanoErrors errors = ErrorsOfNano(DType::kF32, Activations::kF32);
  EXPECT_LE(errors.hidden, 1e-4);
  EXPECT_LE(errors.mean, 1e-4);
  EXPECT_LE(errors.logits, 1e-4);
  std::printf("nano: hidden %.2g, mean %.2g, logits %.2g\n", errors.hidden, errors.mean, errors.logits);
}

// bf16 has 8 digits: what rounding keys and values, or activations too, may cost.
TEST(GoldenNano, RoundsNoMoreThanAsked) {
  const NanoErrors kept = ErrorsOfNano(DType::kBf16, Activations::kF32);
  const NanoErrors rounded = ErrorsOfNano(DType::kBf16, Activations::kBf16);
  std::printf("nano, logits: bf16 keys and values %.2g, bf16 activations %.2g\n", kept.logits,
              rounded.logits);
  EXPECT_LE(kept.logits, 0.01);
  EXPECT_LE(rounded.logits, 0.03);
  EXPECT_GT(rounded.logits, kept.logits);
}

}  // namespace
}  // namespace eduba
