#include "client/client.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "base/wire_array.h"
#include "client/pieces.h"
#include "client/upload.h"
#include "eduba/v1/eduba.grpc.pb.h"
#include "grpcpp/client_context.h"
#include "rpc/channel.h"
#include "rpc/limits.h"
#include "rpc/status.h"

namespace eduba {
namespace {

constexpr int kListPageSize = 1000;
// Giving an append up is a courtesy (idle appends end by themselves), so it gets little time.
constexpr absl::Duration kAbortTimeout = absl::Seconds(5);
// For the last step of a generation that is over time, and its summary.
constexpr absl::Duration kSummaryGrace = absl::Seconds(10);

// Memory for one answer, used for all of a call.
class AnswerReader {
 public:
  explicit AnswerReader(const v1::SessionSpec& spec) : spec_(spec) {}

  // INTERNAL when the message is not the next rows of the answer.
  absl::StatusOr<AnsweredRows> Next(const v1::AttendResponse::Rows& message) {
    const int64_t row_heads = int64_t{message.count()} * spec_.query_heads();
    if (message.first_row() != rows_ || message.count() < 1 ||
        !ReadExactNumbers(message.outputs(), "outputs", row_heads * spec_.value_dim(), outputs_).ok() ||
        !ReadExactNumbers(message.lse(), "lse", row_heads, lse_).ok() ||
        !ReadExactNumbers(message.sink_mass(), "sink mass", row_heads, sink_mass_).ok()) {
      return absl::InternalError(absl::StrCat("the server's answer is malformed after row ", rows_));
    }
    const AnsweredRows rows = {rows_, message.count(), outputs_, lse_, sink_mass_};
    rows_ += message.count();
    return rows;
  }

  // Delivered so far.
  int64_t rows() const { return rows_; }

 private:
  const v1::SessionSpec& spec_;
  int64_t rows_ = 0;
  std::vector<float> outputs_;
  std::vector<float> lse_;
  std::vector<float> sink_mass_;
};

// The client's half of an Attend stream. Ends early, without an error of its own, when the server ends the
// call.
absl::Status SendQueries(grpc::ClientReaderWriter<v1::AttendRequest, v1::AttendResponse>& stream,
                         const v1::Session& session, int64_t rows, const QuerySource& source,
                         const AttendOptions& options) {
  v1::AttendRequest request;
  v1::AttendRequest::Header* header = request.mutable_header();
  header->set_session(session.name());
  header->set_layer(options.layer);
  header->set_policy(options.policy);
  header->set_positions(options.positions);
  if (!stream.Write(request)) return absl::OkStatus();

  const int64_t row_elements = int64_t{session.spec().query_heads()} * session.spec().head_dim();
  // Ten bytes are the longest varint of a position.
  const int64_t row_bytes = row_elements * static_cast<int64_t>(sizeof(float)) + (options.positions ? 10 : 0);
  const int64_t rows_max = std::max<int64_t>(1, kPayloadBytesMax / row_bytes);
  std::vector<float> queries;
  std::vector<int64_t> positions;
  for (int64_t first = 0; first < rows; first += rows_max) {
    const int64_t count = std::min(rows_max, rows - first);
    queries.resize(count * row_elements);
    positions.resize(options.positions ? count : 0);
    EDUBA_RETURN_IF_ERROR(source(first, absl::MakeSpan(queries), absl::MakeSpan(positions)));
    v1::AttendRequest::Rows* message = request.mutable_rows();
    message->set_queries(queries.data(), queries.size() * sizeof(float));
    message->mutable_positions()->Assign(positions.begin(), positions.end());
    if (!stream.Write(request)) return absl::OkStatus();
  }
  stream.WritesDone();
  return absl::OkStatus();
}

}  // namespace

class Client::Stub {
 public:
  explicit Stub(const ClientOptions& options) : server_(options.server), timeout_(options.timeout) {}

  // Connects when it is first asked for.
  v1::Eduba::Stub& service() {
    std::call_once(connected_,
                   [this] { service_ = v1::Eduba::NewStub(Connect(server_, absl::Now() + timeout_)); });
    return *service_;
  }

