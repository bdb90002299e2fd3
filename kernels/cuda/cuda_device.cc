#include "kernels/cuda/cuda_device.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_errors.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/launch.h"

namespace eduba::cuda {
namespace {

// What cuda_errors.h knows by number.
static_assert(kCudaSuccess == cudaSuccess && kCudaMemoryAllocation == cudaErrorMemoryAllocation &&
              kCudaInsufficientDriver == cudaErrorInsufficientDriver &&
              kCudaDevicesUnavailable == cudaErrorDevicesUnavailable && kCudaNoDevice == cudaErrorNoDevice &&
              kCudaLaunchOutOfResources == cudaErrorLaunchOutOfResources);

// The first question to CUDA, which makes no context on any device.
CudaStart Start() {
  CudaStart start;
  cudaDriverGetVersion(&start.driver);
  cudaRuntimeGetVersion(&start.runtime);
  start.error = cudaGetDeviceCount(&start.count);
  start.text = cudaGetErrorString(static_cast<cudaError_t>(start.error));
  return start;
}

absl::Status CheckThereIs(int index) {
  EDUBA_ASSIGN_OR_RETURN(const int count, CountDevices(Start()));
  return CheckIndex(index, count);
}

// A call that failed on the current device, with what there is to say about it. The next call of this thread
// must not find the error.
CudaFailure Failure(const std::string& device, const std::string& what, cudaError_t error) {
  cudaGetLastError();
  CudaFailure failure = {device, what, error, cudaGetErrorString(error)};
  size_t free = 0;
  size_t total = 0;
  if (IsOutOfMemory(error) && cudaMemGetInfo(&free, &total) == cudaSuccess) {
    failure.free_bytes = static_cast<int64_t>(free);
    failure.total_bytes = static_cast<int64_t>(total);
  }
  cudaGetLastError();
  return failure;
}

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index), name_(absl::StrCat("cuda:", index)) {}

  absl::Status Open() {
    EDUBA_RETURN_IF_ERROR(CheckThereIs(index_));
    cudaDeviceProp properties;
    cudaError_t error = cudaGetDeviceProperties(&properties, index_);
    if (error != cudaSuccess) {
      return OpenFailed({name_, "asking what it is", error, cudaGetErrorString(error)});
    }
    EDUBA_RETURN_IF_ERROR(CheckCapability(name_, properties.name, properties.major, properties.minor));
    error = cudaSetDevice(index_);
    if (error == cudaSuccess) error = cudaFree(nullptr);
    if (error != cudaSuccess) return OpenFailed(Failure(name_, "making its context", error));
    // Now, where nobody has taken the memory yet: CUDA would load each kernel when it is first started, which
    // takes memory and may wait for what is running.
    error = LoadKernels();
    if (error == cudaSuccess) error = HasWarpgroups(&has_warpgroups_);
    if (error != cudaSuccess) return OpenFailed(Failure(name_, "loading kernels", error));
    kind_ = absl::StrCat("cuda/sm_", properties.major, properties.minor);
    model_ = properties.name;
    shared_bytes_max_ = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
    multiprocessors_ = properties.multiProcessorCount;
    return absl::OkStatus();
  }

  const std::string& name() const override { return name_; }
  int index() const override { return index_; }
  const std::string& kind() const override { return kind_; }
  const std::string& model() const override { return model_; }
  absl::Status health() const override {
    const MutexLock lock(mutex_);
    return health_;
  }
  absl::Status Attach() override {
    EDUBA_RETURN_IF_ERROR(health());
    return Check(cudaSetDevice(index_), "choosing the device");
  }
  absl::Status Fail(const std::string& what) override {
    const MutexLock lock(mutex_);
    if (health_.ok()) health_ = DeviceFailed(name_, "calling a library", what);
    return health_;
  }

