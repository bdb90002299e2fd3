#include "cli/supervisor.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "cli/signals.h"

namespace eduba {
namespace {

constexpr absl::Duration kDelayMin = absl::Milliseconds(100);
constexpr absl::Duration kDelayMax = absl::Seconds(10);
// A child that ran as long has not failed at once, and is started again without delay.
constexpr absl::Duration kRanWell = absl::Seconds(60);

}  // namespace

absl::StatusOr<ChildProcess*> Supervisor::Start(const std::string& name, std::vector<std::string> arguments) {
  Child child;
  child.name = name;
  child.arguments = std::move(arguments);
  child.started = absl::Now();
  EDUBA_ASSIGN_OR_RETURN(child.process, ChildProcess::Start(name, child.arguments));
  children_.push_back(std::move(child));
  return children_.back().process.get();
}

void Supervisor::SetArguments(const std::string& name, std::vector<std::string> arguments) {
  for (Child& child : children_) {
    if (child.name == name) child.arguments = std::move(arguments);
  }
}

std::string Supervisor::WhyEnded() {
  for (const Child& child : children_) {
    if (child.process == nullptr) return absl::StrCat(child.name, " is not running");
    if (!child.process->Running()) return child.process->WhyEnded();
  }
  return "";
}

void Supervisor::Supervise() {
  while (true) {
    absl::Time wake = absl::InfiniteFuture();
    for (Child& child : children_) {
      CheckEnded(child);
      if (child.process == nullptr && absl::Now() >= child.restarts_at) StartAgain(child);
      if (child.process == nullptr) wake = std::min(wake, child.restarts_at);
    }
    if (AsksToEnd(WaitForSignal(wake - absl::Now()))) return;
  }
}

void Supervisor::CheckEnded(Child& child) {
  if (child.process == nullptr || child.process->Running()) return;
  const absl::Time now = absl::Now();
  const bool ran_well = now - child.started >= kRanWell;
  const absl::Duration delay = ran_well ? absl::ZeroDuration() : child.delay;
  LogError(
      absl::StrCat(child.name, " (process ", child.process->pid(), ") ended: ", child.process->how(),
                   "; it is started again",
                   delay == absl::ZeroDuration() ? "" : absl::StrCat(" in ", absl::FormatDuration(delay))));
  child.process = nullptr;
  child.restarts_at = now + delay;
  child.delay = std::min(kDelayMax, std::max(kDelayMin, 2 * delay));
}

void Supervisor::StartAgain(Child& child) {
  absl::StatusOr<std::unique_ptr<ChildProcess>> process = ChildProcess::Start(child.name, child.arguments);
  child.started = absl::Now();
  if (process.ok()) {
    child.process = *std::move(process);
    return;
  }
  LogError(std::string(process.status().message()));
  child.restarts_at = child.started + kDelayMax;
}

void Supervisor::End(absl::Duration grace) {
  if (!children_.empty() && children_.front().process != nullptr) {
    children_.front().process->Terminate();
    children_.front().process->Join(absl::Now() + grace);
  }
  for (const Child& child : children_) {
    if (child.process != nullptr) child.process->Terminate();
  }
  const absl::Time deadline = absl::Now() + absl::Seconds(1);
  for (const Child& child : children_) {
    if (child.process != nullptr) child.process->Join(deadline);
  }
}

}  // namespace eduba
