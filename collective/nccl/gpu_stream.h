#ifndef EDUBA_COLLECTIVE_NCCL_GPU_STREAM_H_
#define EDUBA_COLLECTIVE_NCCL_GPU_STREAM_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace eduba {

// One queue of work on a GPU, and the memory that it works on: as much of the CUDA runtime as the
// communicator needs, so that tests can stand in for it. One thread at a time, but for Attach.
class GpuStream {
 public:
  virtual ~GpuStream() = default;

  // Makes the device current for the calling thread: before any of the calls below, and before NCCL's.
  virtual absl::Status Attach() = 0;
  // cudaStream_t
  virtual void* handle() = 0;
  // Another queue of the same device, somebody else's, who keeps it as long as the result is used.
  virtual absl::StatusOr<std::unique_ptr<GpuStream>> Over(void* stream) = 0;

  // Memory of the device, zeroed, and page-locked memory of the host. RESOURCE_EXHAUSTED when there is none
  // left. Freeing waits for what is queued.
  virtual absl::StatusOr<void*> AllocateDevice(int64_t bytes) = 0;
  virtual absl::StatusOr<void*> AllocateHost(int64_t bytes) = 0;
  virtual void FreeDevice(void* data) = 0;
  virtual void FreeHost(void* data) = 0;

  // Queue a copy; the host's side is page-locked.
  virtual absl::Status CopyIn(void* device, const void* host, int64_t bytes) = 0;
  virtual absl::Status CopyOut(void* host, const void* device, int64_t bytes) = 0;
  // Puts a mark behind all that is queued. A new mark replaces the old one.
  virtual absl::Status Mark() = 0;
  // Whether all before the mark is done; UNAVAILABLE when the device failed.
  virtual absl::StatusOr<bool> Reached() = 0;
};

// A stream of CUDA's. FAILED_PRECONDITION where the program was built without CUDA, or the device is absent.
absl::StatusOr<std::unique_ptr<GpuStream>> OpenCudaStream(int device);

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_NCCL_GPU_STREAM_H_
