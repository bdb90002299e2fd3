#include "model/model_content.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "model/digest.h"

namespace eduba {
namespace {

// The first `length` ids, as a log of their own.
absl::StatusOr<IdLog> FirstIds(const IdLog& ids, int64_t length) {
  IdLog first;
  std::vector<int32_t> block;
  for (int64_t at = 0; at < length; at += IdLog::kBlockIds) {
    block.resize(std::min(IdLog::kBlockIds, length - at));
    EDUBA_RETURN_IF_ERROR(ids.Read(at, absl::MakeSpan(block)));
    first.Append(block);
  }
  return first;
}

}  // namespace

absl::Status ModelContent::Open(uint64_t session_id, const ContextOptions& options,
                                const Placement& placement, int index) {
  if (Holds(session_id, options, placement)) return absl::OkStatus();
  Close(session_id);
  EDUBA_ASSIGN_OR_RETURN(Context context, engine_.Open(options, placement, index));
  sessions_.emplace(session_id, ModelSession{options, std::move(context), {}, {}, nullptr});
  return absl::OkStatus();
}

absl::Status ModelContent::Restore(uint64_t session_id, const ContextOptions& options,
                                   const Placement& placement, int index, IdLog ids,
                                   std::vector<PositionRange> generated, std::shared_ptr<TokenLog> log) {
  EDUBA_ASSIGN_OR_RETURN(Context context, engine_.Open(options, placement, index));
  sessions_.emplace(session_id, ModelSession{options, std::move(context), std::move(ids),
                                             std::move(generated), std::move(log)});
  return absl::OkStatus();
}

void ModelContent::Close(uint64_t session_id) {
  sessions_.erase(session_id);
  if (logs_ != nullptr) logs_->Erase(session_id);
}

bool ModelContent::Holds(uint64_t session_id, const ContextOptions& options,
                         const Placement& placement) const {
  const auto found = sessions_.find(session_id);
  return found != sessions_.end() && found->second.options == options &&
         found->second.context.placement() == placement;
}

void ModelContent::Retain(const std::set<uint64_t>& session_ids) {
  std::vector<uint64_t> doomed;
  for (const auto& [id, session] : sessions_) {
    if (session_ids.count(id) == 0) doomed.push_back(id);
  }
  for (const uint64_t id : doomed) Close(id);
}

absl::Status ModelContent::Fork(uint64_t session_id, uint64_t fork_id) {
  EDUBA_ASSIGN_OR_RETURN(const ModelSession* session, Find(session_id));
  const auto [fork, made] = sessions_.emplace(fork_id, *session);
  if (!made) return absl::AlreadyExistsError(absl::StrCat("session ", fork_id, " is open already"));
  if (logs_ == nullptr) return absl::OkStatus();
  logs_->Fork(session_id, fork_id);
  fork->second.log = nullptr;
  const absl::Status status = MakeLog(fork_id, fork->second);
  if (!status.ok()) Close(fork_id);
  return status;
}

absl::Status ModelContent::MakeLog(uint64_t session_id, ModelSession& session) {
  if (logs_ == nullptr || session.log != nullptr) return absl::OkStatus();
  EDUBA_ASSIGN_OR_RETURN(const std::shared_ptr<TokenLog> log, logs_->Make(session_id));
  // What a fork has already, in runs that were read in one way.
  std::vector<int32_t> block;
  auto range = session.generated.begin();
  for (int64_t at = 0; at < session.ids.size();) {
    while (range != session.generated.end() && range->end <= at) ++range;
    const bool generated = range != session.generated.end() && range->begin <= at;
    int64_t end = session.ids.size();
    if (range != session.generated.end()) end = generated ? range->end : range->begin;
    block.resize(std::min(IdLog::kBlockIds, end - at));
    EDUBA_RETURN_IF_ERROR(session.ids.Read(at, absl::MakeSpan(block)));
    EDUBA_RETURN_IF_ERROR(log->Add(at, block, generated));
    at += std::ssize(block);
  }
  session.log = log;
  return absl::OkStatus();
}

absl::Status ModelContent::Reserve(uint64_t session_id, ModelSession& session, int64_t count) {
  EDUBA_RETURN_IF_ERROR(MakeLog(session_id, session));
  return session.log == nullptr ? absl::OkStatus() : session.log->Reserve(count);
}

absl::Status ModelContent::Extend(ModelSession& session, absl::Span<const int32_t> ids, bool generated) {
  if (ids.empty()) return absl::OkStatus();
  const int64_t at = session.ids.size();
  AddIds(ids, generated, session.ids, session.generated);
  return session.log == nullptr ? absl::OkStatus() : session.log->Add(at, ids, generated);
}

void ModelContent::AddIds(absl::Span<const int32_t> added, bool are_generated, IdLog& ids,
                          std::vector<PositionRange>& generated) {
  const int64_t at = ids.size();
  ids.Append(added);
  if (!are_generated) return;
  if (!generated.empty() && generated.back().end == at) {
    generated.back().end = ids.size();
  } else {
    generated.push_back({at, ids.size()});
  }
}

absl::Status ModelContent::CutIds(int64_t length, IdLog& ids, std::vector<PositionRange>& generated) {
  EDUBA_ASSIGN_OR_RETURN(ids, FirstIds(ids, length));
  std::vector<PositionRange> kept;
  for (const PositionRange& range : generated) {
    const PositionRange part = range.Intersect({0, length});
    if (!part.empty()) kept.push_back(part);
  }
  generated = std::move(kept);
  return absl::OkStatus();
}

absl::StatusOr<ModelSession*> ModelContent::Find(uint64_t session_id) {
  const auto found = sessions_.find(session_id);
  if (found == sessions_.end()) {
    return absl::NotFoundError(absl::StrCat("session ", session_id, " is not open on this worker"));
  }
  return &found->second;
}

absl::StatusOr<ModelContent::Description> ModelContent::Describe(uint64_t session_id) {
  EDUBA_ASSIGN_OR_RETURN(const ModelSession* session, Find(session_id));
  Description description;
  description.length = session->ids.size();
  description.is_read = session->is_read();
  std::vector<int32_t> block;
  for (int64_t at = 0; at < description.length; at += IdLog::kBlockIds) {
    block.resize(std::min(IdLog::kBlockIds, description.length - at));
    EDUBA_RETURN_IF_ERROR(session->ids.Read(at, absl::MakeSpan(block)));
    description.digest = HashInto(description.digest, absl::MakeConstSpan(block));
  }
  const int64_t read = session->context.length();
  description.digest = HashInto(description.digest, absl::MakeConstSpan(&read, 1));
  description.digest = HashInto(description.digest, session->context.last());
  return description;
}

absl::Status ModelContent::BeginSettle(uint64_t session_id, int64_t length, bool read_again) {
  EDUBA_ASSIGN_OR_RETURN(ModelSession * session, Find(session_id));
  if (length > session->ids.size() || (!read_again && length != session->ids.size())) {
    return absl::FailedPreconditionError(absl::StrCat("session ", session_id, " is to be ", length,
                                                      " tokens long, and has ", session->ids.size(),
                                                      " on this worker"));
  }
  if (!read_again) return absl::OkStatus();
  if (length < session->ids.size()) {
    if (session->log != nullptr) EDUBA_RETURN_IF_ERROR(session->log->SetLength(length));
    EDUBA_RETURN_IF_ERROR(CutIds(length, session->ids, session->generated));
  }
  session->context.Clear();
  return absl::OkStatus();
}

}  // namespace eduba
