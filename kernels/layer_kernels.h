#ifndef EDUBA_KERNELS_LAYER_KERNELS_H_
#define EDUBA_KERNELS_LAYER_KERNELS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/activation.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/rope.h"

namespace eduba {

// to[i] += from[i], rounded once.
struct AddArgs {
  int64_t count = 0;
  const float* from = nullptr;
  float* to = nullptr;
};

// *found = 1 where a number of x is not finite, else 0.
struct NonFiniteArgs {
  int64_t count = 0;
  const float* x = nullptr;
  float* found = nullptr;
};

// Memory that operations work on, and the host's side of it. Must not outlive the kernels that it is of.
class LayerMemory {
 public:
  virtual ~LayerMemory() = default;
  LayerMemory(const LayerMemory&) = delete;
  LayerMemory& operator=(const LayerMemory&) = delete;

  // For operations alone, unless it is host().
  void* data() const { return data_; }
  // For the host. Null where the memory is not shared; data() where operations work on the host's memory.
  void* host() const { return host_; }

 protected:
  LayerMemory(void* data, void* host) : data_(data), host_(host) {}

 private:
  void* const data_;
  void* const host_;
};

// What a transformer computes besides attention, on one device. Every operation works on rows, and a row's
// bits are the same whatever else is in its batch, on any number of threads. One call at a time. NaN and Inf
// never become numbers: a result that would have been one of them is one of them, if not the same.
//
// Operations take pointers into memory of Allocate. They are queued, and run in order; what they work on must
// stay until Wait. What fails is said by Wait, and what was queued after it is not computed; a device that
// fails computes nothing from then on. Where the memory is the host's (the default here), operands may lie
// anywhere, and an operation is done when its call returns.
class LayerKernels {
 public:
  virtual ~LayerKernels() = default;

  // "cpu/AVX2", "reference".
  virtual std::string name() const = 0;
  // What bits depend on and the fixed problems of LayerFingerprint may not show: a library's choices for
  // other shapes. Empty where there is nothing.
  virtual std::string library() const { return ""; }

  // At least `bytes` (more than 0), aligned to 64, not zeroed; with a host's side if it is shared.
  // RESOURCE_EXHAUSTED without memory.
  virtual absl::StatusOr<std::unique_ptr<LayerMemory>> Allocate(int64_t bytes, bool is_shared);
  // Bytes [offset, offset + bytes) of shared memory, queued as operations are: from the host's side, or to
  // it.
  virtual void Send(const LayerMemory& /*memory*/, int64_t /*offset*/, int64_t /*bytes*/) {}
  virtual void Fetch(const LayerMemory& /*memory*/, int64_t /*offset*/, int64_t /*bytes*/) {}
  // Until all is done that was queued. UNAVAILABLE: the device failed, and stays so. RESOURCE_EXHAUSTED: it
  // had no memory to start something.
  virtual absl::Status Wait() { return absl::OkStatus(); }

  // Copies `parts`, which the host has and whose inputs and types are equal, into one matrix: their outputs
  // one after another, so that queries, keys and values are one product. Reads each part once.
  // RESOURCE_EXHAUSTED without memory.
  virtual absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(absl::Span<const MatrixView> parts) = 0;

  // `args.weights` must come from this object.
  virtual void Multiply(const MatmulArgs& args) = 0;
  virtual void Normalise(const NormArgs& args) = 0;
  virtual void Rotate(const RopeArgs& args) = 0;
  virtual void Activate(const ActivationArgs& args) = 0;
  virtual void Softcap(const SoftcapArgs& args) = 0;
  virtual void Add(const AddArgs& args);
  virtual void FlagNonFinite(const NonFiniteArgs& args);
};

// Floats of LayerMemory that grow as they must. Never moved while anything is queued that uses them.
class LayerFloats {
 public:
  enum class Use : uint8_t { kKernels, kShared };
  LayerFloats(LayerKernels* kernels, Use use) : kernels_(kernels), use_(use) {}

  // Room for `count` at least. What was there is lost when there was less. RESOURCE_EXHAUSTED without memory;
  // then there is none left here.
  absl::Status Reserve(int64_t count);
  float* data() const { return memory_ == nullptr ? nullptr : static_cast<float*>(memory_->data()); }
  float* host() const { return memory_ == nullptr ? nullptr : static_cast<float*>(memory_->host()); }
  // Floats [first, first + count), as LayerKernels has it.
  void Send(int64_t first, int64_t count) const;
  void Fetch(int64_t first, int64_t count) const;

 private:
  LayerKernels* kernels_;
  Use use_;
  std::unique_ptr<LayerMemory> memory_;
  int64_t size_ = 0;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_LAYER_KERNELS_H_
