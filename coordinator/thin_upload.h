#ifndef EDUBA_COORDINATOR_THIN_UPLOAD_H_
#define EDUBA_COORDINATOR_THIN_UPLOAD_H_

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "eduba/v1/eduba.pb.h"
#include "grpcpp/client_context.h"
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

// Step 2 of an append on behalf of a client that cannot reach the workers: forwards its pieces. Bound to the
// deadline and cancellation of the client's call.
class ThinUpload {
 public:
  ThinUpload(const grpc::ServerContext& context, v1::SessionSpec spec, v1::AppendPlan plan);
  // Cancels the streams unless Finish was called.
  ~ThinUpload();

  absl::Status Send(const v1::UploadRequest& piece);
  // OK when all workers have received what they were sent.
  absl::Status Finish();

 private:
  struct Stream;

  const v1::SessionSpec spec_;
  const v1::AppendPlan plan_;
  std::vector<std::unique_ptr<Stream>> streams_;  // by worker
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_THIN_UPLOAD_H_
