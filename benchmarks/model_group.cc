// A group's decode: sessions that generate together on a model whose layers all see all keys.
//   build/release/bin/model_group_bench [ranks, default 2] [local|gloo, default local] [sessions, default 8]
//   [tokens of context, default 500]
// Ranks are threads of this process, each with one thread of its own. Weights are random: this says nothing
// about text. Checked: a session's hidden state has the same bits after generating together and alone.
// Prints the time of a step as rank 0 sees it, and how many all-reduces it took.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "base/heap.h"
#include "collective/gloo/gloo_communicator.h"
#include "collective/local/local_communicator.h"
#include "collective/map_rendezvous.h"
#include "collective/testing/counting_communicator.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "model/testing/job_driver.h"
#include "model/testing/random_model.h"

namespace eduba {
namespace {

constexpr int kSteps = 200;

ModelConfig Shape() {
  ModelConfig config;
  config.vocab_size = 4096;
  config.hidden_size = 256;
  config.intermediate_size = 704;
  config.query_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 64;
  config.layers.resize(6);
  for (LayerConfig& layer : config.layers) layer.rope.rotary_dim = 64;
  config.trained_positions = 4096;
  config.norm_eps = 1e-5F;
  // Sinks and keys count alike, so that contexts above 1024 tokens take the maximum path, and shorter ones
  // not.
  config.attention_scale = 1e-3F;
  config.tied_embeddings = true;
  return config;
}

struct Outcome {
  bool ok = false;
  double median_ms = 0, low_ms = 0, high_ms = 0;
  double reductions = 0;  // A step.
};

Outcome RunRank(const testing::RandomModel& random, Communicator* communicator, int sessions,
                int64_t tokens) {
  testing::CountingCommunicator counting(communicator);
  const auto backend = MakeCpuBackend(1);
  const auto kernels = MakeCpuLayerKernels(1);
  PageStore store(backend.get(), int64_t{1} << 30);
  const auto model = Transformer::Create(random.config, random.weights, kernels.get()).value();
  ModelEngine::Options options;
  options.backend = backend.get();
  options.store = &store;
  options.model = model.get();
  options.kv_dtype = DType::kBf16;
  testing::JobDriver jobs(options, &counting, /*stripe_pages=*/1);

  std::vector<testing::JobDriver::Session> all;
  GenerateJob generate;
  generate.max_tokens = kSteps + 1;
  std::vector<uint64_t> alone;
  std::vector<uint64_t> together;
  for (int s = 0; s < sessions; ++s) {
    std::vector<int32_t> text(tokens);
    for (int64_t i = 0; i < tokens; ++i) {
      text[i] = static_cast<int32_t>((i * 7919 + s) % random.config.vocab_size);
    }
    all.push_back(jobs.Open({}).value());
    if (!jobs.Append(all.back(), text).ok()) return {};
    const testing::JobDriver::Session judge = all.back().Fork();
    alone.push_back(jobs.Start(judge, generate));
    if (!jobs.RunAll().ok()) return {};
  }
  for (const testing::JobDriver::Session& session : all) together.push_back(jobs.Start(session, generate));
  if (!jobs.Step().ok()) return {};

  counting.TakeReductions();
  std::vector<double> times;
  for (int i = 0; i < kSteps; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    if (!jobs.Step().ok()) return {};
    times.push_back(
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
  }
  for (int s = 0; s < sessions; ++s) {
    if (jobs.OutcomeOf(together[s]).result.digest != jobs.OutcomeOf(alone[s]).result.digest) {
      std::fprintf(stderr, "session %d has other bits alone\n", s);
      return {};
    }
  }
  const double reductions = static_cast<double>(counting.TakeReductions()) / kSteps;
  std::sort(times.begin(), times.end());
  return {true, times[kSteps / 2], times[kSteps / 10], times[kSteps * 9 / 10], reductions};
}

int Run(int ranks, bool gloo, int sessions, int64_t tokens) {
  const testing::RandomModel random(Shape(), DType::kBf16, 1);
  const absl::Time deadline = absl::Now() + absl::Seconds(60);
  LocalHub hub;
  MapRendezvous rendezvous;
  std::vector<Outcome> outcomes(ranks);
  std::vector<std::thread> threads;
  threads.reserve(ranks);
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      auto group =
          gloo ? ConnectGloo(rank, ranks, rendezvous, {}, deadline) : hub.Join(1, 1, rank, ranks, deadline);
      if (group.ok()) outcomes[rank] = RunRank(random, group->get(), sessions, tokens);
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (!std::all_of(outcomes.begin(), outcomes.end(), [](const Outcome& o) { return o.ok; })) {
    std::fprintf(stderr, "a rank failed\n");
    return 1;
  }
  const Outcome& o = outcomes[0];
  std::printf(
      "%d sessions, %d ranks, %s, %lld tokens of context: %.1f all-reduces a step, %.2f ms (%.2f to %.2f)\n",
      sessions, ranks, gloo ? "gloo" : "local", static_cast<long long>(tokens), o.reductions, o.median_ms,
      o.low_ms, o.high_ms);
  return 0;
}

}  // namespace
}  // namespace eduba

int main(int argc, char** argv) {
  eduba::KeepFreedMemory();  // The program does so too.
  return eduba::Run(argc > 1 ? std::atoi(argv[1]) : 2, argc > 2 && std::string(argv[2]) == "gloo",
                    argc > 3 ? std::atoi(argv[3]) : 8, argc > 4 ? std::atoll(argv[4]) : 500);
}
