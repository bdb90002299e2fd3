#include "worker/node_content.h"

#include "worker/model_sessions.h"

namespace eduba {

NodeContent::NodeContent(Backend* backend, PageStore* store, ServedModel* model)
    : model_(model), tensors_(backend, store) {
  if (model != nullptr) models_.emplace(ModelContentOptions(backend, store, model));
}

void NodeContent::EnterCluster(uint64_t cluster) {
  if (cluster_ == cluster) return;
  cluster_ = cluster;
  tensors_.Retain({});
  if (models_) models_->Retain({});
}

}  // namespace eduba
