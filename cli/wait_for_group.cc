#include "cli/wait_for_group.h"

#include <csignal>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "cli/signals.h"
#include "client/client.h"

namespace eduba {
namespace {

// From processes that listen to a complete group on this machine.
constexpr absl::Duration kGroupTimeout = absl::Seconds(60);
constexpr absl::Duration kPollInterval = absl::Milliseconds(20);

}  // namespace

absl::StatusOr<bool> WaitForGroup(const std::string& address) {
  const absl::Time deadline = absl::Now() + kGroupTimeout;
  Client client({address, kGroupTimeout});
  for (;;) {
    const auto group = client.ListWorkers();
    if (group.ok() && group->state() == "active") return true;
    if (absl::Now() > deadline) {
      return absl::DeadlineExceededError(absl::StrCat(
          "the workers did not form a group within ", absl::FormatDuration(kGroupTimeout), ": ",
          group.ok() ? absl::StrCat(group->workers_size(), " of ", group->group_size(), " are there")
                     : std::string(group.status().message()),
          "; see the messages above"));
    }
    const int signal = WaitForSignal(kPollInterval);
    if (AsksToEnd(signal)) return false;
    if (signal == SIGCHLD) return absl::UnavailableError("a part of the group ended while it was starting");
  }
}

}  // namespace eduba
