#ifndef EDUBA_COLLECTIVE_RENDEZVOUS_H_
#define EDUBA_COLLECTIVE_RENDEZVOUS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace eduba {

// The key-value store through which the ranks of a group exchange their addresses while the group forms. The
// worker's implementation asks the coordinator (worker/rendezvous_client.h); tests keep a map
// (map_rendezvous.h). A store belongs to one epoch and one attempt, so two attempts never see each other's
// addresses. Thread-safe.
class Rendezvous {
 public:
  virtual ~Rendezvous() = default;
  virtual absl::Status Set(const std::string& key, const std::string& value, absl::Time deadline) = 0;
  // Waits until somebody has set the key. DEADLINE_EXCEEDED at `deadline`. Any other error ends the attempt.
  virtual absl::StatusOr<std::string> Get(const std::string& key, absl::Time deadline) = 0;
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_RENDEZVOUS_H_
