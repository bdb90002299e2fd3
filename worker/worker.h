#ifndef EDUBA_WORKER_WORKER_H_
#define EDUBA_WORKER_WORKER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "attention/page_store.h"
#include "base/mutex.h"
#include "collective/communicator.h"
#include "collective/local/local_communicator.h"
#include "eduba/v1/group.grpc.pb.h"
#include "kernels/backend.h"
#include "rpc/server.h"
#include "worker/node_content.h"
#include "worker/node_identity.h"
#include "worker/pages_service.h"
#include "worker/served_model.h"

namespace eduba {

// A whole worker: its content, its Pages server, and its connection to the coordinator, over which it takes
// part in groups. The connection may break and come back; content stays for as long as the worker lives.
class Worker {
 public:
  struct Options {
    std::string coordinator;             // host:port
    std::string listen = "127.0.0.1:0";  // The Pages server's address.
    // host:port by which clients reach this worker; the other workers connect to the same host. Empty: the
    // address listened on, with this machine's name where that is a wildcard.
    std::string advertise;
    int64_t memory_bytes = 0;  // For pages. REQUIRES: > 0.
    int threads = 1;           // The kernels' threads.
    // "cpu" (the best instruction set of this machine), "cuda:N" (a GPU), or "reference" (slow, to compare
    // with).
    std::string backend = "cpu";
    // "exact", or on a GPU "tensor" (kernels/cuda/cuda_backend.h). A group's workers all have the same.
    std::string precision = "exact";
    // How it meets workers that are other processes: "gloo", or "nccl", which only GPUs can.
    std::string transport = "gloo";
    std::string model;  // A folder as Hugging Face's; empty: this worker serves tensor sessions only.
    // The activations of the model's products and of attention's queries. A group's workers all have the
    // same.
    Activations activations = Activations::kF32;
    std::string version;  // The program's version.
    // Who it is, and where that is kept (worker/node_identity.h). Both empty: a node for this object alone.
    std::string node;
    std::string data_dir;
    // Where the workers of this process meet; outlives them. Null: the ranks are processes, and `transport`
    // connects them.
    LocalHub* hub = nullptr;
    // For tests: make the backend, and the kernels of a model's layers, instead.
    std::function<absl::StatusOr<std::unique_ptr<Backend>>()> make_backend;
    std::function<absl::StatusOr<std::unique_ptr<LayerKernels>>()> make_layers;
  };

  // Serves, and keeps asking the coordinator to be taken in. INVALID_ARGUMENT for bad options, UNAVAILABLE
  // when the port is taken, and what NodeIdentity::Open and ServedModel::Load say. FAILED_PRECONDITION or
  // RESOURCE_EXHAUSTED where the device, CUDA or NCCL is missing, too old or full.
  static absl::StatusOr<std::unique_ptr<Worker>> Start(Options options);
  // Calls Shutdown(absl::ZeroDuration()).
  ~Worker();

  // host:port by which clients reach it.
  const std::string& address() const { return address_; }

  // Returns OK after Shutdown, FAILED_PRECONDITION when the coordinator refused this worker for good, or
  // UNAVAILABLE when its device failed: it has left the group then, and only a new process can use the
  // device.
  absl::Status Wait();
  // Takes no new uploads, gives those under way `grace`, then leaves the group. Idempotent; any thread.
  void Shutdown(absl::Duration grace);

 private:
  explicit Worker(Options options);

  absl::Status Init();
  // Backend, page store and model, and with them what the worker says of its arithmetic.
  absl::Status LoadKernels();
  // The Pages server, and the address by which others reach it.
  absl::Status Listen();
  void SetServing(bool serving);
  // Joins again and again, until Shutdown or a refusal.
  void Run();
  // A Join stream has ended with `status`. False: for good.
  bool AwaitNextJoin(const absl::Status& status, bool joined, absl::Duration& backoff);
  // One Join stream, from hello to its end. Sets `joined` once the coordinator has answered.
  absl::Status ServeStream(bool& joined);
  v1::WorkerHello Hello() const;
  // False, and leaves the group for good, when the device has failed.
  bool CheckDevice();
  absl::StatusOr<std::unique_ptr<Communicator>> Connect(const v1::FormGroup& form, absl::Time deadline);

  const Options options_;
  std::unique_ptr<Backend> backend_;
  std::string backend_name_;  // Also names what computes the model's layers, where it is another.
  std::unique_ptr<PageStore> store_;
  std::unique_ptr<ServedModel> model_;  // Null without one.
  std::unique_ptr<NodeContent> content_;
  PagesService pages_;
  std::unique_ptr<v1::Group::Stub> group_;
  std::unique_ptr<RpcServer> server_;
  std::string address_;
  std::string host_;         // The host of address_, in the form that sockets want.
  std::string incarnation_;  // New for every start.
  std::optional<NodeIdentity> identity_;
  uint64_t attention_fingerprint_ = 0;
  uint64_t fingerprint_ = 0;  // Of attention and, with a model, of its layers: what the group compares.

  Mutex shutdown_mutex_;  // Held by the one Shutdown that does the work.
  Mutex mutex_;
  CondVar changed_;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;  // The server is going: it is told nothing more.
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status result_ ABSL_GUARDED_BY(mutex_);
  // The context of the Join under way.
  grpc::ClientContext* stream_context_ ABSL_GUARDED_BY(mutex_) = nullptr;
  std::thread thread_;
};

}  // namespace eduba

#endif  // EDUBA_WORKER_WORKER_H_
