#ifndef EDUBA_COLLECTIVE_OPERATION_H_
#define EDUBA_COLLECTIVE_OPERATION_H_

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"

namespace eduba {

// The calls of a Communicator. The transports compare them between the ranks.
enum class Operation : uint8_t {
  kBarrier = 1,
  kSumI64 = 2,
  kMaxF32 = 3,
  kSendReceive = 4,
  kReduceScatterI64 = 5
};

// Describes a call in an error's text, for example "sum of 130 words".
inline std::string DescribeCall(Operation operation, int64_t count) {
  switch (operation) {
    case Operation::kBarrier:
      return "barrier";
    case Operation::kSumI64:
      return absl::StrCat("sum of ", count, " words");
    case Operation::kMaxF32:
      return absl::StrCat("maximum of ", count, " floats");
    case Operation::kSendReceive:
      return "send and receive";
    case Operation::kReduceScatterI64:
      return absl::StrCat("reduce-scatter of ", count, " words");
  }
  return absl::StrCat("unknown operation ", static_cast<int>(operation));
}

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_OPERATION_H_
