#include "cli/system.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>

namespace eduba {

int64_t UsableMemoryBytes() {
  int64_t bytes = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGE_SIZE);
  // Version 2 of control groups, then version 1. A file that says "max", or that is not there, sets no limit.
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    int64_t limit = 0;
    if (std::ifstream(path) >> limit && limit > 0) bytes = std::min(bytes, limit);
  }
  return bytes;
}

int UsableCores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

std::string ProcessorName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

std::string NvidiaDriverRelease(const std::string& version) {
  std::istringstream words(version);
  for (std::string word; words >> word;) {
    if (std::count(word.begin(), word.end(), '.') > 0 &&
        word.find_first_not_of("0123456789.") == std::string::npos) {
      return word;
    }
  }
  return version.empty() ? "" : "of unknown release";
}

std::string NvidiaDriverRelease() {
  std::ifstream file("/proc/driver/nvidia/version");
  std::stringstream version;
  version << file.rdbuf();
  return NvidiaDriverRelease(version.str());
}

int64_t DefaultStoreBytes() { return UsableMemoryBytes() / 5 * 3; }

}  // namespace eduba
