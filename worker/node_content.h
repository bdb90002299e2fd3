#ifndef EDUBA_WORKER_NODE_CONTENT_H_
#define EDUBA_WORKER_NODE_CONTENT_H_

#include <cstdint>
#include <optional>
#include <set>

#include "attention/page_store.h"
#include "kernels/backend.h"
#include "model/model_content.h"
#include "worker/served_model.h"
#include "worker/tensor_content.h"

namespace eduba {

// All that a node keeps. It lives as long as the worker's process; groups, and connections to coordinators,
// come and go (worker/membership.h). Threads: as TensorContent says.
class NodeContent {
 public:
  // All outlive the content. `model` null: there are no model sessions.
  NodeContent(Backend* backend, PageStore* store, ServedModel* model);
  NodeContent(const NodeContent&) = delete;
  NodeContent& operator=(const NodeContent&) = delete;

  // Session ids mean the sessions of this cluster from now on (FormGroup.cluster); what is held of another
  // cluster's is dropped.
  void EnterCluster(uint64_t cluster);

  TensorContent& tensors() { return tensors_; }
  // Null without a model.
  ModelContent* models() { return models_ ? &*models_ : nullptr; }
  ServedModel* model() { return model_; }

 private:
  ServedModel* const model_;
  TensorContent tensors_;
  std::optional<ModelContent> models_;
  std::optional<uint64_t> cluster_;
};

}  // namespace eduba

#endif  // EDUBA_WORKER_NODE_CONTENT_H_
