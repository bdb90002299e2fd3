#ifndef EDUBA_KERNELS_TESTING_ON_HOST_H_
#define EDUBA_KERNELS_TESTING_ON_HOST_H_

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/layer_kernels.h"

namespace eduba::testing {

// Kernels whose operations take pointers to a host's memory, over any: operands are brought to where those
// work, and all that an operation may write comes back. For tests that know no other memory.
class OnHost final : public LayerKernels {
 public:
  explicit OnHost(std::unique_ptr<LayerKernels> kernels) : kernels_(std::move(kernels)) {}

  std::string name() const override { return kernels_->name(); }
  std::string library() const override { return kernels_->library(); }
  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(absl::Span<const MatrixView> parts) override {
    return kernels_->Pack(parts);
  }

  void Multiply(const MatmulArgs& args) override {
    MatmulArgs there = args;
    Bring(args.x, args.rows * args.weights->inputs(), there.x);
    Bring(args.bias, args.weights->outputs(), there.bias);
    Bring(args.y, args.rows * args.weights->outputs(), there.y);
    kernels_->Multiply(there);
    TakeBack();
  }
  void Normalise(const NormArgs& args) override {
    NormArgs there = args;
    BringRows(args, there);
    Bring(args.weight, args.dim, there.weight);
    Bring(args.bias, args.dim, there.bias);
    kernels_->Normalise(there);
    TakeBack();
  }
  void Rotate(const RopeArgs& args) override {
    RopeArgs there = args;
    BringRows(args, there);
    Bring(args.cosines, args.rows * (args.rotary_dim / 2), there.cosines);
    Bring(args.sines, args.rows * (args.rotary_dim / 2), there.sines);
    kernels_->Rotate(there);
    TakeBack();
  }
  void Activate(const ActivationArgs& args) override {
    ActivationArgs there = args;
    const int64_t count = (args.rows - 1) * args.x_stride + args.dim;
    Bring(args.x, count, there.x);
    Bring(args.gate, count, there.gate);
    Bring(args.y, args.rows * args.dim, there.y);
    kernels_->Activate(there);
    TakeBack();
  }
  void Softcap(const SoftcapArgs& args) override {
    SoftcapArgs there = args;
    Bring(args.x, args.count, there.x);
    kernels_->Softcap(there);
    TakeBack();
  }
  void Add(const AddArgs& args) override {
    AddArgs there = args;
    Bring(args.from, args.count, there.from);
    Bring(args.to, args.count, there.to);
    kernels_->Add(there);
    TakeBack();
  }
  void FlagNonFinite(const NonFiniteArgs& args) override {
    NonFiniteArgs there = args;
    Bring(args.x, args.count, there.x);
    Bring(args.found, 1, there.found);
    kernels_->FlagNonFinite(there);
    TakeBack();
  }

 private:
  struct Brought {
    LayerFloats floats;
    const float* from;
    float* to;  // Null: not written.
    int64_t count;
  };

  // What is there already is not brought twice: operations work in place.
  template <class Pointer>
  void Bring(Pointer from, int64_t count, Pointer& there) {
    there = nullptr;
    if (from == nullptr || count <= 0) return;
    for (Brought& one : brought_) {
      if (one.from != from) continue;
      EDUBA_CHECK_EQ(one.count, count);
      if constexpr (!std::is_const_v<std::remove_pointer_t<Pointer>>) one.to = from;
      there = one.floats.data();
      return;
    }
    Brought& one = brought_.emplace_back(
        Brought{LayerFloats(kernels_.get(), LayerFloats::Use::kShared), from, nullptr, count});
    if constexpr (!std::is_const_v<std::remove_pointer_t<Pointer>>) one.to = from;
    EDUBA_CHECK(one.floats.Reserve(count).ok());
    std::copy_n(from, count, one.floats.host());
    one.floats.Send(0, count);
    there = one.floats.data();
  }
  template <class Args>
  void BringRows(const Args& args, Args& there) {
    const int64_t row = int64_t{args.heads} * args.dim;
    Bring(args.x, (args.rows - 1) * args.x_stride + row, there.x);
    Bring(args.y, (args.rows - 1) * args.y_stride + row, there.y);
  }
  void TakeBack() {
    for (const Brought& one : brought_) {
      if (one.to != nullptr) one.floats.Fetch(0, one.count);
    }
    EDUBA_CHECK(kernels_->Wait().ok());
    for (const Brought& one : brought_) {
      if (one.to != nullptr) std::copy_n(one.floats.host(), one.count, one.to);
    }
    brought_.clear();
  }

  const std::unique_ptr<LayerKernels> kernels_;
  std::vector<Brought> brought_;
};

}  // namespace eduba::testing

#endif  // EDUBA_KERNELS_TESTING_ON_HOST_H_
