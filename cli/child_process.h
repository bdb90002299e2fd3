#ifndef EDUBA_CLI_CHILD_PROCESS_H_
#define EDUBA_CLI_CHILD_PROCESS_H_

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace eduba {

// Another run of this program. It gets SIGTERM when its parent ends, however that ends. Its stderr is ours;
// its stdout comes to us: "ready: ADDRESS" when it serves, and "failed: MESSAGE" when it fails (--child).
class ChildProcess {
 public:
  // `arguments` without the program's name. REQUIRES: the calling thread lives as long as the process,
  // because the child gets its SIGTERM when that thread ends.
  static absl::StatusOr<std::unique_ptr<ChildProcess>> Start(const std::string& name,
                                                             const std::vector<std::string>& arguments);
  // Kills it when it still runs.
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  // "worker 2": how messages call it.
  const std::string& name() const { return name_; }
  pid_t pid() const { return pid_; }

  // The address of its first line, "ready: ADDRESS". UNAVAILABLE when it ended before (with what WhyEnded
  // says), DEADLINE_EXCEEDED when the line did not come in time.
  absl::StatusOr<std::string> WaitUntilReady(absl::Time deadline);

  // False once it has ended; then how() says how: "exit code 1", "signal 9 (Killed)", followed by its own
  // message when it left one: "exit code 1: cannot listen on ...".
  bool Running();
  const std::string& how() const { return how_; }
  // "worker 2: cannot listen on ...", or "worker 2 ended: signal 9 (Killed)". REQUIRES: it has ended.
  std::string WhyEnded() const;

  void Terminate();  // SIGTERM; returns at once.
  // Waits for its end; kills it at `deadline`.
  void Join(absl::Time deadline);

 private:
  ChildProcess(std::string name, pid_t pid, int stdout_fd);
  // False when there is nothing more.
  bool ReadSome();
  void Ended(int wait_status);

  const std::string name_;
  const pid_t pid_;
  int stdout_fd_;
  std::string said_;  // On stdout, so far.
  bool running_ = true;
  std::string how_;
  std::string message_;  // What follows "failed: " on stderr.
};

// What `ask` answers in a copy of this process, which ends then: what it did to that process, a GPU's context
// or a library's threads, is gone with it. INTERNAL when the copy ends without an answer. REQUIRES: this
// process has one thread.
absl::StatusOr<std::string> AskInACopy(const std::function<absl::StatusOr<std::string>()>& ask);

}  // namespace eduba

#endif  // EDUBA_CLI_CHILD_PROCESS_H_
