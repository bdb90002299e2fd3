#include "coordinator/queries.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/step_size.h"

namespace eduba {
namespace {

static_assert(std::endian::native == std::endian::little, "path counts travel as little-endian int32");

// While one step computes, the next is on its way to the workers.
constexpr size_t kStepsInFlightMax = 2;

// Whether error `a` says more than error `b`: ranks that only hear of a bad number elsewhere say less than
// the rank whose page it is in.
bool SaysMore(const absl::Status& a, const absl::Status& b) {
  const auto names_page = [](const absl::Status& status) {
    return std::string(status.message()).find("page") != std::string::npos;
  };
  if (names_page(a) != names_page(b)) return names_page(a);
  return a.message().size() > b.message().size();
}

bool HasSizesOf(const v1::AttendResult& result, int rows, const v1::SessionSpec& spec) {
  const size_t heads = size_t{4} * rows * spec.query_heads();
  return result.outputs().size() == heads * spec.value_dim() && result.lse().size() == heads &&
         result.sink_mass().size() == heads && result.row_heads_maximum().size() == size_t{4} * rows;
}

}  // namespace

absl::Status Queries::CheckHeader(const SessionEntry& session,
                                  const v1::AttendRequest::Header& header) const {
  const v1::SessionSpec& spec = *session.spec;
  const std::string query = absl::StrCat("query of session '", session.record.name, "'");
  if (header.layer() < 0 || header.layer() >= spec.layers()) {
    return absl::InvalidArgumentError(
        absl::StrCat(query, ": layer is ", header.layer(), ", wanted 0 to ", spec.layers() - 1));
  }
  if (!v1::Policy_IsValid(header.policy())) {
    return absl::InvalidArgumentError(
        absl::StrCat(query, ": policy ", header.policy(), " is not known: use global or window"));
  }
  if (header.policy() == v1::POLICY_WINDOW && spec.window() == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(query, ": the session was created without a window: use policy global"));
  }
  if (session.record.length() == 0) {
    return absl::FailedPreconditionError(absl::StrCat(query, ": the session is empty: append first"));
  }
  return absl::OkStatus();
}

// 1. The call sees the length that is committed now.
void Queries::Start(RequestId request, const v1::AttendRequest::Header& header) {
  const absl::StatusOr<SessionEntry*> found = sessions_->FindTensor(header.session());
  absl::Status status = found.status();
  if (status.ok()) status = CheckHeader(**found, header);
  if (!status.ok()) return outbox_->Respond(request, status);
  const SessionEntry& session = **found;
  const v1::SessionSpec& spec = *session.spec;
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
  call.totals.workers = group_->size();
  batcher_.Open(request, key, int64_t{4} * spec.query_heads() * spec.head_dim(),
                StepRows(spec, session.record.placement, key));
  outbox_->Emit(AttendStarted{request, call.spec, key.length});
}

absl::Status Queries::CheckRows(const Call& call, const std::string& queries,
                                const std::vector<int64_t>& positions) {
  const int64_t row_bytes = int64_t{4} * call.spec->query_heads() * call.spec->head_dim();
  const int64_t rows = static_cast<int64_t>(queries.size()) / row_bytes;
  if (rows * row_bytes != static_cast<int64_t>(queries.size())) {
    return absl::InvalidArgumentError(
        absl::StrCat("queries have ", queries.size(), " bytes, wanted a multiple of ", row_bytes,
                     " (f32 [rows, ", call.spec->query_heads(), ", ", call.spec->head_dim(), "])"));
  }
  if (static_cast<int64_t>(positions.size()) != (call.positions ? rows : 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("a message of ", rows, " rows has ", positions.size(), " positions, wanted ",
                     call.positions ? "one per row" : "none, because the header says so"));
  }
  for (size_t i = 0; i < positions.size(); ++i) {
    if (positions[i] >= 0 && positions[i] < call.totals.length) continue;
    return absl::OutOfRangeError(absl::StrCat("row ", call.submitted + static_cast<int64_t>(i),
                                              " is at position ", positions[i], ", but the session has ",
                                              call.totals.length, " positions"));
  }
  return absl::OkStatus();
}

