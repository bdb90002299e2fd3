// A model whose layers are computed on a GPU: played on the host over a fake cuBLASLt, and on a GPU where
// there is one. Attention is a CPU's.

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/cuda_layer_kernels.h"
#include "kernels/cuda/emulated_device.h"
#include "kernels/cuda/fake_cublaslt.h"
#include "model/testing/engine_fixture.h"

namespace eduba {
namespace {

using testing::Fixture;
using testing::RandomModel;
using testing::RandomOptions;
using testing::RunGroup;
using testing::SameBits;
using testing::ToString;

constexpr int64_t kStoreBytes = int64_t{256} << 20;
constexpr int64_t kDeviceBytes = int64_t{1} << 30;

std::unique_ptr<LayerKernels> Played(std::shared_ptr<cuda::Device> device,
                                     Activations activations = Activations::kF32) {
  return *MakeCudaLayerKernelsWith(std::move(device), cuda::FakeCublasLtApi(), activations);
}

absl::StatusOr<std::unique_ptr<LayerKernels>> Real() {
  auto device = cuda::OpenCudaDevice(0);
  if (!device.ok()) return device.status();
  return MakeCudaLayerKernels(*std::move(device), Activations::kF32);
}

class GpuLayers : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (GetParam() == "cuda") {
      const absl::Status missing = Real().status();
      if (!missing.ok()) GTEST_SKIP() << "SKIPPED, NOT TESTED: cuda: " << missing;
    } else if (!cuda::EmulatedDeviceRuns()) {
      GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
    }
  }
  static std::unique_ptr<LayerKernels> Make() {
    return GetParam() == "cuda" ? *Real() : Played(cuda::MakeEmulatedDevice(kDeviceBytes));
  }
  static Fixture OnGpu(uint64_t seed, Communicator* communicator = nullptr) {
    return {RandomModel(seed), DType::kF32, 1, kStoreBytes, communicator, 1, Make()};
  }
};
INSTANTIATE_TEST_SUITE_P(All, GpuLayers, ::testing::Values("emulated", "cuda"),
                         [](const auto& info) { return info.param; });

// The largest difference, relative to the largest number.
double Error(absl::Span<const float> got, absl::Span<const float> wanted) {
  EXPECT_EQ(got.size(), wanted.size());
  double error = 0;
  double size = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    error = std::max(error, std::abs(static_cast<double>(got[i]) - wanted[i]));
    size = std::max(size, std::abs(static_cast<double>(wanted[i])));
  }
  return std::isfinite(error) ? error / size : 1e30;
}

TEST_P(GpuLayers, StatesAndLogitsAreNearACpus) {
  for (uint64_t seed = 1; seed <= 24; ++seed) {
    Fixture cpu(seed);
    Fixture gpu = OnGpu(seed);
    const ContextOptions options = RandomOptions(seed);
    SCOPED_TRACE(absl::StrCat(gpu.random.ToString(), " ", ToString(options)));
    const std::vector<int32_t> ids = cpu.Text(120, seed);
    Context a = cpu.Open(options);
    Context b = gpu.Open(options);
    const std::vector<float> wanted = cpu.Hidden(a, ids, 50, /*asks=*/true);
    const std::vector<float> got = gpu.Hidden(b, ids, 50, /*asks=*/true);
    EXPECT_LE(Error(got, wanted), 1e-4);
    const auto wanted_logits = cpu.engine->NextLogits(a);
    const auto logits = gpu.engine->NextLogits(b);
    ASSERT_TRUE(wanted_logits.ok() && logits.ok()) << logits.status();
    EXPECT_LE(Error(*logits, *wanted_logits), 1e-4);
    if (HasFailure()) return;
  }
}

TEST_P(GpuLayers, AnyChunkingGivesTheSameBits) {
  for (uint64_t seed = 100; seed < 104; ++seed) {
    Fixture f = OnGpu(seed);
    const ContextOptions options = RandomOptions(seed);
    SCOPED_TRACE(absl::StrCat(f.random.ToString(), " ", ToString(options)));
    const std::vector<int32_t> ids = f.Text(70, seed);
    Context whole = f.Open(options);
    const std::vector<float> wanted = f.Hidden(whole, ids, ids.size());
    for (const size_t chunk : {size_t{1}, size_t{3}, size_t{43}}) {
      Context context = f.Open(options);
      ASSERT_TRUE(SameBits(f.Hidden(context, ids, chunk), wanted)) << "chunks of " << chunk;
    }
    // More rows than memory was taken for.
    Context beside = f.Open(options);
    Context again = f.Open(options);
    const std::vector<int32_t> many = f.Text(Transformer::kReservedRows + 9, seed + 1);
    ASSERT_TRUE(f.engine->Step({Turn{&beside, many, false}, Turn{&again, ids, false}}).ok());
    ASSERT_TRUE(SameBits(f.engine->hidden().subspan(many.size() * f.random.config.hidden_size), wanted));
  }
}

