#include "worker/worker.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "collective/gloo/gloo_communicator.h"
#include "collective/nccl/nccl_api.h"
#include "collective/nccl/nccl_communicator.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/cuda_layer_kernels.h"
#include "kernels/fingerprint.h"
#include "kernels/layer_fingerprint.h"
#include "kernels/reference/reference_backend.h"
#include "kernels/reference/reference_layer_kernels.h"
#include "rpc/channel.h"
#include "rpc/limits.h"
#include "rpc/status.h"
#include "worker/command_loop.h"
#include "worker/rendezvous_client.h"

namespace eduba {
namespace {

constexpr absl::Duration kBackoffMin = absl::Milliseconds(200);
constexpr absl::Duration kBackoffMax = absl::Seconds(2);

absl::Status CheckPrecision(const Worker::Options& options) {
  if (options.make_backend) return absl::OkStatus();
  EDUBA_ASSIGN_OR_RETURN(const CudaPrecision precision, ParseCudaPrecision(options.precision));
  if (precision != CudaPrecision::kExact && !CudaDeviceIndex(options.backend).ok()) {
    return absl::InvalidArgumentError(absl::StrCat("precision ", options.precision,
                                                   " is for GPUs, and this worker's ", "device is ",
                                                   options.backend, "; use --device cuda:N"));
  }
  return absl::OkStatus();
}

// What attention and layers share on a GPU; null elsewhere.
absl::StatusOr<std::shared_ptr<cuda::Device>> OpenDevice(const Worker::Options& options) {
  if (options.make_backend || options.backend == "cpu" || options.backend == "reference") return nullptr;
  EDUBA_ASSIGN_OR_RETURN(const int index, CudaDeviceIndex(options.backend));
  return cuda::OpenCudaDevice(index);
}

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const Worker::Options& options,
                                                     std::shared_ptr<cuda::Device> device) {
  if (options.make_backend) return options.make_backend();
  if (options.backend == "cpu") return MakeCpuBackend(options.threads, options.activations);
  if (options.backend == "reference") return MakeReferenceBackend();
  CudaOptions cuda;
  EDUBA_ASSIGN_OR_RETURN(cuda.precision, ParseCudaPrecision(options.precision));
  cuda.page_bytes = options.memory_bytes;
  cuda.threads = options.threads;
  return MakeCudaBackendOn(std::move(device), cuda);
}

// Whether the worker can take part in groups over its transport at all.
absl::Status CheckTransport(const Worker::Options& options) {
  if (options.hub != nullptr || options.transport == "gloo") return absl::OkStatus();
  if (options.transport != "nccl") {
    return absl::InvalidArgumentError(
        absl::StrCat("transport '", options.transport, "' is not known: use gloo or nccl"));
  }
  if (!CudaDeviceIndex(options.backend).ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("transport nccl connects GPUs, and this worker's device is ", options.backend,
                     "; use --device cuda:N, or --transport gloo"));
  }
  return LoadNccl().status();
}

// For a backend that MakeBackend knows.
absl::StatusOr<std::unique_ptr<LayerKernels>> MakeLayerKernels(const Worker::Options& options,
                                                               std::shared_ptr<cuda::Device> device) {
  if (options.make_layers) return options.make_layers();
  if (device != nullptr) return MakeCudaLayerKernels(std::move(device), options.activations);
  if (options.backend == "reference") return MakeReferenceLayerKernels(options.activations);
  return MakeCpuLayerKernels(options.threads, options.activations);
}

// This machine's name, for an address that others can use where we listen on all interfaces.
std::string MachineName() {
  char name[256] = {};
  if (gethostname(name, sizeof(name) - 1) != 0) return "localhost";
  return name;
}

// "[::1]" as "::1".
std::string WithoutBrackets(const std::string& host) {
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') return host.substr(1, host.size() - 2);
  return host;
}

// A Join stream that the command loop, the heartbeat and the reader share.
class Uplink {
 public:
  using Stream = grpc::ClientReaderWriterInterface<v1::WorkerMessage, v1::GroupMessage>;
  explicit Uplink(Stream* stream) : stream_(stream) {}

  // False when the stream is broken; its reader finds out why.
  bool Send(const v1::WorkerMessage& message) {
    const MutexLock lock(mutex_);
    return stream_->Write(message);
  }

 private:
  Mutex mutex_;
  Stream* const stream_ ABSL_PT_GUARDED_BY(mutex_);  // For writes; its reader is one thread.
};

// Sends a heartbeat each interval from a thread of its own, whatever the command loop is busy with.
class Heart {
 public:
  // `goes_on` is asked before each beat; false ends them. All outlive the heart.
  Heart(Uplink* uplink, const PageStore* store, TensorContent* tensors, std::function<bool()> goes_on)
      : uplink_(uplink), store_(store), tensors_(tensors), goes_on_(std::move(goes_on)), thread_([this] {
          Run();
        }) {}
  ~Heart() {
    {
      const MutexLock lock(mutex_);
      stopping_ = true;
      changed_.NotifyOne();
    }
    thread_.join();
  }

