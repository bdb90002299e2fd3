#ifndef EDUBA_COORDINATOR_OUTBOX_H_
#define EDUBA_COORDINATOR_OUTBOX_H_

#include <string>
#include <utility>
#include <vector>

#include "coordinator/effects.h"

namespace eduba {

// Collects what the coordinator's state machines want done, in the order in which they want it.
class Outbox {
 public:
  void Emit(Effect effect);
  // Answers a request. Request 0 means that nobody waits: then nothing is emitted.
  void Respond(RequestId request, absl::StatusOr<Answer> answer);
  void Log(std::string text);

  // All that was emitted since the last call.
  std::vector<Effect> Take() { return std::exchange(effects_, {}); }

 private:
  std::vector<Effect> effects_;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_OUTBOX_H_
