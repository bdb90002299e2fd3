#include "rpc/status.h"

#include <string>

namespace eduba {
namespace {

constexpr size_t kStatusMessageBytesMax = 1024;

}  // namespace

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  std::string message(status.message());
  if (message.size() > kStatusMessageBytesMax) {
    message.resize(kStatusMessageBytesMax - 3);
    message += "...";
  }
  return {static_cast<grpc::StatusCode>(status.raw_code()), message};
}

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  return StatusFromCode(status.error_code(), status.error_message());
}

absl::Status CallerGone() { return absl::CancelledError("the caller gave up or its deadline passed"); }

absl::Status StatusFromCode(int code, const std::string& message) {
  if (code == 0) return absl::OkStatus();
  return {static_cast<absl::StatusCode>(code), message};
}

}  // namespace eduba
