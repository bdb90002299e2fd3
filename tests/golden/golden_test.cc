// Models of every family against what Hugging Face transformers computes with them (README.md,
// make_models.py).

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "ingest/npy.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "kernels/reference/reference_backend.h"
#include "kernels/reference/reference_layer_kernels.h"
#include "model/engine.h"
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

// A model folder and everything to run it with.
struct Fixture {
  std::string folder;
  LoadedModel loaded;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<LayerKernels> kernels;
  std::unique_ptr<PageStore> store;
  std::unique_ptr<Transformer> model;
  std::unique_ptr<ModelEngine> engine;

  explicit Fixture(const std::string& family, int threads = 2, bool reference = false)
      : folder(std::string(EDUBA_GOLDEN_MODELS) + "/" + family) {
    auto read = LoadModel(folder);
    EXPECT_TRUE(read.ok()) << read.status();
    loaded = std::move(read).value();
    backend = reference ? MakeReferenceBackend() : MakeCpuBackend(threads);
    kernels = reference ? MakeReferenceLayerKernels() : MakeCpuLayerKernels(threads);
    store = std::make_unique<PageStore>(backend.get(), kBytes);
    auto made = Transformer::Create(loaded.config, loaded.weights, kernels.get());
    EXPECT_TRUE(made.ok()) << made.status();
    model = std::move(made).value();
    ModelEngine::Options options;
    options.backend = backend.get();
    options.store = store.get();
    options.model = model.get();
    options.kv_dtype = model->weight_dtype();
    engine = std::make_unique<ModelEngine>(options);
  }

  Context Open(const ContextOptions& options = {}) {
    auto context = engine->Open(options);
    EXPECT_TRUE(context.ok()) << context.status();
    return std::move(context).value();
  }
  // Logits [ids, vocabulary] of ids that go on behind the context, `chunk` at a time.
  std::vector<float> Logits(Context& context, const std::vector<int32_t>& ids, size_t chunk) {
    const int64_t vocab = model->config().vocab_size;
    std::vector<float> logits;
    for (size_t at = 0; at < ids.size(); at += chunk) {
      const auto some = absl::MakeConstSpan(ids).subspan(at, chunk);
      const absl::Status status = engine->Step({Turn{&context, some, false}});
      EXPECT_TRUE(status.ok()) << status;
      logits.resize((at + some.size()) * vocab);
      model->Logits(engine->hidden().data(), static_cast<int64_t>(some.size()), &logits[at * vocab]);
    }
    return logits;
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

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class Golden : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Families, Golden, testing::ValuesIn(Families()),
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
  Context context = f.Open();
  const std::vector<float> logits = f.Logits(context, ids, ids.size());
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
  Context context = f.Open();
  EXPECT_LE(Error(f.Logits(context, ids, ids.size()).data(), wanted), 1e-4);
}

TEST_P(Golden, TheGreedyContinuationEqualsTransformers) {
  Fixture f(GetParam());
  const auto ids = ReadNpy<int32_t>(f.folder + "/ids.npy");
  const auto wanted = ReadNpy<int32_t>(f.folder + "/continuation.npy");
  Context context = f.Open();
  ASSERT_TRUE(f.engine->Append(context, ids).ok());
  GenerateOptions options;
  options.max_tokens = static_cast<int64_t>(wanted.size());
  const auto generation = f.engine->Generate(context, options);
  ASSERT_TRUE(generation.ok()) << generation.status();
  std::vector<int32_t> got;
  for (const TokenChoice& token : generation->tokens) got.push_back(token.id);
  EXPECT_EQ(got, wanted);
}

TEST_P(Golden, LogitsFarBehindThePromptEqualTransformers) {
  Fixture f(GetParam());
  auto ids = ReadNpy<int32_t>(f.folder + "/ids.npy");
  const auto more = ReadNpy<int32_t>(f.folder + "/continuation.npy");
  ids.insert(ids.end(), more.begin(), more.end());
  const auto wanted = ReadNpy<float>(f.folder + "/tail_logits_f64.npy");
  Context context = f.Open();
  const std::vector<float> logits = f.Logits(context, ids, 50);
  EXPECT_LE(Error(logits.data() + logits.size() - wanted.size(), wanted), 1e-4);
}

TEST_P(Golden, PooledHiddenStatesEqualTransformers) {
  Fixture f(GetParam());
  const auto ids = ReadNpy<int32_t>(f.folder + "/ids.npy");
  const auto wanted = ReadNpy<float>(f.folder + "/hidden_mean_f64.npy");
  const Context context = f.Open();
  const auto pooled = f.engine->Embed(context, ids, {{0, static_cast<int64_t>(ids.size())}}, Pool::kMean);
  ASSERT_TRUE(pooled.ok()) << pooled.status();
  ASSERT_EQ(pooled->size(), wanted.size());
  EXPECT_LE(Error(pooled->data(), wanted), 1e-4);
}

// Any chunking, any number of threads: the same bits.
TEST_P(Golden, ChunksAndThreadsDoNotChangeABit) {
  Fixture one(GetParam(), 1);
  Fixture three(GetParam(), 3);
  auto ids = ReadNpy<int32_t>(one.folder + "/ids.npy");
  const auto more = ReadNpy<int32_t>(one.folder + "/continuation.npy");
  ids.insert(ids.end(), more.begin(), more.end());
  Context context = one.Open();
  const std::vector<float> whole = one.Logits(context, ids, ids.size());
  for (const size_t chunk : {1, 7, 64, 255, 257}) {
    Context a = one.Open();
    Context b = three.Open();
    EXPECT_TRUE(SameBits(one.Logits(a, ids, chunk), whole)) << "chunks of " << chunk;
    EXPECT_TRUE(SameBits(three.Logits(b, ids, chunk), whole)) << "chunks of " << chunk << ", 3 threads";
  }
}

}  // namespace
}  // namespace eduba
