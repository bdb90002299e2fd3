#include "cli/device.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <system_error>

#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "cli/gpus.h"
#include "cli/system.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cuda_device.h"

namespace eduba {
namespace {

// The bytes of a model's weight files; 0 where there are none.
int64_t WeightBytes(const std::string& model) {
  int64_t bytes = 0;
  std::error_code error;
  for (std::filesystem::directory_iterator file(model, error), end; !error && file != end;
       file.increment(error)) {
    if (file->path().extension() != ".safetensors") continue;
    const uintmax_t size = file->file_size(error);
    if (!error) bytes += static_cast<int64_t>(size);
  }
  return bytes;
}

}  // namespace

void AddDeviceOption(CLI::App& command, std::string& device, const std::string& description) {
  command.add_option("--device", device, description + ": cpu, cuda, or cuda:N")->capture_default_str();
}

void AddPrecisionOption(CLI::App& command, std::string& precision) {
  command
      .add_option("--precision", precision,
                  "On GPUs: exact (a CPU's bits, errors to 3e-6), or tensor (tensor cores for bf16 and f16 "
                  "sessions, errors to 3e-4, f16 6e-4); the same for all workers")
      ->check(CLI::IsMember({"exact", "tensor"}))
      ->capture_default_str();
}

absl::StatusOr<std::vector<std::string>> DevicesOfWorkers(const std::string& device, int workers) {
  if (device == "cpu") return std::vector<std::string>(workers, device);
  EDUBA_RETURN_IF_ERROR(CudaDeviceIndex(device).status());
  EDUBA_ASSIGN_OR_RETURN(const cuda::CudaMachine machine, WorkerGpus().describe());
  if (device != "cuda") return std::vector<std::string>(workers, device);
  std::vector<std::string> devices;
  devices.reserve(workers);
  for (int i = 0; i < workers; ++i) {
    devices.push_back(absl::StrCat("cuda:", i % static_cast<int>(machine.gpus.size())));
  }
  return devices;
}

bool EachHasItsGpu(const std::vector<std::string>& devices) {
  const std::set<std::string> distinct(devices.begin(), devices.end());
  return distinct.count("cpu") == 0 && distinct.size() == devices.size();
}

absl::StatusOr<int64_t> DefaultMemoryBytes(const std::vector<std::string>& devices,
                                           const std::string& model) {
  int64_t bytes = 0;
  for (const std::string& device : std::set<std::string>(devices.begin(), devices.end())) {
    if (device == "cpu") return DefaultStoreBytes();
    EDUBA_ASSIGN_OR_RETURN(const int index, CudaDeviceIndex(device));
    EDUBA_ASSIGN_OR_RETURN(const int64_t free, WorkerGpus().free_bytes(index));
    const int64_t weights = std::count(devices.begin(), devices.end(), device) * WeightBytes(model);
    if (weights >= free) {
      return absl::ResourceExhaustedError(absl::StrCat(
          device, " has ", free, " bytes free, and the weights of ", model, " for its workers take ", weights,
          "; use fewer workers, a larger GPU, or --device cpu"));
    }
    bytes += (free - weights) / 5 * 3;
  }
  return bytes;
}

}  // namespace eduba
