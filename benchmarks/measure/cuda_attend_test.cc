#include "benchmarks/measure/cuda_attend.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <thread>

#include "base/dtype.h"
#include "benchmarks/measure/cuda_matrix_rate.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/emulated_device.h"

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
    // The number that options.threads asks for.
    EXPECT_EQ(r.threads, static_cast<int>(std::thread::hardware_concurrency()));
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

TEST(MatrixRate, MultipliesNormalNumbersInRowsThatDiffer) {
  if (!cuda::EmulatedDeviceRuns()) GTEST_SKIP() << "SKIPPED, NOT TESTED: the emulation needs FMA";
  constexpr int64_t kRow = 8192;
  constexpr int64_t kCount = 400 * kRow;
  const auto device = cuda::MakeEmulatedDevice(kMemory);
  ASSERT_TRUE(device->Attach().ok());
  const auto stream = device->CreateStream();
  ASSERT_TRUE(stream.ok()) << stream.status();
  cuda::Memory memory(*device, cuda::Memory::Kind::kDevice);
  ASSERT_TRUE(memory.ReserveExactly(kCount * 2 + 2).ok());
  std::memset(memory.data(), 0, kCount * 2 + 2);
  ASSERT_TRUE(cuda::FillNormalBf16(*device, *stream, memory.data(), kCount * 2).ok());
  const auto* const numbers =
      reinterpret_cast<const uint16_t*>(memory.data());  // The emulation's is a host's.
  double sum = 0;
  double squares = 0;
  for (int64_t i = 0; i < kCount; ++i) {
    const double x = F32FromBf16(numbers[i]);
    sum += x;
    squares += x * x;
  }
  EXPECT_NEAR(sum / kCount, 0, 0.01);
  EXPECT_NEAR(squares / kCount, 1, 0.01);
  for (int64_t row = 1; row * kRow < kCount; ++row) {
    EXPECT_NE(std::memcmp(numbers, numbers + row * kRow, kRow * 2), 0) << row;
  }
  EXPECT_EQ(numbers[kCount], 0);
  device->DestroyStream(*stream);
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
