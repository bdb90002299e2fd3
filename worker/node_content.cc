#include "worker/node_content.h"

#include "base/log.h"
#include "base/status_macros.h"
#include "worker/model_sessions.h"

namespace eduba {

NodeContent::NodeContent(Backend* backend, PageStore* store, ServedModel* model)
    : model_(model), tensors_(backend, store) {
  if (model != nullptr) models_.emplace(ModelContentOptions(backend, store, model));
}

absl::Status NodeContent::OpenStorage(const std::string& data_dir, uint64_t fingerprint) {
  EDUBA_ASSIGN_OR_RETURN(storage_, NodeStorage::Open(data_dir, fingerprint));
  cluster_ = storage_->cluster();
  return tensors_.Load(storage_.get());
}

absl::Status NodeContent::EnterCluster(uint64_t cluster, bool lasting) {
  if (cluster_ == cluster) return absl::OkStatus();
  if (storage_ != nullptr && (lasting || storage_->cluster())) {
    EDUBA_RETURN_IF_ERROR(storage_->EnterCluster(cluster));
  }
  cluster_ = cluster;
  tensors_.Retain({});
  if (models_) models_->Retain({});
  tensors_.UseStorage(lasting ? storage_.get() : nullptr);
  if (storage_ != nullptr && !lasting) {
    LogWarning("the coordinator keeps no records (--data-dir), so this worker keeps nothing on its disk");
  }
  return absl::OkStatus();
}

}  // namespace eduba
