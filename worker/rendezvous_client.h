#ifndef EDUBA_WORKER_RENDEZVOUS_CLIENT_H_
#define EDUBA_WORKER_RENDEZVOUS_CLIENT_H_

#include <cstdint>
#include <string>

#include "collective/rendezvous.h"
#include "eduba/v1/group.grpc.pb.h"

namespace eduba {

// The coordinator's rendezvous store, for one (epoch, attempt).
class RendezvousClient final : public Rendezvous {
 public:
  // `stub` must outlive the client.
  RendezvousClient(v1::Group::StubInterface* stub, uint64_t epoch, uint32_t attempt)
      : stub_(stub), epoch_(epoch), attempt_(attempt) {}

  absl::Status Set(const std::string& key, const std::string& value, absl::Time deadline) override;
  absl::StatusOr<std::string> Get(const std::string& key, absl::Time deadline) override;

 private:
  v1::Group::StubInterface* const stub_;
  const uint64_t epoch_;
  const uint32_t attempt_;
};

}  // namespace eduba

#endif  // EDUBA_WORKER_RENDEZVOUS_CLIENT_H_
