// ClusterState: queries. The numbers are those of docs/flows.md.
#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "coordinator/placement.h"
#include "coordinator/state.h"
#include "rpc/limits.h"

namespace eduba {
namespace {

static_assert(std::endian::native == std::endian::little, "path counts travel as little-endian int32");

// While one step computes, the next is on its way to the workers.
constexpr int kStepsInFlightMax = 2;
// A worker keeps one partial per row, head and page: what a step may make it hold.
constexpr int64_t kPartialBytesMax = int64_t{256} << 20;
// Multiply-adds of one step on the busiest rank: about four seconds of two slow cores (8e9 a second each), so
// that calls take turns, and what nobody wants any more is soon over. Enough for a step to be matrix work: 18
// rows of 50 million cells of 64 + 16 numbers.
constexpr int64_t kStepWorkMax = int64_t{1} << 36;

// Of the ranks' errors the one that says most: the ranks that only hear of a bad number elsewhere say less
// than the one whose page it is in.
bool SaysMore(const absl::Status& a, const absl::Status& b) {
  const auto names_page = [](const absl::Status& status) {
    return std::string(status.message()).find("page") != std::string::npos;
  };
  if (names_page(a) != names_page(b)) return names_page(a);
  return a.message().size() > b.message().size();
}

}  // namespace

// 1. The call sees the length that is committed now.
void ClusterState::StartAttend(RequestId request, const v1::AttendRequest::Header& header,
                               int64_t /*now_ms*/) {
  const absl::StatusOr<SessionEntry*> found = FindTensorSession(header.session());
  if (!found.ok()) return Respond(request, found.status());
  const SessionEntry& session = **found;
  const v1::SessionSpec& spec = *session.spec;
  const std::string query = absl::StrCat("query of session '", session.record.name, "'");
  if (header.layer() < 0 || header.layer() >= spec.layers()) {
    return Respond(request, absl::InvalidArgumentError(absl::StrCat(query, ": layer is ", header.layer(),
                                                                    ", wanted 0 to ", spec.layers() - 1)));
  }
  if (!v1::Policy_IsValid(header.policy())) {
    return Respond(request, absl::InvalidArgumentError(absl::StrCat(query, ": policy ", header.policy(),
                                                                    " is not known: use global or window")));
  }
  if (header.policy() == v1::POLICY_WINDOW && spec.window() == 0) {
    return Respond(request, absl::FailedPreconditionError(absl::StrCat(
                                query, ": the session was created without a window: use policy global")));
  }
  if (session.record.length() == 0) {
    return Respond(
        request, absl::FailedPreconditionError(absl::StrCat(query, ": the session is empty: append first")));
  }
  BatchKey key;
  key.session_id = session.record.id;
  key.layer = header.layer();
  key.length = session.record.length();
  key.policy = header.policy() == v1::POLICY_WINDOW ? v1::POLICY_WINDOW : v1::POLICY_GLOBAL;
  key.positions = header.positions();
  Call& call = calls_[request];
  call.session_id = key.session_id;
  call.spec = session.spec;
  call.positions = header.positions();
  call.totals.length = key.length;
  call.totals.workers = options_.group_size;
  batcher_.Open(request, key, int64_t{4} * spec.query_heads() * spec.head_dim(), StepRows(spec, key));
  Emit(AttendStarted{request, call.spec, key.length});
}

// The most pages of one rank that a row sees.
int64_t ClusterState::VisiblePages(const v1::SessionSpec& spec, const BatchKey& key) const {
  const int64_t pages = PagesOfBusiestRank(key.length, spec.stripe_pages(), options_.group_size);
  // Rows with positions of their own may see different windows; together they may read every page.
  if (key.policy != v1::POLICY_WINDOW || key.positions) return pages;
  return std::min(pages, PageCount(spec.window()) + 1);
}

// Multiply-adds for one row on the busiest rank, token sinks included.
int64_t ClusterState::RowWork(const v1::SessionSpec& spec, const BatchKey& key) const {
  int64_t keys = VisiblePages(spec, key) * kPageRows;
  if (key.policy == v1::POLICY_WINDOW) keys = std::min(keys, spec.window());
  return (keys + spec.sink_tokens()) * spec.query_heads() * (int64_t{spec.head_dim()} + spec.value_dim());
}

int ClusterState::StepRows(const v1::SessionSpec& spec, const BatchKey& key) const {
  // Outputs, lse and sink mass of each row and head, and a path count.
  const int64_t answer_bytes = int64_t{4} * (spec.query_heads() * (int64_t{spec.value_dim()} + 2) + 1);
  const int64_t query_bytes = int64_t{4} * spec.query_heads() * spec.head_dim();
  const int64_t partial_bytes =
      int64_t{4} * spec.query_heads() * (int64_t{spec.value_dim()} + 2) * VisiblePages(spec, key);
  const int64_t rows =
      std::min({int64_t{kStepRowsMax}, kPayloadBytesMax / answer_bytes, kPayloadBytesMax / query_bytes,
                kPartialBytesMax / partial_bytes, kStepWorkMax / RowWork(spec, key)});
  return static_cast<int>(std::max<int64_t>(1, rows));
}

void ClusterState::SubmitRows(RequestId request, std::string queries, std::vector<int64_t> positions,
                              int64_t now_ms) {
  const auto it = calls_.find(request);
  if (it == calls_.end()) return;
  Call& call = it->second;
  const int64_t row_bytes = int64_t{4} * call.spec->query_heads() * call.spec->head_dim();
  const int64_t rows = static_cast<int64_t>(queries.size()) / row_bytes;
  if (rows * row_bytes != static_cast<int64_t>(queries.size())) {
    return FailCall(request,
                    absl::InvalidArgumentError(absl::StrCat(
                        "queries have ", queries.size(), " bytes, wanted a multiple of ", row_bytes,
                        " (f32 [rows, ", call.spec->query_heads(), ", ", call.spec->head_dim(), "])")));
  }
  if (static_cast<int64_t>(positions.size()) != (call.positions ? rows : 0)) {
    return FailCall(request, absl::InvalidArgumentError(absl::StrCat(
                                 "a message of ", rows, " rows has ", positions.size(), " positions, wanted ",
                                 call.positions ? "one per row" : "none, because the header says so")));
  }
  for (size_t i = 0; i < positions.size(); ++i) {
    if (positions[i] < 0 || positions[i] >= call.totals.length) {
      return FailCall(request,
                      absl::OutOfRangeError(absl::StrCat(
                          "row ", call.submitted + static_cast<int64_t>(i), " is at position ", positions[i],
                          ", but the session has ", call.totals.length, " positions")));
    }
  }
  call.submitted += rows;
  batcher_.Push(request, std::move(queries), std::move(positions));
  PumpSteps(now_ms);
}

void ClusterState::FinishRows(RequestId request, int64_t) {
  const auto it = calls_.find(request);
  if (it == calls_.end()) return;
  it->second.finished = true;
  EndCallIfDone(request, &it->second);
}

// 2. Rows become steps.
void ClusterState::PumpSteps(int64_t now_ms) {
  while (phase_ == Phase::kActive && steps_in_flight_ < kStepsInFlightMax) {
    Batch batch;
    if (!again_.empty()) {
      batch = std::move(again_.front());
      again_.pop_front();
      if (calls_.count(batch.parts[0].call) == 0) continue;
    } else if (!batcher_.empty()) {
      batch = batcher_.Next();
    } else {
      return;
    }
    const int64_t work = batch.rows * RowWork(*calls_.at(batch.parts[0].call).spec, batch.key);
    v1::Command command;
    v1::AttendStep* step = command.mutable_attend();
    step->set_session_id(batch.key.session_id);
    step->set_layer(batch.key.layer);
    step->set_length(batch.key.length);
    step->set_policy(batch.key.policy);
    step->set_rows(batch.rows);
    step->set_queries(std::exchange(batch.queries, {}));
    step->mutable_positions()->Add(batch.positions.begin(), batch.positions.end());
    batch.positions.clear();
    if (batch.parts.size() == 1) step->set_first_row(batch.parts[0].first_row);
    ++steps_in_flight_;
    const uint64_t session_id = batch.key.session_id;
    Command({CommandKind::kAttend, session_id, 0, {}, 0, std::move(batch), work}, std::move(command), now_ms);
  }
}

// 6. Back to the calls.
void ClusterState::OnStep(const PendingCommand& command, int64_t now_ms) {
  --steps_in_flight_;
  absl::Status failure;
  AttendTotals step;
  for (const WorkerEntry* worker : Ranks()) {
    const v1::CommandResult& result = *command.results[worker->rank];
    step.bytes_read += result.attend().bytes_read();
    step.collectives = std::max<int64_t>(step.collectives, result.attend().collectives());
    if (result.code() == 0) continue;
    const absl::Status status(static_cast<absl::StatusCode>(result.code()),
                              absl::StrCat(NameOf(*worker), ": ", result.message()));
    if (failure.ok() || SaysMore(status, failure)) failure = status;
  }
  if (!failure.ok()) {
    if (command.batch.parts.size() == 1) {
      FailCall(command.batch.parts[0].call, failure);
      return PumpSteps(now_ms);
    }
    // One call's rows may be to blame: each call's are asked by themselves, so that only that call fails.
    int64_t first = 0;
    for (const Batch::Part& part : command.batch.parts) {
      AskAgain(command, part, first);
      first += part.rows;
    }
    return PumpSteps(now_ms);
  }

  const SessionEntry* session = SessionById(command.subject);
  if (session == nullptr) return PumpSteps(now_ms);  // Deleted meanwhile; its calls have been told.
  const v1::SessionSpec& spec = *session->spec;
  const v1::AttendResult& result = command.results[0]->attend();
  const size_t heads = size_t{4} * command.batch.rows * spec.query_heads();
  if (result.outputs().size() != heads * spec.value_dim() || result.lse().size() != heads ||
      result.sink_mass().size() != heads ||
      result.row_heads_maximum().size() != size_t{4} * command.batch.rows) {
    return Expel(Ranks()[0]->id,
                 absl::StrCat("answered ", command.batch.rows, " rows with arrays of wrong sizes"), now_ms);
  }
  int64_t first = 0;
  for (const Batch::Part& part : command.batch.parts) {
    const auto it = calls_.find(part.call);
    if (it != calls_.end() && it->second.again > 0 && !command.batch.again) {
      // The step was under way when the rows before these failed; a call's rows come in order.
      AskAgain(command, part, first);
    } else if (it != calls_.end()) {
      if (command.batch.again) --it->second.again;
      DeliverPart(&it->second, part, part.call, first, result, step);
      EndCallIfDone(part.call, &it->second);
    }
    first += part.rows;
  }
  PumpSteps(now_ms);
}

void ClusterState::AskAgain(const PendingCommand& command, const Batch::Part& part, int64_t first) {
  const auto it = calls_.find(part.call);
  if (it == calls_.end()) return;
  const v1::AttendStep& step = command.message->command().attend();
  const int64_t row_bytes = int64_t{4} * it->second.spec->query_heads() * it->second.spec->head_dim();
  Batch batch;
  batch.key = command.batch.key;
  batch.rows = part.rows;
  batch.queries = step.queries().substr(first * row_bytes, part.rows * row_bytes);
  batch.positions.assign(step.positions().begin() + first, step.positions().begin() + first + part.rows);
  batch.parts = {part};
  batch.again = true;
  again_.push_back(std::move(batch));
  ++it->second.again;
}

void ClusterState::DeliverPart(Call* call, const Batch::Part& part, RequestId id, int64_t first_in_step,
                               const v1::AttendResult& result, const AttendTotals& step) {
  const int64_t heads = call->spec->query_heads();
  const int64_t head_bytes = 4 * heads;
  const int64_t output_bytes = head_bytes * call->spec->value_dim();
  AttendedRows answer{id, {}};
  answer.rows.set_first_row(call->answered);
  answer.rows.set_count(part.rows);
  answer.rows.set_outputs(result.outputs().substr(first_in_step * output_bytes, part.rows * output_bytes));
  answer.rows.set_lse(result.lse().substr(first_in_step * head_bytes, part.rows * head_bytes));
  answer.rows.set_sink_mass(result.sink_mass().substr(first_in_step * head_bytes, part.rows * head_bytes));
  int64_t maximum = 0;
  for (int64_t row = first_in_step; row < first_in_step + part.rows; ++row) {
    int32_t count = 0;
    std::memcpy(&count, result.row_heads_maximum().data() + 4 * row, 4);
    maximum += count;
  }
  call->answered += part.rows;
  call->totals.rows += part.rows;
  call->totals.row_heads_maximum += maximum;
  call->totals.row_heads_sink += part.rows * heads - maximum;
  call->totals.collectives += step.collectives;
  call->totals.bytes_read += step.bytes_read;
  Emit(std::move(answer));
}

void ClusterState::EndCallIfDone(RequestId request, Call* call) {
  if (!call->finished || call->answered < call->submitted) return;
  Respond(request, Answer(call->totals));
  batcher_.Close(request);
  calls_.erase(request);
}

void ClusterState::FailCall(RequestId request, const absl::Status& status) {
  if (calls_.erase(request) == 0) return;
  batcher_.Close(request);
  Respond(request, status);
}

void ClusterState::FailCallsOf(uint64_t session_id, const absl::Status& status) {
  std::vector<RequestId> ids;
  for (const auto& [id, call] : calls_) {
    if (call.session_id == session_id) ids.push_back(id);
  }
  for (const RequestId id : ids) FailCall(id, status);
}

}  // namespace eduba
