#ifndef EDUBA_COLLECTIVE_NCCL_GPU_STREAM_H_
#define EDUBA_COLLECTIVE_NCCL_GPU_STREAM_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace eduba {

// One queue of work on a GPU, and the memory that it works on. It is as much of the CUDA runtime as the
// communicator needs, so that tests can replace it. Only one thread at a time may use it, except for Attach.
class GpuStream {
 public:
  virtual ~GpuStream() = default;

  // Makes the device current for the calling thread. A thread calls it before any of the calls below, and
  // before those of NCCL.
  virtual absl::Status Attach() = 0;
  // The cudaStream_t.
  virtual void* handle() = 0;
  // A view of another queue of the same device. Its owner keeps it as long as the result is used.
  virtual absl::StatusOr<std::unique_ptr<GpuStream>> Over(void* stream) = 0;

  // AllocateDevice returns zeroed memory of the device, AllocateHost page-locked memory of the host. Both
  // return RESOURCE_EXHAUSTED when none is left. Freeing waits for the work that is queued.
  virtual absl::StatusOr<void*> AllocateDevice(int64_t bytes) = 0;
  virtual absl::StatusOr<void*> AllocateHost(int64_t bytes) = 0;
  virtual void FreeDevice(void* data) = 0;
  virtual void FreeHost(void* data) = 0;

  // CopyIn and CopyOut queue a copy. REQUIRES: `host` is page-locked.
  virtual absl::Status CopyIn(void* device, const void* host, int64_t bytes) = 0;
  virtual absl::Status CopyOut(void* host, const void* device, int64_t bytes) = 0;
  // Puts a mark after all that is queued so far. A new mark replaces the old one.
  virtual absl::Status Mark() = 0;
  // Whether all the work before the mark is done. UNAVAILABLE when the device has failed.
  virtual absl::StatusOr<bool> Reached() = 0;
};

// Opens a stream of CUDA. FAILED_PRECONDITION where the program was built without CUDA, or the device is
// absent.
absl::StatusOr<std::unique_ptr<GpuStream>> OpenCudaStream(int device);

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_NCCL_GPU_STREAM_H_
