#ifndef EDUBA_CLI_GPUS_H_
#define EDUBA_CLI_GPUS_H_

#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/cuda_device.h"
#include "worker/worker.h"

namespace eduba {

// The GPUs on which workers run: this machine's, unless the program's main says otherwise, as that of a
// program for tests does.
struct Gpus {
  std::function<absl::StatusOr<cuda::CudaMachine>()> describe = cuda::DescribeCuda;
  std::function<absl::StatusOr<int64_t>(int index)> free_bytes = cuda::FreeCudaBytes;
  // Gives a worker on cuda:`index` its kernels (Worker::Options::make_backend and make_layers). Empty: the
  // worker opens the device by itself.
  std::function<absl::Status(int index, Worker::Options& options)> equip;
};

const Gpus& WorkerGpus();
// To be called before RunProgram, if at all.
void SetWorkerGpus(Gpus gpus);

// Lets WorkerGpus().equip, where there is one, give its kernels to a worker whose backend is a GPU.
absl::Status EquipWorker(Worker::Options& options);

}  // namespace eduba

#endif  // EDUBA_CLI_GPUS_H_
