#ifndef EDUBA_WORKER_PAGES_SERVICE_H_
#define EDUBA_WORKER_PAGES_SERVICE_H_

#include <memory>
#include <mutex>

#include "eduba/v1/eduba.grpc.pb.h"
#include "worker/engine.h"

namespace eduba {

// The door of the bulk path: messages of an upload go to the engine's staged appends.
class PagesService final : public v1::Pages::Service {
 public:
  // Where uploads go from now on; null: nowhere (UNAVAILABLE).
  void SetEngine(std::shared_ptr<Engine> engine);

  grpc::Status Upload(grpc::ServerContext* context, grpc::ServerReader<v1::UploadRequest>* reader,
                      v1::UploadResponse* response) override;

 private:
  std::mutex mutex_;
  std::shared_ptr<Engine> engine_;  // Guarded by mutex_.
};

}  // namespace eduba

#endif  // EDUBA_WORKER_PAGES_SERVICE_H_