  absl::Status Explain(const grpc::Status& status) const {
    absl::Status result = FromGrpc(status);
    // gRPC's own words for these name sockets, resolvers and retry states.
    if (absl::IsUnavailable(result) && absl::StrContains(status.error_message(), "DNS resolution failed")) {
      return absl::UnavailableError(
          absl::StrCat("found no machine of the name in ", server_,
                       "; give HOST:PORT of a server with --server or EDUBA_SERVER"));
    }
    if (absl::IsUnavailable(result) && absl::StartsWith(status.error_message(), "failed to connect")) {
      return absl::UnavailableError(
          absl::StrCat("no server answers at ", server_,
                       "; start one with 'eduba up', or name it with --server or EDUBA_SERVER"));
    }
    return result;
  }

  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(grpc::Status (v1::Eduba::Stub::*method)(grpc::ClientContext*, const Request&,
                                                                        Response*),
                                const Request& request, absl::Time deadline) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(deadline));
    Response response;
    const absl::Status status = Explain((service().*method)(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }

 private:
  const std::string server_;
  const absl::Duration timeout_;
  std::once_flag connected_;
  std::unique_ptr<v1::Eduba::Stub> service_;
};

Client::Client(ClientOptions options) : options_(std::move(options)), stub_(new Stub(options_)) {}

Client::~Client() = default;

absl::StatusOr<v1::Session> Client::CreateSession(const std::string& name, const v1::SessionSpec& spec) {
  v1::CreateSessionRequest request;
  request.set_name(name);
  *request.mutable_spec() = spec;
  return stub_->Call(&v1::Eduba::Stub::CreateSession, request, absl::Now() + options_.timeout);
}

absl::StatusOr<v1::Session> Client::GetSession(const std::string& name) {
  v1::GetSessionRequest request;
  request.set_name(name);
  return stub_->Call(&v1::Eduba::Stub::GetSession, request, absl::Now() + options_.timeout);
}

absl::StatusOr<std::vector<v1::Session>> Client::ListSessions() {
  const absl::Time deadline = absl::Now() + options_.timeout;
  std::vector<v1::Session> sessions;
  v1::ListSessionsRequest request;
  request.set_page_size(kListPageSize);
  do {
    EDUBA_ASSIGN_OR_RETURN(const v1::ListSessionsResponse page,
                           stub_->Call(&v1::Eduba::Stub::ListSessions, request, deadline));
    sessions.insert(sessions.end(), page.sessions().begin(), page.sessions().end());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  return sessions;
}

absl::Status Client::DeleteSession(const std::string& name) {
  v1::DeleteSessionRequest request;
  request.set_name(name);
  return stub_->Call(&v1::Eduba::Stub::DeleteSession, request, absl::Now() + options_.timeout).status();
}

absl::StatusOr<v1::AppendReceipt> Client::Append(const v1::Session& session, int64_t count,
                                                 const RowSource& source, const AppendOptions& options) {
  const absl::Time deadline = absl::Now() + options_.timeout;
  // 1. Plan.
  v1::PlanAppendRequest request;
  request.set_session(session.name());
  if (options.at) request.set_at(*options.at);
  request.set_count(count);
  EDUBA_ASSIGN_OR_RETURN(const v1::AppendPlan plan,
                         stub_->Call(&v1::Eduba::Stub::PlanAppend, request, deadline));

  // 2. Upload.
  const absl::Status uploaded = UploadToWorkers(session.spec(), plan, source, options.progress, deadline);
  if (!uploaded.ok()) {
    v1::AbortAppendRequest abort;
    abort.set_append_id(plan.append_id());
    // Its own error would hide the one that matters; an idle append ends by itself.
    stub_->Call(&v1::Eduba::Stub::AbortAppend, abort, absl::Now() + kAbortTimeout).status().IgnoreError();
    return uploaded;
  }

  // 3. to 5. Commit; the server seals and publishes.
  v1::CommitAppendRequest commit;
  commit.set_append_id(plan.append_id());
  auto receipt = stub_->Call(&v1::Eduba::Stub::CommitAppend, commit, deadline);
  if (absl::IsUnavailable(receipt.status()) || absl::IsDeadlineExceeded(receipt.status())) {
    return Annotate(receipt.status(),
                    absl::StrCat("the commit got no answer and may have happened; repeat the "
                                 "append at position ",
                                 plan.at(), ", which is safe"));
  }
  return receipt;
}

absl::StatusOr<v1::AppendReceipt> Client::AppendProxied(const v1::Session& session, int64_t count,
                                                        const RowSource& source,
                                                        const AppendOptions& options) {
  const v1::SessionSpec& spec = session.spec();
  const DType wire = WireType(source.dtype(), spec);
  // Positions in pieces are absolute, so the start has to be known before the first one.
  int64_t at = 0;
  if (options.at) {
    at = *options.at;
  } else {
    EDUBA_ASSIGN_OR_RETURN(const v1::Session current, GetSession(session.name()));
    at = current.length();
  }
  const auto pieces = CutIntoPieces({{at, at + count}}, spec.layers(), PieceRows(spec, wire));
  const int64_t row_bytes = WireRowBytes(spec, wire).total();

  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + options_.timeout));
  v1::AppendReceipt receipt;
  const auto writer = stub_->service().Append(&context, &receipt);
  v1::AppendRequest request;
  request.mutable_plan()->set_session(session.name());
  request.mutable_plan()->set_at(at);
  request.mutable_plan()->set_count(count);
  bool open = writer->Write(request);
  PieceReader reader(spec, source, at);
  int64_t sent = 0;
  for (const Piece& piece : pieces) {
    if (!open) break;  // The server has ended the call; Finish says why.
    const absl::Status read = reader.Read(piece, request.mutable_piece());
    if (!read.ok()) {
      context.TryCancel();
      (void)writer->Finish();
      return read;
    }
    open = writer->Write(request);
    sent += piece.count * row_bytes;
    if (options.progress) options.progress(sent, count * spec.layers() * row_bytes);
  }
  writer->WritesDone();
  const absl::Status status = stub_->Explain(writer->Finish());
  if (!status.ok()) return status;
  return receipt;
}

