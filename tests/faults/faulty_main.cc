// The main of `eduba_faulty`: the program `eduba` with GPUs that a test may emulate, and make fail.
//
// EDUBA_EMULATED_GPUS=FOLDER  The machine's GPUs are as many as the folder has files cuda:0, cuda:1, ...,
//                             emulated by the host (emulated_device.h), each for one process at a time, as a
//                             GPU in exclusive mode is. Without it they are the machine's own.
// SIGUSR1                     The GPU of a worker fails: an emulated one after as many more calls as the
//                             signal's value says (sigqueue), a real one at once, by a write to an illegal
//                             address.
#include <fcntl.h>
#include <semaphore.h>
#include <sys/file.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "cli/gpus.h"
#include "cli/program.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/cuda_errors.h"
#include "kernels/cuda/cuda_layer_kernels.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/emulated_device.h"
#include "worker/worker.h"

namespace eduba::cuda {

namespace {

constexpr int64_t kEmulatedBytes = int64_t{1} << 30;
// What an emulated GPU says that it has free: who takes all of its share still leaves room for partials.
constexpr int64_t kEmulatedBytesFree = int64_t{64} << 20;

// Null: GPUs are real.
const char* EmulatedFolder() { return std::getenv("EDUBA_EMULATED_GPUS"); }

absl::StatusOr<int> CountEmulated() {
  int count = 0;
  while (std::filesystem::exists(absl::StrCat(EmulatedFolder(), "/cuda:", count))) ++count;
  return CountDevices({13000, 13000, kCudaSuccess, "no error", count});
}

// From here to its end this process has a context on the GPU, and no other can.
absl::Status TakeEmulated(int index) {
  EDUBA_ASSIGN_OR_RETURN(const int count, CountEmulated());
  EDUBA_RETURN_IF_ERROR(CheckIndex(index, count));
  static Mutex mutex;
  static std::map<int, int> files ABSL_GUARDED_BY(mutex);
  const MutexLock lock(mutex);
  if (files.contains(index)) return absl::OkStatus();
  const int file = open(absl::StrCat(EmulatedFolder(), "/cuda:", index).c_str(), O_RDWR | O_CLOEXEC);
  EDUBA_CHECK(file >= 0);
  if (flock(file, LOCK_EX | LOCK_NB) != 0) {
    close(file);
    return OpenFailed({absl::StrCat("cuda:", index), "making its context", kCudaDevicesUnavailable,
                       "CUDA-capable device(s) is/are busy or unavailable"});
  }
  files[index] = file;
  return absl::OkStatus();
}

sem_t asked_to_fail;
std::atomic<int> calls_to_failure;

void OnSignal(int /*signal*/, siginfo_t* info, void* /*context*/) {
  calls_to_failure = info->si_value.sival_int;
  sem_post(&asked_to_fail);
}

// A write of rows to a page that is nowhere: an error of CUDA, and the end of the process's context.
void LoseReal(Device& device) {
  if (!device.Attach().ok()) return;
  const auto stream = device.CreateUrgentStream();
  const auto rows = device.AllocateDevice(4096);
  if (!stream.ok() || !rows.ok()) return;
  const WriteArgs args = {
      MakePageLayout(4, 1, 16, 16), std::bit_cast<void*>(uintptr_t{1} << 40), 0, 1, *rows, *rows};
  device.Write(*stream, args).IgnoreError();
  device.Synchronize(*stream).IgnoreError();
}

// The process's first device is its worker's, which has it until the end.
void FailWhenAsked(Device* device) {
  static std::atomic<bool> is_taken = false;
  if (is_taken.exchange(true)) return;
  EDUBA_CHECK_EQ(sem_init(&asked_to_fail, 0, 0), 0);
  struct sigaction action = {};
  action.sa_sigaction = OnSignal;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  EDUBA_CHECK_EQ(sigaction(SIGUSR1, &action, nullptr), 0);
  std::thread([device] {
    while (sem_wait(&asked_to_fail) != 0) EDUBA_CHECK_EQ(errno, EINTR);
    device->is_emulated() ? BreakEmulatedDevice(*device, calls_to_failure) : LoseReal(*device);
  }).detach();
}

absl::StatusOr<CudaMachine> Describe() {
  if (EmulatedFolder() == nullptr) return DescribeCuda();
  EDUBA_ASSIGN_OR_RETURN(const int count, CountEmulated());
  CudaMachine machine;
  machine.driver = machine.runtime = "13.0";
  for (int i = 0; i < count; ++i) machine.gpus.push_back({"an emulated GPU", 8, 0, kEmulatedBytes});
  return machine;
}

absl::StatusOr<int64_t> FreeBytes(int index) {
  if (EmulatedFolder() == nullptr) return FreeCudaBytes(index);
  EDUBA_RETURN_IF_ERROR(TakeEmulated(index));
  return kEmulatedBytesFree;
}

absl::StatusOr<std::unique_ptr<Device>> Open(int index) {
  if (EmulatedFolder() == nullptr) return OpenCudaDevice(index);
  EDUBA_RETURN_IF_ERROR(TakeEmulated(index));
  return MakeEmulatedDevice(kEmulatedBytes);
}

// The same kernels as a worker would make by itself, on a device that fails when it is asked to.
absl::Status Equip(int index, Worker::Options& options) {
  CudaOptions cuda;
  EDUBA_ASSIGN_OR_RETURN(cuda.precision, ParseCudaPrecision(options.precision));
  cuda.page_bytes = options.memory_bytes;
  cuda.threads = options.threads;
  EDUBA_ASSIGN_OR_RETURN(const std::shared_ptr<Device> device, Open(index));
  FailWhenAsked(device.get());
  options.make_backend = [device, cuda] { return MakeCudaBackendOn(device, cuda); };
  options.make_layers = [device, activations = options.activations] {
    return MakeCudaLayerKernels(device, activations);
  };
  return absl::OkStatus();
}

}  // namespace
}  // namespace eduba::cuda

int main(int argc, char** argv) {
  eduba::SetWorkerGpus({eduba::cuda::Describe, eduba::cuda::FreeBytes, eduba::cuda::Equip});
  return eduba::RunProgram(argc, argv);
}
