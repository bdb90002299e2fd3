#include "kernels/fingerprint.h"

#include <map>
#include <memory>
#include <string>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/reference/reference_backend.h"

namespace eduba {
namespace {

TEST(Fingerprint, IsTheSameForEveryThreadCountAndRun) {
  const uint64_t one = Fingerprint(*MakeCpuBackend(1)).value();
  const auto backend = MakeCpuBackend(3);
  EXPECT_EQ(Fingerprint(*backend).value(), one);
  EXPECT_EQ(Fingerprint(*backend).value(), one);
}

TEST(Fingerprint, TellsBackendsApartExactlyWhereTheirArithmeticDiffers) {
  std::map<bool, uint64_t> by_fma;
  for (const std::string& target : CpuTargets()) {
    const uint64_t print = Fingerprint(*MakeCpuBackendForTest(1, target)).value();
    const auto [it, fresh] = by_fma.emplace(CpuTargetHasFma(target), print);
    EXPECT_EQ(it->second, print) << target;
  }
  if (by_fma.size() == 2) {
    EXPECT_NE(by_fma[false], by_fma[true]);
  }
  for (const auto& [fma, print] : by_fma) EXPECT_NE(print, Fingerprint(*MakeReferenceBackend()).value());
}

// With and without the chip's dot products.
TEST(Fingerprint, TellsWorkersThatRoundToBf16FromOthers) {
  const uint64_t rounded = Fingerprint(*MakeCpuBackend(1, Activations::kBf16)).value();
  for (const std::string& target : CpuTargets()) {
    EXPECT_NE(Fingerprint(*MakeCpuBackendForTest(1, target)).value(), rounded) << target;
    const auto backend = MakeCpuBackendForTest(1, target, kKeptPartialsBytesMax, Activations::kBf16);
    const uint64_t print = Fingerprint(*backend).value();
    EXPECT_EQ(print == rounded, CpuTargetHasFma(target) == CpuTargetHasFma(CpuTargets().front())) << target;
  }
}

// The numbers of every release so far. Another number says that answers have changed: workers of both builds
// refuse each other, and stored answers are no longer what this build gives.
TEST(Fingerprint, IsWhatItHasAlwaysBeen) {
  for (const std::string& target : CpuTargets()) {
    const bool fma = CpuTargetHasFma(target);
    EXPECT_EQ(Fingerprint(*MakeCpuBackendForTest(1, target)).value(),
              fma ? 0x703ec82626e5451fU : 0x1f99a93f41fba070U)
        << target;
    EXPECT_EQ(
        Fingerprint(*MakeCpuBackendForTest(1, target, kKeptPartialsBytesMax, Activations::kBf16)).value(),
        fma ? 0x1c899412ee9f91feU : 0x3ae517aa699aebf7U)
        << target;
  }
}

}  // namespace
}  // namespace eduba
