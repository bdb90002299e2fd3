#include "client/upload.h"

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "client/pieces.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "grpcpp/client_context.h"
#include "rpc/channel.h"
#include "rpc/status.h"

namespace eduba {
namespace {

// Streams in all: enough that serialising, the kernel's copy and the worker's parsing overlap; every worker
// gets at least one.
constexpr int kStreamsTarget = 4;

// What the streams of one upload share.
class Upload {
 public:
  Upload(int64_t total_bytes, const Progress& progress) : total_bytes_(total_bytes), progress_(progress) {}

  // False when the upload has failed already. The context must outlive the upload.
  bool Register(grpc::ClientContext* context) {
    const MutexLock lock(mutex_);
    contexts_.push_back(context);
    return status_.ok();
  }

  // Keeps the first error and ends every stream: the others' CANCELLED comes after it and is not kept.
  void Fail(const absl::Status& status) {
    const MutexLock lock(mutex_);
    if (!status_.ok()) return;
    status_ = status;
    for (grpc::ClientContext* context : contexts_) context->TryCancel();
  }

  void Sent(int64_t bytes) {
    const MutexLock lock(mutex_);
    sent_bytes_ += bytes;
    if (progress_) progress_(sent_bytes_, total_bytes_);
  }

  absl::Status status() {
    const MutexLock lock(mutex_);
    return status_;
  }

 private:
  const int64_t total_bytes_;
  const Progress& progress_;
  Mutex mutex_;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::vector<grpc::ClientContext*> contexts_ ABSL_GUARDED_BY(mutex_);
  int64_t sent_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

// What one worker is sent; its streams take pieces in turn.
struct WorkerQueue {
  std::string address;
  std::vector<Piece> pieces;
  std::atomic<size_t> next{0};
};

struct Stream {
  WorkerQueue* queue;
  grpc::ClientContext context;
  std::thread thread;
};

absl::Status RunStream(uint64_t append_id, PieceReader reader, absl::Time deadline, Stream& stream,
                       Upload& upload) {
  // A channel of its own: streams that share a connection share its flow control and its one thread.
  const auto stub = v1::Pages::NewStub(Connect(stream.queue->address, deadline));
  v1::UploadResponse response;
  const auto writer = stub->Upload(&stream.context, &response);
  v1::UploadRequest request;
  request.set_append_id(append_id);
  int64_t positions = 0;
  for (;;) {
    const size_t index = stream.queue->next.fetch_add(1);
    if (index >= stream.queue->pieces.size()) break;
    const Piece& piece = stream.queue->pieces[index];
    const absl::Status read = reader.Read(piece, &request);
    if (!read.ok()) {
      upload.Fail(read);
      break;
    }
    if (!writer->Write(request)) break;  // The worker has ended the stream; Finish says why.
    positions += piece.count;
    upload.Sent(static_cast<int64_t>(request.keys().size() + request.values().size()));
  }
  writer->WritesDone();
  EDUBA_RETURN_IF_ERROR(Annotate(FromGrpc(writer->Finish()), absl::StrCat("worker ", stream.queue->address)));
  if (response.positions() != positions) {
    return absl::InternalError(absl::StrCat("worker ", stream.queue->address, " received ",
                                            response.positions(), " positions of ", positions, " sent"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status UploadToWorkers(const v1::SessionSpec& spec, const v1::AppendPlan& plan, const RowSource& source,
                             const Progress& progress, absl::Time deadline) {
  EDUBA_ASSIGN_OR_RETURN(const auto ranges, RangesByWorker(plan));
  const DType wire = WireType(source.dtype(), spec);
  const int64_t row_bytes = WireRowBytes(spec, wire).total();

  std::vector<std::unique_ptr<WorkerQueue>> queues;
  int64_t total_bytes = 0;
  for (size_t worker = 0; worker < ranges.size(); ++worker) {
    if (ranges[worker].empty()) continue;
    auto queue = std::make_unique<WorkerQueue>();
    queue->address = plan.workers(static_cast<int>(worker));
    queue->pieces = CutIntoPieces(ranges[worker], spec.layers(), PieceRows(spec, wire));
    for (const Piece& piece : queue->pieces) total_bytes += piece.count * row_bytes;
    queues.push_back(std::move(queue));
  }

  Upload upload(total_bytes, progress);
  const size_t streams_per_worker = std::max<size_t>(1, kStreamsTarget / queues.size());
  std::vector<std::unique_ptr<Stream>> streams;
  for (const auto& queue : queues) {
    for (size_t i = 0; i < std::min(streams_per_worker, queue->pieces.size()); ++i) {
      streams.push_back(std::make_unique<Stream>());
      streams.back()->queue = queue.get();
      streams.back()->context.set_deadline(absl::ToChronoTime(deadline));
    }
  }
  for (const auto& stream : streams) {
    if (!upload.Register(&stream->context)) break;
    stream->thread = std::thread([&, s = stream.get()] {
      const absl::Status status =
          RunStream(plan.append_id(), PieceReader(spec, source, plan.at()), deadline, *s, upload);
      if (!status.ok()) upload.Fail(status);
    });
  }
  for (const auto& stream : streams) {
    if (stream->thread.joinable()) stream->thread.join();
  }
  return upload.status();
}

}  // namespace eduba
