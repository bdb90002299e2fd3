#include "rpc/raw.h"

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "google/protobuf/descriptor.h"
#include "grpcpp/impl/codegen/proto_utils.h"

namespace eduba {

absl::Status Decode(grpc::ByteBuffer* bytes, google::protobuf::MessageLite* message) {
  const size_t size = bytes->Length();
  if (grpc::SerializationTraits<google::protobuf::MessageLite>::Deserialize(bytes, message).ok()) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "a message of ", size, " bytes is not a whole ", message->GetTypeName(),
      ": it was damaged, cut or made from another proto file; nothing of it or after it was used"));
}

absl::Status DecodeOnly(bool read, grpc::ByteBuffer* bytes, google::protobuf::MessageLite* message) {
  if (read) return Decode(bytes, message);
  return absl::InvalidArgumentError(
      absl::StrCat("the call has no message, wanted one ", message->GetTypeName()));
}

grpc::ByteBuffer Encode(const google::protobuf::MessageLite& message) {
  grpc::ByteBuffer bytes;
  bool own = false;
  EDUBA_CHECK(
      grpc::SerializationTraits<google::protobuf::MessageLite>::Serialize(message, &bytes, &own).ok());
  return bytes;
}

int MethodIndex(const std::string& full_name) {
  const auto* method = google::protobuf::DescriptorPool::generated_pool()->FindMethodByName(full_name);
  EDUBA_CHECK(method != nullptr);
  return method->index();
}

}  // namespace eduba
