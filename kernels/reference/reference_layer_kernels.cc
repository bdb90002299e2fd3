#include "kernels/reference/reference_layer_kernels.h"

#include <string>
#include <vector>

#include "base/check.h"

namespace eduba {
namespace {

class ReferenceMatrix final : public PackedMatrix {
 public:
  ReferenceMatrix(int64_t outputs, int64_t inputs, DType dtype, std::vector<float> weights)
      : PackedMatrix(outputs, inputs, static_cast<int64_t>(weights.size() * sizeof(float))),
        dtype_(dtype),
        weights_(std::move(weights)) {}

  DType dtype() const { return dtype_; }
  const float* weights() const { return weights_.data(); }

 private:
  const DType dtype_;
  const std::vector<float> weights_;
};

class ReferenceLayerKernels final : public LayerKernels {
 public:
  explicit ReferenceLayerKernels(Activations activations) : activations_(activations) {}

  std::string name() const override {
    return activations_ == Activations::kBf16 ? "reference/bf16" : "reference";
  }

  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(absl::Span<const MatrixView> parts) override {
    EDUBA_CHECK(!parts.empty());
    std::vector<float> weights;
    int64_t outputs = 0;
    for (const MatrixView& part : parts) {
      EDUBA_CHECK_EQ(part.inputs, parts[0].inputs);
      for (int64_t i = 0; i < part.outputs * part.inputs; ++i) {
        weights.push_back(LoadElement(part.data, part.dtype, i));
      }
      outputs += part.outputs;
    }
    return std::make_unique<ReferenceMatrix>(outputs, parts[0].inputs, parts[0].dtype, std::move(weights));
  }

  void Multiply(const MatmulArgs& args) override {
    const auto& matrix = static_cast<const ReferenceMatrix&>(*args.weights);
    ReferenceMultiply(args, matrix.weights(),
                      matrix.dtype() == DType::kBf16 ? activations_ : Activations::kF32);
  }
  void Normalise(const NormArgs& args) override { ReferenceNormalise(args); }
  void Rotate(const RopeArgs& args) override { ReferenceRotate(args); }
  void Activate(const ActivationArgs& args) override { ReferenceActivate(args); }
  void Softcap(const SoftcapArgs& args) override { ReferenceSoftcap(args); }

 private:
  const Activations activations_;
};

}  // namespace

std::unique_ptr<LayerKernels> MakeReferenceLayerKernels(Activations activations) {
  return std::make_unique<ReferenceLayerKernels>(activations);
}

}  // namespace eduba
