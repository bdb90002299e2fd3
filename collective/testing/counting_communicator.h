#ifndef EDUBA_COLLECTIVE_TESTING_COUNTING_COMMUNICATOR_H_
#define EDUBA_COLLECTIVE_TESTING_COUNTING_COMMUNICATOR_H_

#include <utility>

#include "collective/testing/forwarding_communicator.h"

namespace eduba::testing {

// Wraps another communicator and counts how often its host collectives are called, so that a test can say
// what an operation costs.
class CountingCommunicator final : public ForwardingCommunicator {
 public:
  using ForwardingCommunicator::ForwardingCommunicator;

  absl::Status SumI64(absl::Span<int64_t> data, absl::Time deadline) override {
    ++reductions_;
    return ForwardingCommunicator::SumI64(data, deadline);
  }
  absl::Status ReduceScatterI64(absl::Span<int64_t> data, absl::Span<const int64_t> counts,
                                absl::Time deadline) override {
    ++reductions_;
    return ForwardingCommunicator::ReduceScatterI64(data, counts, deadline);
  }
  absl::Status MaxF32(absl::Span<float> data, absl::Time deadline) override {
    ++reductions_;
    return ForwardingCommunicator::MaxF32(data, deadline);
  }

  // Returns the number of calls of SumI64, ReduceScatterI64 and MaxF32 since this was called last.
  int TakeReductions() { return std::exchange(reductions_, 0); }

 private:
  int reductions_ = 0;
};

}  // namespace eduba::testing

#endif  // EDUBA_COLLECTIVE_TESTING_COUNTING_COMMUNICATOR_H_
