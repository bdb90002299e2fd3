#ifndef EDUBA_MODEL_TESTING_ENGINE_FIXTURE_H_
#define EDUBA_MODEL_TESTING_ENGINE_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "attention/page_store.h"
#include "base/testing/same_bits.h"
#include "collective/local/local_communicator.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "model/testing/job_driver.h"
#include "model/testing/random_model.h"

namespace eduba::testing {

using Session = JobDriver::Session;

struct FixtureOptions {
  DType kv_dtype = DType::kF32;
  int threads = 1;
  int64_t store_bytes = int64_t{256} << 20;
  Communicator* group = nullptr;  // Null: alone.
  int64_t stripe_pages = 1;
  int64_t chunk_rows = 100;
};

// A random model and everything to run jobs on it.
struct Fixture {
  RandomModel random;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<LayerKernels> kernels;
  std::unique_ptr<PageStore> store;
  std::unique_ptr<Transformer> model;
  std::unique_ptr<JobDriver> jobs;

  explicit Fixture(uint64_t seed, const FixtureOptions& options = {}) : Fixture(RandomModel(seed), options) {}
  explicit Fixture(RandomModel&& random_model, const FixtureOptions& options = {},
                   std::unique_ptr<LayerKernels> layers = nullptr)
      : random(std::move(random_model)),
        backend(MakeCpuBackend(options.threads)),
        kernels(layers != nullptr ? std::move(layers) : MakeCpuLayerKernels(options.threads)),
        store(std::make_unique<PageStore>(backend.get(), options.store_bytes)) {
    auto made = Transformer::Create(random.config, random.weights, kernels.get());
    EXPECT_TRUE(made.ok()) << made.status();
    model = std::move(made).value();
    ModelEngine::Options engine;
    engine.backend = backend.get();
    engine.store = store.get();
    engine.model = model.get();
    engine.kv_dtype = options.kv_dtype;
    engine.chunk_rows = options.chunk_rows;
    jobs = std::make_unique<JobDriver>(engine, options.group, options.stripe_pages);
  }

  Session Open(const ContextOptions& options = {}) {
    auto session = jobs->Open(options);
    EXPECT_TRUE(session.ok()) << session.status();
    return std::move(session).value();
  }
  // A tiny random text.
  std::vector<int32_t> Text(int64_t length, uint64_t seed = 1) const {
    std::mt19937_64 generator(seed);
    std::vector<int32_t> ids(length);
    for (int32_t& id : ids) id = static_cast<int32_t>(generator() % random.config.vocab_size);
    return ids;
  }
  // Appends, which succeeds.
  void Append(const Session& session, absl::Span<const int32_t> ids) {
    const JobOutcome outcome = jobs->Append(session, ids);
    EXPECT_TRUE(outcome.ok()) << outcome.status();
  }
  // Appends of `chunk` ids each, with every row computed by every rank. Returns the hidden states of all
  // rows.
  std::vector<float> Hidden(const Session& session, absl::Span<const int32_t> ids, size_t chunk) {
    std::vector<float> hidden;
    for (size_t at = 0; at < ids.size(); at += chunk) {
      const JobOutcome outcome = jobs->AppendInChunks(session, ids.subspan(at, chunk));
      EXPECT_TRUE(outcome.ok()) << outcome.status();
      hidden.insert(hidden.end(), outcome.hidden.begin(), outcome.hidden.end());
    }
    return hidden;
  }
  // The scores of ids, and the hidden states of all their rows but for those that a prefill computed.
  JobOutcome Score(const Session& session, absl::Span<const int32_t> ids) {
    JobOutcome outcome = jobs->Score(session, ids);
    EXPECT_TRUE(outcome.ok()) << outcome.status();
    return outcome;
  }
  JobOutcome Generate(const Session& session, GenerateJob job) {
    JobOutcome outcome = jobs->Run(session, std::move(job));
    EXPECT_TRUE(outcome.ok()) << outcome.status();
    return outcome;
  }
  // Greedy.
  JobOutcome Generate(const Session& session, int64_t tokens) {
    GenerateJob job;
    job.max_tokens = tokens;
    return Generate(session, job);
  }
  // The logits of the token after the session.
  absl::StatusOr<std::vector<float>> NextLogits(const Session& session) {
    return jobs->engine().Logits(session.last());
  }
};

inline std::string ToString(const ContextOptions& o) {
  return absl::StrCat("{policy=", static_cast<int>(o.policy), " positions=", static_cast<int>(o.positions),
                      " sink_tokens=", o.sink_tokens, " window=", o.window, " clamp=", o.clamp, "}");
}

inline ContextOptions RandomOptions(uint64_t seed) {
  std::mt19937_64 random(seed * 7919 + 1);
  const auto pick = [&](auto... options) {
    const std::common_type_t<decltype(options)...> all[] = {options...};
    return all[random() % sizeof...(options)];
  };
  ContextOptions options;
  options.policy =
      pick(ContextPolicy::kModel, ContextPolicy::kStreaming, ContextPolicy::kStreaming, ContextPolicy::kStar);
  options.sink_tokens = pick(0, 1, 4, 4, 4, 4, 260);
  if (options.policy != ContextPolicy::kModel) options.window = pick(1, 2, 16, 64, 300);
  if (options.policy == ContextPolicy::kStreaming) {
    options.positions = pick(PositionMode::kAbsolute, PositionMode::kRolling, PositionMode::kClamped);
    if (options.positions == PositionMode::kClamped) options.clamp = pick(10, 100);
  }
  return options;
}

// Runs body(rank, communicator) as every rank of a group, each on a thread of its own.
inline void RunGroup(int size, const std::function<void(int, Communicator*)>& body) {
  LocalHub hub;
  std::vector<std::thread> threads;
  threads.reserve(size);
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      const auto communicator = hub.Join(1, 0, rank, size, absl::Now() + absl::Seconds(60));
      ASSERT_TRUE(communicator.ok()) << communicator.status();
      body(rank, communicator->get());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace eduba::testing

#endif  // EDUBA_MODEL_TESTING_ENGINE_FIXTURE_H_
