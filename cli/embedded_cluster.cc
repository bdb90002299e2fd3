#include "cli/embedded_cluster.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/placement.h"
#include "base/status_macros.h"
#include "cli/gpus.h"
#include "cli/system.h"
#include "rpc/server.h"

namespace eduba {

absl::StatusOr<std::unique_ptr<EmbeddedCluster>> EmbeddedCluster::Start(const Options& options) {
  EDUBA_ASSIGN_OR_RETURN(const auto host_and_port, ParseAddress(options.listen));
  std::unique_ptr<EmbeddedCluster> cluster(new EmbeddedCluster());
  Coordinator::Options coordinator;
  coordinator.listen = options.listen;
  coordinator.group_size = options.workers;
  coordinator.data_dir = options.data_dir;
  coordinator.transport = "local";
  coordinator.version = options.version;
  EDUBA_ASSIGN_OR_RETURN(cluster->coordinator_, Coordinator::Start(coordinator));
  const std::vector<std::string> nodes = Placement::OfRanks(options.workers).nodes;
  for (int i = 0; i < options.workers; ++i) {
    Worker::Options worker;
    worker.node = nodes[i];
    if (!options.data_dir.empty()) worker.data_dir = NodeFolder(options.data_dir, nodes[i]);
    worker.coordinator = cluster->address();
    worker.listen = absl::StrCat(host_and_port.first, ":0");
    worker.memory_bytes = options.memory_bytes / options.workers;
    worker.threads = std::max(1, UsableCores() / options.workers);
    worker.version = options.version;
    if (!options.devices.empty()) worker.backend = options.devices[i];
    worker.precision = options.precision;
    worker.model = options.model;
    worker.activations = options.activations;
    worker.hub = &cluster->hub_;
    EDUBA_RETURN_IF_ERROR(EquipWorker(worker));
    EDUBA_ASSIGN_OR_RETURN(auto started, Worker::Start(worker));
    cluster->workers_.push_back(std::move(started));
  }
  return cluster;
}

EmbeddedCluster::~EmbeddedCluster() { Shutdown(absl::ZeroDuration()); }

void EmbeddedCluster::Shutdown(absl::Duration grace) {
  // The coordinator first: calls under way need the workers until they end.
  if (coordinator_) coordinator_->Shutdown(grace);
  for (const auto& worker : workers_) worker->Shutdown(absl::ZeroDuration());
}

}  // namespace eduba
