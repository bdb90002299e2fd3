#ifndef EDUBA_CLI_GPU_FINDINGS_H_
#define EDUBA_CLI_GPU_FINDINGS_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/cuda_device.h"

namespace eduba {

// One line of `eduba doctor`. `state` is "ok", or "note" for what the reader should mind.
struct Finding {
  std::string name;
  std::string state;
  std::string text;
};

// Opens the device of a number, as cuda::OpenCudaDevice.
using OpenDevice = std::function<absl::StatusOr<std::unique_ptr<cuda::Device>>(int index)>;

// What GPUs there are and what would run on them, and the libraries for them, which may be there without any.
// `driver` is the release of NVIDIA's driver in the kernel, empty without one: a machine without GPUs is
// well, but one with a driver that does not serve this program is not.
std::vector<Finding> FindingsOfGpus(const std::string& driver,
                                    const absl::StatusOr<cuda::CudaMachine>& machine, const OpenDevice& open);

}  // namespace eduba

#endif  // EDUBA_CLI_GPU_FINDINGS_H_
