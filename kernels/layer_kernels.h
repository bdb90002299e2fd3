#ifndef EDUBA_KERNELS_LAYER_KERNELS_H_
#define EDUBA_KERNELS_LAYER_KERNELS_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/activation.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/rope.h"

namespace eduba {

// What a transformer computes besides attention, on one device. Every operation works on rows, and a row's
// bits are the same whatever else is in its batch, on any number of threads. One call at a time. NaN and Inf
// go through to the result.
class LayerKernels {
 public:
  virtual ~LayerKernels() = default;

  // "cpu/AVX2", "reference".
  virtual std::string name() const = 0;

  // Copies `parts`, whose inputs and types are equal, into one matrix: their outputs one after another, so
  // that queries, keys and values are one product. Reads each part once. RESOURCE_EXHAUSTED without memory.
  virtual absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(absl::Span<const MatrixView> parts) = 0;

  // `args.weights` must come from this object.
  virtual void Multiply(const MatmulArgs& args) = 0;
  virtual void Normalise(const NormArgs& args) = 0;
  virtual void Rotate(const RopeArgs& args) = 0;
  virtual void Activate(const ActivationArgs& args) = 0;
  virtual void Softcap(const SoftcapArgs& args) = 0;
};

}  // namespace eduba

#endif  // EDUBA_KERNELS_LAYER_KERNELS_H_
