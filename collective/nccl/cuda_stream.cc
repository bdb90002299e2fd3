#include <cuda_runtime.h>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "collective/nccl/gpu_stream.h"

namespace eduba {
namespace {

absl::Status Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string text = absl::StrCat("CUDA: ", what, ": ", cudaGetErrorString(error));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // Clears the error, so that the next call does not find it.
    return absl::ResourceExhaustedError(text);
  }
  return absl::UnavailableError(text);
}

class CudaStream final : public GpuStream {
 public:
  // Works on `another` stream, or on one of its own when that is null.
  CudaStream(int device, cudaStream_t another)
      : device_(device), is_own_(another == nullptr), stream_(another) {}
  ~CudaStream() override {
    cudaSetDevice(device_);
    if (mark_ != nullptr) cudaEventDestroy(mark_);
    if (is_own_ && stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  absl::Status Init() {
    const cudaError_t error = cudaSetDevice(device_);
    if (error != cudaSuccess) {
      return absl::FailedPreconditionError(absl::StrCat("cuda:", device_,
                                                        " cannot be used: ", cudaGetErrorString(error),
                                                        "; 'eduba doctor' lists what this machine has"));
    }
    // A non-blocking stream does not wait for the default stream, which nobody here uses.
    if (is_own_) {
      EDUBA_RETURN_IF_ERROR(
          Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream"));
    }
    return Check(cudaEventCreateWithFlags(&mark_, cudaEventDisableTiming), "creating an event");
  }

  absl::Status Attach() override { return Check(cudaSetDevice(device_), "choosing the device"); }
  void* handle() override { return stream_; }
  absl::StatusOr<std::unique_ptr<GpuStream>> Over(void* stream) override {
    auto view = std::make_unique<CudaStream>(device_, static_cast<cudaStream_t>(stream));
    EDUBA_RETURN_IF_ERROR(view->Init());
    return view;
  }

  absl::StatusOr<void*> AllocateDevice(int64_t bytes) override {
    void* data = nullptr;
    EDUBA_RETURN_IF_ERROR(Check(cudaMalloc(&data, bytes), "allocating"));
    const absl::Status zeroed = Check(cudaMemsetAsync(data, 0, bytes, stream_), "zeroing");
    if (!zeroed.ok()) {
      cudaFree(data);
      return zeroed;
    }
    return data;
  }
  absl::StatusOr<void*> AllocateHost(int64_t bytes) override {
    void* data = nullptr;
    EDUBA_RETURN_IF_ERROR(Check(cudaMallocHost(&data, bytes), "allocating page-locked memory"));
    return data;
  }
  void FreeDevice(void* data) override {
    cudaStreamSynchronize(stream_);
    cudaFree(data);
  }
  void FreeHost(void* data) override {
    cudaStreamSynchronize(stream_);
    cudaFreeHost(data);
  }

  absl::Status CopyIn(void* device, const void* host, int64_t bytes) override {
    return Check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_), "copying in");
  }
  absl::Status CopyOut(void* host, const void* device, int64_t bytes) override {
    return Check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_), "copying out");
  }
  absl::Status Mark() override { return Check(cudaEventRecord(mark_, stream_), "recording an event"); }
  absl::StatusOr<bool> Reached() override {
    const cudaError_t error = cudaEventQuery(mark_);
    if (error == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    EDUBA_RETURN_IF_ERROR(Check(error, "waiting"));
    return true;
  }

 private:
  const int device_;
  const bool is_own_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t mark_ = nullptr;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GpuStream>> OpenCudaStream(int device) {
  auto stream = std::make_unique<CudaStream>(device, nullptr);
  EDUBA_RETURN_IF_ERROR(stream->Init());
  return stream;
}

}  // namespace eduba
