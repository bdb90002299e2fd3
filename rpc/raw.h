#ifndef EDUBA_RPC_RAW_H_
#define EDUBA_RPC_RAW_H_

#include <functional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "google/protobuf/message_lite.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/method_handler.h"
#include "grpcpp/support/status.h"
#include "grpcpp/support/sync_stream.h"
#include "rpc/status.h"

namespace eduba {

// Messages that we decode ourselves. gRPC's own readers answer "no more" alike for a client that has said all
// and for a message that cannot be decoded, so a stream with a broken message in the middle would look
// complete; and a call of one broken message ends as INTERNAL with no text.

// Takes `bytes`. INVALID_ARGUMENT when they are not a message of that type.
absl::Status Decode(grpc::ByteBuffer* bytes, google::protobuf::MessageLite* message);
grpc::ByteBuffer Encode(const google::protobuf::MessageLite& message);

// Where the method "package.Service.Method" stands in its service: what gRPC's generated code calls it by.
int MethodIndex(const std::string& full_name);

// The only message of a call. INVALID_ARGUMENT when there is none, or it is not of that type.
absl::Status DecodeOnly(bool read, grpc::ByteBuffer* bytes, google::protobuf::MessageLite* message);
template <typename Reader>
absl::Status ReadOnly(Reader* reader, google::protobuf::MessageLite* message) {
  grpc::ByteBuffer bytes;
  const bool read = reader->Read(&bytes);
  return DecodeOnly(read, &bytes, message);
}

// For grpc::Service::MarkMethodStreamed, which takes them over: methods of one message that decode it
// themselves. A unary one,
template <typename Request, typename Response>
grpc::internal::MethodHandler* DecodingUnary(
    std::function<grpc::Status(grpc::ServerContext*, const Request*, Response*)> call) {
  using Stream = grpc::ServerUnaryStreamer<grpc::ByteBuffer, Response>;
  return new grpc::internal::StreamedUnaryHandler<grpc::ByteBuffer, Response>(
      [call = std::move(call)](grpc::ServerContext* context, Stream* stream) {
        Request request;
        const absl::Status read = ReadOnly(stream, &request);
        if (!read.ok()) return ToGrpc(read);
        Response response;
        grpc::Status status = call(context, &request, &response);
        if (status.ok()) stream->Write(response);
        return status;
      });
}
// and one that is answered by a stream.
template <typename Request, typename Response>
grpc::internal::MethodHandler* DecodingServerStreaming(
    std::function<grpc::Status(grpc::ServerContext*, const Request*,
                               grpc::internal::WriterInterface<Response>*)>
        call) {
  using Stream = grpc::ServerSplitStreamer<grpc::ByteBuffer, Response>;
  return new grpc::internal::SplitServerStreamingHandler<grpc::ByteBuffer, Response>(
      [call = std::move(call)](grpc::ServerContext* context, Stream* stream) {
        Request request;
        const absl::Status read = ReadOnly(stream, &request);
        return read.ok() ? call(context, &request, stream) : ToGrpc(read);
      });
}

}  // namespace eduba

#endif  // EDUBA_RPC_RAW_H_
