#include "worker/pages_service.h"

#include <utility>

#include "grpcpp/support/method_handler.h"
#include "rpc/raw.h"
#include "rpc/status.h"

namespace eduba {

PagesService::PagesService() {
  MarkMethodStreamed(
      MethodIndex("eduba.v1.Pages.Upload"),
      new grpc::internal::ClientStreamingHandler<PagesService, grpc::ByteBuffer, v1::UploadResponse>(
          [](PagesService* self, grpc::ServerContext* context, grpc::ServerReader<grpc::ByteBuffer>* reader,
             v1::UploadResponse* response) { return self->UploadEncoded(context, reader, response); },
          this));
}

void PagesService::SetCommandLoop(std::shared_ptr<CommandLoop> loop) {
  const std::scoped_lock lock(mutex_);
  loop_ = std::move(loop);
}

grpc::Status PagesService::UploadEncoded(grpc::ServerContext* context,
                                         grpc::ServerReader<grpc::ByteBuffer>* reader,
                                         v1::UploadResponse* response) {
  std::shared_ptr<CommandLoop> loop;
  {
    const std::scoped_lock lock(mutex_);
    loop = loop_;
  }
  if (loop == nullptr) {
    return ToGrpc(absl::UnavailableError("this worker is in no group at the moment; plan the append again"));
  }
  grpc::ByteBuffer bytes;
  v1::UploadRequest request;
  int64_t positions = 0;
  while (reader->Read(&bytes)) {
    absl::Status status = Decode(&bytes, &request);
    if (status.ok()) status = loop->Upload(request);
    if (!status.ok()) return ToGrpc(status);
    positions += request.count();
  }
  // A client that went away in the middle ends its stream the same way; it learns nothing from the answer.
  if (context->IsCancelled()) return grpc::Status::CANCELLED;
  response->set_positions(positions);
  return grpc::Status::OK;
}

}  // namespace eduba
