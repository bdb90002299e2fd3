#ifndef EDUBA_KERNELS_CUDA_CUDA_ERRORS_H_
#define EDUBA_KERNELS_CUDA_CUDA_ERRORS_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// What an answer of CUDA's means to whoever runs the program: a Status of one line that says what to do next.
// Functions of plain numbers, so that every line is tested where there is no CUDA.
namespace eduba::cuda {

// These are the values of cudaError_t that are told apart. cuda_device.cc compares them with CUDA's.
inline constexpr int kCudaSuccess = 0;
inline constexpr int kCudaMemoryAllocation = 2;
inline constexpr int kCudaInsufficientDriver = 35;
inline constexpr int kCudaDevicesUnavailable = 46;
inline constexpr int kCudaNoDevice = 100;
inline constexpr int kCudaLaunchOutOfResources = 701;

// "13.0" for CUDA's 13000.
std::string CudaVersionText(int version);

// What CUDA says when it is asked first.
struct CudaStart {
  int driver = 0;   // Newest version that the driver serves; 0: there is none.
  int runtime = 0;  // The runtime that this program was built with.
  int error = kCudaSuccess;
  std::string text;  // CUDA's own, of `error`.
  int count = 0;     // The number of devices.
};
// How many devices there are, at least 1. FAILED_PRECONDITION where there is no driver, an older one than the
// program needs, one that does not start, or no device that it shows.
absl::StatusOr<int> CountDevices(const CudaStart& start);

// FAILED_PRECONDITION where `index` is none of `count` devices.
absl::Status CheckIndex(int index, int count);

// FAILED_PRECONDITION for a device older than sm_80. `model`: "Tesla T4".
absl::Status CheckCapability(const std::string& name, const std::string& model, int major, int minor);

// A call that failed.
struct CudaFailure {
  std::string device;  // "cuda:0"
  std::string what;    // "starting attention"
  int error = kCudaSuccess;
  std::string text;  // CUDA's own, of `error`.
  // Bytes of the device's memory; a total of 0: it could not be asked.
  int64_t free_bytes = 0;
  int64_t total_bytes = 0;
};
// Whether nothing but memory, or another resource, was missing: the device is as it was before the call.
bool IsOutOfMemory(int error);
// The error when opening the device failed: RESOURCE_EXHAUSTED where IsOutOfMemory, FAILED_PRECONDITION
// otherwise.
absl::Status OpenFailed(const CudaFailure& failure);
// The error of a call to an open device. REQUIRES: IsOutOfMemory(failure.error). RESOURCE_EXHAUSTED.
absl::Status OutOfMemory(const CudaFailure& failure);
// The same where it is not: UNAVAILABLE, for good.
absl::Status DeviceFailed(const std::string& device, const std::string& what, const std::string& text);

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_CUDA_ERRORS_H_