void Queries::Submit(RequestId request, std::string queries, std::vector<int64_t> positions, int64_t now_ms) {
  const auto it = calls_.find(request);
  if (it == calls_.end()) return;
  Call& call = it->second;
  const absl::Status status = CheckRows(call, queries, positions);
  if (!status.ok()) return Fail(request, status);
  call.submitted +=
      static_cast<int64_t>(queries.size()) / (int64_t{4} * call.spec->query_heads() * call.spec->head_dim());
  batcher_.Push(request, std::move(queries), std::move(positions));
  Pump(now_ms);
}

void Queries::Finish(RequestId request) {
  const auto it = calls_.find(request);
  if (it == calls_.end()) return;
  it->second.finished = true;
  EndIfDone(request, &it->second);
}

// 2. Rows become steps.
void Queries::Pump(int64_t now_ms) {
  while (group_->active() && steps_.size() < kStepsInFlightMax) {
    if (!again_.empty()) {
      Batch batch = std::move(again_.front());
      again_.pop_front();
      if (calls_.count(batch.parts[0].call) > 0) SendStep(std::move(batch), now_ms);
    } else if (!batcher_.empty()) {
      SendStep(batcher_.Next(), now_ms);
    } else {
      return;
    }
  }
}

void Queries::SendStep(Batch batch, int64_t now_ms) {
  const Call& call = calls_.at(batch.parts[0].call);
  const Placement& placement = sessions_->ById(call.session_id)->record.placement;
  const int64_t work = batch.rows * RowWork(*call.spec, placement, batch.key);
  v1::Command command;
  v1::AttendStep* attend = command.mutable_attend();
  attend->set_session_id(batch.key.session_id);
  attend->set_layer(batch.key.layer);
  attend->set_length(batch.key.length);
  attend->set_policy(batch.key.policy);
  attend->set_rows(batch.rows);
  attend->set_queries(std::exchange(batch.queries, {}));
  attend->mutable_positions()->Add(batch.positions.begin(), batch.positions.end());
  batch.positions.clear();
  if (batch.parts.size() == 1) attend->set_first_row(batch.parts[0].first_row);
  Step& step = steps_.emplace_back();
  step.session_id = batch.key.session_id;
  step.batch = std::move(batch);
  step.message = group_->Send(
      std::move(command), now_ms,
      [this](Answered answered, int64_t now) { OnStep(std::move(answered), now); }, nullptr,
      StepExtraMs(work));
}

// Steps are delivered in order, because a call's rows may lie in several.
void Queries::OnStep(Answered answered, int64_t now_ms) {
  const auto step = std::find_if(steps_.begin(), steps_.end(), [&answered](const Step& other) {
    return other.message->command().ordinal() == answered.ordinal;
  });
  step->answered = std::move(answered);
  step->complete = true;
  while (!steps_.empty() && steps_.front().complete) {
    const Step first = std::move(steps_.front());
    steps_.pop_front();
    Deliver(first, now_ms);
    Pump(now_ms);
  }
}

absl::Status Queries::Sum(const Step& step, AttendTotals* totals) const {
  absl::Status failure;
  for (size_t rank = 0; rank < step.answered.results.size(); ++rank) {
    const v1::CommandResult& result = step.answered.results[rank];
    totals->bytes_read += result.attend().bytes_read();
    totals->collectives = std::max<int64_t>(totals->collectives, result.attend().collectives());
    if (result.code() == 0) continue;
    const absl::Status status(static_cast<absl::StatusCode>(result.code()),
                              absl::StrCat(group_->NameOf(static_cast<int>(rank)), ": ", result.message()));
    if (failure.ok() || SaysMore(status, failure)) failure = status;
  }
  return failure;
}

