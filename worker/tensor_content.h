#ifndef EDUBA_WORKER_TENSOR_CONTENT_H_
#define EDUBA_WORKER_TENSOR_CONTENT_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "attention/page_store.h"
#include "attention/sequence.h"
#include "attention/staged_append.h"
#include "base/mutex.h"
#include "base/parallel.h"
#include "base/placement.h"
#include "eduba/v1/eduba.pb.h"
#include "eduba/v1/group.pb.h"
#include "kernels/backend.h"
#include "storage/node_storage.h"
#include "storage/session_log.h"

namespace eduba {

// What a node keeps of tensor sessions: their committed rows, and the appends on their way into them. It
// lives as long as the worker's process, through the end of groups and of connections to the coordinator.
// Appends that are not sealed belong to the group in which they began: whoever ends the group calls
// DropUnsealed.
//
// With a storage, sessions and appends are written down as they come, and a new process begins with Load of
// each.
//
// Upload and TakeTouchedAppends may be called from any thread. All other calls come from one thread at a
// time.
class TensorContent {
 public:
  // Both outlive the content, and so does the storage.
  TensorContent(Backend* backend, PageStore* store) : backend_(backend), store_(store) {}
  ~TensorContent();
  TensorContent(const TensorContent&) = delete;
  TensorContent& operator=(const TensorContent&) = delete;

  // Where sessions are kept from now on; null: in memory only. REQUIRES: there are no sessions.
  void UseStorage(NodeStorage* storage) { storage_ = storage; }
  // Takes in the session that the storage holds as `opened` says. RESOURCE_EXHAUSTED, DATA_LOSS, UNAVAILABLE:
  // it could not be read, is not here, and stays on the disk as it is.
  absl::Status Load(const v1::OpenSession& opened, ThreadPool& threads);

  // Drops the sessions that are not named, on the disk too.
  void Retain(const std::set<uint64_t>& session_ids);
  // Makes an empty session, or finds the one that is held with the same spec and placement; one with others
  // is dropped first. Says what is held now. INVALID_ARGUMENT: the spec is not one of a tensor session.
  absl::StatusOr<v1::SessionContent> Open(const v1::OpenSession& request, const Placement& placement);
  // Publishes the sealed append that ends at `request.length`, and drops all others.
  //   NOT_FOUND            the session is not open
  //   FAILED_PRECONDITION  the session has another length after that
  //   INTERNAL             the exponents do not fit the append
  absl::Status Settle(const v1::SettleSession& request);
  // Drops the session and its appends. Unknown sessions are ignored.
  void Close(uint64_t session_id);

  // An append, from its beginning to its end. Errors are StagedAppend's, and NOT_FOUND for a session or an
  // append that is not here.
  absl::Status BeginAppend(const v1::BeginAppend& request);
  struct Sealed {
    v1::SealResult result;
    std::shared_ptr<FrameLog> frames;  // To be synced before the result is told. Null: there is no need.
  };
  absl::StatusOr<Sealed> SealAppend(const v1::SealAppend& request);
  absl::Status CommitAppend(const v1::CommitAppend& request);
  void AbortAppend(uint64_t append_id);
  // Drops the appends that are not sealed, and those that only compare: nothing can come of them once their
  // group is over.
  void DropUnsealed();

  // Null: the session is not open. Valid until the session is dropped.
  const Sequence* Find(uint64_t session_id) const;

  // Takes rows into an append. NOT_FOUND: no append has this id. UNAVAILABLE: the append ended with its
  // group. Otherwise as StagedAppend::AddRows.
  absl::Status Upload(const v1::UploadRequest& request);
  // The appends into which rows have come since the last call.
  std::vector<uint64_t> TakeTouchedAppends();

 private:
  struct Session {
    v1::SessionSpec spec;  // Completed.
    Placement placement;
    std::unique_ptr<Sequence> sequence;
    std::shared_ptr<SessionLog> log;  // Null until the first append, and without a storage.
  };
  using Appends = std::map<uint64_t, std::shared_ptr<StagedAppend>>;

  absl::Status Read(const v1::OpenSession& opened, ThreadPool& threads);
  // Gives the session a log, if there is a storage and it has none yet.
  absl::Status MakeLog(uint64_t session_id, Session& session);
  // Takes the session's appends away, and the session. The disk keeps what it has.
  void Drop(uint64_t session_id);
  absl::StatusOr<std::shared_ptr<StagedAppend>> FindAppend(uint64_t append_id) const;
  // The append to the sequence that would be published: sealed, and beginning at its end. Null: there is
  // none.
  std::shared_ptr<StagedAppend> SealedAppendTo(const Sequence& sequence) const;
  // Drops the appends of which `doomed(append)` is true, and cuts them off their logs.
  template <typename Predicate>
  void DropAppends(Predicate doomed);
  // The same, and leaves their logs as they are. Returns them, aborted.
  template <typename Predicate>
  std::vector<std::shared_ptr<StagedAppend>> TakeAppends(Predicate doomed);
  // Null: the sequence's session has none.
  std::shared_ptr<SessionLog> LogOf(const Sequence& sequence) const;
  v1::SessionContent ContentOf(const Sequence& sequence) const;

  Backend* const backend_;
  PageStore* const store_;
  NodeStorage* storage_ = nullptr;  // Null: none.
  std::map<uint64_t, Session> sessions_;
  uint64_t loaded_ = 0;  // Appends that were loaded; their ids count down from the largest.

  mutable Mutex mutex_;
  Appends appends_ ABSL_GUARDED_BY(mutex_);
  std::set<uint64_t> touched_ ABSL_GUARDED_BY(mutex_);
  // The appends that the last group took with it when it ended: their clients may still be uploading.
  std::set<uint64_t> ended_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace eduba

#endif  // EDUBA_WORKER_TENSOR_CONTENT_H_
