#include "cli/gpu_findings.h"

#include <cstddef>

#include "absl/strings/str_cat.h"
#include "cli/output.h"
#include "collective/nccl/nccl_api.h"
#include "kernels/cuda/cublaslt_api.h"
#include "kernels/cuda/device.h"

namespace eduba {
namespace {

Finding FindingOfGpu(const std::string& name, const cuda::CudaMachine::Gpu& gpu,
                     const absl::StatusOr<std::unique_ptr<cuda::Device>>& device) {
  const std::string text =
      absl::StrCat(gpu.name, ", sm_", gpu.major, gpu.minor, ", ", BytesText(gpu.memory_bytes), "; ");
  if (!device.ok()) return {name, "note", absl::StrCat(text, std::string(device.status().message()))};
  return {name, "ok",
          absl::StrCat(text, "--device ", name, " would run exact kernels there; with --precision tensor: ",
                       (*device)->WarpgroupBlocksAtOnce() > 0 ? "wgmma (sm_90a)" : "mma.sync")};
}

// A library that is loaded when it is asked for: one that is missing matters where there are GPUs.
Finding FindingOfLibrary(const std::string& name, bool has_gpus, const absl::Status& loaded,
                         const std::function<std::string()>& version) {
  if (loaded.ok()) return {name, "ok", absl::StrCat("version ", version())};
  if (has_gpus) return {name, "note", std::string(loaded.message())};
  return {name, "ok", absl::StrCat("not used: ", std::string(loaded.message()))};
}

}  // namespace

std::vector<Finding> FindingsOfGpus(const std::string& driver,
                                    const absl::StatusOr<cuda::CudaMachine>& machine,
                                    const OpenDevice& open) {
  std::vector<Finding> findings;
  const std::string release = driver.empty() ? "the driver" : absl::StrCat("driver ", driver);
  if (machine.ok()) {
    findings.push_back({"cuda", "ok",
                        absl::StrCat(release, " serves CUDA ", machine->driver,
                                     ", this program was built with ", machine->runtime)});
    for (size_t i = 0; i < machine->gpus.size(); ++i) {
      findings.push_back(FindingOfGpu(absl::StrCat("cuda:", i), machine->gpus[i], open(static_cast<int>(i))));
    }
  } else if (driver.empty()) {
    findings.push_back({"cuda", "ok", absl::StrCat("not used: ", std::string(machine.status().message()))});
  } else {
    findings.push_back({"cuda", "note",
                        absl::StrCat(release, " is loaded, but no GPU can be used: ",
                                     std::string(machine.status().message()))});
  }
  const bool has_gpus = machine.ok() || !driver.empty();
  const auto nccl = LoadNccl();
  findings.push_back(FindingOfLibrary("nccl", has_gpus, nccl.status(), [&] {
    return absl::StrCat(NcclVersionText(**nccl), ", for --transport nccl");
  }));
  const auto cublaslt = cuda::LoadCublasLt();
  findings.push_back(FindingOfLibrary("cublaslt", has_gpus, cublaslt.status(), [&] {
    return absl::StrCat((*cublaslt)->get_version(), ", for --model on GPUs");
  }));
  return findings;
}

}  // namespace eduba
