#ifndef EDUBA_WORKER_NODE_CONTENT_H_
#define EDUBA_WORKER_NODE_CONTENT_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>

#include "absl/status/status.h"
#include "attention/page_store.h"
#include "base/parallel.h"
#include "kernels/backend.h"
#include "model/model_content.h"
#include "storage/node_storage.h"
#include "worker/served_model.h"
#include "worker/stored_tokens.h"
#include "worker/tensor_content.h"

namespace eduba {

// All that a node keeps. It lives as long as the worker's process; groups, and connections to coordinators,
// come and go (worker/membership.h). With a data directory it outlives the process too. Threads: as
// TensorContent says.
class NodeContent {
 public:
  // All outlive the content. `model` null: there are no model sessions.
  NodeContent(Backend* backend, PageStore* store, ServedModel* model);
  NodeContent(const NodeContent&) = delete;
  NodeContent& operator=(const NodeContent&) = delete;

  // Takes in what the data directory of `node` has, and keeps content there from now on. Sessions that cannot
  // be read stay on the disk as they are, and the program's log has a line for each. Call it before anything
  // else happens to the content. Errors: NodeStorage::Open.
  absl::Status OpenStorage(const std::string& data_dir, const std::string& node, uint64_t fingerprint,
                           int threads);
  // Whose sessions the disk holds; none: nobody's, or there is no data directory.
  std::optional<uint64_t> stored_cluster() const {
    return storage_ != nullptr ? storage_->cluster() : std::nullopt;
  }
  // The last coordinator that was obeyed with it.
  ObeyedTerm stored_term() const { return storage_ != nullptr ? storage_->obeyed() : ObeyedTerm(); }

  // Session ids mean the sessions of this cluster from now on (FormGroup.cluster). What is held in memory of
  // another cluster's is dropped; what is held on the disk is not: FAILED_PRECONDITION, and nothing changed.
  // `lasting`: the coordinator keeps records. Where it keeps none, nothing is kept on the disk either.
  // FAILED_PRECONDITION also where a later term of the cluster has been obeyed.
  absl::Status EnterCluster(uint64_t cluster, bool lasting, const ObeyedTerm& term);

  // Why the disk holds the session and it could not be read; OK: it was read, or the disk does not hold it.
  absl::Status CheckReadable(uint64_t session_id) const;
  // Drops what could not be read of the sessions that are not named, and of one session, on the disk.
  void RetainUnreadable(const std::set<uint64_t>& session_ids);
  void CloseUnreadable(uint64_t session_id);

  TensorContent& tensors() { return tensors_; }
  // Null without a model.
  ModelContent* models() { return models_ ? &*models_ : nullptr; }
  ServedModel* model() { return model_; }
  // Null where ids are not kept on the disk.
  StoredTokens* stored_tokens() { return keeps_ ? tokens_.get() : nullptr; }

 private:
  absl::Status Load(uint64_t session_id, ThreadPool& threads);

  ServedModel* const model_;
  std::unique_ptr<NodeStorage> storage_;  // Null without a data directory.
  std::unique_ptr<StoredTokens> tokens_;  // Null without that, or without a model.
  std::map<uint64_t, absl::Status> unreadable_;
  bool keeps_ = false;  // There is a data directory, and content is kept there.
  TensorContent tensors_;
  std::optional<ModelContent> models_;
  std::optional<uint64_t> cluster_;
  ObeyedTerm obeyed_;  // The term that is obeyed in cluster_.
};

}  // namespace eduba

#endif  // EDUBA_WORKER_NODE_CONTENT_H_
