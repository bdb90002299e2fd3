#ifndef EDUBA_WORKER_NODE_IDENTITY_H_
#define EDUBA_WORKER_NODE_IDENTITY_H_

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace eduba {

// Who a worker is, for as long as its data lasts. With a data directory the id is kept in DIR/node_id, and
// the directory belongs to one living worker: DIR/worker.lock is locked until the object goes, or the process
// ends in whatever way.
class NodeIdentity {
 public:
  // `given`: the id, or empty: the one that the directory has, which is made where there is none. Without a
  // directory (empty) and without a given id: one for this object alone.
  //   INVALID_ARGUMENT     the given id is not 1 to 64 of a-z A-Z 0-9 . _ -
  //   FAILED_PRECONDITION  the directory cannot be written, is another node's, or another live worker has it
  //   DATA_LOSS            what DIR/node_id holds is no id
  static absl::StatusOr<NodeIdentity> Open(const std::string& given, const std::string& data_dir);
  ~NodeIdentity();
  NodeIdentity(NodeIdentity&& other) noexcept
      : id_(std::move(other.id_)), lock_(std::exchange(other.lock_, -1)) {}
  NodeIdentity& operator=(NodeIdentity&& other) noexcept {
    std::swap(id_, other.id_);
    std::swap(lock_, other.lock_);
    return *this;
  }

  const std::string& id() const { return id_; }

 private:
  NodeIdentity(std::string id, int lock) : id_(std::move(id)), lock_(lock) {}

  std::string id_;
  int lock_ = -1;  // The open file that is locked; -1: none.
};

// 16 random hexadecimal digits.
std::string RandomId();

}  // namespace eduba

#endif  // EDUBA_WORKER_NODE_IDENTITY_H_
