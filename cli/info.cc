// eduba workers, doctor, version.

#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "cli/command.h"
#include "cli/flags.h"
#include "cli/gpu_findings.h"
#include "cli/output.h"
#include "cli/system.h"
#include "grpcpp/grpcpp.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_device.h"
#include "rpc/server.h"

namespace eduba {
namespace {

// --- workers ---

struct WorkersOptions {
  ServerFlags server;
  bool json = false;
};

void AddWorkersOptions(CLI::App& command, WorkersOptions& options) {
  AddServerFlags(command, options.server);
  AddJsonFlag(command, options.json);
}

absl::Status RunWorkers(const WorkersOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(const v1::ListWorkersResponse group, Connect(options.server)->ListWorkers());
  if (options.json) {
    Json workers = Json::array();
    for (const v1::Worker& worker : group.workers()) {
      workers.push_back({{"rank", worker.rank()},
                         {"address", worker.address()},
                         {"incarnation", worker.incarnation()},
                         {"backend", worker.backend()},
                         {"threads", worker.threads()},
                         {"memory_bytes", worker.memory_bytes()},
                         {"memory_used_bytes", worker.memory_used_bytes()},
                         {"state", worker.state()}});
    }
    PrintJson({{"state", group.state()},
               {"epoch", group.epoch()},
               {"group_size", group.group_size()},
               {"transport", group.transport()},
               {"version", group.version()},
               {"workers", std::move(workers)}});
    return absl::OkStatus();
  }
  std::cout << "group " << group.state() << ", epoch " << group.epoch() << ", " << group.workers_size()
            << " of " << group.group_size() << " workers, transport " << group.transport() << ", version "
            << group.version() << "\n";
  std::vector<std::vector<std::string>> rows = {
      {"rank", "address", "state", "backend", "threads", "memory used", "memory"}};
  for (const v1::Worker& worker : group.workers()) {
    rows.push_back({absl::StrCat(worker.rank()), worker.address(), worker.state(), worker.backend(),
                    absl::StrCat(worker.threads()), BytesText(worker.memory_used_bytes()),
                    BytesText(worker.memory_bytes())});
  }
  PrintTable(rows);
  return absl::OkStatus();
}

// --- version ---

struct VersionOptions {
  bool json = false;
};

void AddVersionOptions(CLI::App& command, VersionOptions& options) { AddJsonFlag(command, options.json); }

Json LibraryVersions() {
  return {{"grpc", grpc::Version()},
          {"protobuf", EDUBA_PROTOBUF_VERSION},
          {"highway", EDUBA_HIGHWAY_VERSION},
          {"hdf5", EDUBA_HDF5_VERSION},
          {"sqlite", EDUBA_SQLITE_VERSION}};
}

absl::Status RunVersion(const VersionOptions& options) {
  if (options.json) {
    PrintJson({{"version", EDUBA_VERSION}, {"compiler", __VERSION__}, {"libraries", LibraryVersions()}});
  } else {
    std::cout << "eduba " << EDUBA_VERSION << std::endl;
  }
  return absl::OkStatus();
}

// --- doctor ---

struct DoctorOptions {
  ServerFlags server;
  bool json = false;
};

void AddDoctorOptions(CLI::App& command, DoctorOptions& options) {
  AddServerFlags(command, options.server);
  // A server that hangs should not make the doctor hang.
  command.get_option("--timeout")->default_val(5.0);
  AddJsonFlag(command, options.json);
}

std::vector<Finding> ExamineServer(const ServerFlags& flags) {
  const auto group = Connect(flags)->ListWorkers();
  if (group.ok()) {
    return {{"server", group->state() == "active" ? "ok" : "note",
             absl::StrCat(flags.server, " answers: version ", group->version(), ", group ", group->state(),
                          ", ", group->workers_size(), " of ", group->group_size(), " workers")}};
  }
  const absl::Status port = RpcServer::Start(flags.server, {}).status();
  return {{"server", "note", std::string(group.status().message())},
          {"port", port.ok() ? "ok" : "note",
           port.ok() ? absl::StrCat(flags.server, " is free: 'eduba up' can serve there")
                     : std::string(port.message())}};
}

absl::Status RunDoctor(const DoctorOptions& options) {
  const std::vector<std::string> targets = CpuTargets();
  const std::string best = targets.empty() ? "none" : targets.front();
  const int64_t memory = UsableMemoryBytes();
  std::vector<Finding> findings = {
      {"program", "ok", absl::StrCat("eduba ", EDUBA_VERSION)},
      {"processor", "ok", ProcessorName()},
      {"kernels", best == "AVX2" || best.rfind("AVX3", 0) == 0 ? "ok" : "note",
       absl::StrCat("would run on cpu/", best, "; this machine has ", absl::StrJoin(targets, " "),
                    ", this build has ", absl::StrJoin(BuiltCpuTargets(), " "))},
      {"cores", "ok", absl::StrCat(UsableCores())},
      {"memory", memory >= (int64_t{2} << 30) ? "ok" : "note",
       absl::StrCat(BytesText(memory), "; 'eduba up' would keep ", BytesText(DefaultStoreBytes()),
                    " for pages (--memory-bytes)")},
  };
  for (Finding& finding : FindingsOfGpus(NvidiaDriverRelease(), cuda::DescribeCuda(), cuda::OpenCudaDevice)) {
    findings.push_back(std::move(finding));
  }
  for (Finding& finding : ExamineServer(options.server)) findings.push_back(std::move(finding));
  const Json libraries = LibraryVersions();
  for (const auto& [library, version] : libraries.items()) {
    findings.push_back({library, "ok", version.get<std::string>()});
  }
  if (options.json) {
    Json json;
    for (const Finding& finding : findings) {
      json[finding.name] = {{"state", finding.state}, {"text", finding.text}};
    }
    PrintJson(json);
    return absl::OkStatus();
  }
  std::vector<std::vector<std::string>> rows = {{"what", "state", "found"}};
  for (const Finding& finding : findings) rows.push_back({finding.name, finding.state, finding.text});
  PrintTable(rows);
  return absl::OkStatus();
}

}  // namespace

void AddInfoCommands(CLI::App& app, Command& chosen) {
  AddCommand(app, "workers", "Show the group and its workers", chosen, AddWorkersOptions, RunWorkers);
  AddCommand(app, "doctor", "Say what this machine would run on, and whether a server answers", chosen,
             AddDoctorOptions, RunDoctor);
  AddCommand(app, "version", "Print the version", chosen, AddVersionOptions, RunVersion);
}

}  // namespace eduba
