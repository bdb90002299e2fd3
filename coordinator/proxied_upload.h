#ifndef EDUBA_COORDINATOR_PROXIED_UPLOAD_H_
#define EDUBA_COORDINATOR_PROXIED_UPLOAD_H_

#include <functional>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "eduba/v1/eduba.pb.h"
#include "grpcpp/server_context.h"

namespace eduba {

// Which worker gets which part of a piece: the extents of `plan` that it touches, and the replicated part for
// all workers. By worker; pieces are cut at the borders. INVALID_ARGUMENT when the piece does not fit the
// plan or its arrays have the wrong sizes.
struct RoutedPiece {
  int worker = 0;
  v1::UploadRequest piece;
};
absl::StatusOr<std::vector<RoutedPiece>> RoutePiece(const v1::SessionSpec& spec, const v1::AppendPlan& plan,
                                                    const v1::UploadRequest& piece);

// Step 2 of an append on behalf of a client that cannot reach the workers: forwards its pieces, one at a
// time, to the workers that need them, over one Pages.Upload stream to each. Bound to the deadline and the
// cancellation of the client's call. Nothing blocks: what takes time ends with a callback, which comes on one
// of gRPC's threads, or before the function returns, and never with a lock of this class held.
class ProxiedUpload {
 public:
  using Callback = std::function<void(absl::Status status)>;

  // `call` is the client's, and must live until Finish or Cancel has called back.
  ProxiedUpload(const grpc::CallbackServerContext* call, v1::SessionSpec spec, v1::AppendPlan plan);
  // REQUIRES: nothing was sent, or Finish or Cancel has called back.
  ~ProxiedUpload();

  // Calls back when all parts of the piece have left, so that a slow worker slows its client: nothing but
  // this piece is kept. After an error the upload can only be cancelled. REQUIRES: the last Send has called
  // back.
  void Send(const v1::UploadRequest& piece, Callback sent);
  // OK when all workers have received what they were sent. REQUIRES: the last Send has called back.
  void Finish(Callback done);
  // Ends all streams, and calls back with CANCELLED when they have ended. A Send or Finish that is under way
  // calls back as well, with an error. At any time and from any thread, once.
  void Cancel(Callback done);

 private:
  struct Stream;

  void Push(int worker, v1::UploadRequest part) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Open(Stream& stream) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // What gRPC says of a stream.
  void PartSent(Stream& stream, bool ok);
  void Ended(Stream& stream, const absl::Status& status);
  static absl::Status Result(const Stream& stream, const absl::Status& status);
  // The callbacks whose time has come. They are called after the lock is released.
  std::vector<std::function<void()>> TakeDue() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const grpc::CallbackServerContext* const call_;
  const v1::SessionSpec spec_;
  const v1::AppendPlan plan_;

  Mutex mutex_;
  std::vector<std::unique_ptr<Stream>> streams_ ABSL_GUARDED_BY(mutex_);  // by worker; null: has no part yet
  int open_streams_ ABSL_GUARDED_BY(mutex_) = 0;
  int unsent_parts_ ABSL_GUARDED_BY(mutex_) = 0;  // of the piece that is being sent
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);  // the first of any stream
  Callback sent_ ABSL_GUARDED_BY(mutex_);
  Callback finished_ ABSL_GUARDED_BY(mutex_);
  Callback cancelled_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_PROXIED_UPLOAD_H_
