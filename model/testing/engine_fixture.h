#ifndef EDUBA_MODEL_TESTING_ENGINE_FIXTURE_H_
#define EDUBA_MODEL_TESTING_ENGINE_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
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
#include "collective/local/local_communicator.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "model/engine.h"
#include "model/testing/random_model.h"

namespace eduba::testing {

// A random model and everything to run it with.
struct Fixture {
  RandomModel random;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<LayerKernels> kernels;
  std::unique_ptr<PageStore> store;
  std::unique_ptr<Transformer> model;
  std::unique_ptr<ModelEngine> engine;

  explicit Fixture(uint64_t seed, DType kv_dtype = DType::kF32, int threads = 1,
                   int64_t store_bytes = int64_t{256} << 20, Communicator* communicator = nullptr,
                   int64_t stripe_pages = 1)
      : Fixture(RandomModel(seed), kv_dtype, threads, store_bytes, communicator, stripe_pages) {}
  Fixture(RandomModel&& random_model, DType kv_dtype, int threads, int64_t store_bytes,
          Communicator* communicator = nullptr, int64_t stripe_pages = 1,
          std::unique_ptr<LayerKernels> layers = nullptr)
      : random(std::move(random_model)),
        backend(MakeCpuBackend(threads)),
        kernels(layers != nullptr ? std::move(layers) : MakeCpuLayerKernels(threads)),
        store(std::make_unique<PageStore>(backend.get(), store_bytes)) {
    auto made = Transformer::Create(random.config, random.weights, kernels.get());
    EXPECT_TRUE(made.ok()) << made.status();
    model = std::move(made).value();
    ModelEngine::Options options;
    options.backend = backend.get();
    options.store = store.get();
    options.model = model.get();
    options.kv_dtype = kv_dtype;
    options.chunk_rows = 100;
    options.communicator = communicator;
    options.stripe_pages = stripe_pages;
    engine = std::make_unique<ModelEngine>(options);
  }

  Context Open(const ContextOptions& options = {}) {
    auto context = engine->Open(options);
    EXPECT_TRUE(context.ok()) << context.status();
    return std::move(context).value();
  }
  // A tiny random text.
  std::vector<int32_t> Text(int64_t length, uint64_t seed = 1) const {
    std::mt19937_64 generator(seed);
    std::vector<int32_t> ids(length);
    for (int32_t& id : ids) id = static_cast<int32_t>(generator() % random.config.vocab_size);
    return ids;
  }
  // Hidden states of `ids` behind the context, in steps of `chunk`.
  std::vector<float> Hidden(Context& context, absl::Span<const int32_t> ids, size_t chunk,
                            bool asks = false) {
    std::vector<float> hidden;
    for (size_t at = 0; at < ids.size(); at += chunk) {
      const absl::Status status = engine->Step({Turn{&context, ids.subspan(at, chunk), asks}});
      EXPECT_TRUE(status.ok()) << status;
      hidden.insert(hidden.end(), engine->hidden().begin(), engine->hidden().end());
    }
    return hidden;
  }
};

inline bool SameBits(absl::Span<const float> a, absl::Span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

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