// 6. Back to the calls.
void Queries::Deliver(const Step& step, int64_t now_ms) {
  AttendTotals totals;
  const absl::Status failure = Sum(step, &totals);
  if (!failure.ok()) return DeliverFailure(step, failure);
  const SessionEntry* session = sessions_->ById(step.session_id);
  if (session == nullptr) return;  // Deleted meanwhile; its calls have been told.
  const v1::AttendResult& result = step.answered.results[0].attend();
  if (!HasSizesOf(result, step.batch.rows, *session->spec)) {
    return group_->Expel(0, absl::StrCat("answered ", step.batch.rows, " rows with arrays of wrong sizes"),
                         now_ms);
  }
  int64_t first = 0;
  for (const Batch::Part& part : step.batch.parts) {
    const auto it = calls_.find(part.call);
    if (it != calls_.end() && it->second.again > 0 && !step.batch.again) {
      // The step was under way when the rows before these failed; a call's rows come in order.
      AskAgain(step, part, first);
    } else if (it != calls_.end()) {
      if (step.batch.again) --it->second.again;
      DeliverPart(&it->second, part, first, result, totals);
      EndIfDone(part.call, &it->second);
    }
    first += part.rows;
  }
}

void Queries::DeliverFailure(const Step& step, const absl::Status& failure) {
  if (step.batch.parts.size() == 1) return Fail(step.batch.parts[0].call, failure);
  // One call's rows may be to blame: each call's are asked by themselves, so that only that call fails.
  int64_t first = 0;
  for (const Batch::Part& part : step.batch.parts) {
    AskAgain(step, part, first);
    first += part.rows;
  }
}

void Queries::AskAgain(const Step& step, const Batch::Part& part, int64_t first) {
  const auto it = calls_.find(part.call);
  if (it == calls_.end()) return;
  const v1::AttendStep& attend = step.message->command().attend();
  const int64_t row_bytes = int64_t{4} * it->second.spec->query_heads() * it->second.spec->head_dim();
  Batch batch;
  batch.key = step.batch.key;
  batch.rows = part.rows;
  batch.queries = attend.queries().substr(first * row_bytes, part.rows * row_bytes);
  batch.positions.assign(attend.positions().begin() + first, attend.positions().begin() + first + part.rows);
  batch.parts = {part};
  batch.again = true;
  again_.push_back(std::move(batch));
  ++it->second.again;
}

void Queries::DeliverPart(Call* call, const Batch::Part& part, int64_t first, const v1::AttendResult& result,
                          const AttendTotals& totals) {
  const int64_t heads = call->spec->query_heads();
  const int64_t head_bytes = 4 * heads;
  const int64_t output_bytes = head_bytes * call->spec->value_dim();
  AttendedRows answer{part.call, {}};
  answer.rows.set_first_row(call->answered);
  answer.rows.set_count(part.rows);
  answer.rows.set_outputs(result.outputs().substr(first * output_bytes, part.rows * output_bytes));
  answer.rows.set_lse(result.lse().substr(first * head_bytes, part.rows * head_bytes));
  answer.rows.set_sink_mass(result.sink_mass().substr(first * head_bytes, part.rows * head_bytes));
  int64_t maximum = 0;
  for (int64_t row = first; row < first + part.rows; ++row) {
    int32_t count = 0;
    std::memcpy(&count, result.row_heads_maximum().data() + 4 * row, 4);
    maximum += count;
  }
  call->answered += part.rows;
  call->totals.rows += part.rows;
  call->totals.row_heads_maximum += maximum;
  call->totals.row_heads_sink += part.rows * heads - maximum;
  call->totals.collectives += totals.collectives;
  call->totals.bytes_read += totals.bytes_read;
  outbox_->Emit(std::move(answer));
}

void Queries::EndIfDone(RequestId request, Call* call) {
  if (!call->finished || call->answered < call->submitted) return;
  outbox_->Respond(request, Answer(call->totals));
  batcher_.Close(request);
  calls_.erase(request);
}

void Queries::Fail(RequestId request, const absl::Status& status) {
  if (calls_.erase(request) == 0) return;
  batcher_.Close(request);
  outbox_->Respond(request, status);
}

void Queries::FailOf(uint64_t session_id, const absl::Status& status) {
  std::vector<RequestId> ids;
  for (const auto& [id, call] : calls_) {
    if (call.session_id == session_id) ids.push_back(id);
  }
  for (const RequestId id : ids) Fail(id, status);
}

bool Queries::Cancel(RequestId request) {
  if (calls_.erase(request) == 0) return false;
  batcher_.Close(request);
  return true;
}

void Queries::OnOver(const absl::Status& status) {
  again_.clear();
  steps_.clear();
  while (!calls_.empty()) Fail(calls_.begin()->first, status);
}

}  // namespace eduba
