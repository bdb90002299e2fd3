#ifndef EDUBA_WORKER_NODE_CONTENT_H_
#define EDUBA_WORKER_NODE_CONTENT_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>

#include "attention/page_store.h"
#include "kernels/backend.h"
#include "model/model_content.h"
#include "storage/node_storage.h"
#include "worker/served_model.h"
#include "worker/tensor_content.h"

namespace eduba {

// All that a node keeps. It lives as long as the worker's process; groups, and connections to coordinators,
// come and go (worker/membership.h). Threads: as TensorContent says.
class NodeContent {
 public:
  // All outlive the content. `model` null: there are no model sessions.
  NodeContent(Backend* backend, PageStore* store, ServedModel* model);
  // Takes in what the data directory has, and keeps content there from now on. Before anything else happens
  // to the content. Errors: NodeStorage::Open, and TensorContent::Load.
  absl::Status OpenStorage(const std::string& data_dir, uint64_t fingerprint);
  NodeContent(const NodeContent&) = delete;
  NodeContent& operator=(const NodeContent&) = delete;

  // Session ids mean the sessions of this cluster from now on (FormGroup.cluster). What is held in memory of
  // another cluster's is dropped; what is held on the disk is not: FAILED_PRECONDITION, and nothing changed.
  // `lasting`: the coordinator keeps records. Where it keeps none, nothing is kept on the disk either.
  absl::Status EnterCluster(uint64_t cluster, bool lasting);
  // Whose sessions the disk holds; none: nobody's, or there is no data directory.
  std::optional<uint64_t> stored_cluster() const { return storage_ ? storage_->cluster() : std::nullopt; }

  TensorContent& tensors() { return tensors_; }
  // Null without a model.
  ModelContent* models() { return models_ ? &*models_ : nullptr; }
  ServedModel* model() { return model_; }

 private:
  ServedModel* const model_;
  std::unique_ptr<NodeStorage> storage_;  // Null without a data directory.
  TensorContent tensors_;
  std::optional<ModelContent> models_;
  std::optional<uint64_t> cluster_;
};

}  // namespace eduba

#endif  // EDUBA_WORKER_NODE_CONTENT_H_
