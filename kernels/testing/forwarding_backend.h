#ifndef EDUBA_KERNELS_TESTING_FORWARDING_BACKEND_H_
#define EDUBA_KERNELS_TESTING_FORWARDING_BACKEND_H_

#include <memory>
#include <string>
#include <utility>

#include "kernels/backend.h"

namespace eduba::testing {

// Another backend: tests override the calls that they watch or break.
class ForwardingBackend : public Backend {
 public:
  // `inner` outlives this.
  explicit ForwardingBackend(Backend* inner) : inner_(inner) {}
  explicit ForwardingBackend(std::unique_ptr<Backend> inner) : own_(std::move(inner)), inner_(own_.get()) {}

  std::string name() const override { return inner_->name(); }
  int gpu() const override { return inner_->gpu(); }
  void* stream() const override { return inner_->stream(); }
  absl::Status health() const override { return inner_->health(); }
  absl::StatusOr<void*> AllocateSlab(int64_t bytes) override { return inner_->AllocateSlab(bytes); }
  void FreeSlab(void* slab, int64_t bytes) override { inner_->FreeSlab(slab, bytes); }
  int64_t PageBytes(const AttentionShape& shape) const override { return inner_->PageBytes(shape); }
  absl::Status ResetPage(void* page) override { return inner_->ResetPage(page); }
  absl::Status SealPage(const AttentionShape& shape, void* page) override {
    return inner_->SealPage(shape, page);
  }
  absl::Status WriteRows(const AttentionShape& shape, void* page, int row, int rows, const void* keys,
                         const void* values) override {
    return inner_->WriteRows(shape, page, row, rows, keys, values);
  }
  absl::Status ReadRows(const AttentionShape& shape, const void* page, int row, int rows, void* keys,
                        void* values) override {
    return inner_->ReadRows(shape, page, row, rows, keys, values);
  }
  absl::Status CopyPage(const AttentionShape& shape, const void* from, void* to) override {
    return inner_->CopyPage(shape, from, to);
  }
  absl::StatusOr<std::unique_ptr<AttentionStep>> StartStep(const StepArgs& args) override {
    return inner_->StartStep(args);
  }

 private:
  const std::unique_ptr<Backend> own_;  // Or none.
  Backend* const inner_;
};

}  // namespace eduba::testing

#endif  // EDUBA_KERNELS_TESTING_FORWARDING_BACKEND_H_
