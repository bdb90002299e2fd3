#include "worker/worker.h"

#include <unistd.h>

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
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

std::string RandomName() {
  std::random_device random;
  return absl::StrFormat("%08x%08x", random(), random());
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

// A Join stream that the engine, the heartbeat and the reader share.
class Uplink {
 public:
  using Stream = grpc::ClientReaderWriterInterface<v1::WorkerMessage, v1::GroupMessage>;
  explicit Uplink(Stream* stream) : stream_(stream) {}

  // False when the stream is broken; its reader finds out why.
  bool Send(const v1::WorkerMessage& message) {
    const std::scoped_lock lock(mutex_);
    return stream_->Write(message);
  }

 private:
  std::mutex mutex_;
  Stream* const stream_;
};

// Sends a heartbeat each interval from a thread of its own, whatever the engine is busy with.
class Heart {
 public:
  // `goes_on` is asked before each beat; false ends them.
  Heart(Uplink& uplink, const PageStore& store, Engine& engine, std::function<bool()> goes_on)
      : goes_on_(std::move(goes_on)),
        thread_([this, &uplink, &store, &engine] { Beat(uplink, store, engine); }) {}
  ~Heart() {
    {
      const std::scoped_lock lock(mutex_);
      stopping_ = true;
      changed_.notify_one();
    }
    thread_.join();
  }

 private:
  void Beat(Uplink& uplink, const PageStore& store, Engine& engine) {
    std::unique_lock lock(mutex_);
    while (!stopping_) {
      lock.unlock();
      if (!goes_on_()) return;
      v1::WorkerMessage message;
      message.mutable_heartbeat()->set_memory_used_bytes(store.used_bytes());
      for (const uint64_t append : engine.TakeTouchedAppends()) {
        message.mutable_heartbeat()->add_appends(append);
      }
      const bool sent = uplink.Send(message);
      lock.lock();
      if (!sent) return;
      changed_.wait_for(lock, std::chrono::milliseconds(kHeartbeatIntervalMs), [this] { return stopping_; });
    }
  }

  const std::function<bool()> goes_on_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;  // Guarded by mutex_.
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
  EDUBA_ASSIGN_OR_RETURN(const std::shared_ptr<cuda::Device> device, OpenDevice(options_));
  EDUBA_ASSIGN_OR_RETURN(backend_, MakeBackend(options_, device));
  backend_name_ = backend_->name();
  store_ = std::make_unique<PageStore>(backend_.get(), options_.memory_bytes);
  EDUBA_ASSIGN_OR_RETURN(fingerprint_, Fingerprint(*backend_));
  if (!options_.model.empty()) {
    EDUBA_ASSIGN_OR_RETURN(std::unique_ptr<LayerKernels> kernels, MakeLayerKernels(options_, device));
    if (kernels->name() != backend_name_) absl::StrAppend(&backend_name_, "+", kernels->name());
    if (!kernels->library().empty()) absl::StrAppend(&backend_name_, ", ", kernels->library());
    EDUBA_ASSIGN_OR_RETURN(const uint64_t layers, LayerFingerprint(*kernels));
    fingerprint_ ^= layers;
    EDUBA_ASSIGN_OR_RETURN(model_, ServedModel::Load(options_.model, std::move(kernels)));
  }
  incarnation_ = RandomName();
  group_ = v1::Group::NewStub(OpenChannel(options_.coordinator));
  EDUBA_ASSIGN_OR_RETURN(server_, RpcServer::Start(options_.listen, {&pages_}));

  EDUBA_ASSIGN_OR_RETURN(auto bound, ParseAddress(server_->address()));
  if (bound.first == "0.0.0.0" || bound.first == "[::]") bound.first = MachineName();
  address_ = options_.advertise.empty() ? absl::StrCat(bound.first, ":", bound.second) : options_.advertise;
  EDUBA_ASSIGN_OR_RETURN(const auto advertised, ParseAddress(address_));
  host_ = WithoutBrackets(advertised.first);
  thread_ = std::thread([this] { Run(); });
  return absl::OkStatus();
}

Worker::~Worker() { Shutdown(absl::ZeroDuration()); }

absl::Status Worker::Wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return done_; });
  return result_;
}

void Worker::Shutdown(absl::Duration grace) {
  const std::scoped_lock only(shutdown_mutex_);
  {
    const std::scoped_lock lock(mutex_);
    draining_ = true;
  }
  if (server_ != nullptr) server_->Shutdown(grace);
  {
    const std::scoped_lock lock(mutex_);
    stopping_ = true;
    if (stream_context_ != nullptr) stream_context_->TryCancel();
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

void Worker::SetServing(bool serving) {
  const std::scoped_lock lock(mutex_);
  if (!draining_) server_->SetServing(serving);
}

void Worker::Run() {
  absl::Duration backoff = kBackoffMin;
  while (true) {
    bool joined = false;
    absl::Status status = ServeStream(joined);
    std::unique_lock lock(mutex_);
    if (!stopping_ && absl::IsFailedPrecondition(status)) {
      result_ =
          Annotate(status, absl::StrCat("the coordinator at ", options_.coordinator, " refused this worker"));
      stopping_ = true;
    }
    if (stopping_) break;
    // Once for every connection that was lost, and once for the first that could not be made.
    if (joined || backoff == kBackoffMin) {
      LogWarning(absl::StrCat("not connected to the coordinator at ", options_.coordinator, ": ",
                              std::string(status.message()), "; trying again"));
    }
    backoff = joined ? kBackoffMin : std::min(2 * backoff, kBackoffMax);
    changed_.wait_for(lock, absl::ToChronoNanoseconds(backoff), [this] { return stopping_; });
    if (stopping_) break;
  }
  const std::scoped_lock lock(mutex_);
  done_ = true;
  changed_.notify_all();
}

absl::Status Worker::ServeStream(bool& joined) {
  grpc::ClientContext context;
  {
    const std::scoped_lock lock(mutex_);
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
  Engine::Options options;
  options.backend = backend_.get();
  options.store = store_.get();
  options.model = model_.get();
  options.connect = [this](const v1::FormGroup& form, absl::Time deadline) {
    return Connect(form, deadline);
  };
  options.send = [&uplink](const v1::WorkerMessage& message) { uplink.Send(message); };
  options.on_active = [this](bool active) { SetServing(active); };
  const auto engine = std::make_shared<Engine>(std::move(options));
  pages_.SetEngine(engine);
  {
    const Heart heart(uplink, *store_, *engine, [this] { return CheckDevice(); });
    v1::GroupMessage message;
    while (stream->Read(&message)) {
      joined = true;
      engine->Handle(std::move(message));
    }
    pages_.SetEngine(nullptr);
    engine->Stop();
  }
  absl::Status status = FromGrpc(stream->Finish());
  const std::scoped_lock lock(mutex_);
  stream_context_ = nullptr;
  return status;
}

v1::WorkerHello Worker::Hello() const {
  v1::WorkerHello hello;
  hello.set_protocol(kGroupProtocol);
  hello.set_version(options_.version);
  hello.set_incarnation(incarnation_);
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
  const std::scoped_lock lock(mutex_);
  if (!stopping_) {
    result_ = Annotate(health, "this worker has left its group, and ends");
    LogError(std::string(result_.message()));
    stopping_ = true;
    changed_.notify_all();
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
