#ifndef EDUBA_COORDINATOR_RENDEZVOUS_BOARD_H_
#define EDUBA_COORDINATOR_RENDEZVOUS_BOARD_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace eduba {

// Where the ranks of one attempt to form a group leave their addresses. Thread-safe.
class RendezvousBoard {
 public:
  // Forgets all keys; whoever waits gets ABORTED. Epoch 0: nobody's.
  void Reset(uint64_t epoch, uint32_t attempt);

  // ABORTED when the attempt is not the present one; RESOURCE_EXHAUSTED when the board is full.
  absl::Status Set(uint64_t epoch, uint32_t attempt, const std::string& key, const std::string& value);
  // Waits for the key; CANCELLED once `cancelled` says so, which is asked now and then.
  absl::StatusOr<std::string> Get(uint64_t epoch, uint32_t attempt, const std::string& key,
                                  const std::function<bool()>& cancelled);

 private:
  absl::Status CheckAttempt(uint64_t epoch, uint32_t attempt) const;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::pair<uint64_t, uint32_t> attempt_{0, 0};  // Guarded by mutex_, as all below.
  std::map<std::string, std::string> values_;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_RENDEZVOUS_BOARD_H_
