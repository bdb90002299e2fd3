#ifndef EDUBA_CLI_DEVICE_H_
#define EDUBA_CLI_DEVICE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "CLI/App.hpp"
#include "absl/status/statusor.h"

namespace eduba {

// --device: cpu, cuda or cuda:N.
void AddDeviceOption(CLI::App& command, std::string& device, const std::string& description);

// --precision: exact or tensor.
void AddPrecisionOption(CLI::App& command, std::string& precision);

// The device of each of `workers` workers of this machine: "cuda" gives them its GPUs in turn.
// INVALID_ARGUMENT for a device that is none, FAILED_PRECONDITION where CUDA or the GPU is missing.
absl::StatusOr<std::vector<std::string>> DevicesOfWorkers(const std::string& device, int workers);

// Whether no two of them share a GPU, as NCCL wants it.
bool EachHasItsGpu(const std::vector<std::string>& devices);

// Memory for pages when --memory-bytes is not given, over all these workers: 60 % of this machine's, or of
// what their GPUs have free beside the weights of the model in the folder `model` (empty: none), of which
// each worker has its own. RESOURCE_EXHAUSTED where a GPU has no room for these.
absl::StatusOr<int64_t> DefaultMemoryBytes(const std::vector<std::string>& devices, const std::string& model);

}  // namespace eduba

#endif  // EDUBA_CLI_DEVICE_H_
