#ifndef EDUBA_TESTS_CLUSTER_TEST_CLUSTER_H_
#define EDUBA_TESTS_CLUSTER_TEST_CLUSTER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "client/client.h"
#include "collective/local/local_communicator.h"
#include "coordinator/coordinator.h"
#include "worker/worker.h"

namespace eduba {

// A coordinator and its workers in this process, over real gRPC on loopback, whose workers can be taken away
// and replaced.
class TestCluster {
 public:
  struct Options {
    int workers = 1;
    std::string transport = "local";
    int64_t memory_bytes = int64_t{64} << 20;  // Each worker's memory for pages.
    std::string model = {};                    // A folder; empty: none.
  };

  // Returns when the group is active; ends the test program when that fails.
  explicit TestCluster(const Options& options);
  ~TestCluster();

  const std::string& address() const { return coordinator_->address(); }
  Client& client() { return *client_; }
  int workers() const { return static_cast<int>(workers_.size()); }

  // Waits until the group is active.
  void AwaitActive();
  // Worker `index` leaves. The epoch is over when the coordinator has seen it.
  void StopWorker(int index) { workers_[index]->Shutdown(absl::ZeroDuration()); }
  // A new one in the place of a stopped worker.
  void ReplaceWorker(int index) { workers_[index] = StartWorker(index); }

 private:
  std::unique_ptr<Worker> StartWorker(int index);

  const Options options_;
  LocalHub hub_;
  std::unique_ptr<Coordinator> coordinator_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::unique_ptr<Client> client_;
};

}  // namespace eduba

#endif  // EDUBA_TESTS_CLUSTER_TEST_CLUSTER_H_
