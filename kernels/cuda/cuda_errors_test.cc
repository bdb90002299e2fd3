#include "kernels/cuda/cuda_errors.h"

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace eduba::cuda {
namespace {

std::string Text(const absl::Status& status) {
  return absl::StrCat(absl::StatusCodeToString(status.code()), ": ", status.message());
}

// A driver and a program of the same version, and two devices.
CudaStart Works() { return {13000, 13000, kCudaSuccess, "no error", 2}; }

TEST(CudaErrors, DevicesThatWorkAreCounted) { EXPECT_EQ(*CountDevices(Works()), 2); }

TEST(CudaErrors, ANewerDriverThanTheProgramWorks) {
  CudaStart start = Works();
  start.driver = 13020;
  EXPECT_EQ(*CountDevices(start), 2);
}

// CUDA calls a driver that is not there an old one.
TEST(CudaErrors, NoDriver) {
  CudaStart start = Works();
  start.driver = 0;
  start.count = 0;
  for (const int error : {kCudaInsufficientDriver, kCudaNoDevice, kCudaSuccess}) {
    start.error = error;
    EXPECT_EQ(Text(CountDevices(start).status()),
              "FAILED_PRECONDITION: no CUDA driver on this machine (libcuda.so.1 was not found); install "
              "NVIDIA's, or use --device cpu");
  }
}

TEST(CudaErrors, ADriverOlderThanTheProgram) {
  EXPECT_EQ(
      Text(CountDevices({12040, 13000, kCudaInsufficientDriver, "CUDA driver version is insufficient", 0})
               .status()),
      "FAILED_PRECONDITION: the CUDA driver serves CUDA 12.4, this program was built with 13.0; update "
      "the driver, or use --device cpu");
}

TEST(CudaErrors, ADriverThatDoesNotStart) {
  EXPECT_EQ(Text(CountDevices({13000, 13000, 802, "system not yet initialized", 0}).status()),
            "FAILED_PRECONDITION: CUDA does not start: system not yet initialized; see whether nvidia-smi "
            "works, or use --device cpu");
}

TEST(CudaErrors, NoDeviceOrHiddenOnes) {
  for (const int error : {kCudaNoDevice, kCudaSuccess}) {
    EXPECT_EQ(
        Text(CountDevices({13000, 13000, error, "no CUDA-capable device is detected", 0}).status()),
        "FAILED_PRECONDITION: the CUDA driver shows no device (CUDA_VISIBLE_DEVICES may hide them); use "
        "--device cpu");
  }
}

TEST(CudaErrors, ADeviceThatIsNotThere) {
  EXPECT_EQ(CheckIndex(0, 1), absl::OkStatus());
  EXPECT_EQ(CheckIndex(3, 4), absl::OkStatus());
  EXPECT_EQ(Text(CheckIndex(1, 1)),
            "FAILED_PRECONDITION: there is no cuda:1; this machine has cuda:0, see 'eduba doctor'");
  EXPECT_EQ(
      Text(CheckIndex(-1, 4)),
      "FAILED_PRECONDITION: there is no cuda:-1; this machine has cuda:0 to cuda:3, see 'eduba doctor'");
}

TEST(CudaErrors, ADeviceThatIsTooOld) {
  EXPECT_EQ(CheckCapability("cuda:0", "NVIDIA A100", 8, 0), absl::OkStatus());
  EXPECT_EQ(CheckCapability("cuda:0", "NVIDIA H200", 9, 0), absl::OkStatus());
  EXPECT_EQ(CheckCapability("cuda:0", "NVIDIA B200", 10, 0), absl::OkStatus());
  EXPECT_EQ(Text(CheckCapability("cuda:1", "Tesla T4", 7, 5)),
            "FAILED_PRECONDITION: cuda:1 (Tesla T4) has compute capability 7.5, wanted 8.0 (A100) or newer; "
            "use --device cpu");
}

// Where others have taken all, there may be no context to ask how much is left.
TEST(CudaErrors, NoMemoryToOpenADevice) {
  EXPECT_EQ(Text(OpenFailed({"cuda:0", "making its context", kCudaMemoryAllocation, "out of memory"})),
            "RESOURCE_EXHAUSTED: cuda:0: out of memory while making its context; give less with "
            "--memory-bytes, or end what else uses the device");
  EXPECT_EQ(
      Text(OpenFailed({"cuda:0", "loading kernels", kCudaMemoryAllocation, "out of memory", 1024, 4096})),
      "RESOURCE_EXHAUSTED: cuda:0: out of memory while loading kernels (1024 of 4096 bytes are free); "
      "give less with --memory-bytes, or end what else uses the device");
}

TEST(CudaErrors, ADeviceThatCannotBeOpened) {
  EXPECT_EQ(Text(OpenFailed({"cuda:0", "making its context", kCudaDevicesUnavailable,
                             "CUDA-capable device(s) is/are busy or unavailable"})),
            "FAILED_PRECONDITION: cuda:0 cannot be used: CUDA-capable device(s) is/are busy or unavailable; "
            "nvidia-smi shows whether another process has it to itself; use another, or --device cpu");
  EXPECT_EQ(Text(OpenFailed({"cuda:0", "loading kernels", 209, "no kernel image is available"})),
            "FAILED_PRECONDITION: cuda:0 cannot be used: no kernel image is available while loading kernels; "
            "use --device cpu");
}

// A launch that finds no memory has done nothing to the device.
TEST(CudaErrors, NoMemoryForACallIsNotAFailedDevice) {
  EXPECT_TRUE(IsOutOfMemory(kCudaMemoryAllocation));
  EXPECT_TRUE(IsOutOfMemory(kCudaLaunchOutOfResources));
  for (const int error : {kCudaSuccess, kCudaInsufficientDriver, kCudaNoDevice, 1, 700, 719}) {
    EXPECT_FALSE(IsOutOfMemory(error)) << error;
  }
  EXPECT_EQ(
      Text(OutOfMemory({"cuda:0", "starting attention", kCudaMemoryAllocation, "out of memory", 0, 4096})),
      "RESOURCE_EXHAUSTED: cuda:0: out of memory while starting attention (0 of 4096 bytes are free); "
      "give less with --memory-bytes, or end what else uses the device");
}

TEST(CudaErrors, ADeviceThatFailed) {
  EXPECT_EQ(
      Text(DeviceFailed("cuda:0", "running kernels", "an illegal memory access was encountered")),
      "UNAVAILABLE: cuda:0 failed while running kernels: an illegal memory access was encountered; only "
      "a new process can use it: start the worker again");
}

}  // namespace
}  // namespace eduba::cuda
