#ifndef EDUBA_WORKER_PAGES_SERVICE_H_
#define EDUBA_WORKER_PAGES_SERVICE_H_

#include <memory>

#include "absl/base/thread_annotations.h"
#include "base/mutex.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "rpc/task_threads.h"
#include "worker/command_loop.h"

namespace eduba {

// The door of the bulk path: messages of an upload go to the worker's staged appends. Messages come encoded
// (rpc/raw.h says why). No upload holds a thread while it waits for its client; rows are copied into pages on
// a few threads of the service, one message of each upload at a time. The next message is read when the last
// one has been copied, so that a slow worker slows its clients.
class PagesService final : public v1::Pages::WithRawCallbackMethod_Upload<v1::Pages::Service> {
 public:
  PagesService();

  // Where uploads go that begin from now on; null: nowhere (UNAVAILABLE).
  void SetCommandLoop(std::shared_ptr<CommandLoop> loop);

  grpc::ServerReadReactor<grpc::ByteBuffer>* Upload(grpc::CallbackServerContext* context,
                                                    grpc::ByteBuffer* response) override;

 private:
  Mutex mutex_;
  std::shared_ptr<CommandLoop> loop_ ABSL_GUARDED_BY(mutex_);
  TaskThreads copying_;
};

}  // namespace eduba

#endif  // EDUBA_WORKER_PAGES_SERVICE_H_
