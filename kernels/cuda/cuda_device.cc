#include "kernels/cuda/cuda_device.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/launch.h"

namespace eduba::cuda {
namespace {

constexpr int kOldestMajor = 8;

std::string VersionText(int version) { return absl::StrCat(version / 1000, ".", version % 1000 / 10); }

// The first question to CUDA, with an answer for every way in which a machine has none.
absl::StatusOr<int> CountDevices() {
  int driver = 0;
  int runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (driver == 0) {
    return absl::FailedPreconditionError(
        "no CUDA driver on this machine (libcuda.so.1 was not found); install NVIDIA's, or use --device cpu");
  }
  if (error == cudaErrorInsufficientDriver) {
    return absl::FailedPreconditionError(absl::StrCat("the CUDA driver serves CUDA ", VersionText(driver),
                                                      ", this program was built with ", VersionText(runtime),
                                                      "; update the driver, or use --device cpu"));
  }
  if (error != cudaSuccess && error != cudaErrorNoDevice) {
    return absl::FailedPreconditionError(
        absl::StrCat("CUDA does not start: ", cudaGetErrorString(error), "; use --device cpu"));
  }
  if (count == 0) {
    return absl::FailedPreconditionError(
        "the CUDA driver shows no device (CUDA_VISIBLE_DEVICES may hide them); use --device cpu");
  }
  return count;
}

absl::Status CheckIndex(int index) {
  EDUBA_ASSIGN_OR_RETURN(const int count, CountDevices());
  if (index >= 0 && index < count) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("there is no cuda:", index, "; this machine has cuda:0",
                                                    count > 1 ? absl::StrCat(" to cuda:", count - 1) : "",
                                                    ", see 'eduba doctor'"));
}

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index), name_(absl::StrCat("cuda:", index)) {}

  absl::Status Open() {
    EDUBA_RETURN_IF_ERROR(CheckIndex(index_));
    cudaDeviceProp properties;
    cudaError_t error = cudaGetDeviceProperties(&properties, index_);
    if (error == cudaSuccess && properties.major < kOldestMajor) {
      return absl::FailedPreconditionError(
          absl::StrCat(name_, " (", properties.name, ") has compute capability ", properties.major, ".",
                       properties.minor, ", wanted ", kOldestMajor, ".0 (A100) or newer; use --device cpu"));
    }
    if (error == cudaSuccess) error = cudaSetDevice(index_);
    if (error == cudaSuccess) error = cudaFree(nullptr);  // Makes the context.
    if (error == cudaErrorMemoryAllocation) return OutOfMemory(0);
    if (error == cudaSuccess) error = CheckKernelImage();
    if (error == cudaSuccess) error = HasWarpgroups(&has_warpgroups_);
    if (error != cudaSuccess) {
      return absl::FailedPreconditionError(
          absl::StrCat(name_, " cannot be used: ", cudaGetErrorString(error), "; use --device cpu"));
    }
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
    const std::scoped_lock lock(mutex_);
    return health_;
  }
  absl::Status Attach() override {
    EDUBA_RETURN_IF_ERROR(health());
    return Check(cudaSetDevice(index_), "choosing the device");
  }
  absl::Status Fail(const std::string& what) override {
    const std::scoped_lock lock(mutex_);
    if (health_.ok()) health_ = absl::UnavailableError(absl::StrCat(name_, " failed: ", what));
    return health_;
  }

  absl::StatusOr<void*> AllocateDevice(int64_t bytes) override {
    void* data = nullptr;
    const cudaError_t error = cudaMalloc(&data, bytes);
    if (error == cudaErrorMemoryAllocation) return OutOfMemory(bytes);
    EDUBA_RETURN_IF_ERROR(Check(error, "allocating"));
    return data;
  }
  void FreeDevice(void* data) override { Check(cudaFree(data), "freeing").IgnoreError(); }
  absl::StatusOr<void*> AllocateHost(int64_t bytes) override {
    void* data = nullptr;
    const cudaError_t error = cudaMallocHost(&data, bytes);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return absl::ResourceExhaustedError(
          absl::StrCat("the machine has no page-locked memory for ", bytes, " bytes"));
    }
    EDUBA_RETURN_IF_ERROR(Check(error, "allocating page-locked memory"));
    return data;
  }
  void FreeHost(void* data) override { Check(cudaFreeHost(data), "freeing").IgnoreError(); }

  absl::StatusOr<Stream> CreateStream() override {
    cudaStream_t stream = nullptr;
    // Not ordered behind the default stream, which nobody here uses.
    EDUBA_RETURN_IF_ERROR(
        Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream"));
    return stream;
  }
  void DestroyStream(Stream stream) override {
    Check(cudaStreamDestroy(static_cast<cudaStream_t>(stream)), "destroying a stream").IgnoreError();
  }
  absl::Status Synchronize(Stream stream) override {
    return Check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "running kernels");
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
    const std::scoped_lock lock(mutex_);
    const auto [known, is_new] =
        blocks_at_once_.try_emplace({element, args.tile, AttendSharedBytes(args)}, multiprocessors_);
    int blocks = 0;
    if (is_new && CountAttendBlocks(element, args, &blocks) == cudaSuccess && blocks > 0) {
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
  absl::Status Fold(Stream stream, Element element, const FoldArgs& args) override {
    return Check(LaunchFold(static_cast<cudaStream_t>(stream), element, args), "starting the fold");
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
      const std::scoped_lock lock(mutex_);
      timed.swap(timed_);
    }
    double seconds = 0;
    absl::Status status;
    for (const auto& [begin, end] : timed) {
      float milliseconds = 0;
      cudaError_t error = cudaEventSynchronize(end);
      if (error == cudaSuccess) error = cudaEventElapsedTime(&milliseconds, begin, end);
      status.Update(Check(error, "reading its clock"));
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
    EDUBA_RETURN_IF_ERROR(Check(error, "starting its clock"));
    EDUBA_RETURN_IF_ERROR(launch(to));
    EDUBA_RETURN_IF_ERROR(Check(cudaEventRecord(end, to), "stopping its clock"));
    const std::scoped_lock lock(mutex_);
    timed_.emplace_back(begin, end);
    return absl::OkStatus();
  }

  absl::Status Copy(Stream stream, void* to, const void* from, int64_t bytes, cudaMemcpyKind kind) {
    if (bytes == 0) return absl::OkStatus();
    return Check(cudaMemcpyAsync(to, from, bytes, kind, static_cast<cudaStream_t>(stream)), "copying");
  }

  absl::Status OutOfMemory(int64_t bytes) const {
    cudaGetLastError();  // The next call must not find it.
    size_t free = 0;
    size_t total = 0;
    cudaMemGetInfo(&free, &total);
    return absl::ResourceExhaustedError(
        absl::StrCat(name_, ": no memory for ", bytes, " bytes: ", free, " of ", total,
                     " are free; give less with --memory-bytes, or end what else uses the device"));
  }

  // A device that has failed once does not come back in this process.
  absl::Status Check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return absl::OkStatus();
    const std::scoped_lock lock(mutex_);
    if (health_.ok()) {
      health_ = absl::UnavailableError(
          absl::StrCat(name_, " failed while ", what, ": ", cudaGetErrorString(error)));
    }
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
  mutable std::mutex mutex_;
  absl::Status health_;  // Guarded by mutex_.
  // What Attend's occupancy depends on (element, tile, bytes of shared memory), to AttendBlocksAtOnce.
  std::map<std::tuple<Element, int, int64_t>, int64_t> blocks_at_once_;  // Guarded by mutex_.
  std::vector<std::pair<cudaEvent_t, cudaEvent_t>> timed_;               // Guarded by mutex_.
};

}  // namespace

absl::StatusOr<CudaMachine> DescribeCuda() {
  EDUBA_ASSIGN_OR_RETURN(const int count, CountDevices());
  CudaMachine machine;
  int version = 0;
  cudaDriverGetVersion(&version);
  machine.driver = VersionText(version);
  cudaRuntimeGetVersion(&version);
  machine.runtime = VersionText(version);
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (const cudaError_t error = cudaGetDeviceProperties(&properties, i); error != cudaSuccess) {
      return absl::FailedPreconditionError(
          absl::StrCat("cuda:", i, " does not answer: ", cudaGetErrorString(error)));
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
  EDUBA_RETURN_IF_ERROR(CheckIndex(index));
  size_t free = 0;
  size_t total = 0;
  cudaError_t error = cudaSetDevice(index);
  if (error == cudaSuccess) error = cudaMemGetInfo(&free, &total);
  if (error != cudaSuccess) {
    return absl::FailedPreconditionError(
        absl::StrCat("cuda:", index, " cannot be used: ", cudaGetErrorString(error), "; use --device cpu"));
  }
  return static_cast<int64_t>(free);
}

}  // namespace eduba::cuda
