// A model whose layers are computed on a GPU: emulated on the host over a fake cuBLASLt, and on a GPU where
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
using testing::FixtureOptions;
using testing::RandomModel;
using testing::RandomOptions;
using testing::RunGroup;
using testing::Session;
using testing::ToString;

constexpr int64_t kDeviceBytes = int64_t{1} << 30;

std::unique_ptr<LayerKernels> OverEmulation(std::shared_ptr<cuda::Device> device,
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
    return GetParam() == "cuda" ? *Real() : OverEmulation(cuda::MakeEmulatedDevice(kDeviceBytes));
  }
  static Fixture OnGpu(uint64_t seed, const FixtureOptions& options = {}) {
    return Fixture(RandomModel(seed), options, Make());
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
    const Session a = cpu.Open(options);
    const Session b = gpu.Open(options);
    // Some rows that are appended, and some that are asked.
    const auto states = [&](Fixture& f, const Session& session) {
      std::vector<float> hidden = f.Hidden(session, absl::MakeConstSpan(ids).first(70), 50);
      const std::vector<float> asked = f.Score(session, absl::MakeConstSpan(ids).subspan(70)).hidden;
      hidden.insert(hidden.end(), asked.begin(), asked.end());
      return hidden;
    };
    const std::vector<float> wanted = states(cpu, a);
    EXPECT_LE(Error(states(gpu, b), wanted), 1e-4);
    const auto wanted_logits = cpu.NextLogits(a);
    const auto logits = gpu.NextLogits(b);
    ASSERT_TRUE(wanted_logits.ok() && logits.ok()) << logits.status();
    EXPECT_LE(Error(*logits, *wanted_logits), 1e-4);
    if (HasFailure()) return;
  }
}

TEST_P(GpuLayers, AnyChunkingGivesTheSameBits) {
  for (uint64_t seed = 100; seed < 104; ++seed) {
    FixtureOptions how;
    how.stripe_pages = 64;
    how.chunk_rows = 1000;  // What is appended at once is one step.
    Fixture f = OnGpu(seed, how);
    const ContextOptions options = RandomOptions(seed);
    SCOPED_TRACE(absl::StrCat(f.random.ToString(), " ", ToString(options)));
    const std::vector<int32_t> ids = f.Text(70, seed);
    const Session whole = f.Open(options);
    const std::vector<float> wanted = f.Hidden(whole, ids, ids.size());
    for (const size_t chunk : {size_t{1}, size_t{3}, size_t{43}}) {
      const Session session = f.Open(options);
      ASSERT_TRUE(SameBits(f.Hidden(session, ids, chunk), wanted)) << "chunks of " << chunk;
    }
    // More rows in a step than memory was taken for.
    const std::vector<int32_t> many = f.Text(Transformer::kReservedRows + 9, seed + 1);
    const Session large = f.Open(options);
    const Session small = f.Open(options);
    const std::vector<float> at_once = f.Hidden(large, many, many.size());
    ASSERT_TRUE(SameBits(f.Hidden(small, many, 100), at_once));
  }
}

TEST_P(GpuLayers, PrefillsOfSeveralWorkersGiveTheBitsOfOne) {
  for (uint64_t seed = 200; seed < 203; ++seed) {
    const ContextOptions options = RandomOptions(seed);
    Fixture one = OnGpu(seed);
    const std::vector<int32_t> ids = one.Text(700, seed);
    const auto run = [&](Fixture& f, const Session& session) {
      f.Append(session, absl::MakeConstSpan(ids).first(1));
      const uint64_t digest = f.Score(session, absl::MakeConstSpan(ids).subspan(1)).result.digest;
      f.Append(session, absl::MakeConstSpan(ids).subspan(1));
      return digest;
    };
    const Session session = one.Open(options);
    const uint64_t wanted = run(one, session);
    RunGroup(2, [&](int rank, Communicator* communicator) {
      FixtureOptions how;
      how.group = communicator;
      Fixture f = OnGpu(seed, how);
      SCOPED_TRACE(absl::StrCat(f.random.ToString(), " ", ToString(options), " rank ", rank));
      const Session mine = f.Open(options);
      EXPECT_EQ(run(f, mine), wanted);
      EXPECT_TRUE(SameBits(mine.last(), session.last()));
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
  Fixture f(RandomModel(1), {}, std::make_unique<Waits>(Make(), &count));
  const Session session = f.Open();
  for (const int64_t rows : {1, 90}) {
    count = 0;
    f.Append(session, f.Text(rows));
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
    Fixture f(RandomModel(2), {}, OverEmulation(device));
    const Session session = f.Open();
    const std::vector<int32_t> ids = f.Text(5);
    f.Append(session, ids);
    cuda::BreakEmulatedDevice(*device, calls);
    const absl::Status status = f.jobs->Append(session, ids).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << calls << ": " << status;
    EXPECT_EQ(session.length(), 5);
    EXPECT_EQ(f.NextLogits(session).status().code(), absl::StatusCode::kUnavailable);
  }
}

// A launch may find no memory: that ends the group, whose other ranks have computed the step, but neither the
// device nor the session.
TEST_F(BrokenGpuLayers, ACallWithoutMemoryEndsItsGroupAndTheSessionGoesOn) {
  std::shared_ptr<cuda::Device> device = cuda::MakeEmulatedDevice(kDeviceBytes);
  const std::vector<int32_t> ids = {1, 2, 3, 4, 5};
  Fixture f(RandomModel(2), {}, OverEmulation(device));
  const Session whole = f.Open();
  f.Append(whole, ids);
  for (const int calls : {0, 1, 5, 20, 40}) {
    SCOPED_TRACE(calls);
    const Session session = f.Open();
    cuda::ExhaustEmulatedDevice(*device, calls);
    const absl::Status status = f.jobs->Append(session, ids).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    EXPECT_EQ(device->health(), absl::OkStatus());
    EXPECT_EQ(session.length(), 0);
    f.jobs->JoinGroupOfOne();
    f.Append(session, ids);
    EXPECT_TRUE(SameBits(session.last(), whole.last()));
  }
}

TEST_F(BrokenGpuLayers, WhatDoesNotFitIsSaidAtTheStart) {
  const RandomModel random(3);
  int64_t refused = 0;
  absl::Status status;
  for (int64_t bytes = 50'000; bytes < kDeviceBytes; bytes += bytes / 4) {
    const auto kernels = OverEmulation(cuda::MakeEmulatedDevice(bytes));
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
