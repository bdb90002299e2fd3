#ifndef EDUBA_MODEL_TOKEN_LOG_H_
#define EDUBA_MODEL_TOKEN_LOG_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace eduba {

// Where the ids of one session's tokens are written down, so that keys and values can be computed again from
// them. Errors: RESOURCE_EXHAUSTED where the disk is full, UNAVAILABLE for all else.
class TokenLog {
 public:
  virtual ~TokenLog() = default;

  // Makes room for `count` more ids. After a success, Add takes as many.
  virtual absl::Status Reserve(int64_t count) = 0;
  // Adds ids at position `at`, where the ids so far end. `generated`: they were read as generated tokens are
  // (ModelSession::generated).
  virtual absl::Status Add(int64_t at, absl::Span<const int32_t> ids, bool generated) = 0;
  // The first `length` ids stay.
  virtual absl::Status SetLength(int64_t length) = 0;
};

// The logs of a node's sessions.
class TokenLogs {
 public:
  virtual ~TokenLogs() = default;

  // Makes an empty log for the session.
  virtual absl::StatusOr<std::shared_ptr<TokenLog>> Make(uint64_t session_id) = 0;
  // The session is a copy of another, until now.
  virtual void Fork(uint64_t session_id, uint64_t fork_id) = 0;
  // The session is gone, and its log is to go. Unknown sessions are ignored.
  virtual void Erase(uint64_t session_id) = 0;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKEN_LOG_H_
