#ifndef EDUBA_KERNELS_CUDA_DEVICE_H_
#define EDUBA_KERNELS_CUDA_DEVICE_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/finalise.h"
#include "kernels/cuda/layer_rows.h"
#include "kernels/cuda/multiply_loop.h"
#include "kernels/cuda/page_attention.h"
#include "kernels/cuda/page_rows.h"
#include "kernels/cuda/page_sums.h"
#include "kernels/cuda/page_tensor.h"
#include "kernels/cuda/page_warpgroup.h"
#include "kernels/cuda/sink_scores.h"

namespace eduba::cuda {

// A queue of work that runs in order. Work on different streams runs in any order.
using Stream = void*;

// What the backend needs of a GPU: its memory, streams and kernels. One implementation calls CUDA
// (cuda_device.h), one runs the same kernels on the host, for tests (emulated_device.h).
//
// All functions are thread-safe. A thread calls Attach before any of the others. Errors:
//   RESOURCE_EXHAUSTED  no memory left for this call, which has done nothing, with what is left
//   UNAVAILABLE         the device failed: it stays so for the rest of the process
class Device {
 public:
  virtual ~Device() = default;

  // "cuda:0"
  virtual const std::string& name() const = 0;
  // CUDA's number of it.
  virtual int index() const = 0;
  // "cuda/sm_90": what decides about the bits that it computes.
  virtual const std::string& kind() const = 0;
  // "NVIDIA H200": what decides about a library's choices for it.
  virtual const std::string& model() const = 0;
  // Whether a host emulates it: nothing about its speed means anything then.
  virtual bool is_emulated() const { return false; }
  // Not OK once it has failed.
  virtual absl::Status health() const = 0;
  virtual absl::Status Attach() = 0;
  // A library's call failed, and with it the device. Its health().
  virtual absl::Status Fail(const std::string& what) = 0;

  // Memory of the device, aligned to 256 bytes, not zeroed; page-locked memory of the host. Freeing waits for
  // what is queued.
  virtual absl::StatusOr<void*> AllocateDevice(int64_t bytes) = 0;
  virtual void FreeDevice(void* data) = 0;
  virtual absl::StatusOr<void*> AllocateHost(int64_t bytes) = 0;
  virtual void FreeHost(void* data) = 0;

  virtual absl::StatusOr<Stream> CreateStream() = 0;
  // One whose blocks go first whenever a block of another stream has ended: a kernel that fills the device
  // would keep them waiting to its end. For short work.
  virtual absl::StatusOr<Stream> CreateUrgentStream() = 0;
  virtual void DestroyStream(Stream stream) = 0;
  // Waits until all that is queued is done.
  virtual absl::Status Synchronize(Stream stream) = 0;

  // Queued; host memory is page-locked and stays until the stream was synchronised.
  virtual absl::Status CopyIn(Stream stream, void* device, const void* host, int64_t bytes) = 0;
  virtual absl::Status CopyOut(Stream stream, void* host, const void* device, int64_t bytes) = 0;
  virtual absl::Status CopyWithin(Stream stream, void* to, const void* from, int64_t bytes) = 0;
  virtual absl::Status Zero(Stream stream, void* data, int64_t bytes) = 0;

  // Queued; nothing where there is nothing to do. Bytes of shared memory that a block of Attend may have:
  virtual int64_t shared_bytes_max() const = 0;
  // Blocks of Attend that the device runs at a time: more runs of pages would wait for them.
  virtual int64_t AttendBlocksAtOnce(Element element, const AttendArgs& args) = 0;
  virtual absl::Status Attend(Stream stream, Element element, const AttendArgs& args) = 0;
  // REQUIRES: elements of 16 bits, a tile that is a multiple of 16.
  virtual absl::Status AttendTensor(Stream stream, Element element, const AttendArgs& args) = 0;
  // Blocks of AttendWarpgroups that the device runs at a time; 0: it has no products of warpgroups (sm_90a).
  virtual int64_t WarpgroupBlocksAtOnce() const = 0;
  // REQUIRES: there are some; TakesWarpgroups(args.layout), a tile of ChooseWarpgroupTile.
  virtual absl::Status AttendWarpgroups(Stream stream, Element element, const AttendArgs& args) = 0;
  virtual absl::Status Sum(Stream stream, const SumArgs& args) = 0;
  virtual absl::Status MultiplyLoop(Stream stream, const LoopArgs& args) = 0;
  virtual absl::Status Magnitudes(Stream stream, const MagnitudeArgs& args) = 0;
  // REQUIRES: an urgent stream.
  virtual absl::Status Write(Stream stream, const WriteArgs& args) = 0;
  virtual absl::Status ScoreSinks(Stream stream, Element element, const SinkArgs& args) = 0;
  virtual absl::Status Finalise(Stream stream, Element element, const FinaliseArgs& args) = 0;
  virtual absl::Status Layer(Stream stream, const LayerOperation& operation) = 0;

  // For benchmarks: measures, from here on, how long the device is busy with keys and values (Attend,
  // AttendTensor, AttendWarpgroups, Sum).
  virtual void TimeAttention() = 0;
  // The seconds since the last call; waits for what is queued.
  virtual absl::StatusOr<double> AttentionSeconds() = 0;
};

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_DEVICE_H_