 private:
  void Run() {
    while (goes_on_() && Beat() && AwaitNextBeat()) {
    }
  }

  // False: the stream is broken.
  bool Beat() {
    v1::WorkerMessage message;
    message.mutable_heartbeat()->set_memory_used_bytes(store_->used_bytes());
    for (const uint64_t append : tensors_->TakeTouchedAppends()) {
      message.mutable_heartbeat()->add_appends(append);
    }
    return uplink_->Send(message);
  }

  // False: there is to be none.
  bool AwaitNextBeat() {
    const auto time = std::chrono::steady_clock::now() + std::chrono::milliseconds(kHeartbeatIntervalMs);
    const MutexLock lock(mutex_);
    while (!stopping_ && changed_.WaitUntil(mutex_, time)) {
    }
    return !stopping_;
  }

  Uplink* const uplink_;
  const PageStore* const store_;
  TensorContent* const tensors_;
  const std::function<bool()> goes_on_;
  Mutex mutex_;
  CondVar changed_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Worker>> Worker::Start(Options options) {
  auto worker = std::unique_ptr<Worker>(new Worker(std::move(options)));
  EDUBA_RETURN_IF_ERROR(worker->Init());
  return worker;
}

Worker::Worker(Options options) : options_(std::move(options)) {}

absl::Status Worker::Init() {
  if (options_.memory_bytes <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("memory for pages is ", options_.memory_bytes, " bytes, wanted more than 0"));
  }
  if (options_.threads < 1) {
    return absl::InvalidArgumentError(absl::StrCat("threads is ", options_.threads, ", wanted at least 1"));
  }
  EDUBA_RETURN_IF_ERROR(ParseAddress(options_.coordinator).status());
  EDUBA_RETURN_IF_ERROR(CheckTransport(options_));
  EDUBA_RETURN_IF_ERROR(CheckPrecision(options_));
  EDUBA_ASSIGN_OR_RETURN(identity_, NodeIdentity::Open(options_.node, options_.data_dir));
  incarnation_ = RandomId();
  EDUBA_RETURN_IF_ERROR(LoadKernels());
  content_ = std::make_unique<NodeContent>(backend_.get(), store_.get(), model_.get());
  if (!options_.data_dir.empty()) {
    EDUBA_RETURN_IF_ERROR(
        content_->OpenStorage(options_.data_dir, identity_->id(), attention_fingerprint_, options_.threads));
  }
  group_ = v1::Group::NewStub(OpenChannel(options_.coordinator));
  EDUBA_RETURN_IF_ERROR(Listen());
  thread_ = std::thread([this] { Run(); });
  return absl::OkStatus();
}

absl::Status Worker::LoadKernels() {
  EDUBA_ASSIGN_OR_RETURN(const std::shared_ptr<cuda::Device> device, OpenDevice(options_));
  EDUBA_ASSIGN_OR_RETURN(backend_, MakeBackend(options_, device));
  backend_name_ = backend_->name();
  store_ = std::make_unique<PageStore>(backend_.get(), options_.memory_bytes);
  EDUBA_ASSIGN_OR_RETURN(attention_fingerprint_, Fingerprint(*backend_));
  fingerprint_ = attention_fingerprint_;
  if (options_.model.empty()) return absl::OkStatus();
  EDUBA_ASSIGN_OR_RETURN(std::unique_ptr<LayerKernels> kernels, MakeLayerKernels(options_, device));
  if (kernels->name() != backend_name_) absl::StrAppend(&backend_name_, "+", kernels->name());
  if (!kernels->library().empty()) absl::StrAppend(&backend_name_, ", ", kernels->library());
  EDUBA_ASSIGN_OR_RETURN(const uint64_t layers, LayerFingerprint(*kernels));
  fingerprint_ ^= layers;
  EDUBA_ASSIGN_OR_RETURN(model_, ServedModel::Load(options_.model, std::move(kernels)));
  return absl::OkStatus();
}

absl::Status Worker::Listen() {
  EDUBA_ASSIGN_OR_RETURN(server_, RpcServer::Start(options_.listen, {&pages_}));
  EDUBA_ASSIGN_OR_RETURN(auto bound, ParseAddress(server_->address()));
  if (bound.first == "0.0.0.0" || bound.first == "[::]") bound.first = MachineName();
  address_ = options_.advertise.empty() ? absl::StrCat(bound.first, ":", bound.second) : options_.advertise;
  EDUBA_ASSIGN_OR_RETURN(const auto advertised, ParseAddress(address_));
  host_ = WithoutBrackets(advertised.first);
  return absl::OkStatus();
}

Worker::~Worker() { Shutdown(absl::ZeroDuration()); }

absl::Status Worker::Wait() {
  const MutexLock lock(mutex_);
  while (!done_) changed_.Wait(mutex_);
  return result_;
}

void Worker::Shutdown(absl::Duration grace) {
  const MutexLock only(shutdown_mutex_);
  {
    const MutexLock lock(mutex_);
    draining_ = true;
  }
  if (server_ != nullptr) server_->Shutdown(grace);
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
    if (stream_context_ != nullptr) stream_context_->TryCancel();
    changed_.NotifyAll();
  }
  if (thread_.joinable()) thread_.join();
}

