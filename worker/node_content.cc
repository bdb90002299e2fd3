#include "worker/node_content.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "worker/model_sessions.h"

namespace eduba {

NodeContent::NodeContent(Backend* backend, PageStore* store, ServedModel* model)
    : model_(model), tensors_(backend, store) {
  if (model != nullptr) models_.emplace(ModelContentOptions(backend, store, model));
}

absl::Status NodeContent::OpenStorage(const std::string& data_dir, const std::string& node,
                                      uint64_t fingerprint, int threads) {
  EDUBA_ASSIGN_OR_RETURN(storage_, NodeStorage::Open(data_dir, fingerprint));
  cluster_ = storage_->cluster();
  obeyed_ = storage_->obeyed();
  keeps_ = true;
  tensors_.UseStorage(storage_.get());
  if (models_) {
    tokens_ = std::make_unique<StoredTokens>(storage_.get(), model_, node);
    models_->UseLogs(tokens_.get());
  }
  EDUBA_ASSIGN_OR_RETURN(const std::vector<uint64_t> ids, storage_->Sessions());
  const absl::Time begun = absl::Now();
  ThreadPool pool(threads);
  for (const uint64_t id : ids) {
    absl::Status status = Load(id, pool);
    if (status.ok()) continue;
    status = Annotate(status, absl::StrCat(storage_->FolderOf(id), " cannot be read"));
    LogWarning(std::string(status.message()));
    unreadable_.emplace(id, std::move(status));
  }
  if (!ids.empty()) {
    LogInfo(absl::StrCat("read ", ids.size() - unreadable_.size(), " of ", ids.size(), " sessions from ",
                         data_dir, " in ",
                         absl::FormatDuration(absl::Trunc(absl::Now() - begun, absl::Milliseconds(1)))));
  }
  return absl::OkStatus();
}

absl::Status NodeContent::Load(uint64_t session_id, ThreadPool& threads) {
  EDUBA_ASSIGN_OR_RETURN(const std::string descriptor, storage_->Descriptor(session_id));
  v1::OpenSession opened;
  if (!opened.ParseFromString(descriptor) || opened.session_id() != session_id) {
    return absl::DataLossError("its descriptor makes no sense");
  }
  if (!opened.spec().has_model()) return tensors_.Load(opened, threads);
  if (tokens_ != nullptr) return tokens_->Load(opened, *models_);
  return absl::FailedPreconditionError("it is a model's session; start this worker with --model");
}

absl::Status NodeContent::EnterCluster(uint64_t cluster, bool lasting, const ObeyedTerm& term) {
  if (storage_ != nullptr && (lasting || storage_->cluster())) {
    EDUBA_RETURN_IF_ERROR(storage_->Enter(cluster, term));
  }
  if (cluster_ == cluster) {
    EDUBA_RETURN_IF_ERROR(CheckTerm(obeyed_, term));
    obeyed_ = term;
    return absl::OkStatus();
  }
  cluster_ = cluster;
  obeyed_ = term;
  tensors_.Retain({});
  if (models_) models_->Retain({});
  keeps_ = lasting && storage_ != nullptr;
  tensors_.UseStorage(keeps_ ? storage_.get() : nullptr);
  if (models_) models_->UseLogs(stored_tokens());
  if (storage_ != nullptr && !lasting) {
    LogWarning("the coordinator keeps no records (--data-dir), so this worker keeps nothing on its disk");
  }
  return absl::OkStatus();
}

absl::Status NodeContent::CheckReadable(uint64_t session_id) const {
  const auto found = unreadable_.find(session_id);
  return found == unreadable_.end() ? absl::OkStatus() : found->second;
}

void NodeContent::RetainUnreadable(const std::set<uint64_t>& session_ids) {
  std::vector<uint64_t> doomed;
  for (const auto& [id, why] : unreadable_) {
    if (session_ids.count(id) == 0) doomed.push_back(id);
  }
  for (const uint64_t id : doomed) CloseUnreadable(id);
}

void NodeContent::CloseUnreadable(uint64_t session_id) {
  if (unreadable_.erase(session_id) > 0) storage_->Erase(session_id);
}

}  // namespace eduba
