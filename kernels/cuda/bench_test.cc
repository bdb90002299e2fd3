#include "kernels/cuda/bench.h"

#include <gtest/gtest.h>

#include <cstdint>

#include "kernels/cuda/emulated_device.h"
#include "kernels/cuda/matrix_rate.h"

namespace eduba {
namespace {

constexpr int64_t kMemory = int64_t{2} << 30;

TEST(CudaAttendBench, MeasuresWhatFitsBesideCopies) {
  if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  BenchOptions options;
  options.bytes = int64_t{8 << 10} * 8 * 256 * 2;  // 8Ki keys.
  options.rounds = 1;
  const auto results = RunCudaAttendBenchOn(
      cuda::MakeEmulatedDevice(kMemory), cuda::MakeEmulatedDevice(kMemory), CudaPrecision::kExact, options);
  ASSERT_TRUE(results.ok()) << results.status();
  ASSERT_EQ(results->size(), 3U);
  for (const AttendResult& r : *results) {
    EXPECT_EQ(r.bytes, options.bytes);
    EXPECT_GT(r.seconds, 0);
    EXPECT_GT(r.stream_gb_per_s, 0);
    EXPECT_GT(r.share, 0);
    EXPECT_GT(r.kernel_seconds, 0);
    EXPECT_LE(r.kernel_seconds, r.seconds);
    EXPECT_GE(r.kernel_share, r.share);
  }
}

TEST(CudaAttendBench, MeasuresTheTensorPathBesideProducts) {
  if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  const auto device = cuda::MakeEmulatedDevice(kMemory);
  const auto rate = cuda::MatrixRate::Make(*device);
  ASSERT_TRUE(rate.ok()) << rate.status();
  EXPECT_EQ((*rate)->name(), "mma.sync");
  EXPECT_GT(*(*rate)->Measure(), 0);
  BenchOptions options;
  options.bytes = int64_t{8 << 10} * 8 * 256 * 2;
  options.rounds = 1;
  const auto results = RunCudaAttendBenchOn(
      cuda::MakeEmulatedDevice(kMemory), cuda::MakeEmulatedDevice(kMemory), CudaPrecision::kTensor, options);
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_EQ(results->front().backend, "cuda:emulated/tensor");
}

TEST(CudaAttendBench, RefusesTooFewBytesAndAnAbsentDevice) {
  BenchOptions options;
  options.bytes = 4096;
  if (cuda::EmulatedDeviceRuns()) {
    EXPECT_EQ(RunCudaAttendBenchOn(cuda::MakeEmulatedDevice(kMemory), cuda::MakeEmulatedDevice(kMemory),
                                   CudaPrecision::kExact, options)
                  .status()
                  .code(),
              absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(RunCudaAttendBench(4711, CudaPrecision::kExact, options).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace eduba
