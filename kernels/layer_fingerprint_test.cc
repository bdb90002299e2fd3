#include "kernels/layer_fingerprint.h"

#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "kernels/reference/reference_layer_kernels.h"

namespace eduba {
namespace {

TEST(LayerFingerprint, IsTheSameForEveryThreadCountAndRun) {
  const uint64_t one = LayerFingerprint(*MakeCpuLayerKernels(1)).value();
  const auto kernels = MakeCpuLayerKernels(3);
  EXPECT_EQ(LayerFingerprint(*kernels).value(), one);
  EXPECT_EQ(LayerFingerprint(*kernels).value(), one);
}

TEST(LayerFingerprint, TellsKernelsApartExactlyWhereTheirArithmeticDiffers) {
  std::map<bool, uint64_t> by_fma;
  for (const std::string& target : CpuTargets()) {
    const uint64_t print = LayerFingerprint(*MakeCpuLayerKernelsForTest(1, target)).value();
    const auto [it, fresh] = by_fma.emplace(CpuTargetHasFma(target), print);
    EXPECT_EQ(it->second, print) << target;
  }
  const uint64_t rounded = LayerFingerprint(*MakeCpuLayerKernels(1, Activations::kBf16)).value();
  if (CpuTargetHasFma(CpuTargets().front())) {  // With the chip's dot products or without.
    const auto kernels = MakeCpuLayerKernelsForTest(1, CpuTargets().front(), Activations::kBf16);
    EXPECT_EQ(LayerFingerprint(*kernels).value(), rounded);
  }
  for (const auto& [fma, print] : by_fma) {
    EXPECT_NE(print, rounded);
    EXPECT_NE(print, LayerFingerprint(*MakeReferenceLayerKernels()).value());
    EXPECT_NE(print, by_fma[!fma]);
  }
}

class Forwarding : public LayerKernels {
 public:
  std::string name() const override { return good_->name(); }
  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(absl::Span<const MatrixView> parts) override {
    return good_->Pack(parts);
  }
  void Multiply(const MatmulArgs& args) override { good_->Multiply(args); }
  void Normalise(const NormArgs& args) override { good_->Normalise(args); }
  void Rotate(const RopeArgs& args) override { good_->Rotate(args); }
  void Activate(const ActivationArgs& args) override { good_->Activate(args); }
  void Softcap(const SoftcapArgs& args) override { good_->Softcap(args); }

 private:
  std::unique_ptr<LayerKernels> good_ = MakeCpuLayerKernels(1);
};

// Kernels whose products round large batches differently, as matrix libraries may.
class BatchSensitive final : public Forwarding {
 public:
  void Multiply(const MatmulArgs& args) override {
    Forwarding::Multiply(args);
    if (args.rows > 16) args.y[11 * args.weights->outputs()] += 1e-6F;
  }
};

class OfLibrary final : public Forwarding {
 public:
  explicit OfLibrary(std::string name) : name_(std::move(name)) {}
  std::string library() const override { return name_; }

 private:
  const std::string name_;
};

// Its choices for other shapes are not seen.
TEST(LayerFingerprint, TellsLibrariesApart) {
  std::set<uint64_t> prints = {LayerFingerprint(*MakeCpuLayerKernels(1)).value()};
  for (const char* name : {"", "one 1.0", "one 1.1"}) {
    OfLibrary kernels(name);
    prints.insert(LayerFingerprint(kernels).value());
  }
  EXPECT_EQ(prints.size(), 3U);
}

TEST(LayerFingerprint, RefusesKernelsWhoseRowsDependOnTheirBatch) {
  BatchSensitive kernels;
  const auto print = LayerFingerprint(kernels);
  EXPECT_EQ(print.status().code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(print.status().message()), testing::HasSubstr("row 11"));
}

// These are held as those of attention are (fingerprint_test.cc).
TEST(LayerFingerprint, IsWhatItHasAlwaysBeen) {
  for (const std::string& target : CpuTargets()) {
    const bool fma = CpuTargetHasFma(target);
    EXPECT_EQ(LayerFingerprint(*MakeCpuLayerKernelsForTest(1, target)).value(),
              fma ? 0x87aa3592114d66eeU : 0x0bd708272822b38aU)
        << target;
    EXPECT_EQ(LayerFingerprint(*MakeCpuLayerKernelsForTest(1, target, Activations::kBf16)).value(),
              fma ? 0xd7975a9651538a45U : 0xb97bac16c49c9e44U)
        << target;
  }
}

}  // namespace
}  // namespace eduba
