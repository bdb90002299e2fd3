#include "cli/signals.h"

#include <pthread.h>

#include <cerrno>

#include "base/check.h"

namespace eduba {
namespace {

sigset_t HeldSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGCHLD);
  return set;
}

}  // namespace

void HoldSignals() {
  const sigset_t set = HeldSignals();
  EDUBA_CHECK_EQ(pthread_sigmask(SIG_BLOCK, &set, nullptr), 0);
}

void ReleaseSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  EDUBA_CHECK_EQ(pthread_sigmask(SIG_UNBLOCK, &set, nullptr), 0);
}

int WaitForSignal(absl::Duration timeout) {
  const sigset_t set = HeldSignals();
  const timespec limit = absl::ToTimespec(timeout);
  for (;;) {
    const int signal = timeout == absl::InfiniteDuration() ? sigwaitinfo(&set, nullptr)
                                                           : sigtimedwait(&set, nullptr, &limit);
    if (signal > 0) return signal;
    if (errno == EAGAIN) return 0;
    EDUBA_CHECK_EQ(errno, EINTR);  // A debugger stopped us: wait again.
  }
}

}  // namespace eduba
