// Contexts whose memory several ranks share, against the same context on one worker: equal to the bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "collective/local/local_communicator.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "model/engine.h"
#include "model/testing/random_model.h"

namespace eduba {
namespace {

using testing::RandomModel;

// What is done to a context, from a seed.
struct Problem {
  uint64_t seed = 0;
  ContextOptions options;
  std::vector<int32_t> ids;
  std::vector<size_t> chunks;
  std::vector<int32_t> question;

  std::string Text() const {
    return absl::StrCat("seed=", seed, " {policy=", static_cast<int>(options.policy),
                        " sinks=", options.sink_tokens, " window=", options.window, " length=", ids.size(),
                        " chunks=", chunks.size(), "}");
  }
};

Problem MakeProblem(uint64_t seed, int64_t vocab) {
  std::mt19937_64 random(seed);
  Problem problem;
  problem.seed = seed;
  problem.options.policy = static_cast<ContextPolicy>(seed % 3);
  problem.options.sink_tokens = random() % 3 == 0 ? 0 : static_cast<int64_t>(random() % 300);
  if (problem.options.policy != ContextPolicy::kModel) problem.options.window = 1 + random() % 400;
  problem.ids.resize(300 + random() % 900);
  for (int32_t& id : problem.ids) id = static_cast<int32_t>(random() % vocab);
  problem.question.resize(40);
  for (int32_t& id : problem.question) id = static_cast<int32_t>(random() % vocab);
  for (size_t left = problem.ids.size(); left > 0;) {
    problem.chunks.push_back(std::min<size_t>(left, 1 + random() % 400));
    left -= problem.chunks.back();
  }
  return problem;
}

// Everything that a context answers.
struct Answers {
  std::vector<float> hidden, scores, generated_log_probs, fork_hidden;
  std::vector<int32_t> generated;
  bool operator==(const Answers&) const = default;
};

class Rank {
 public:
  Rank(uint64_t model_seed, int threads, Communicator* group)
      : random_(model_seed),
        backend_(MakeCpuBackend(threads)),
        kernels_(MakeCpuLayerKernels(threads)),
        store_(backend_.get(), int64_t{256} << 20),
        model_(Transformer::Create(random_.config, random_.weights, kernels_.get()).value()) {
    ModelEngine::Options options;
    options.backend = backend_.get();
    options.store = &store_;
    options.model = model_.get();
    options.chunk_rows = 100;
    options.group = group;
    engine_ = std::make_unique<ModelEngine>(options);
  }

  Answers Run(const Problem& problem) {
    Answers answers;
    Context context = engine_->Open(problem.options, /*stripe_pages=*/1).value();
    const absl::Span<const int32_t> ids = problem.ids;
    size_t at = 0;
    for (const size_t chunk : problem.chunks) {
      const absl::Status status = engine_->Step({Turn{&context, ids.subspan(at, chunk)}});
      EXPECT_TRUE(status.ok()) << status;
      answers.hidden.insert(answers.hidden.end(), engine_->hidden().begin(), engine_->hidden().end());
      at += chunk;
    }
    Context fork = context.Fork();
    answers.scores = engine_->Score(context, problem.question).value();
    GenerateOptions generate;
    generate.max_tokens = 5;
    const Generation generation = engine_->Generate(context, generate).value();
    for (const TokenChoice& token : generation.tokens) {
      answers.generated.push_back(token.id);
      answers.generated_log_probs.push_back(token.log_prob);
    }
    // The fork beside its origin, in one step.
    const absl::Status status = engine_->Step({Turn{&context, problem.question, true},
                                               Turn{&fork, absl::MakeConstSpan(problem.question).first(7)}});
    EXPECT_TRUE(status.ok()) << status;
    answers.fork_hidden.assign(engine_->hidden().begin(), engine_->hidden().end());
    return answers;
  }
  int64_t used_bytes() const { return store_.used_bytes(); }

 private:
  RandomModel random_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<LayerKernels> kernels_;
  PageStore store_;
  std::unique_ptr<Transformer> model_;
  std::unique_ptr<ModelEngine> engine_;
};

TEST(ShardedContext, AnyNumberOfRanksGivesTheBitsOfOneWorker) {
  for (uint64_t seed = 1; seed <= 9; ++seed) {
    const Problem problem = MakeProblem(seed, RandomModel::RandomConfig(seed).vocab_size);
    const Answers alone = Rank(seed, 1, nullptr).Run(problem);
    for (int size = 1; size <= 4; ++size) {
      LocalHub hub;
      std::vector<Answers> answers(size);
      std::vector<std::thread> threads;
      for (int rank = 0; rank < size; ++rank) {
        threads.emplace_back([&, rank] {
          const auto group = hub.Join(1, 1, rank, size, absl::Now() + absl::Seconds(60)).value();
          answers[rank] = Rank(seed, 1 + rank % 2, group.get()).Run(problem);
        });
      }
      for (std::thread& thread : threads) thread.join();
      for (int rank = 0; rank < size; ++rank) {
        EXPECT_TRUE(answers[rank] == alone) << problem.Text() << ", rank " << rank << " of " << size;
      }
    }
  }
}

// What sharding is for.
TEST(ShardedContext, EveryRankKeepsItsShareOfTheLayersThatSeeAll) {
  ModelConfig config = RandomModel::RandomConfig(3);
  for (LayerConfig& layer : config.layers) layer.window = 0;
  const RandomModel random(config, DType::kF32, 3);
  const auto bytes = [&](int size) {
    LocalHub hub;
    std::vector<int64_t> used(size);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] {
        const auto group = hub.Join(1, 1, rank, size, absl::Now() + absl::Seconds(60)).value();
        const auto backend = MakeCpuBackend(1);
        const auto kernels = MakeCpuLayerKernels(1);
        PageStore store(backend.get(), int64_t{256} << 20);
        const auto model = Transformer::Create(random.config, random.weights, kernels.get()).value();
        ModelEngine::Options options;
        options.backend = backend.get();
        options.store = &store;
        options.model = model.get();
        options.group = group.get();
        ModelEngine engine(options);
        Context context = engine.Open({}, 1).value();
        const std::vector<int32_t> ids(12 * kPageRows, 1);
        EXPECT_TRUE(engine.Append(context, ids).ok());
        used[rank] = store.used_bytes();
      });
    }
    for (std::thread& thread : threads) thread.join();
    return used;
  };
  const int64_t whole = bytes(1)[0];
  // Pages 0 to 11 by turns; page 0, with the sinks, on all.
  EXPECT_EQ(bytes(3), (std::vector<int64_t>{whole * 4 / 12, whole * 5 / 12, whole * 5 / 12}));
}

}  // namespace
}  // namespace eduba