TEST_P(GpuLayers, WavesOfSeveralWorkersGiveTheBitsOfOne) {
  for (uint64_t seed = 200; seed < 203; ++seed) {
    const ContextOptions options = RandomOptions(seed);
    Fixture one = OnGpu(seed);
    const std::vector<int32_t> ids = one.Text(700, seed);
    ContextAppendOptions append;
    append.log_probs = true;
    Context context = one.Open(options);
    ASSERT_TRUE(one.engine->Append(context, absl::MakeConstSpan(ids).first(1)).ok());
    const auto wanted = one.engine->Append(context, absl::MakeConstSpan(ids).subspan(1), append);
    ASSERT_TRUE(wanted.ok()) << wanted.status();
    RunGroup(2, [&](int rank, Communicator* communicator) {
      Fixture f = OnGpu(seed, communicator);
      SCOPED_TRACE(absl::StrCat(f.random.ToString(), " ", ToString(options), " rank ", rank));
      Context mine = f.Open(options);
      ASSERT_TRUE(f.engine->Append(mine, absl::MakeConstSpan(ids).first(1)).ok());
      const auto got = f.engine->Append(mine, absl::MakeConstSpan(ids).subspan(1), append);
      ASSERT_TRUE(got.ok()) << got.status();
      EXPECT_TRUE(SameBits(*got, *wanted));
      EXPECT_TRUE(SameBits(mine.last(), context.last()));
    });
  }
}

// Kernels that count how often a host waits for them.
class Waits final : public LayerKernels {
 public:
  Waits(std::unique_ptr<LayerKernels> kernels, int* count) : kernels_(std::move(kernels)), count_(count) {}

  std::string name() const override { return kernels_->name(); }
  absl::StatusOr<std::unique_ptr<LayerMemory>> Allocate(int64_t bytes, bool is_shared) override {
    return kernels_->Allocate(bytes, is_shared);
  }
  void Send(const LayerMemory& memory, int64_t offset, int64_t bytes) override {
    kernels_->Send(memory, offset, bytes);
  }
  void Fetch(const LayerMemory& memory, int64_t offset, int64_t bytes) override {
    kernels_->Fetch(memory, offset, bytes);
  }
  absl::Status Wait() override {
    ++*count_;
    return kernels_->Wait();
  }
  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(absl::Span<const MatrixView> parts) override {
    return kernels_->Pack(parts);
  }
  void Multiply(const MatmulArgs& args) override { kernels_->Multiply(args); }
  void Normalise(const NormArgs& args) override { kernels_->Normalise(args); }
  void Rotate(const RopeArgs& args) override { kernels_->Rotate(args); }
  void Activate(const ActivationArgs& args) override { kernels_->Activate(args); }
  void Softcap(const SoftcapArgs& args) override { kernels_->Softcap(args); }
  void Add(const AddArgs& args) override { kernels_->Add(args); }
  void FlagNonFinite(const NonFiniteArgs& args) override { kernels_->FlagNonFinite(args); }

 private:
  const std::unique_ptr<LayerKernels> kernels_;
  int* const count_;
};

TEST_P(GpuLayers, AStepWaitsOnceALayer) {
  int count = 0;
  Fixture f(RandomModel(1), DType::kF32, 1, kStoreBytes, nullptr, 1, std::make_unique<Waits>(Make(), &count));
  Context context = f.Open();
  for (const int64_t rows : {1, 90}) {
    count = 0;
    ASSERT_TRUE(f.engine->Step({Turn{&context, f.Text(rows), true}}).ok());
    EXPECT_EQ(count, static_cast<int>(f.random.config.layers.size()) + 1);
  }
}

class BrokenGpuLayers : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  }
};

TEST_F(BrokenGpuLayers, ADeviceThatFailsEndsTheStep) {
  for (const int calls : {0, 1, 5, 20, 40}) {
    std::shared_ptr<cuda::Device> device = cuda::MakeEmulatedDevice(kDeviceBytes);
    Fixture f(RandomModel(2), DType::kF32, 1, kStoreBytes, nullptr, 1, Played(device));
    Context context = f.Open();
    const std::vector<int32_t> ids = f.Text(5);
    ASSERT_TRUE(f.engine->Step({Turn{&context, ids, true}}).ok());
    cuda::BreakEmulatedDevice(*device, calls);
    const absl::Status status = f.engine->Step({Turn{&context, ids, true}});
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << calls << ": " << status;
    EXPECT_EQ(context.length(), 5);
    EXPECT_EQ(f.engine->NextLogits(context).status().code(), absl::StatusCode::kUnavailable);
  }
}

// A launch may find no memory: that step ends, and the next is computed.
TEST_F(BrokenGpuLayers, ACallWithoutMemoryEndsItsStepAlone) {
  std::shared_ptr<cuda::Device> device = cuda::MakeEmulatedDevice(kDeviceBytes);
  Fixture f(RandomModel(2), DType::kF32, 1, kStoreBytes, nullptr, 1, Played(device));
  const std::vector<int32_t> ids = f.Text(5);
  Context whole = f.Open();
  ASSERT_TRUE(f.engine->Step({Turn{&whole, ids, true}}).ok());
  for (const int calls : {0, 1, 5, 20, 40}) {
    SCOPED_TRACE(calls);
    Context context = f.Open();
    cuda::ExhaustEmulatedDevice(*device, calls);
    const absl::Status status = f.engine->Step({Turn{&context, ids, true}});
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    EXPECT_EQ(device->health(), absl::OkStatus());
    EXPECT_EQ(context.length(), 0);
    const absl::Status again = f.engine->Step({Turn{&context, ids, true}});
    ASSERT_EQ(again, absl::OkStatus());
    EXPECT_TRUE(SameBits(context.last(), whole.last()));
  }
}

TEST_F(BrokenGpuLayers, WhatDoesNotFitIsSaidAtTheStart) {
  const RandomModel random(3);
  int64_t refused = 0;
  absl::Status status;
  for (int64_t bytes = 50'000; bytes < kDeviceBytes; bytes += bytes / 4) {
    const auto kernels = Played(cuda::MakeEmulatedDevice(bytes));
    status = Transformer::Create(random.config, random.weights, kernels.get()).status();
    if (status.ok()) break;
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    ++refused;
  }
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_GT(refused, 5);
}

}  // namespace
}  // namespace eduba
