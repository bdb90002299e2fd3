#ifndef EDUBA_COORDINATOR_COORDINATOR_H_
#define EDUBA_COORDINATOR_COORDINATOR_H_

#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "coordinator/runtime.h"
#include "coordinator/service.h"
#include "rpc/server.h"

namespace eduba {

// A coordinator that serves: `eduba coordinator`, and a part of `eduba up`.
class Coordinator {
 public:
  struct Options {
    std::string listen = "127.0.0.1:7070";  // port 0: any free one
    int group_size = 1;                     // workers that make a group, 1 to kMaxGroupSize
    std::string data_dir;                   // of the sessions' metadata; empty: nothing outlives the process
    std::string transport = "local";        // of the workers' collectives: "local" or "gloo"
    std::string version;                    // of the program
    absl::Duration form_timeout = absl::Seconds(10);       // for the workers to find each other
    absl::Duration operation_timeout = absl::Seconds(30);  // for the collectives of one command
  };

  // Listens when it returns; health is SERVING while a group is active. INVALID_ARGUMENT for options,
  // UNAVAILABLE when the port or the data folder is in use, and what Store::Open says.
  static absl::StatusOr<std::unique_ptr<Coordinator>> Start(const Options& options);
  // Calls Shutdown(absl::ZeroDuration()).
  ~Coordinator();

  const std::string& address() const { return address_; }
  absl::Status WaitUntilActive(absl::Time deadline) { return runtime_->WaitUntilActive(deadline); }
  // Takes no new calls, gives those under way `grace`, ends the rest and all workers' streams. Idempotent.
  void Shutdown(absl::Duration grace);

 private:
  Coordinator() = default;
  void SetServing(bool serving);

  std::string address_;
  std::unique_ptr<Runtime> runtime_;
  std::unique_ptr<EdubaService> eduba_;
  std::unique_ptr<GroupService> group_;

  std::unique_ptr<RpcServer> server_;

  // The runtime says SetServing from any thread, also before the server is there.
  Mutex health_mutex_;
  bool serving_ ABSL_GUARDED_BY(health_mutex_) = false;
  RpcServer* health_ ABSL_GUARDED_BY(health_mutex_) = nullptr;  // The server, as long as it may be told.
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_COORDINATOR_H_
