#include "worker/pages_service.h"

#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "rpc/raw.h"
#include "rpc/status.h"

namespace eduba {
namespace {

// Enough to fill the memory bandwidth that a network card leaves to copies.
constexpr int kCopyThreads = 4;

// One Upload call. At any time either a read is awaited or a message is being copied, and the end of both
// ends the call where the client has gone: OnCancel has nothing to do. Deletes itself when the call has
// ended.
class UploadStream final : public grpc::ServerReadReactor<grpc::ByteBuffer> {
 public:
  UploadStream(std::shared_ptr<CommandLoop> loop, TaskThreads* copying, grpc::CallbackServerContext* context,
               grpc::ByteBuffer* response)
      : loop_(std::move(loop)), copying_(copying), context_(context), response_(response) {
    const MutexLock lock(mutex_);
    if (loop_ == nullptr) {
      End(absl::UnavailableError("this worker is in no group at the moment; plan the append again"));
    } else {
      StartRead(&bytes_);
    }
  }

  void OnReadDone(bool ok) override {
    if (ok) return copying_->Add([this] { Copy(); });
    const MutexLock lock(mutex_);
    // A client that went away in the middle ends its stream the same way.
    if (context_->IsCancelled()) return End(CallerGone());
    v1::UploadResponse message;
    message.set_positions(positions_);
    *response_ = Encode(message);
    End(absl::OkStatus());
  }
  void OnDone() override {
    // Whoever called Finish may not have let go of the mutex yet.
    { const MutexLock lock(mutex_); }
    delete this;
  }

 private:
  ~UploadStream() override = default;

  void Copy() {
    const MutexLock lock(mutex_);
    v1::UploadRequest request;
    absl::Status status = Decode(&bytes_, &request);
    if (status.ok()) status = loop_->Upload(request);
    if (!status.ok()) return End(status);
    positions_ += request.count();
    StartRead(&bytes_);
  }
  void End(const absl::Status& status) { Finish(ToGrpc(status)); }

  const std::shared_ptr<CommandLoop> loop_;
  TaskThreads* const copying_;
  grpc::CallbackServerContext* const context_;
  grpc::ByteBuffer* const response_;

  // Only one thread works on the call at a time. The mutex is for what it hands over to the next one.
  Mutex mutex_;
  grpc::ByteBuffer bytes_;  // Belongs to gRPC while a read is awaited.
  int64_t positions_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace

PagesService::PagesService() : copying_(kCopyThreads) {}

void PagesService::SetCommandLoop(std::shared_ptr<CommandLoop> loop) {
  const MutexLock lock(mutex_);
  loop_ = std::move(loop);
}

grpc::ServerReadReactor<grpc::ByteBuffer>* PagesService::Upload(grpc::CallbackServerContext* context,
                                                                grpc::ByteBuffer* response) {
  std::shared_ptr<CommandLoop> loop;
  {
    const MutexLock lock(mutex_);
    loop = loop_;
  }
  return new UploadStream(std::move(loop), &copying_, context, response);
}

}  // namespace eduba
