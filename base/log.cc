#include "base/log.h"

#include <cstdio>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace eduba {
namespace {

void Log(char level, const std::string& message) {
  const std::string time = absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone());
  // One call, so lines of several threads do not mix.
  std::fprintf(stderr, "%s %c %s\n", time.c_str(), level, message.c_str());
}

}  // namespace

void LogInfo(const std::string& message) { Log('I', message); }
void LogWarning(const std::string& message) { Log('W', message); }
void LogError(const std::string& message) { Log('E', message); }

}  // namespace eduba
