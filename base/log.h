#ifndef EDUBA_BASE_LOG_H_
#define EDUBA_BASE_LOG_H_

#include <string>

namespace eduba {

// One line on stderr: UTC time with milliseconds, a level letter (I, W or E), the message. Thread-safe. An
// error is logged once, where it leaves the program (an RPC's end, a command's exit); everywhere else it
// travels as a Status.
void LogInfo(const std::string& message);
void LogWarning(const std::string& message);
void LogError(const std::string& message);

}  // namespace eduba

#endif  // EDUBA_BASE_LOG_H_
