#include "cli/child_process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace eduba {
namespace {

constexpr absl::Duration kJoinPoll = absl::Milliseconds(20);
// From closing its stdout to its end.
constexpr absl::Duration kEndTimeout = absl::Seconds(5);
constexpr size_t kSaidBytesMax = 65536;
constexpr char kReady[] = "ready: ";
constexpr char kFailed[] = "failed: ";

// In the child, after fork: only calls that are safe between fork and exec.
[[noreturn]] void RunProgram(pid_t parent, int stdout_fd, char* const* arguments) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  // Ctrl-C in a terminal goes to the whole foreground group; the parent decides in which order its children
  // end.
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) _exit(1);  // It ended before the line above could tell us.
  dup2(stdout_fd, STDOUT_FILENO);
  execv("/proc/self/exe", arguments);
  _exit(127);
}

// Until the other end is closed.
std::string ReadAll(int fd) {
  std::string all;
  char buffer[256];
  while (true) {
    const ssize_t bytes = read(fd, buffer, sizeof(buffer));
    if (bytes > 0) all.append(buffer, bytes);
    if (bytes == 0 || (bytes < 0 && errno != EINTR)) return all;
  }
}

// In the copy: the answer as its status code, a character, and its text.
[[noreturn]] void Answer(int fd, const absl::StatusOr<std::string>& answer) {
  const std::string text = answer.ok() ? *answer : std::string(answer.status().message());
  const std::string all = static_cast<char>(answer.status().code()) + text;
  size_t written = 0;
  while (written < all.size()) {
    const ssize_t bytes = write(fd, all.data() + written, all.size() - written);
    if (bytes < 0 && errno != EINTR) break;
    if (bytes > 0) written += bytes;
  }
  _exit(0);  // Nothing of this process's own end: that is the original's.
}

// "exit code 1", "signal 9 (Killed)"
std::string EndText(int wait_status) {
  return WIFEXITED(wait_status)
             ? absl::StrCat("exit code ", WEXITSTATUS(wait_status))
             : absl::StrCat("signal ", WTERMSIG(wait_status), " (", strsignal(WTERMSIG(wait_status)), ")");
}

}  // namespace

absl::StatusOr<std::string> AskInACopy(const std::function<absl::StatusOr<std::string>()>& ask) {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) {
    return absl::ResourceExhaustedError(absl::StrCat("no pipe for a process: ", std::strerror(errno)));
  }
  const pid_t pid = fork();
  if (pid == 0) {
    close(fds[0]);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    Answer(fds[1], ask());
  }
  close(fds[1]);
  const std::string all = pid > 0 ? ReadAll(fds[0]) : "";
  const int error = errno;
  close(fds[0]);
  if (pid < 0) {
    return absl::ResourceExhaustedError(absl::StrCat("cannot start a process: ", std::strerror(error)));
  }
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (all.empty()) {
    return absl::InternalError(
        absl::StrCat("the process that looks for devices ended without an answer: ", EndText(status)));
  }
  const auto code = static_cast<absl::StatusCode>(all.front());
  if (code != absl::StatusCode::kOk) return absl::Status(code, all.substr(1));
  return all.substr(1);
}

absl::StatusOr<std::unique_ptr<ChildProcess>> ChildProcess::Start(const std::string& name,
                                                                  const std::vector<std::string>& arguments) {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) {
    return absl::ResourceExhaustedError(absl::StrCat("no pipe for ", name, ": ", std::strerror(errno)));
  }
  std::string program = "eduba";
  std::vector<std::string> copy = arguments;
  std::vector<char*> argv = {program.data()};
  for (std::string& argument : copy) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) RunProgram(parent, fds[1], argv.data());
  close(fds[1]);
  if (pid < 0) {
    const int error = errno;
    close(fds[0]);
    return absl::ResourceExhaustedError(absl::StrCat("cannot start ", name, ": ", std::strerror(error)));
  }
  return std::unique_ptr<ChildProcess>(new ChildProcess(name, pid, fds[0]));
}

ChildProcess::ChildProcess(std::string name, pid_t pid, int stdout_fd)
    : name_(std::move(name)), pid_(pid), stdout_fd_(stdout_fd) {}

ChildProcess::~ChildProcess() {
  Join(absl::InfinitePast());
  close(stdout_fd_);
}

bool ChildProcess::ReadSome() {
  char buffer[256];
  ssize_t bytes = 0;
  do {
    bytes = read(stdout_fd_, buffer, sizeof(buffer));
  } while (bytes < 0 && errno == EINTR);
  if (bytes <= 0 || said_.size() > kSaidBytesMax) return false;
  said_.append(buffer, bytes);
  return true;
}

absl::StatusOr<std::string> ChildProcess::WaitUntilReady(absl::Time deadline) {
  while (!absl::StrContains(said_, '\n')) {
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration()) {
      return absl::DeadlineExceededError(absl::StrCat(name_, " did not get ready in time"));
    }
    pollfd ready = {stdout_fd_, POLLIN, 0};
    const int polled = poll(&ready, 1, static_cast<int>(absl::ToInt64Milliseconds(left)) + 1);
    if (polled > 0 && !ReadSome()) break;
  }
  const std::string line = said_.substr(0, said_.find('\n'));
  if (absl::StartsWith(line, kReady)) return line.substr(std::strlen(kReady));
  Join(absl::Now() + kEndTimeout);
  return absl::UnavailableError(WhyEnded());
}

bool ChildProcess::Running() {
  int status = 0;
  if (running_ && waitpid(pid_, &status, WNOHANG) == pid_) Ended(status);
  return running_;
}

void ChildProcess::Terminate() {
  if (Running()) kill(pid_, SIGTERM);
}

void ChildProcess::Join(absl::Time deadline) {
  while (Running()) {
    if (absl::Now() >= deadline) {
      kill(pid_, SIGKILL);
      int status = 0;
      if (waitpid(pid_, &status, 0) == pid_) Ended(status);
      running_ = false;
      return;
    }
    // SIGCHLD is held, so its arrival shortens nothing; this is a bounded poll of one waitpid.
    absl::SleepFor(kJoinPoll);
  }
}

void ChildProcess::Ended(int wait_status) {
  running_ = false;
  how_ = EndText(wait_status);
  while (ReadSome()) {
  }
  const size_t at = absl::StartsWith(said_, kFailed) ? 0 : said_.find(absl::StrCat("\n", kFailed));
  if (at == std::string::npos) return;
  message_ = said_.substr(said_.find(kFailed, at) + std::strlen(kFailed));
  absl::StripTrailingAsciiWhitespace(&message_);
  absl::StrAppend(&how_, ": ", message_);
}

std::string ChildProcess::WhyEnded() const {
  return message_.empty() ? absl::StrCat(name_, " ended: ", how_) : absl::StrCat(name_, ": ", message_);
}

}  // namespace eduba
