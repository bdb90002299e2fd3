#include "cli/gpu_findings.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cli/system.h"
#include "kernels/cuda/emulated_device.h"

namespace eduba {
namespace {

using ::testing::ElementsAre;
using ::testing::Field;
using ::testing::HasSubstr;

const absl::Status kTooOld = absl::FailedPreconditionError("the CUDA driver serves CUDA 11.4");

absl::StatusOr<std::unique_ptr<cuda::Device>> None(int /*index*/) { return kTooOld; }

std::vector<std::string> Names(const std::vector<Finding>& findings) {
  std::vector<std::string> names;
  names.reserve(findings.size());
  for (const Finding& finding : findings) names.push_back(finding.name);
  return names;
}

TEST(GpuFindings, AMachineWithoutADriverIsWell) {
  const auto findings = FindingsOfGpus("", absl::FailedPreconditionError("no CUDA driver"), None);
  EXPECT_THAT(Names(findings), ElementsAre("cuda", "nccl", "cublaslt"));
  EXPECT_THAT(findings, Each(Field(&Finding::state, "ok")));
  EXPECT_EQ(findings[0].text, "not used: no CUDA driver");
}

TEST(GpuFindings, ADriverThatServesNoGpuIsSaidSo) {
  const auto findings = FindingsOfGpus("470.82.01", kTooOld, None);
  EXPECT_THAT(Names(findings), ElementsAre("cuda", "nccl", "cublaslt"));
  EXPECT_EQ(findings[0].state, "note");
  EXPECT_EQ(findings[0].text,
            "driver 470.82.01 is loaded, but no GPU can be used: the CUDA driver serves CUDA 11.4");
}

TEST(GpuFindings, EachGpuSaysWhatWouldRunOnIt) {
  if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  cuda::CudaMachine machine{"13.0", "12.9", {{"A100", 8, 0, 1}, {"H200", 9, 0, 1}, {"V100", 7, 0, 1}}};
  const auto findings =
      FindingsOfGpus("580.1", machine, [](int index) -> absl::StatusOr<std::unique_ptr<cuda::Device>> {
        if (index == 2) return absl::FailedPreconditionError("too old");
        return cuda::MakeEmulatedDevice(1 << 20, /*has_warpgroups=*/index == 1);
      });
  EXPECT_THAT(Names(findings), ElementsAre("cuda", "cuda:0", "cuda:1", "cuda:2", "nccl", "cublaslt"));
  EXPECT_EQ(findings[0].text, "driver 580.1 serves CUDA 13.0, this program was built with 12.9");
  EXPECT_EQ(
      findings[1].text,
      "A100, sm_80, 1 B; --device cuda:0 would run exact kernels there; with --precision tensor: mma.sync");
  EXPECT_THAT(findings[2].text, HasSubstr("--precision tensor: wgmma (sm_90a)"));
  EXPECT_EQ(findings[3].state, "note");
  EXPECT_EQ(findings[3].text, "V100, sm_70, 1 B; too old");
}

TEST(NvidiaDriver, ReleaseIsReadFromWhatTheKernelSays) {
  EXPECT_EQ(NvidiaDriverRelease(
                "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC\n"
                "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"),
            "535.104.05");
  EXPECT_EQ(
      NvidiaDriverRelease("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65  Release Build\n"),
      "580.65");
  EXPECT_EQ(NvidiaDriverRelease(""), "");
  EXPECT_EQ(NvidiaDriverRelease("something else"), "of unknown release");
}

}  // namespace
}  // namespace eduba
