#ifndef EDUBA_CLI_EMBEDDED_CLUSTER_H_
#define EDUBA_CLI_EMBEDDED_CLUSTER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "collective/local/local_communicator.h"
#include "coordinator/coordinator.h"
#include "worker/worker.h"

namespace eduba {

// The data directory of one of the workers of this machine whose coordinator has `data_dir`.
inline std::string NodeFolder(const std::string& data_dir, const std::string& node) {
  return absl::StrCat(data_dir, "/nodes/", node);
}

// A coordinator and its workers in this process, joined by the `local` transport. They speak gRPC with each
// other as separate processes would: the same code path.
class EmbeddedCluster {
 public:
  struct Options {
    // The coordinator's address; workers listen on free ports of the same host.
    std::string listen = "127.0.0.1:0";
    int workers = 1;
    int64_t memory_bytes = 0;          // For pages, over all workers. REQUIRES: > 0.
    std::vector<std::string> devices;  // Each worker's backend (worker.h). Empty: all on the CPU.
    std::string precision = "exact";   // Each worker's precision (worker.h).
    // The coordinator's data directory; workers have folders in it (NodeFolder). Empty: nothing is kept.
    std::string data_dir;
    std::string version;
    std::string model;                            // A model's folder, for every worker. Empty: none.
    Activations activations = Activations::kF32;  // The model's activations.
  };

  // Returns when everything listens; the group forms after that.
  static absl::StatusOr<std::unique_ptr<EmbeddedCluster>> Start(const Options& options);
  // Calls Shutdown(absl::ZeroDuration()).
  ~EmbeddedCluster();

  // The coordinator's address.
  const std::string& address() const { return coordinator_->address(); }
  // Calls under way get `grace`. Idempotent.
  void Shutdown(absl::Duration grace);

 private:
  EmbeddedCluster() = default;

  LocalHub hub_;
  std::unique_ptr<Coordinator> coordinator_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

}  // namespace eduba

#endif  // EDUBA_CLI_EMBEDDED_CLUSTER_H_
