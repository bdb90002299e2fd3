#ifndef EDUBA_RPC_SERVER_H_
#define EDUBA_RPC_SERVER_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/impl/service_type.h"
#include "grpcpp/server.h"

namespace eduba {

// Host and port of "host:port" or "[v6]:port". INVALID_ARGUMENT otherwise.
absl::StatusOr<std::pair<std::string, int>> ParseAddress(const std::string& address);

// A gRPC server with our limits, grpc.health.v1 and reflection. Services should be reactors (the generated
// WithCallbackMethod_... and WithRawCallbackMethod_...), which hold no thread while a call waits: their
// reactions run on a few threads that gRPC shares among all calls of the process, and must not block. A
// handler without callbacks takes a thread for as long as its call lasts, of which there are few.
class RpcServer {
 public:
  // Listens on `address` (port 0: any free one) and serves; `services` must outlive the server. Health says
  // NOT_SERVING until SetServing(true). UNAVAILABLE when the port is taken.
  static absl::StatusOr<std::unique_ptr<RpcServer>> Start(const std::string& address,
                                                          const std::vector<grpc::Service*>& services);
  // Calls Shutdown(absl::ZeroDuration()).
  ~RpcServer();

  // host:port, with the port that was bound.
  const std::string& address() const { return address_; }
  void SetServing(bool serving);
  // Health NOT_SERVING, no new calls; calls under way get `grace`, then are cancelled. Returns when all
  // calls have ended, reactors included (OnDone). Idempotent.
  void Shutdown(absl::Duration grace);

 private:
  RpcServer() = default;

  std::string address_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace eduba

#endif  // EDUBA_RPC_SERVER_H_
