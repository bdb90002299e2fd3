#ifndef EDUBA_CLI_SIGNALS_H_
#define EDUBA_CLI_SIGNALS_H_

#include <csignal>

#include "absl/time/time.h"

namespace eduba {

// Keeps SIGTERM, SIGINT and SIGCHLD from interrupting anything: they wait until WaitForSignal takes them. To
// be called before the first thread starts, because threads inherit it.
void HoldSignals();

// The next held signal, or 0 when none came within `timeout` (absl::InfiniteDuration() waits for one).
int WaitForSignal(absl::Duration timeout);

// From here on SIGTERM and SIGINT end the process at once: for who asks again while it drains.
void ReleaseSignals();

// SIGTERM or SIGINT: the program should drain and end.
inline bool AsksToEnd(int signal) { return signal == SIGTERM || signal == SIGINT; }

}  // namespace eduba

#endif  // EDUBA_CLI_SIGNALS_H_
