#ifndef EDUBA_RPC_RAW_H_
#define EDUBA_RPC_RAW_H_

#include <string>

#include "absl/status/status.h"
#include "google/protobuf/message_lite.h"
#include "grpcpp/support/byte_buffer.h"

namespace eduba {

// Streams of messages that we decode ourselves. gRPC's own readers answer "no more" alike for a client that
// has said all and for a message that cannot be decoded, so a stream with a broken message in the middle
// would look complete.

// Takes `bytes`. INVALID_ARGUMENT when they are not a message of that type.
absl::Status Decode(grpc::ByteBuffer* bytes, google::protobuf::MessageLite* message);
grpc::ByteBuffer Encode(const google::protobuf::MessageLite& message);

// Where the method "package.Service.Method" stands in its service: what gRPC's generated code calls it by.
int MethodIndex(const std::string& full_name);

}  // namespace eduba

#endif  // EDUBA_RPC_RAW_H_
