#ifndef EDUBA_RPC_RAW_H_
#define EDUBA_RPC_RAW_H_

#include "absl/status/status.h"
#include "google/protobuf/message_lite.h"
#include "grpcpp/support/byte_buffer.h"

namespace eduba {

// Our services take their messages still encoded (the generated WithRawCallbackMethod_...) and decode them
// here. gRPC's own readers answer "no more" alike for a client that has said all and for a message that
// cannot be decoded, so a stream with a broken message in the middle would look complete; and a call of one
// broken message would end as UNIMPLEMENTED with no text.

// Takes `bytes`. INVALID_ARGUMENT when they are not a message of that type.
absl::Status Decode(grpc::ByteBuffer* bytes, google::protobuf::MessageLite* message);

// Decodes the only message of a call. INVALID_ARGUMENT when there is none, or it is not of that type.
absl::Status DecodeOnly(const grpc::ByteBuffer& bytes, google::protobuf::MessageLite* message);

grpc::ByteBuffer Encode(const google::protobuf::MessageLite& message);

}  // namespace eduba

#endif  // EDUBA_RPC_RAW_H_
