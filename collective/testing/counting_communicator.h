#ifndef EDUBA_COLLECTIVE_TESTING_COUNTING_COMMUNICATOR_H_
#define EDUBA_COLLECTIVE_TESTING_COUNTING_COMMUNICATOR_H_

#include <utility>

#include "collective/communicator.h"

namespace eduba::testing {

// Another communicator, and how often it was called: tests say what a thing costs.
class CountingCommunicator final : public Communicator {
 public:
  explicit CountingCommunicator(Communicator* inner) : inner_(inner) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  const char* transport() const override { return inner_->transport(); }
  absl::Status SumI64(absl::Span<int64_t> data, absl::Time deadline) override {
    ++reductions_;
    return inner_->SumI64(data, deadline);
  }
  absl::Status MaxF32(absl::Span<float> data, absl::Time deadline) override {
    ++reductions_;
    return inner_->MaxF32(data, deadline);
  }
  absl::Status SendReceive(absl::Span<const char> send, int to, absl::Span<char> receive, int from,
                           absl::Time deadline) override {
    return inner_->SendReceive(send, to, receive, from, deadline);
  }
  absl::Status Barrier(absl::Time deadline) override { return inner_->Barrier(deadline); }
  void Abort(const absl::Status& reason) override { inner_->Abort(reason); }

  // Calls of SumI64 and MaxF32 since this was asked last.
  int TakeReductions() { return std::exchange(reductions_, 0); }

 private:
  Communicator* const inner_;
  int reductions_ = 0;
};

}  // namespace eduba::testing

#endif  // EDUBA_COLLECTIVE_TESTING_COUNTING_COMMUNICATOR_H_
