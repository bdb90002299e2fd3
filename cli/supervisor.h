#ifndef EDUBA_CLI_SUPERVISOR_H_
#define EDUBA_CLI_SUPERVISOR_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "cli/child_process.h"

namespace eduba {

// Child processes that are started again when they end: at once the first time, and later and later when one
// ends again and again. One thread, whose process gets no signal but those that it takes (signals.h).
class Supervisor {
 public:
  Supervisor() = default;
  Supervisor(const Supervisor&) = delete;
  Supervisor& operator=(const Supervisor&) = delete;

  // Starts a child. The object may be asked for it at any time; it is not started again before Supervise.
  absl::StatusOr<ChildProcess*> Start(const std::string& name, std::vector<std::string> arguments);
  // How a child is started when it is started again. `name`: given to Start.
  void SetArguments(const std::string& name, std::vector<std::string> arguments);
  // Why a child is not running, as one line; empty: all run.
  std::string WhyEnded();

  // Until the program is asked to end (AsksToEnd). Says which child ended and when it is started again.
  void Supervise();
  // Asks the first child to end and waits `grace` for it, then the others. Kills what is left.
  void End(absl::Duration grace);

 private:
  struct Child {
    std::string name;
    std::vector<std::string> arguments;
    std::unique_ptr<ChildProcess> process;  // Null: it is not running.
    absl::Time started;
    absl::Duration delay;    // Before it is started again.
    absl::Time restarts_at;  // While it is not running.
  };

  void CheckEnded(Child& child);
  void StartAgain(Child& child);

  std::vector<Child> children_;
};

}  // namespace eduba

#endif  // EDUBA_CLI_SUPERVISOR_H_
