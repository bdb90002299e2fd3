#include "cli/gpus.h"

#include <utility>

#include "kernels/cuda/cuda_backend.h"

namespace eduba {
namespace {

Gpus& Chosen() {
  static auto* const gpus = new Gpus();
  return *gpus;
}

}  // namespace

const Gpus& WorkerGpus() { return Chosen(); }

void SetWorkerGpus(Gpus gpus) { Chosen() = std::move(gpus); }

absl::Status EquipWorker(Worker::Options& options) {
  if (!WorkerGpus().equip) return absl::OkStatus();
  const absl::StatusOr<int> index = CudaDeviceIndex(options.backend);
  if (!index.ok() || *index < 0) return absl::OkStatus();
  return WorkerGpus().equip(*index, options);
}

}  // namespace eduba
