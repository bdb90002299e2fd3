#ifndef EDUBA_WORKER_PAGES_SERVICE_H_
#define EDUBA_WORKER_PAGES_SERVICE_H_

#include <memory>
#include <mutex>

#include "eduba/v1/eduba.grpc.pb.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/sync_stream.h"
#include "worker/command_loop.h"

namespace eduba {

// The door of the bulk path: messages of an upload go to the worker's staged appends.
class PagesService final : public v1::Pages::Service {
 public:
  PagesService();

  // Where uploads go from now on; null: nowhere (UNAVAILABLE).
  void SetCommandLoop(std::shared_ptr<CommandLoop> loop);

 private:
  // Upload, its messages still encoded (rpc/raw.h says why).
  grpc::Status UploadEncoded(grpc::ServerContext* context, grpc::ServerReader<grpc::ByteBuffer>* reader,
                             v1::UploadResponse* response);

  std::mutex mutex_;
  std::shared_ptr<CommandLoop> loop_;  // Guarded by mutex_.
};

}  // namespace eduba

#endif  // EDUBA_WORKER_PAGES_SERVICE_H_
