#ifndef EDUBA_STORAGE_NODE_STORAGE_H_
#define EDUBA_STORAGE_NODE_STORAGE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace eduba {

// A start of a coordinator (coordinator/records.h, Term), as a worker remembers it. 0: none.
struct ObeyedTerm {
  uint64_t number = 0;
  uint64_t nonce = 0;

  bool operator==(const ObeyedTerm&) const = default;
};
// FAILED_PRECONDITION: who has obeyed `before` must not obey `now`.
absl::Status CheckTerm(const ObeyedTerm& before, const ObeyedTerm& now);

// The part of a node's data directory that holds content: DIR/content. It says which cluster's sessions these
// are and on which arithmetic they were served, and has a folder for each session, DIR/content/session-ID:
// a descriptor, which whoever made the session chose, and the frames of its log. One thread at a time.
class NodeStorage {
 public:
  // Makes what is not there. REQUIRES: the data directory is there, and no other process uses it.
  //   FAILED_PRECONDITION  content of another format, or served by another fingerprint
  //   DATA_LOSS            the directory's own description cannot be read
  //   RESOURCE_EXHAUSTED, UNAVAILABLE   as file.h says
  static absl::StatusOr<std::unique_ptr<NodeStorage>> Open(const std::string& data_dir, uint64_t fingerprint);

  // Whose sessions these are; none: nobody's yet.
  std::optional<uint64_t> cluster() const { return cluster_; }
  // The last coordinator that was obeyed.
  const ObeyedTerm& obeyed() const { return obeyed_; }
  // The sessions are this cluster's from now on, and its coordinator of this term is obeyed; that is on the
  // disk when this returns. FAILED_PRECONDITION: they are another's, or a later term has been obeyed, or
  // another coordinator of the same.
  absl::Status Enter(uint64_t cluster, const ObeyedTerm& term);

  // The ids of the sessions that are held, ascending.
  absl::StatusOr<std::vector<uint64_t>> Sessions() const;
  // Where the session's log is.
  std::string FolderOf(uint64_t session_id) const;
  // Makes a session without frames. REQUIRES: it is not held.
  absl::Status Create(uint64_t session_id, const std::string& descriptor);
  // DATA_LOSS: the descriptor is not what was written.
  absl::StatusOr<std::string> Descriptor(uint64_t session_id) const;
  // Removes the session. What the disk does not remove now is removed by the next Open.
  void Erase(uint64_t session_id);

 private:
  NodeStorage(std::string root, uint64_t fingerprint) : root_(std::move(root)), fingerprint_(fingerprint) {}

  absl::Status ReadDescription();
  absl::Status WriteDescription() const;

  const std::string root_;
  const uint64_t fingerprint_;
  std::optional<uint64_t> cluster_;
  ObeyedTerm obeyed_;
};

}  // namespace eduba

#endif  // EDUBA_STORAGE_NODE_STORAGE_H_
