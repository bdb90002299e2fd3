#include "worker/stored_tokens.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "rpc/placement.h"
#include "storage/token_frames.h"
#include "worker/model_sessions.h"

namespace eduba {
namespace {

// Collects what a log says.
class Collector final : public TokenFrames::Reader {
 public:
  absl::Status Add(int64_t /*at*/, absl::Span<const int32_t> ids, bool generated) override {
    ModelContent::AddIds(ids, generated, ids_, generated_);
    return absl::OkStatus();
  }
  absl::Status SetLength(int64_t length) override { return ModelContent::CutIds(length, ids_, generated_); }

  IdLog& ids() { return ids_; }
  std::vector<PositionRange>& generated() { return generated_; }

 private:
  IdLog ids_;
  std::vector<PositionRange> generated_;
};

}  // namespace

class StoredTokens::Log final : public TokenLog {
 public:
  explicit Log(std::unique_ptr<TokenFrames> tokens) : tokens_(std::move(tokens)) {}

  absl::Status Reserve(int64_t count) override { return tokens_->Reserve(count); }
  absl::Status Add(int64_t at, absl::Span<const int32_t> ids, bool generated) override {
    return tokens_->Add(at, ids, generated);
  }
  absl::Status SetLength(int64_t length) override { return tokens_->SetLength(length); }

  const std::shared_ptr<FrameLog>& frames() const { return tokens_->frames(); }

 private:
  const std::unique_ptr<TokenFrames> tokens_;
};

StoredTokens::StoredTokens(NodeStorage* storage, const ServedModel* model, std::string node)
    : storage_(storage), model_(model), node_(std::move(node)) {}

StoredTokens::~StoredTokens() = default;

absl::Status StoredTokens::Load(const v1::OpenSession& opened, ModelContent& content) {
  const uint64_t id = opened.session_id();
  if (opened.spec().model().model_hash() != model_->info().hash()) {
    return absl::FailedPreconditionError(absl::StrCat("it is a session of another model than ",
                                                      model_->info().name(), "; start with that one"));
  }
  EDUBA_ASSIGN_OR_RETURN(const Placement placement, PlacementFromProto(opened.placement()));
  Collector collector;
  EDUBA_ASSIGN_OR_RETURN(std::unique_ptr<TokenFrames> tokens,
                         TokenFrames::Open(storage_->FolderOf(id), collector));
  if (!tokens->frames()->damage().empty()) {
    LogInfo(absl::StrCat("session ", id, " is read up to token ", collector.ids().size(), ": ",
                         tokens->frames()->damage()));
  }
  const auto log = std::make_shared<Log>(std::move(tokens));
  EDUBA_RETURN_IF_ERROR(content.Restore(id, ContextOptionsOf(opened.spec().model()), placement,
                                        placement.IndexOf(node_), std::move(collector.ids()),
                                        std::move(collector.generated()), log));
  opened_[id] = opened;
  logs_[id] = log;
  return absl::OkStatus();
}

void StoredTokens::Describe(const v1::OpenSession& opened) {
  if (logs_.count(opened.session_id()) == 0) opened_[opened.session_id()] = opened;
}

std::shared_ptr<FrameLog> StoredTokens::FramesOf(uint64_t session_id) const {
  const auto log = logs_.find(session_id);
  return log == logs_.end() ? nullptr : log->second->frames();
}

absl::StatusOr<std::shared_ptr<TokenLog>> StoredTokens::Make(uint64_t session_id) {
  EDUBA_RETURN_IF_ERROR(storage_->Create(session_id, opened_[session_id].SerializeAsString()));
  Collector nothing;
  EDUBA_ASSIGN_OR_RETURN(std::unique_ptr<TokenFrames> tokens,
                         TokenFrames::Open(storage_->FolderOf(session_id), nothing));
  return logs_[session_id] = std::make_shared<Log>(std::move(tokens));
}

void StoredTokens::Fork(uint64_t session_id, uint64_t fork_id) {
  v1::OpenSession opened = opened_[session_id];
  opened.set_session_id(fork_id);
  opened_[fork_id] = std::move(opened);
}

void StoredTokens::Erase(uint64_t session_id) {
  opened_.erase(session_id);
  if (logs_.erase(session_id) > 0) storage_->Erase(session_id);
}

}  // namespace eduba
