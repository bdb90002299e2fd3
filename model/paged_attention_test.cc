#include "model/paged_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "collective/local/local_communicator.h"
#include "collective/testing/counting_communicator.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "kernels/testing/forwarding_backend.h"
#include "model/testing/random_model.h"

namespace eduba {
namespace {

using testing::RandomModel;

// Remembers what each row's step was told besides the row itself.
class SpyBackend final : public testing::ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;

  absl::StatusOr<std::unique_ptr<AttentionStep>> StartStep(const StepArgs& args) override {
    for (const PositionRange& range : args.visible) {
      told[range.end] = {args.positions, {args.exponents.begin(), args.exponents.end()}};
      ++rows;
    }
    ++steps;
    return ForwardingBackend::StartStep(args);
  }

  // By the position after the row's.
  std::map<int64_t, std::pair<int64_t, std::vector<int16_t>>> told;
  int64_t rows = 0;
  int64_t steps = 0;
};

// A random model of one layer, whose window is given.
struct OneLayer {
  explicit OneLayer(int64_t window) : random(Config(window), DType::kF32, 3) {}

  static ModelConfig Config(int64_t window) {
    ModelConfig config = RandomModel::RandomConfig(3);
    config.layers.resize(1);
    config.layers[0].window = window;
    return config;
  }

  const RandomModel random;
  const std::unique_ptr<LayerKernels> kernels = MakeCpuLayerKernels(1);
  const std::unique_ptr<Transformer> model =
      Transformer::Create(random.config, random.weights, kernels.get()).value();
  const int head_dim = random.config.head_dim;
  const AttentionShape shape = {
      random.config.query_heads, random.config.kv_heads, head_dim, head_dim, DType::kF32, DType::kF32, 1, 0};
};

// Too little to show in fp32 on a small problem, and yet part of the promise: units come from the row's own
// position and from the weights.
TEST(PagedAttention, UnitsDependOnARowsPositionAlone) {
  const OneLayer f(3);
  const std::vector<LayerView> views = {{Policy::kWindow, 0, 3}};
  const int64_t begin = (1 << 16) - 300;
  const int64_t end = (1 << 16) + 300;

  const auto told = [&](int64_t chunk) {
    SpyBackend backend(MakeCpuBackend(1));
    PageStore store(&backend, int64_t{1} << 24);
    KvPages pages(&backend, &store, f.shape, Placement::OfRanks(1), 0, {LayerPages()});
    EXPECT_TRUE(pages.Reserve(begin / kPageRows * kPageRows, end).ok());
    const std::vector<float> numbers((end - begin) * f.shape.query_heads * f.head_dim, 0.5F);
    std::vector<float> outputs(numbers.size());
    for (int64_t at = begin; at < end; at += chunk) {
      const int64_t rows = std::min(chunk, end - at);
      const ContextRows context{&pages, at, rows, views};
      PagedAttention attention(&backend, f.model.get(), absl::MakeConstSpan(&context, 1), nullptr,
                               absl::InfiniteFuture());
      const absl::Status status = attention.Attend(
          {0, rows, numbers.data(), numbers.data(), numbers.data(), numbers.data()}, outputs.data());
      EXPECT_TRUE(status.ok()) << status;
    }
    EXPECT_EQ(backend.rows, end - begin);
    return backend.told;
  };
  const auto whole = told(end - begin);
  EXPECT_EQ(whole.size(), static_cast<size_t>(end - begin));
  EXPECT_EQ(told(1), whole);
  EXPECT_EQ(told(77), whole);
  EXPECT_EQ(told(512), whole);
  for (const auto& [position, units] : whole) EXPECT_GE(units.first, position);
}

TEST(PagedAttention, RowsThatAreCutAtAPowerOfTwoShareTheirCollectives) {
  const OneLayer f(0);
  LocalHub hub;
  const auto communicator = hub.Join(1, 1, 0, 1, absl::Now() + absl::Seconds(60)).value();
  testing::CountingCommunicator counting(communicator.get());
  SpyBackend backend(MakeCpuBackend(1));
  PageStore store(&backend, int64_t{1} << 24);
  const int64_t begin = (1 << 16) - 3;
  const int64_t rows = 8;
  KvPages pages(&backend, &store, f.shape, Placement::OfRanks(1), 0, {LayerPages()});
  ASSERT_TRUE(pages.Reserve(begin / kPageRows * kPageRows, begin + rows).ok());
  const std::vector<LayerView> views = {{Policy::kGlobal, 0, 0}};
  const ContextRows context{&pages, begin, rows, views};
  const std::vector<float> numbers(rows * f.shape.query_heads * f.head_dim, 0.5F);
  std::vector<float> outputs(numbers.size());
  PagedAttention attention(&backend, f.model.get(), absl::MakeConstSpan(&context, 1), &counting,
                           absl::Now() + absl::Seconds(60));
  ASSERT_TRUE(
      attention
          .Attend({0, rows, numbers.data(), numbers.data(), numbers.data(), numbers.data()}, outputs.data())
          .ok());
  EXPECT_EQ(backend.steps, 2);
  EXPECT_EQ(counting.TakeReductions(), 2);  // Without sinks: maxima, sums.
}

}  // namespace
}  // namespace eduba
