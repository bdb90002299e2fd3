#include "tests/cluster/test_cluster.h"

#include <utility>

#include "absl/time/clock.h"
#include "base/check.h"
#include "base/placement.h"

namespace eduba {
namespace {

// Sanitized builds on a busy machine are slow; a cluster that needs this long hangs.
constexpr absl::Duration kPatience = absl::Seconds(60);

template <typename T>
T ValueOf(absl::StatusOr<T> result) {
  if (!result.ok()) internal::CheckFailed(__FILE__, __LINE__, result.status().ToString());
  return *std::move(result);
}

}  // namespace

TestCluster::TestCluster(const Options& options) : options_(options) {
  Coordinator::Options coordinator;
  coordinator.listen = "127.0.0.1:0";
  coordinator.group_size = options.workers;
  coordinator.transport = options.transport;
  coordinator.version = "test";
  coordinator_ = ValueOf(Coordinator::Start(coordinator));
  for (int i = 0; i < options.workers; ++i) workers_.push_back(StartWorker(i));
  ClientOptions client;
  client.server = address();
  client.timeout = kPatience;
  client_ = std::make_unique<Client>(client);
  AwaitActive();
}

TestCluster::~TestCluster() {
  coordinator_->Shutdown(absl::ZeroDuration());
  workers_.clear();
}

void TestCluster::AwaitActive() {
  const absl::Status status = coordinator_->WaitUntilActive(absl::Now() + kPatience);
  if (!status.ok()) internal::CheckFailed(__FILE__, __LINE__, status.ToString());
}

std::unique_ptr<Worker> TestCluster::StartWorker(int index) {
  Worker::Options worker;
  worker.coordinator = address();
  worker.node = Placement::OfRanks(options_.workers).nodes[index];
  worker.memory_bytes = options_.memory_bytes;
  // Unequal on purpose: threads are no part of an answer.
  worker.threads = 1 + index % 2;
  worker.version = "test";
  worker.model = options_.model;
  worker.hub = options_.transport == "local" ? &hub_ : nullptr;
  return ValueOf(Worker::Start(worker));
}

}  // namespace eduba
