#include "coordinator/thin_upload.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/pages.h"
#include "base/status_macros.h"
#include "rpc/channel.h"
#include "rpc/spec.h"
#include "rpc/status.h"

namespace eduba {

absl::StatusOr<std::vector<RoutedPiece>> RoutePiece(const v1::SessionSpec& spec, const v1::AppendPlan& plan,
                                                    const v1::UploadRequest& piece) {
  EDUBA_ASSIGN_OR_RETURN(const DType dtype, DTypeFromProto(piece.dtype()));
  const int64_t element = static_cast<int64_t>(DTypeBytes(dtype));
  const int64_t key_bytes = element * spec.kv_heads() * spec.head_dim();
  const int64_t value_bytes = element * spec.kv_heads() * spec.value_dim();
  const int64_t first = piece.first_position();
  const int64_t count = piece.count();
  if (count < 1 || first < plan.at() || count > plan.at() + plan.count() - first) {
    return absl::InvalidArgumentError(absl::StrCat("a piece of ", count, " positions at ", first,
                                                   " does not lie in the append [", plan.at(), ", ",
                                                   plan.at() + plan.count(), ")"));
  }
  if (piece.layer() < 0 || piece.layer() >= spec.layers()) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer is ", piece.layer(), ", wanted 0 to ", spec.layers() - 1));
  }
  if (static_cast<int64_t>(piece.keys().size()) != count * key_bytes ||
      static_cast<int64_t>(piece.values().size()) != count * value_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("a piece of ", count, " positions has ", piece.keys().size(), " bytes of keys and ",
                     piece.values().size(), " of values, wanted ", count * key_bytes, " and ",
                     count * value_bytes, " (", DTypeName(dtype), ")"));
  }
  std::vector<RoutedPiece> routed;
  const auto route = [&](int worker, PositionRange range) {
    RoutedPiece& part = routed.emplace_back();
    part.worker = worker;
    part.piece.set_append_id(plan.append_id());
    part.piece.set_layer(piece.layer());
    part.piece.set_first_position(range.begin);
    part.piece.set_count(static_cast<int32_t>(range.size()));
    part.piece.set_dtype(piece.dtype());
    part.piece.set_keys(piece.keys().substr((range.begin - first) * key_bytes, range.size() * key_bytes));
    part.piece.set_values(
        piece.values().substr((range.begin - first) * value_bytes, range.size() * value_bytes));
  };
  const PositionRange whole{first, first + count};
  // The first extent that does not end before the piece.
  auto extent =
      std::partition_point(plan.extents().begin(), plan.extents().end(),
                           [first](const v1::Extent& e) { return e.first_position() + e.count() <= first; });
  for (; extent != plan.extents().end() && extent->first_position() < whole.end; ++extent) {
    const PositionRange own =
        whole.Intersect({extent->first_position(), extent->first_position() + extent->count()});
    route(extent->worker(), own);
    const PositionRange replicated = own.Intersect({0, plan.replicate_below()});
    for (int worker = 0; !replicated.empty() && worker < plan.workers_size(); ++worker) {
      if (worker != extent->worker()) route(worker, replicated);
    }
  }
  return routed;
}

struct ThinUpload::Stream {
  std::unique_ptr<grpc::ClientContext> context;
  std::unique_ptr<v1::Pages::Stub> stub;
  std::unique_ptr<grpc::ClientWriter<v1::UploadRequest>> writer;
  v1::UploadResponse response;
  int64_t sent = 0;
  bool finished = false;

  absl::Status Finish(const std::string& address) {
    writer->WritesDone();
    finished = true;
    EDUBA_RETURN_IF_ERROR(Annotate(FromGrpc(writer->Finish()), absl::StrCat("worker ", address)));
    if (response.positions() == sent) return absl::OkStatus();
    return absl::InternalError(absl::StrCat("worker ", address, " received ", response.positions(),
                                            " positions of ", sent, " sent"));
  }
};

ThinUpload::ThinUpload(const grpc::ServerContext& context, v1::SessionSpec spec, v1::AppendPlan plan)
    : spec_(std::move(spec)), plan_(std::move(plan)) {
  for (const std::string& address : plan_.workers()) {
    auto stream = std::make_unique<Stream>();
    stream->context = grpc::ClientContext::FromServerContext(context);
    stream->stub = v1::Pages::NewStub(Connect(address, absl::FromChrono(context.deadline())));
    stream->writer = stream->stub->Upload(stream->context.get(), &stream->response);
    streams_.push_back(std::move(stream));
  }
}

ThinUpload::~ThinUpload() {
  for (const auto& stream : streams_) {
    if (stream->finished) continue;
    stream->context->TryCancel();
    (void)stream->writer->Finish();
  }
}

absl::Status ThinUpload::Send(const v1::UploadRequest& piece) {
  EDUBA_ASSIGN_OR_RETURN(const std::vector<RoutedPiece> routed, RoutePiece(spec_, plan_, piece));
  for (const RoutedPiece& part : routed) {
    Stream& stream = *streams_[part.worker];
    if (stream.writer->Write(part.piece)) {
      stream.sent += part.piece.count();
      continue;
    }
    // The worker has ended the stream and says why.
    const absl::Status status = stream.Finish(plan_.workers(part.worker));
    return status.ok() ? absl::InternalError("a worker ended its upload stream early") : status;
  }
  return absl::OkStatus();
}

absl::Status ThinUpload::Finish() {
  absl::Status first;
  for (size_t worker = 0; worker < streams_.size(); ++worker) {
    const absl::Status status = streams_[worker]->Finish(plan_.workers(static_cast<int>(worker)));
    if (first.ok()) first = status;
  }
  return first;
}

}  // namespace eduba
