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
  sessions_.emplace(session_id, ModelSession{options, std::move(context), {}, {}});
  return absl::OkStatus();
}

bool ModelContent::Holds(uint64_t session_id, const ContextOptions& options,
                         const Placement& placement) const {
  const auto found = sessions_.find(session_id);
  return found != sessions_.end() && found->second.options == options &&
         found->second.context.placement() == placement;
}

void ModelContent::Retain(const std::set<uint64_t>& session_ids) {
  for (auto next = sessions_.begin(); next != sessions_.end();) {
    next = session_ids.count(next->first) > 0 ? std::next(next) : sessions_.erase(next);
  }
}

absl::Status ModelContent::Fork(uint64_t session_id, uint64_t fork_id) {
  EDUBA_ASSIGN_OR_RETURN(const ModelSession* session, Find(session_id));
  if (!sessions_.emplace(fork_id, *session).second) {
    return absl::AlreadyExistsError(absl::StrCat("session ", fork_id, " is open already"));
  }
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
    EDUBA_ASSIGN_OR_RETURN(session->ids, FirstIds(session->ids, length));
    std::vector<PositionRange> generated;
    for (const PositionRange& range : session->generated) {
      const PositionRange kept = range.Intersect({0, length});
      if (!kept.empty()) generated.push_back(kept);
    }
    session->generated = std::move(generated);
  }
  session->context.Clear();
  return absl::OkStatus();
}

}  // namespace eduba
