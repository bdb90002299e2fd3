// eduba up, coordinator, worker.

#include <algorithm>
#include <atomic>
#include <csignal>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "CLI/Option.hpp"
#include "CLI/Validators.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "base/log.h"
#include "base/pages.h"
#include "base/placement.h"
#include "base/status_macros.h"
#include "cli/child_process.h"
#include "cli/command.h"
#include "cli/device.h"
#include "cli/embedded_cluster.h"
#include "cli/flags.h"
#include "cli/gpus.h"
#include "cli/model_folder.h"
#include "cli/output.h"
#include "cli/signals.h"
#include "cli/supervisor.h"
#include "cli/system.h"
#include "cli/wait_for_group.h"
#include "coordinator/coordinator.h"
#include "rpc/server.h"
#include "worker/worker.h"

namespace eduba {
namespace {

// Calls under way when the program is asked to end.
constexpr absl::Duration kDrainGrace = absl::Seconds(10);
// For one part to listen.
constexpr absl::Duration kStartTimeout = absl::Seconds(60);

// Who reads it may wait for this line, the only one on stdout: it comes when calls can come.
void PrintReady(const std::string& address, bool json) {
  if (json) {
    PrintJsonLine({{"event", "ready"}, {"address", address}});
  } else {
    std::cout << "ready: " << address << std::endl;
  }
}

void AddReadyJsonFlag(CLI::App& command, bool& json) {
  command.add_flag("--json", json,
                   R"(Say {"event":"ready","address":"HOST:PORT"} instead of ready: HOST:PORT)");
}

// To be called when the program has been asked to end and begins to drain.
void BeginEnd(bool log) {
  if (log) LogInfo("asked to end: no new calls; those under way may finish (asked again, it ends at once)");
  ReleaseSignals();
}

// Takes signals until one asks the program to end.
void WaitForSignalToEnd() {
  while (!AsksToEnd(WaitForSignal(absl::InfiniteDuration()))) {
  }
}

// A part of `eduba up --processes` is run with it: its failure is told to the parent, which has one line for
// all of them, and being asked to end is no news.
void AddChildFlag(CLI::App& command, bool& child) { command.add_flag("--child", child)->group(""); }

absl::Status TellParent(const absl::Status& status) {
  if (status.ok()) return status;
  std::cout << "failed: " << status.message() << std::endl;
  return AlreadyTold(status);
}

// --- up ---

struct UpOptions {
  int workers = 2;
  bool processes = false;
  std::string listen = "127.0.0.1:7070";
  int64_t memory_bytes = 0;  // 0: what DefaultMemoryBytes says.
  std::string device = "cpu";
  std::string precision = "exact";
  std::string transport;  // What joins worker processes. Empty: what TransportOf says.
  std::string data_dir;
  std::string model;
  std::string activations = "f32";
  bool json = false;
};

// --model, of whoever runs workers.
void AddModelOption(CLI::App& command, std::string& folder) {
  command
      .add_option(
          "--model", folder,
          "Folder with a model (config.json, *.safetensors, tokenizer), or nano, which comes with this "
          "program (./nano: a folder of that name): token ids in, text and scores out [none]")
      ->transform([](const std::string& named) {
        const absl::StatusOr<std::string> found = ModelFolder(named);
        if (!found.ok()) throw CLI::ValidationError(std::string(found.status().message()));
        return *found;
      });
}

void AddActivationsOption(CLI::App& command, std::string& activations) {
  command
      .add_option("--activations", activations,
                  "What bf16 weights and keys are multiplied with: f32, or rounded to bf16, as PyTorch does "
                  "with such models: faster prompts where the CPU has AVX512_BF16. The same for all workers")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
}

Activations ParseActivations(const std::string& name) {
  return name == "bf16" ? Activations::kBf16 : Activations::kF32;
}

void AddUpOptions(CLI::App& command, UpOptions& options) {
  command.add_option("--workers", options.workers, "Workers")
      ->check(CLI::Range(1, kMaxGroupSize))
      ->capture_default_str();
  CLI::Option* const processes = command.add_flag(
      "--processes", options.processes, "Every worker a process of its own (otherwise: all in this process)");
  command
      .add_option("--transport", options.transport,
                  "How processes reduce together: gloo, or nccl between GPUs [nccl where each of several "
                  "workers has a GPU of its own, else gloo]")
      ->check(CLI::IsMember({"gloo", "nccl"}))
      ->needs(processes);
  command.add_option("--listen", options.listen, "Address to serve on, HOST:PORT")->capture_default_str();
  AddBytesOption(
      command, "--memory-bytes", options.memory_bytes,
      "Memory for keys and values, over all workers; 8GiB, 500MiB, ... [60 % of this machine's, or of "
      "what is free on its GPUs]");
  AddDeviceOption(command, options.device, "What the workers run on; with cuda, this machine's GPUs in turn");
  AddPrecisionOption(command, options.precision);
  command.add_option("--data-dir", options.data_dir,
                     "Folder for sessions: the coordinator's records, and a folder of content for each "
                     "worker [kept in memory]");
  AddModelOption(command, options.model);
  AddActivationsOption(command, options.activations);
  AddReadyJsonFlag(command, options.json);
}

absl::Status UpInThisProcess(const UpOptions& options, const std::vector<std::string>& devices) {
  EmbeddedCluster::Options cluster_options;
  cluster_options.listen = options.listen;
  cluster_options.workers = options.workers;
  cluster_options.memory_bytes = options.memory_bytes;
  cluster_options.devices = devices;
  cluster_options.precision = options.precision;
  cluster_options.data_dir = options.data_dir;
  cluster_options.version = EDUBA_VERSION;
  cluster_options.model = options.model;
  cluster_options.activations = ParseActivations(options.activations);
  EDUBA_ASSIGN_OR_RETURN(const auto cluster, EmbeddedCluster::Start(cluster_options));
  EDUBA_ASSIGN_OR_RETURN(const bool complete, WaitForGroup(cluster->address()));
  if (complete) {
    PrintReady(cluster->address(), options.json);
    WaitForSignalToEnd();
    BeginEnd(/*log=*/true);
  }
  cluster->Shutdown(kDrainGrace);
  return absl::OkStatus();
}

// The transport of workers that are processes. One worker alone has nobody to reduce with, and needs no NCCL.
std::string TransportOf(const UpOptions& options, const std::vector<std::string>& devices) {
  if (!options.transport.empty()) return options.transport;
  return devices.size() > 1 && EachHasItsGpu(devices) ? "nccl" : "gloo";
}

std::vector<std::string> CoordinatorArguments(const UpOptions& options, const std::string& listen,
                                              const std::string& transport) {
  std::vector<std::string> arguments = {"coordinator", "--child",      "--listen",
                                        listen,        "--group-size", absl::StrCat(options.workers),
                                        "--transport", transport};
  if (!options.data_dir.empty()) arguments.insert(arguments.end(), {"--data-dir", options.data_dir});
  return arguments;
}

std::vector<std::string> WorkerArguments(const UpOptions& options, int index, const std::string& node,
                                         const std::string& device, const std::string& transport,
                                         const std::string& coordinator, const std::string& host) {
  std::vector<std::string> arguments = {
      "worker",         "--child",
      "--coordinator",  coordinator,
      "--listen",       absl::StrCat(host, ":0"),
      "--memory-bytes", absl::StrCat(options.memory_bytes / options.workers),
      "--threads",      absl::StrCat(std::max(1, UsableCores() / options.workers)),
      "--device",       device,
      "--precision",    options.precision,
      "--transport",    transport,
      "--node-id",      node};
  if (!options.data_dir.empty()) {
    arguments.insert(arguments.end(), {"--data-dir", NodeFolder(options.data_dir, node)});
  }
  if (!options.model.empty()) {
    arguments.insert(arguments.end(), {"--model", options.model, "--activations", options.activations});
  }
  return arguments;
}

// Starts all parts, the coordinator first; returns its address.
absl::StatusOr<std::string> StartChildren(const UpOptions& options, const std::vector<std::string>& devices,
                                          Supervisor& children) {
  EDUBA_ASSIGN_OR_RETURN(const auto host_and_port, ParseAddress(options.listen));
  const std::string transport = TransportOf(options, devices);
  const std::string name = "the coordinator";
  EDUBA_ASSIGN_OR_RETURN(ChildProcess * coordinator,
                         children.Start(name, CoordinatorArguments(options, options.listen, transport)));
  EDUBA_ASSIGN_OR_RETURN(const std::string address, coordinator->WaitUntilReady(absl::Now() + kStartTimeout));
  // Another one in its place has the port that this one chose.
  children.SetArguments(name, CoordinatorArguments(options, address, transport));
  const std::vector<std::string> nodes = Placement::OfRanks(options.workers).nodes;
  for (int i = 0; i < options.workers; ++i) {
    EDUBA_RETURN_IF_ERROR(
        children
            .Start(absl::StrCat("worker ", i),
                   WorkerArguments(options, i, nodes[i], devices[i], transport, address, host_and_port.first))
            .status());
  }
  return address;
}

// Until the program is asked to end. A part that ends before all have started is an error; later it is
// started again.
absl::Status ServeFromChildren(const UpOptions& options, const std::vector<std::string>& devices,
                               Supervisor& children) {
  EDUBA_ASSIGN_OR_RETURN(const std::string address, StartChildren(options, devices, children));
  const absl::StatusOr<bool> complete = WaitForGroup(address);
  if (!complete.ok()) {
    const std::string why = children.WhyEnded();
    return why.empty() ? complete.status() : absl::UnavailableError(why);
  }
  if (!*complete) return absl::OkStatus();
  PrintReady(address, options.json);
  children.Supervise();
  BeginEnd(/*log=*/true);
  return absl::OkStatus();
}

absl::Status UpInProcesses(const UpOptions& options, const std::vector<std::string>& devices) {
  Supervisor children;
  absl::Status served = ServeFromChildren(options, devices, children);
  // The coordinator, which is the first, ends first: its calls under way need the workers. Once it is gone,
  // what the workers still take in can never be committed.
  children.End(kDrainGrace + absl::Seconds(5));
  return served;
}

// What the workers run on, and the memory for all of them.
struct Resources {
  std::vector<std::string> devices;
  int64_t memory_bytes = 0;
};

absl::StatusOr<Resources> FindResources(const UpOptions& options) {
  Resources resources;
  EDUBA_ASSIGN_OR_RETURN(resources.devices, DevicesOfWorkers(options.device, options.workers));
  resources.memory_bytes = options.memory_bytes;
  if (resources.memory_bytes == 0) {
    EDUBA_ASSIGN_OR_RETURN(resources.memory_bytes, DefaultMemoryBytes(resources.devices, options.model));
  }
  return resources;
}

// The same for workers that are processes. Whoever asks a GPU how much memory is free has a context on it,
// which takes some itself, and keeps all others away where a GPU is one process's: so it is not this process,
// which stays, that asks.
absl::StatusOr<Resources> FindResourcesOfProcesses(const UpOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const std::string found, AskInACopy([&]() -> absl::StatusOr<std::string> {
                           EDUBA_ASSIGN_OR_RETURN(const Resources resources, FindResources(options));
                           return absl::StrCat(resources.memory_bytes, " ",
                                               absl::StrJoin(resources.devices, " "));
                         }));
  Resources resources;
  resources.devices = absl::StrSplit(found, ' ');
  EDUBA_CHECK(absl::SimpleAtoi(resources.devices.front(), &resources.memory_bytes));
  resources.devices.erase(resources.devices.begin());
  return resources;
}

absl::Status RunUp(const UpOptions& given) {
  Resources resources;
  if (given.processes) {
    // Before signals are held: the end of the process that is asked is no news.
    EDUBA_ASSIGN_OR_RETURN(resources, FindResourcesOfProcesses(given));
    HoldSignals();
  } else {
    HoldSignals();  // Before CUDA starts threads.
    EDUBA_ASSIGN_OR_RETURN(resources, FindResources(given));
  }
  UpOptions options = given;
  options.memory_bytes = resources.memory_bytes;
  if (options.memory_bytes / options.workers < 1) {
    return absl::InvalidArgumentError("--memory-bytes leaves nothing for each worker; give more");
  }
  return options.processes ? UpInProcesses(options, resources.devices)
                           : UpInThisProcess(options, resources.devices);
}

// --- coordinator ---

struct CoordinatorOptions {
  std::string listen;
  int group_size = 0;
  std::string transport = "gloo";
  std::string data_dir;
  bool json = false;
  bool child = false;
};

void AddCoordinatorOptions(CLI::App& command, CoordinatorOptions& options) {
  command.add_option("--listen", options.listen, "Address to serve on, HOST:PORT; port 0: any free one")
      ->required();
  command.add_option("--group-size", options.group_size, "Workers that make a group")
      ->required()
      ->check(CLI::Range(1, kMaxGroupSize));
  command
      .add_option("--transport", options.transport,
                  "How the workers reduce together: gloo, or nccl between GPUs")
      ->check(CLI::IsMember({"gloo", "nccl"}))
      ->capture_default_str();
  command.add_option("--data-dir", options.data_dir, "Folder for sessions' records [kept in memory]");
  AddReadyJsonFlag(command, options.json);
  AddChildFlag(command, options.child);
}

absl::Status Coordinate(const CoordinatorOptions& options) {
  Coordinator::Options coordinator_options;
  coordinator_options.listen = options.listen;
  coordinator_options.group_size = options.group_size;
  coordinator_options.data_dir = options.data_dir;
  coordinator_options.transport = options.transport;
  coordinator_options.version = EDUBA_VERSION;
  EDUBA_ASSIGN_OR_RETURN(const auto coordinator, Coordinator::Start(coordinator_options));
  PrintReady(coordinator->address(), options.json);
  WaitForSignalToEnd();
  BeginEnd(!options.child);
  coordinator->Shutdown(kDrainGrace);
  return absl::OkStatus();
}

absl::Status RunCoordinator(const CoordinatorOptions& options) {
  HoldSignals();
  const absl::Status status = Coordinate(options);
  return options.child ? TellParent(status) : status;
}

// --- worker ---

struct WorkerOptions {
  std::string coordinator;
  std::string listen;
  int64_t memory_bytes = 0;  // 0: what DefaultMemoryBytes says.
  std::string device = "cpu";
  std::string precision = "exact";
  std::string transport;  // Empty: nccl for a GPU, gloo otherwise.
  int threads = UsableCores();
  std::string model;
  std::string activations = "f32";
  std::string data_dir;
  std::string node_id;
  bool json = false;
  bool child = false;
};

void AddWorkerOptions(CLI::App& command, WorkerOptions& options) {
  command.add_option("--coordinator", options.coordinator, "Address of the coordinator, HOST:PORT")
      ->required();
  command
      .add_option("--listen", options.listen,
                  "Address to take uploads on, as clients reach it, HOST:PORT; port 0: any free one")
      ->required();
  AddBytesOption(
      command, "--memory-bytes", options.memory_bytes,
      "Memory for keys and values: 8GiB, 500MiB, ... [60 % of this machine's, or of what is free on "
      "the GPU]");
  AddDeviceOption(command, options.device, "What it runs on");
  AddPrecisionOption(command, options.precision);
  command
      .add_option(
          "--transport", options.transport,
          "How it reduces with the others, as the coordinator's --transport [nccl for a GPU, else gloo]")
      ->check(CLI::IsMember({"gloo", "nccl"}));
  command.add_option("--threads", options.threads, "Threads of the kernels")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  AddModelOption(command, options.model);
  AddActivationsOption(command, options.activations);
  command.add_option("--data-dir", options.data_dir,
                     "Folder that keeps the worker's node id, one for each worker [a new id at each start]");
  command.add_option(
      "--node-id", options.node_id,
      "Who the worker is for sessions that it keeps: 1 to 64 of a-z A-Z 0-9 . _ -, another for "
      "each worker of a coordinator [the one in --data-dir, else random]");
  AddReadyJsonFlag(command, options.json);
  AddChildFlag(command, options.child);
}

absl::Status Work(const WorkerOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const std::vector<std::string> devices, DevicesOfWorkers(options.device, 1));
  Worker::Options worker_options;
  worker_options.backend = devices.front();
  worker_options.precision = options.precision;
  worker_options.transport = !options.transport.empty() ? options.transport
                             : EachHasItsGpu(devices)   ? "nccl"
                                                        : "gloo";
  worker_options.coordinator = options.coordinator;
  worker_options.listen = options.listen;
  worker_options.memory_bytes = options.memory_bytes;
  if (options.memory_bytes == 0) {
    EDUBA_ASSIGN_OR_RETURN(worker_options.memory_bytes, DefaultMemoryBytes(devices, options.model));
  }
  worker_options.threads = options.threads;
  worker_options.version = EDUBA_VERSION;
  worker_options.model = options.model;
  worker_options.activations = ParseActivations(options.activations);
  worker_options.node = options.node_id;
  worker_options.data_dir = options.data_dir;
  EDUBA_RETURN_IF_ERROR(EquipWorker(worker_options));
  EDUBA_ASSIGN_OR_RETURN(const auto worker, Worker::Start(worker_options));
  PrintReady(worker->address(), options.json);
  // A worker that is refused for good ends by itself; the signal, which asks for nothing, brings that to
  // where we wait.
  absl::Status ended;
  std::atomic<bool> by_itself = false;
  std::thread waiter([&] {
    ended = worker->Wait();
    by_itself = true;
    kill(getpid(), SIGCHLD);
  });
  while (!by_itself && !AsksToEnd(WaitForSignal(absl::InfiniteDuration()))) {
  }
  BeginEnd(!by_itself && !options.child);
  // The coordinator of a child has ended before it: what uploads still bring can never be committed.
  worker->Shutdown(options.child ? absl::ZeroDuration() : kDrainGrace);
  waiter.join();
  // A device that failed has been logged; a parent is told besides.
  return absl::IsUnavailable(ended) && !options.child ? AlreadyTold(ended) : ended;
}

absl::Status RunWorker(const WorkerOptions& options) {
  HoldSignals();
  const absl::Status status = Work(options);
  return options.child ? TellParent(status) : status;
}

}  // namespace

void AddServeCommands(CLI::App& app, Command& chosen) {
  AddCommand(app, "up", "Run a coordinator and its workers on this machine", chosen, AddUpOptions, RunUp);
  AddCommand(app, "coordinator", "Run a coordinator for workers on other machines", chosen,
             AddCoordinatorOptions, RunCoordinator);
  AddCommand(app, "worker", "Run one worker", chosen, AddWorkerOptions, RunWorker);
}

}  // namespace eduba
