#include "worker/pages_service.h"

#include <utility>

#include "rpc/status.h"

namespace eduba {

void PagesService::SetEngine(std::shared_ptr<Engine> engine) {
  const std::scoped_lock lock(mutex_);
  engine_ = std::move(engine);
}

grpc::Status PagesService::Upload(grpc::ServerContext* context, grpc::ServerReader<v1::UploadRequest>* reader,
                                  v1::UploadResponse* response) {
  std::shared_ptr<Engine> engine;
  {
    const std::scoped_lock lock(mutex_);
    engine = engine_;
  }
  if (engine == nullptr) {
    return ToGrpc(absl::UnavailableError("this worker is in no group at the moment; plan the append again"));
  }
  v1::UploadRequest request;
  int64_t positions = 0;
  while (reader->Read(&request)) {
    const absl::Status status = engine->Upload(request);
    if (!status.ok()) return ToGrpc(status);
    positions += request.count();
  }
  // A client that went away in the middle ends its stream the same way; it learns nothing from the answer.
  if (context->IsCancelled()) return grpc::Status::CANCELLED;
  response->set_positions(positions);
  return grpc::Status::OK;
}

}  // namespace eduba
