#ifndef EDUBA_CLI_SYSTEM_H_
#define EDUBA_CLI_SYSTEM_H_

#include <cstdint>
#include <string>

namespace eduba {

// What this process may use: the machine's memory, or less when its control group says so.
int64_t UsableMemoryBytes();

// CPUs that this process may run on.
int UsableCores();

// The processor's name, as /proc/cpuinfo has it; "unknown" without one.
std::string ProcessorName();

// The release of NVIDIA's driver from what its kernel module says of itself, /proc/driver/nvidia/version:
// "580.65.06"; empty where `version` is, "of unknown release" where it says none.
std::string NvidiaDriverRelease(const std::string& version);
// The release of this machine's driver; empty where there is none.
std::string NvidiaDriverRelease();

// Memory for pages when --memory-bytes is not given: 60 % of what there is. The rest is for the operating
// system's cache, the client's arrays and other programs.
int64_t DefaultStoreBytes();

}  // namespace eduba

#endif  // EDUBA_CLI_SYSTEM_H_
