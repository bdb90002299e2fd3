#include "rpc/raw.h"

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "grpcpp/support/proto_buffer_reader.h"
#include "grpcpp/support/proto_buffer_writer.h"

namespace eduba {

absl::Status Decode(grpc::ByteBuffer* bytes, google::protobuf::MessageLite* message) {
  const size_t size = bytes->Length();
  bool decoded = false;
  {
    grpc::ProtoBufferReader reader(bytes);
    decoded = reader.status().ok() && message->ParseFromZeroCopyStream(&reader);
  }
  bytes->Clear();
  if (decoded) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "a message of ", size, " bytes is not a whole ", message->GetTypeName(),
      ": it was damaged, cut or made from another proto file; nothing of it or after it was used"));
}

absl::Status DecodeOnly(const grpc::ByteBuffer& bytes, google::protobuf::MessageLite* message) {
  if (!bytes.Valid()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the call has no message, wanted one ", message->GetTypeName()));
  }
  grpc::ByteBuffer own = bytes;
  return Decode(&own, message);
}

grpc::ByteBuffer Encode(const google::protobuf::MessageLite& message) {
  grpc::ByteBuffer bytes;
  const int size = static_cast<int>(message.ByteSizeLong());
  {
    grpc::ProtoBufferWriter writer(&bytes, grpc::kProtoBufferWriterMaxBufferLength, size);
    EDUBA_CHECK(message.SerializeToZeroCopyStream(&writer));
  }
  return bytes;
}

}  // namespace eduba