  absl::StatusOr<void*> AllocateDevice(int64_t bytes) override {
    void* data = nullptr;
    EDUBA_RETURN_IF_ERROR(Check(cudaMalloc(&data, bytes), absl::StrCat("allocating ", bytes, " bytes")));
    return data;
  }
  void FreeDevice(void* data) override { Check(cudaFree(data), "freeing").IgnoreError(); }
  absl::StatusOr<void*> AllocateHost(int64_t bytes) override {
    void* data = nullptr;
    const cudaError_t error = cudaMallocHost(&data, bytes);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return absl::ResourceExhaustedError(absl::StrCat("the machine has no page-locked memory for ", bytes,
                                                       " bytes; free some of its memory"));
    }
    EDUBA_RETURN_IF_ERROR(Check(error, "allocating page-locked memory"));
    return data;
  }
  void FreeHost(void* data) override { Check(cudaFreeHost(data), "freeing").IgnoreError(); }

  absl::StatusOr<Stream> CreateStream() override { return CreateStream(0); }
  absl::StatusOr<Stream> CreateUrgentStream() override {
    int least = 0;
    int greatest = 0;
    EDUBA_RETURN_IF_ERROR(
        Check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "asking for priorities"));
    return CreateStream(greatest);
  }
  void DestroyStream(Stream stream) override {
    Check(cudaStreamDestroy(static_cast<cudaStream_t>(stream)), "destroying a stream").IgnoreError();
  }
  absl::Status Synchronize(Stream stream) override {
    return CheckQueued(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "running kernels");
  }

  absl::Status CopyIn(Stream stream, void* device, const void* host, int64_t bytes) override {
    return Copy(stream, device, host, bytes, cudaMemcpyHostToDevice);
  }
  absl::Status CopyOut(Stream stream, void* host, const void* device, int64_t bytes) override {
    return Copy(stream, host, device, bytes, cudaMemcpyDeviceToHost);
  }
  absl::Status CopyWithin(Stream stream, void* to, const void* from, int64_t bytes) override {
    return Copy(stream, to, from, bytes, cudaMemcpyDeviceToDevice);
  }
  absl::Status Zero(Stream stream, void* data, int64_t bytes) override {
    return Check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "zeroing");
  }

  int64_t shared_bytes_max() const override { return shared_bytes_max_; }
  // Asked for at every step: CUDA takes microseconds to say it.
  int64_t AttendBlocksAtOnce(Element element, const AttendArgs& args) override {
    const MutexLock lock(mutex_);
    const auto [known, is_new] =
        blocks_at_once_.try_emplace({element, args.tile, AttendSharedBytes(args)}, multiprocessors_);
    if (!is_new) return known->second;
    int blocks = 0;
    if (CountAttendBlocks(element, args, &blocks) != cudaSuccess) {
      cudaGetLastError();  // The launch, which wants the same, has its own error.
    } else if (blocks > 0) {
      known->second *= blocks;
    }
    return known->second;
  }
  absl::Status Attend(Stream stream, Element element, const AttendArgs& args) override {
    return Timed(stream, [&](cudaStream_t to) {
      return Check(LaunchAttend(to, element, args), "starting attention");
    });
  }
  absl::Status AttendTensor(Stream stream, Element element, const AttendArgs& args) override {
    return Timed(stream, [&](cudaStream_t to) {
      return Check(LaunchAttendTensor(to, element, args), "starting attention on tensor cores");
    });
  }
  int64_t WarpgroupBlocksAtOnce() const override { return has_warpgroups_ ? multiprocessors_ : 0; }
  absl::Status AttendWarpgroups(Stream stream, Element element, const AttendArgs& args) override {
    return Timed(stream, [&](cudaStream_t to) {
      return Check(LaunchAttendWarpgroups(to, element, args), "starting attention of warpgroups");
    });
  }
  absl::Status Sum(Stream stream, const SumArgs& args) override {
    return Timed(stream, [&](cudaStream_t to) { return Check(LaunchSum(to, args), "starting the sum"); });
  }
  absl::Status MultiplyLoop(Stream stream, const LoopArgs& args) override {
    return Check(LaunchMultiplyLoop(static_cast<cudaStream_t>(stream), args), "starting products");
  }
  absl::Status Magnitudes(Stream stream, const MagnitudeArgs& args) override {
    return Check(LaunchMagnitudes(static_cast<cudaStream_t>(stream), args), "starting the magnitudes");
  }
  absl::Status Write(Stream stream, const WriteArgs& args) override {
    return Check(LaunchWrite(static_cast<cudaStream_t>(stream), args), "starting a write of rows");
  }
  absl::Status ScoreSinks(Stream stream, Element element, const SinkArgs& args) override {
    return Check(LaunchScoreSinks(static_cast<cudaStream_t>(stream), element, args), "starting the sinks");
  }
  absl::Status Finalise(Stream stream, Element element, const FinaliseArgs& args) override {
    return Check(LaunchFinalise(static_cast<cudaStream_t>(stream), element, args), "starting the finalise");
  }
  absl::Status Layer(Stream stream, const LayerOperation& operation) override {
    const auto launch = [&](const auto& args) {
      return LaunchLayer(static_cast<cudaStream_t>(stream), args);
    };
    return Check(std::visit(launch, operation), "starting a layer's work");
  }

  void TimeAttention() override { is_timed_ = true; }
  absl::StatusOr<double> AttentionSeconds() override {
    std::vector<std::pair<cudaEvent_t, cudaEvent_t>> timed;
    {
      const MutexLock lock(mutex_);
      timed.swap(timed_);
    }
    double seconds = 0;
    absl::Status status;
    for (const auto& [begin, end] : timed) {
      float milliseconds = 0;
      cudaError_t error = cudaEventSynchronize(end);
      if (error == cudaSuccess) error = cudaEventElapsedTime(&milliseconds, begin, end);
      status.Update(CheckQueued(error, "reading its clock"));
      seconds += 1e-3 * static_cast<double>(milliseconds);
      cudaEventDestroy(begin);
      cudaEventDestroy(end);
    }
    if (!status.ok()) return status;
    return seconds;
  }

 private:
  // launch(stream) between two events, if somebody wants to know how long it takes.
  template <class Launch>
  absl::Status Timed(Stream stream, const Launch& launch) {
    auto* const to = static_cast<cudaStream_t>(stream);
    if (!is_timed_) return launch(to);
    cudaEvent_t begin = nullptr;
    cudaEvent_t end = nullptr;
    cudaError_t error = cudaEventCreate(&begin);
    if (error == cudaSuccess) error = cudaEventCreate(&end);
    if (error == cudaSuccess) error = cudaEventRecord(begin, to);
    absl::Status status = Check(error, "starting its clock");
    if (status.ok()) status = launch(to);
    if (status.ok()) status = Check(cudaEventRecord(end, to), "stopping its clock");
    if (!status.ok()) {
      if (begin != nullptr) cudaEventDestroy(begin);
      if (end != nullptr) cudaEventDestroy(end);
      return status;
    }
    const MutexLock lock(mutex_);
    timed_.emplace_back(begin, end);
    return absl::OkStatus();
  }

  absl::Status Copy(Stream stream, void* to, const void* from, int64_t bytes, cudaMemcpyKind kind) {
    if (bytes == 0) return absl::OkStatus();
    return Check(cudaMemcpyAsync(to, from, bytes, kind, static_cast<cudaStream_t>(stream)), "copying");
  }

  // `priority` as CUDA has it: lower numbers first.
  absl::StatusOr<Stream> CreateStream(int priority) {
    cudaStream_t stream = nullptr;
    // The stream does not wait for the default stream, which nobody here uses.
    EDUBA_RETURN_IF_ERROR(
        Check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority), "creating a stream"));
    return stream;
  }

  // For a call that does, or queues, one thing. Where memory is missing the call has done nothing.
  absl::Status Check(cudaError_t error, absl::string_view what) {
    return IsOutOfMemory(error) ? OutOfMemory(Failure(name_, std::string(what), error))
                                : CheckQueued(error, what);
  }
  // For a call that waits for what is queued, by whomever: whatever it says, some of that may not have been
  // done. A device that has failed once does not come back in this process.
  absl::Status CheckQueued(cudaError_t error, absl::string_view what) {
    if (error == cudaSuccess) return absl::OkStatus();
    const MutexLock lock(mutex_);
    if (health_.ok()) health_ = DeviceFailed(name_, std::string(what), cudaGetErrorString(error));
    return health_;
  }

  const int index_;
  const std::string name_;
  std::string kind_;
  std::string model_;
  int64_t shared_bytes_max_ = 0;
  int64_t multiprocessors_ = 1;
  bool has_warpgroups_ = false;
  std::atomic<bool> is_timed_ = false;
  mutable Mutex mutex_;
  absl::Status health_ ABSL_GUARDED_BY(mutex_);
  // What Attend's occupancy depends on (element, tile, bytes of shared memory), to AttendBlocksAtOnce.
  std::map<std::tuple<Element, int, int64_t>, int64_t> blocks_at_once_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::pair<cudaEvent_t, cudaEvent_t>> timed_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::StatusOr<CudaMachine> DescribeCuda() {
  const CudaStart start = Start();
  EDUBA_ASSIGN_OR_RETURN(const int count, CountDevices(start));
  CudaMachine machine;
  machine.driver = CudaVersionText(start.driver);
  machine.runtime = CudaVersionText(start.runtime);
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (const cudaError_t error = cudaGetDeviceProperties(&properties, i); error != cudaSuccess) {
      return OpenFailed({absl::StrCat("cuda:", i), "asking what it is", error, cudaGetErrorString(error)});
    }
    machine.gpus.push_back({properties.name, properties.major, properties.minor,
                            static_cast<int64_t>(properties.totalGlobalMem)});
  }
  return machine;
}

absl::StatusOr<std::unique_ptr<Device>> OpenCudaDevice(int index) {
  auto device = std::make_unique<CudaDevice>(index);
  EDUBA_RETURN_IF_ERROR(device->Open());
  return device;
}

absl::StatusOr<int64_t> FreeCudaBytes(int index) {
  EDUBA_RETURN_IF_ERROR(CheckThereIs(index));
  size_t free = 0;
  size_t total = 0;
  cudaError_t error = cudaSetDevice(index);
  if (error == cudaSuccess) error = cudaMemGetInfo(&free, &total);
  if (error != cudaSuccess) {
    return OpenFailed(Failure(absl::StrCat("cuda:", index), "asking for its memory", error));
  }
  return static_cast<int64_t>(free);
}

}  // namespace eduba::cuda