void Worker::SetServing(bool serving) {
  const MutexLock lock(mutex_);
  if (!draining_) server_->SetServing(serving);
}

void Worker::Run() {
  absl::Duration backoff = kBackoffMin;
  while (true) {
    bool joined = false;
    const absl::Status status = ServeStream(joined);
    if (!AwaitNextJoin(status, joined, backoff)) break;
  }
  const MutexLock lock(mutex_);
  done_ = true;
  changed_.NotifyAll();
}

bool Worker::AwaitNextJoin(const absl::Status& status, bool joined, absl::Duration& backoff) {
  const MutexLock lock(mutex_);
  if (!stopping_ && absl::IsFailedPrecondition(status)) {
    result_ =
        Annotate(status, absl::StrCat("the coordinator at ", options_.coordinator, " refused this worker"));
    stopping_ = true;
  }
  if (stopping_) return false;
  // Once for every connection that was lost, and once for the first that could not be made.
  if (joined || backoff == kBackoffMin) {
    LogWarning(absl::StrCat("not connected to the coordinator at ", options_.coordinator, ": ",
                            std::string(status.message()), "; trying again"));
  }
  backoff = joined ? kBackoffMin : std::min(2 * backoff, kBackoffMax);
  const auto time = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(backoff);
  while (!stopping_ && changed_.WaitUntil(mutex_, time)) {
  }
  return !stopping_;
}

absl::Status Worker::ServeStream(bool& joined) {
  grpc::ClientContext context;
  {
    const MutexLock lock(mutex_);
    if (stopping_) return absl::CancelledError("the worker stops");
    stream_context_ = &context;
  }
  const auto stream = group_->Join(&context);
  Uplink uplink(stream.get());
  {
    v1::WorkerMessage hello;
    *hello.mutable_hello() = Hello();
    uplink.Send(hello);
  }
  CommandLoop::Options options;
  options.backend = backend_.get();
  options.content = content_.get();
  options.connect = [this](const v1::FormGroup& form, absl::Time deadline) {
    return Connect(form, deadline);
  };
  options.send = [&uplink](const v1::WorkerMessage& message) { uplink.Send(message); };
  options.on_active = [this](bool active) { SetServing(active); };
  const auto loop = std::make_shared<CommandLoop>(std::move(options));
  pages_.SetCommandLoop(loop);
  {
    const Heart heart(&uplink, store_.get(), &content_->tensors(), [this] { return CheckDevice(); });
    v1::GroupMessage message;
    while (stream->Read(&message)) {
      joined = true;
      loop->Handle(std::move(message));
    }
    pages_.SetCommandLoop(nullptr);
    loop->Stop();
  }
  absl::Status status = FromGrpc(stream->Finish());
  const MutexLock lock(mutex_);
  stream_context_ = nullptr;
  return status;
}

v1::WorkerHello Worker::Hello() const {
  v1::WorkerHello hello;
  hello.set_protocol(kGroupProtocol);
  hello.set_version(options_.version);
  hello.set_node(identity_->id());
  hello.set_incarnation(incarnation_);
  hello.set_cluster(content_->stored_cluster().value_or(0));
  hello.set_term(content_->stored_term().number);
  hello.set_term_nonce(content_->stored_term().nonce);
  hello.set_address(address_);
  hello.set_backend(backend_name_);
  hello.set_threads(options_.threads);
  hello.set_memory_bytes(options_.memory_bytes);
  hello.set_fingerprint(fingerprint_);
  hello.set_transport(options_.hub != nullptr ? "local" : options_.transport);
  if (model_ != nullptr) *hello.mutable_model() = model_->info();
  return hello;
}

bool Worker::CheckDevice() {
  const absl::Status health = backend_->health();
  if (health.ok()) return true;
  const MutexLock lock(mutex_);
  if (!stopping_) {
    result_ = Annotate(health, "this worker has left its group, and ends");
    LogError(std::string(result_.message()));
    stopping_ = true;
    changed_.NotifyAll();
  }
  if (stream_context_ != nullptr) stream_context_->TryCancel();
  return false;
}

absl::StatusOr<std::unique_ptr<Communicator>> Worker::Connect(const v1::FormGroup& form,
                                                              absl::Time deadline) {
  if (!CheckDevice()) return backend_->health();
  if (options_.hub != nullptr) {
    return options_.hub->Join(form.epoch(), form.attempt(), form.rank(), form.size(), deadline);
  }
  RendezvousClient rendezvous(group_.get(), form.epoch(), form.attempt());
  if (options_.transport == "nccl") {
    NcclOptions nccl;
    EDUBA_ASSIGN_OR_RETURN(nccl.device, CudaDeviceIndex(options_.backend));
    return ConnectNccl(form.rank(), form.size(), rendezvous, nccl, deadline);
  }
  GlooOptions gloo;
  gloo.host = host_;
  return ConnectGloo(form.rank(), form.size(), rendezvous, gloo, deadline);
}

}  // namespace eduba
