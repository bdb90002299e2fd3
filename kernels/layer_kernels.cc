#include "kernels/layer_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

constexpr int64_t kAlignment = 64;

class HostMemory final : public LayerMemory {
 public:
  explicit HostMemory(void* data) : LayerMemory(data, data) {}
  ~HostMemory() override { std::free(data()); }
};

}  // namespace

absl::StatusOr<std::unique_ptr<LayerMemory>> LayerKernels::Allocate(int64_t bytes, bool /*is_shared*/) {
  void* const data = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (data == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for ", bytes, " bytes of a model's states; end what else uses it"));
  }
  return std::make_unique<HostMemory>(data);
}

void LayerKernels::Add(const AddArgs& args) {
  for (int64_t i = 0; i < args.count; ++i) args.to[i] += args.from[i];
}

void LayerKernels::FlagNonFinite(const NonFiniteArgs& args) {
  *args.found =
      std::all_of(args.x, args.x + args.count, [](float x) { return std::isfinite(x); }) ? 0.0F : 1.0F;
}

absl::Status LayerFloats::Reserve(int64_t count) {
  if (count <= size_) return absl::OkStatus();
  memory_ = nullptr;
  size_ = 0;
  EDUBA_ASSIGN_OR_RETURN(
      memory_, kernels_->Allocate(count * static_cast<int64_t>(sizeof(float)), use_ == Use::kShared));
  size_ = count;
  return absl::OkStatus();
}

void LayerFloats::Send(int64_t first, int64_t count) const {
  constexpr int64_t kBytes = sizeof(float);
  if (count > 0) kernels_->Send(*memory_, first * kBytes, count * kBytes);
}
void LayerFloats::Fetch(int64_t first, int64_t count) const {
  constexpr int64_t kBytes = sizeof(float);
  if (count > 0) kernels_->Fetch(*memory_, first * kBytes, count * kBytes);
}

}  // namespace eduba
