#ifndef EDUBA_COORDINATOR_ATTEND_STREAM_H_
#define EDUBA_COORDINATOR_ATTEND_STREAM_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "coordinator/runtime.h"
#include "eduba/v1/eduba.pb.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"

namespace eduba {

// INVALID_ARGUMENT names the first NaN or Inf of f32 [rows, query_heads, head_dim]; `first_row` is the number
// of the first one.
absl::Status CheckFiniteQueries(const std::string& queries, const v1::SessionSpec& spec, int64_t first_row);

// One Attend call, its messages still encoded (rpc/raw.h says why). It reads queries while the client
// has not taken all answers yet, up to a bounded number of bytes. Deletes itself when the stream has ended.
class AttendStream final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>, public Caller {
 public:
  explicit AttendStream(Runtime* runtime);

  void OnStarted(const AttendStarted& started) override;
  void OnRows(v1::AttendResponse::Rows&& rows) override;
  void OnReply(absl::StatusOr<Answer> answer) override;

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  ~AttendStream() override = default;

  struct Outgoing {
    grpc::ByteBuffer bytes;
    int64_t rows = 0;
  };

  void Begin(bool ok);
  void Fail(const absl::Status& status);
  void Enqueue(const v1::AttendResponse& response) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void EndWith(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ReadMore() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Runtime* const runtime_;
  const absl::Time start_;
  grpc::ByteBuffer bytes_;
  v1::AttendRequest incoming_;
  int64_t received_rows_ = 0;

  // Never held while the runtime is called: the runtime calls On... with its own mutex held.
  Mutex mutex_;
  RequestId id_ ABSL_GUARDED_BY(mutex_) = 0;  // 0 until the header has been handed in
  std::shared_ptr<const v1::SessionSpec> spec_ ABSL_GUARDED_BY(mutex_);
  // Bytes of a query or of an answer, whichever is more.
  int64_t row_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  // Read from the client and not yet answered to it.
  int64_t outstanding_rows_ ABSL_GUARDED_BY(mutex_) = 0;
  // A message is awaited or being worked on: bytes_ and incoming_ are taken.
  bool reading_ ABSL_GUARDED_BY(mutex_) = true;
  bool read_all_ ABSL_GUARDED_BY(mutex_) = false;
  std::deque<Outgoing> queue_ ABSL_GUARDED_BY(mutex_);  // the front is being written
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status end_ ABSL_GUARDED_BY(mutex_);
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_ATTEND_STREAM_H_
