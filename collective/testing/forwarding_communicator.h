#ifndef EDUBA_COLLECTIVE_TESTING_FORWARDING_COMMUNICATOR_H_
#define EDUBA_COLLECTIVE_TESTING_FORWARDING_COMMUNICATOR_H_

#include <memory>
#include <utility>

#include "collective/communicator.h"

namespace eduba::testing {

// Wraps another communicator. Tests override the calls that they watch or break.
class ForwardingCommunicator : public Communicator {
 public:
  // `inner` outlives this.
  explicit ForwardingCommunicator(Communicator* inner) : inner_(inner) {}
  explicit ForwardingCommunicator(std::unique_ptr<Communicator> inner)
      : own_(std::move(inner)), inner_(own_.get()) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  const char* transport() const override { return inner_->transport(); }
  absl::Status SumI64(absl::Span<int64_t> data, absl::Time deadline) override {
    return inner_->SumI64(data, deadline);
  }
  absl::Status ReduceScatterI64(absl::Span<int64_t> data, absl::Span<const int64_t> counts,
                                absl::Time deadline) override {
    return inner_->ReduceScatterI64(data, counts, deadline);
  }
  DeviceSums* device_sums() override { return inner_->device_sums(); }
  absl::Status MaxF32(absl::Span<float> data, absl::Time deadline) override {
    return inner_->MaxF32(data, deadline);
  }
  absl::Status SendReceive(absl::Span<const char> send, int to, absl::Span<char> receive, int from,
                           absl::Time deadline) override {
    return inner_->SendReceive(send, to, receive, from, deadline);
  }
  absl::Status Barrier(absl::Time deadline) override { return inner_->Barrier(deadline); }
  void Abort(const absl::Status& reason) override { inner_->Abort(reason); }

 private:
  const std::unique_ptr<Communicator> own_;  // Null when `inner_` belongs to somebody else.
  Communicator* const inner_;
};

}  // namespace eduba::testing

#endif  // EDUBA_COLLECTIVE_TESTING_FORWARDING_COMMUNICATOR_H_