absl::StatusOr<v1::AttendSummary> Client::Attend(const v1::Session& session, int64_t rows,
                                                 const QuerySource& source, const ResultSink& sink,
                                                 const AttendOptions& options) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + options_.timeout));
  const auto stream = stub_->service().Attend(&context);
  // Rows are sent on a second thread: answers come while later rows are still sent, and a call whose answers
  // nobody reads would stop.
  absl::Status sent;
  std::thread sender([&] {
    sent = SendQueries(*stream, session, rows, source, options);
    if (!sent.ok()) context.TryCancel();
  });

  AnswerReader answers(session.spec());
  std::optional<v1::AttendSummary> summary;
  absl::Status taken;
  v1::AttendResponse response;
  while (taken.ok() && stream->Read(&response)) {
    if (response.has_summary()) {
      summary = response.summary();
      continue;
    }
    const auto next = answers.Next(response.rows());
    taken = next.ok() ? sink(*next) : next.status();
  }
  if (!taken.ok()) context.TryCancel();
  sender.join();
  const absl::Status finished = stub_->Explain(stream->Finish());
  if (!taken.ok()) return taken;
  if (!sent.ok()) return sent;
  if (!finished.ok()) return finished;
  if (!summary || answers.rows() != rows || summary->rows() != rows) {
    return absl::InternalError(absl::StrCat("the server ended the answer after ", answers.rows(), " of ",
                                            rows, " rows: take nothing of it, and repeat the call"));
  }
  return *std::move(summary);
}

absl::StatusOr<v1::Model> Client::GetModel() {
  return stub_->Call(&v1::Eduba::Stub::GetModel, v1::GetModelRequest(), absl::Now() + options_.timeout);
}

absl::StatusOr<v1::AppendTokensReceipt> Client::AppendTokens(const std::string& session,
                                                             absl::Span<const int32_t> ids,
                                                             const AppendOptions& options) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + options_.timeout));
  v1::AppendTokensReceipt receipt;
  const auto writer = stub_->service().AppendTokens(&context, &receipt);
  const auto count = static_cast<int64_t>(ids.size());
  bool open = true;
  for (int64_t first = 0; open && (first < count || first == 0); first += kTokenIdsMax) {
    const absl::Span<const int32_t> piece = ids.subspan(first, kTokenIdsMax);
    v1::AppendTokensRequest request;
    if (first == 0) {
      request.set_session(session);
      if (options.at) request.set_at(*options.at);
    }
    request.set_ids(piece.data(), piece.size() * sizeof(int32_t));
    open = writer->Write(request);
    if (options.progress) options.progress(std::min(count, first + kTokenIdsMax), count);
  }
  writer->WritesDone();
  const absl::Status status = stub_->Explain(writer->Finish());
  if (!status.ok()) return status;
  return receipt;
}

