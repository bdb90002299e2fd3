#include "kernels/cuda/cuda_errors.h"

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace eduba::cuda {
namespace {

constexpr int kOldestMajor = 8;

}  // namespace

std::string CudaVersionText(int version) { return absl::StrCat(version / 1000, ".", version % 1000 / 10); }

absl::StatusOr<int> CountDevices(const CudaStart& start) {
  if (start.driver == 0) {
    return absl::FailedPreconditionError(
        "no CUDA driver on this machine (libcuda.so.1 was not found); install NVIDIA's, or use --device cpu");
  }
  if (start.error == kCudaInsufficientDriver) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the CUDA driver serves CUDA ", CudaVersionText(start.driver), ", this program was built with ",
        CudaVersionText(start.runtime), "; update the driver, or use --device cpu"));
  }
  if (start.error != kCudaSuccess && start.error != kCudaNoDevice) {
    return absl::FailedPreconditionError(absl::StrCat("CUDA does not start: ", start.text,
                                                      "; see whether nvidia-smi works, or use --device cpu"));
  }
  if (start.count <= 0) {
    return absl::FailedPreconditionError(
        "the CUDA driver shows no device (CUDA_VISIBLE_DEVICES may hide them); use --device cpu");
  }
  return start.count;
}

absl::Status CheckIndex(int index, int count) {
  if (index >= 0 && index < count) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("there is no cuda:", index, "; this machine has cuda:0",
                                                    count > 1 ? absl::StrCat(" to cuda:", count - 1) : "",
                                                    ", see 'eduba doctor'"));
}

absl::Status CheckCapability(const std::string& name, const std::string& model, int major, int minor) {
  if (major >= kOldestMajor) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(name, " (", model, ") has compute capability ", major,
                                                    ".", minor, ", wanted ", kOldestMajor,
                                                    ".0 (A100) or newer; use --device cpu"));
}

bool IsOutOfMemory(int error) { return error == kCudaMemoryAllocation || error == kCudaLaunchOutOfResources; }

absl::Status OutOfMemory(const CudaFailure& failure) {
  EDUBA_CHECK(IsOutOfMemory(failure.error));
  return absl::ResourceExhaustedError(absl::StrCat(
      failure.device, ": ", failure.text, " while ", failure.what,
      failure.total_bytes > 0
          ? absl::StrCat(" (", failure.free_bytes, " of ", failure.total_bytes, " bytes are free)")
          : "",
      "; give less with --memory-bytes, or end what else uses the device"));
}

absl::Status OpenFailed(const CudaFailure& failure) {
  if (IsOutOfMemory(failure.error)) return OutOfMemory(failure);
  if (failure.error == kCudaDevicesUnavailable) {
    return absl::FailedPreconditionError(absl::StrCat(
        failure.device, " cannot be used: ", failure.text,
        "; nvidia-smi shows whether another process has it to itself; use another, or --device cpu"));
  }
  return absl::FailedPreconditionError(absl::StrCat(failure.device, " cannot be used: ", failure.text,
                                                    " while ", failure.what, "; use --device cpu"));
}

absl::Status DeviceFailed(const std::string& device, const std::string& what, const std::string& text) {
  return absl::UnavailableError(absl::StrCat(device, " failed while ", what, ": ", text,
                                             "; only a new process can use it: start the worker again"));
}

}  // namespace eduba::cuda
