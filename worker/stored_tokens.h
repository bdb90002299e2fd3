#ifndef EDUBA_WORKER_STORED_TOKENS_H_
#define EDUBA_WORKER_STORED_TOKENS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "eduba/v1/group.pb.h"
#include "model/model_content.h"
#include "model/token_log.h"
#include "storage/frame_log.h"
#include "storage/node_storage.h"
#include "worker/served_model.h"

namespace eduba {

// Model sessions as a node's storage keeps them: how each was opened, and the ids of its tokens. Keys and
// values are not kept; they are computed again from the ids. One thread.
class StoredTokens final : public TokenLogs {
 public:
  // All outlive the object. `node`: the worker's.
  StoredTokens(NodeStorage* storage, const ServedModel* model, std::string node);
  ~StoredTokens() override;

  // Puts the session, which the storage holds as `opened` says, into `content`.
  //   FAILED_PRECONDITION  it is a session of another model
  //   DATA_LOSS, UNAVAILABLE   it cannot be read
  absl::Status Load(const v1::OpenSession& opened, ModelContent& content);

  // How a session is opened that may be made later.
  void Describe(const v1::OpenSession& opened);
  // What is to be synced before it is said what is in the session. Null: nothing.
  std::shared_ptr<FrameLog> FramesOf(uint64_t session_id) const;

  absl::StatusOr<std::shared_ptr<TokenLog>> Make(uint64_t session_id) override;
  void Fork(uint64_t session_id, uint64_t fork_id) override;
  void Erase(uint64_t session_id) override;

 private:
  class Log;

  NodeStorage* const storage_;
  const ServedModel* const model_;
  const std::string node_;
  std::map<uint64_t, v1::OpenSession> opened_;
  std::map<uint64_t, std::shared_ptr<Log>> logs_;
};

}  // namespace eduba

#endif  // EDUBA_WORKER_STORED_TOKENS_H_
