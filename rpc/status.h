#ifndef EDUBA_RPC_STATUS_H_
#define EDUBA_RPC_STATUS_H_

#include "absl/status/status.h"
#include "grpcpp/support/status.h"

namespace eduba {

// The canonical codes have the same numbers in both; messages are cut to 1 KiB, because they travel as a
// header.
grpc::Status ToGrpc(const absl::Status& status);
absl::Status FromGrpc(const grpc::Status& status);

// How a call ends whose client has gone.
absl::Status CallerGone();

// For statuses that travel inside messages.
absl::Status StatusFromCode(int code, const std::string& message);

}  // namespace eduba

#endif  // EDUBA_RPC_STATUS_H_