absl::StatusOr<v1::GenerateSummary> Client::Generate(
    v1::GenerateRequest request,
    const std::function<absl::Status(const v1::GenerateResponse::Tokens& tokens)>& sink) {
  if (request.time_limit_ms() == 0) {
    request.set_time_limit_ms(std::max<int64_t>(1, absl::ToInt64Milliseconds(options_.timeout)));
  }
  grpc::ClientContext context;
  // Later than the limit, so that the server can still say how far it came.
  context.set_deadline(
      absl::ToChronoTime(absl::Now() + absl::Milliseconds(request.time_limit_ms()) + kSummaryGrace));
  const auto stream = stub_->service().Generate(&context, request);
  std::optional<v1::GenerateSummary> summary;
  absl::Status taken;
  v1::GenerateResponse response;
  while (taken.ok() && stream->Read(&response)) {
    if (response.has_summary()) {
      summary = response.summary();
    } else {
      taken = sink(response.tokens());
    }
  }
  if (!taken.ok()) context.TryCancel();
  const absl::Status finished = stub_->Explain(stream->Finish());
  if (!taken.ok()) return taken;
  if (!finished.ok()) return finished;
  if (!summary) return absl::InternalError("the server ended the generation without a summary");
  return *std::move(summary);
}

absl::StatusOr<std::vector<float>> Client::Score(const std::string& session, absl::Span<const int32_t> ids,
                                                 std::vector<float>* sink_mass) {
  v1::ScoreRequest request;
  request.set_session(session);
  request.set_ids(ids.data(), ids.size() * sizeof(int32_t));
  request.set_sink_mass(sink_mass != nullptr);
  EDUBA_ASSIGN_OR_RETURN(const v1::ScoreResponse response,
                         stub_->Call(&v1::Eduba::Stub::Score, request, absl::Now() + options_.timeout));
  std::vector<float> log_probs;
  if (!ReadExactNumbers(response.log_probs(), "log-probabilities", std::ssize(ids), log_probs).ok()) {
    return absl::InternalError(absl::StrCat("the server answered ", ids.size(), " tokens with ",
                                            response.log_probs().size(), " bytes"));
  }
  if (sink_mass != nullptr &&
      !ReadNumbers(response.sink_mass(), "sink mass", *sink_mass, /*count_min=*/1).ok()) {
    return absl::InternalError(
        absl::StrCat("the server answered with ", response.sink_mass().size(), " bytes of sink mass"));
  }
  return log_probs;
}

absl::StatusOr<std::vector<float>> Client::Embed(const std::string& session, absl::Span<const int64_t> ranges,
                                                 v1::Pool pool) {
  v1::EmbedRequest request;
  request.set_session(session);
  request.set_ranges(ranges.data(), ranges.size() * sizeof(int64_t));
  request.set_pool(pool);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + options_.timeout));
  const auto stream = stub_->service().Embed(&context, request);
  std::vector<float> all;
  std::vector<float> piece;
  int64_t rows = 0;
  bool sound = true;
  v1::EmbedResponse response;
  while (stream->Read(&response)) {
    sound = sound && response.first_range() == rows && ReadNumbers(response.vectors(), "vectors", piece).ok();
    all.insert(all.end(), piece.begin(), piece.end());
    rows += response.count();
  }
  const absl::Status finished = stub_->Explain(stream->Finish());
  if (!finished.ok()) return finished;
  if (!sound || rows * 2 != static_cast<int64_t>(ranges.size()) ||
      all.size() % std::max<size_t>(1, rows) != 0) {
    return absl::InternalError(
        absl::StrCat("the server answered ", ranges.size() / 2, " ranges with ", rows));
  }
  return all;
}

absl::StatusOr<v1::Session> Client::ForkSession(const std::string& session, const std::string& name) {
  v1::ForkSessionRequest request;
  request.set_session(session);
  request.set_name(name);
  return stub_->Call(&v1::Eduba::Stub::ForkSession, request, absl::Now() + options_.timeout);
}

absl::StatusOr<v1::ListWorkersResponse> Client::ListWorkers() {
  return stub_->Call(&v1::Eduba::Stub::ListWorkers, v1::ListWorkersRequest(), absl::Now() + options_.timeout);
}

}  // namespace eduba
