// What a sequence-parallel prefill allocates beside its pages is what it has reserved.
#include <gtest/gtest.h>
#include <malloc.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "model/testing/engine_fixture.h"

namespace eduba {
namespace {

// This thread's bytes from operator new that are in use, and the most since it was set.
thread_local int64_t in_use = 0;
thread_local int64_t most_in_use = 0;

void* Allocate(size_t bytes) {
  void* const memory = std::malloc(std::max<size_t>(bytes, 1));
  if (memory == nullptr) std::abort();
  in_use += static_cast<int64_t>(malloc_usable_size(memory));
  most_in_use = std::max(most_in_use, in_use);
  return memory;
}
void Free(void* memory) {
  if (memory != nullptr) in_use -= static_cast<int64_t>(malloc_usable_size(memory));
  std::free(memory);
}

}  // namespace
}  // namespace eduba

void* operator new(size_t bytes) { return eduba::Allocate(bytes); }
void* operator new[](size_t bytes) { return eduba::Allocate(bytes); }
void operator delete(void* memory) noexcept { eduba::Free(memory); }
void operator delete[](void* memory) noexcept { eduba::Free(memory); }
void operator delete(void* memory, size_t /*bytes*/) noexcept { eduba::Free(memory); }
void operator delete[](void* memory, size_t /*bytes*/) noexcept { eduba::Free(memory); }

namespace eduba {
namespace {

using testing::Fixture;
using testing::RandomModel;
using testing::RunGroup;
using testing::Session;

struct Case {
  int64_t window;  // The window of the model's layers; 0: none.
  ContextOptions options;
  bool log_probs;
  bool pools;
  int ranks = 3;
};

TEST(SequenceParallelPrefillMemory, IsWhatItReserves) {
  ContextOptions rolling;
  rolling.policy = ContextPolicy::kStreaming;
  rolling.positions = PositionMode::kRolling;
  rolling.window = 3000;
  ContextOptions sinkless;
  sinkless.sink_tokens = 0;
  const Case cases[] = {{0, {}, false, false},
                        {2000, {}, false, false},
                        {0, rolling, false, false},
                        {0, {}, true, false},
                        {700, {}, false, true},
                        // More rows in a round than in a chunk, and all of them on the maximum path.
                        {0, sinkless, false, false, 5}};
  for (const Case& c : cases) {
    SCOPED_TRACE(absl::StrCat("window ", c.window, " ", testing::ToString(c.options), " log_probs ",
                              c.log_probs, " pools ", c.pools, " ranks ", c.ranks));
    ModelConfig config = RandomModel::RandomConfig(5);
    config.hidden_size = 64;
    config.query_heads = 4;
    config.kv_heads = 2;
    config.head_dim = 32;
    config.layers.resize(2, config.layers[0]);
    for (LayerConfig& layer : config.layers) layer.window = c.window;
    RunGroup(c.ranks, [&](int rank, Communicator* communicator) {
      Fixture f(RandomModel(config, DType::kF32, 5), {.group = communicator, .stripe_pages = 12});
      const std::vector<int32_t> ids = f.Text(c.ranks * 12 * kPageRows);
      const Session session = f.Open(c.options);
      // The first chunk makes the workspace of a step, which is not the prefill's.
      f.Hidden(session, absl::MakeConstSpan(ids).first(100), 100);
      const ModelEngine& engine = f.jobs->engine();
      Context& context = session.context();
      std::optional<Pooler> pooler;
      if (c.pools) {
        std::vector<PositionRange> ranges;
        for (int64_t i = 100; i + 1 < static_cast<int64_t>(ids.size()); i += 4) ranges.push_back({i, i + 4});
        pooler = Pooler::Create(ranges, Pool::kMean, f.model->hidden_exponents()).value();
      }
      const int64_t before = in_use;
      most_in_use = in_use;
      const auto prefill = engine.StartPrefill(context, absl::MakeConstSpan(ids).subspan(100), false,
                                               c.log_probs, pooler ? &*pooler : nullptr, *communicator);
      ASSERT_TRUE(prefill != nullptr && prefill->Reserve().ok());
      while (!prefill->done()) ASSERT_TRUE(prefill->Run(1, absl::Now() + absl::Seconds(60)).ok());
      ASSERT_TRUE(prefill->status().ok());
      const int64_t most = most_in_use - before;
      // What a step of a chunk takes while it runs, at this length.
      engine.FinishPrefill(*prefill, context, nullptr);
      const int64_t idle = in_use;
      most_in_use = in_use;
      const BatchEntry chunk_entry{&context, absl::MakeConstSpan(ids).first(100), false};
      ASSERT_TRUE(engine.Prepare(chunk_entry).ok());
      ASSERT_TRUE(f.jobs->engine().Step({chunk_entry}, *communicator, absl::Now() + absl::Seconds(60)).ok());
      const int64_t chunk = most_in_use - idle;
      EXPECT_LE(most, prefill->buffer_bytes() + chunk + (int64_t{64} << 10)) << "rank " << rank;
      EXPECT_GE(most, prefill->buffer_bytes() / 2) << "rank " << rank;
      EXPECT_GT(prefill->buffer_bytes(), 3 * chunk) << "rank " << rank;
    });
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace eduba
