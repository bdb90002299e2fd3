#ifndef EDUBA_WORKER_MEMBERSHIP_H_
#define EDUBA_WORKER_MEMBERSHIP_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "collective/communicator.h"
#include "eduba/v1/group.pb.h"
#include "worker/model_sessions.h"
#include "worker/node_content.h"

namespace eduba {

// Joins the ranks of a group; blocks until all have come, or `deadline`.
using ConnectGroup = std::function<absl::StatusOr<std::unique_ptr<Communicator>>(const v1::FormGroup& form,
                                                                                 absl::Time deadline)>;

// A worker's part in one group, from FormGroup to the end of its epoch: the communicator, the number of the
// command that is due, and the jobs under way. The worker's content outlives it (worker/node_content.h).
//
// End, over and cancelled may be called from any thread; all else belongs to the thread that runs commands.
class Membership {
 public:
  // `on_active` hears, at once, when the group begins and ceases to work; it may not call the membership.
  Membership(v1::FormGroup form, std::function<void(bool active)> on_active);
  // Leaves the group. Jobs end without results.
  ~Membership();
  Membership(const Membership&) = delete;
  Membership& operator=(const Membership&) = delete;

  const v1::FormGroup& form() const { return form_; }
  uint64_t epoch() const { return form_.epoch(); }
  // This worker's node id, as placements name it.
  const std::string& node() const { return form_.nodes(form_.rank()); }

  // Meets the other ranks. After an error, which may be why the group is over already, it cannot be used.
  // INVALID_ARGUMENT: the group does not name a node for every rank.
  absl::Status Connect(const ConnectGroup& connect, absl::Time deadline);
  // REQUIRES: connected.
  Communicator& communicator() { return *group_; }
  // Model sessions can be used from now on, if the content has a model. REQUIRES: connected.
  void StartModels(NodeContent* content, ModelSessions::SendMessage send);
  // FAILED_PRECONDITION: this worker holds no model.
  absl::StatusOr<ModelSessions*> Models();
  // Ends all jobs with `status`.
  void FailJobs(const absl::Status& status);
  // Whether there are jobs, which need steps.
  bool busy() const { return models_ != nullptr && models_->busy(); }

  // The ordinal of the command that is due.
  uint64_t next_ordinal() const { return next_ordinal_; }
  // Takes the command's turn. Any error but OK means that the group is over: a rank that missed a command
  // would meet the others in the wrong collective.
  absl::Status TakeTurn(const v1::Command& command);

  // Decides whether the communicator is dead after a command that takes part in collectives returned
  // `status`; ends the membership if so. Ranks find wrong input alike, before any of them enters a collective
  // that another one does not enter; after any other error they may have parted. Returns `status`.
  absl::Status EndIfBroken(absl::Status status);
  // The group is over: a collective under way returns, kernels stop between two pages. Only the first call
  // counts.
  void End(const absl::Status& reason);
  // Not OK: the group is over, and why.
  absl::Status over() const;
  // Set when the group is over.
  const std::atomic<bool>& cancelled() const { return cancelled_; }

 private:
  const v1::FormGroup form_;
  const std::function<void(bool active)> on_active_;
  uint64_t next_ordinal_ = 1;
  Communicator* group_ = nullptr;  // communicator_'s, which only the destructor takes away.
  std::unique_ptr<ModelSessions> models_;
  std::atomic<bool> cancelled_ = false;

  mutable Mutex mutex_;
  std::unique_ptr<Communicator> communicator_ ABSL_GUARDED_BY(mutex_);
  absl::Status over_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace eduba

#endif  // EDUBA_WORKER_MEMBERSHIP_H_
