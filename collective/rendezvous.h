#ifndef EDUBA_COLLECTIVE_RENDEZVOUS_H_
#define EDUBA_COLLECTIVE_RENDEZVOUS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace eduba {

// The key-value board on which the ranks of one (epoch, attempt) leave their addresses while a group forms.
// The worker's implementation asks the coordinator; tests keep a map. The implementation scopes keys to its
// epoch and attempt, so two attempts never see each other's addresses. Thread-safe.
class Rendezvous {
 public:
  virtual ~Rendezvous() = default;
  virtual absl::Status Set(const std::string& key, const std::string& value, absl::Time deadline) = 0;
  // Waits for the key. DEADLINE_EXCEEDED at `deadline`; any other error ends the attempt.
  virtual absl::StatusOr<std::string> Get(const std::string& key, absl::Time deadline) = 0;
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_RENDEZVOUS_H_
