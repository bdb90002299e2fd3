#ifndef EDUBA_MODEL_MODEL_CONTENT_H_
#define EDUBA_MODEL_MODEL_CONTENT_H_

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/id_log.h"
#include "base/placement.h"
#include "model/context.h"
#include "model/engine.h"
#include "model/token_log.h"

namespace eduba {

// A session as one node keeps it: the ids of its tokens, and the context that has read them.
//   context.length() == ids.size(), or it is smaller where an interruption left keys and values that have to
//   be read again from the ids (ModelContent::BeginSettle).
struct ModelSession {
  ContextOptions options;  // The options that Open was given.
  Context context;
  IdLog ids;
  // Positions of generated tokens, ascending and apart. They were read with BatchEntry::asks, and have to be
  // read so again.
  std::vector<PositionRange> generated;
  std::shared_ptr<TokenLog> log;  // Null: none, or none yet.

  bool is_read() const { return context.length() == ids.size(); }
};

// What a node keeps of model sessions. It lives as long as the node's process, and knows no group: a group's
// jobs (model/job_loop.h) come and go, and leave the sessions where they stopped. One thread.
class ModelContent {
 public:
  // What `options` points to outlives the content.
  explicit ModelContent(const ModelEngine::Options& options) : engine_(options) {}
  ModelContent(const ModelContent&) = delete;
  ModelContent& operator=(const ModelContent&) = delete;

  ModelEngine& engine() { return engine_; }

  // Where the ids of sessions are written down from now on; null: nowhere. It outlives the content. REQUIRES:
  // there are no sessions.
  void UseLogs(TokenLogs* logs) { logs_ = logs; }
  // Puts a session in that `log` holds. Its ids are to be read by all ranks together before anything else
  // happens to it (BeginSettle). INVALID_ARGUMENT as Open. REQUIRES: the session is not held.
  absl::Status Restore(uint64_t session_id, const ContextOptions& options, const Placement& placement,
                       int index, IdLog ids, std::vector<PositionRange> generated,
                       std::shared_ptr<TokenLog> log);

  // Makes an empty session, or keeps the one that is there with the same options and placement; one with
  // others is dropped first. `index` is this node's in the placement. INVALID_ARGUMENT as ModelEngine::Open;
  // the session is gone then.
  absl::Status Open(uint64_t session_id, const ContextOptions& options, const Placement& placement,
                    int index);
  // Whether Open would keep what is there.
  bool Holds(uint64_t session_id, const ContextOptions& options, const Placement& placement) const;
  bool Holds(uint64_t session_id) const { return sessions_.count(session_id) > 0; }
  // Unknown sessions are ignored.
  void Close(uint64_t session_id);
  // Drops the sessions that are not in `session_ids`.
  void Retain(const std::set<uint64_t>& session_ids);
  // The same session under another id. NOT_FOUND, ALREADY_EXISTS; as TokenLog where it cannot be written
  // down.
  absl::Status Fork(uint64_t session_id, uint64_t fork_id);

  // NOT_FOUND. The session stays where it is until it is closed or dropped.
  absl::StatusOr<ModelSession*> Find(uint64_t session_id);

  // Makes room for `count` more ids where they are written down. As TokenLog::Reserve.
  absl::Status Reserve(uint64_t session_id, ModelSession& session, int64_t count);
  // Adds ids that the context has read, and writes them down. As TokenLog::Add, if there was no room.
  static absl::Status Extend(ModelSession& session, absl::Span<const int32_t> ids, bool generated);

  // The same for ids and ranges that are not in a session: adds ids, or keeps the first `length` of them.
  // UNAVAILABLE where the disk does not give the ids.
  static void AddIds(absl::Span<const int32_t> added, bool are_generated, IdLog& ids,
                     std::vector<PositionRange>& generated);
  static absl::Status CutIds(int64_t length, IdLog& ids, std::vector<PositionRange>& generated);

  // How far the session came. Ranks with equal descriptions stand at the same place: they have the same ids,
  // and have read as many of them, to the same hidden state.
  struct Description {
    int64_t length = 0;  // Ids.
    uint64_t digest = 0;
    bool is_read = true;  // ModelSession::is_read.
    bool operator==(const Description&) const = default;
  };
  // NOT_FOUND; UNAVAILABLE where the disk does not give the ids.
  absl::StatusOr<Description> Describe(uint64_t session_id);

  // The session is `length` tokens long from now on. `read_again`: keys and values are dropped, all of them.
  // Afterwards is_read(), or ids are to be read from context.length() on, by all ranks together, before
  // anything else happens to the session (JobLoop::Settle). Without `read_again` ranks stand at the same
  // place, and nothing is dropped.
  //   NOT_FOUND
  //   FAILED_PRECONDITION  the session has fewer ids; or, without `read_again`, another length. Nothing
  //                        changed.
  //   UNAVAILABLE          the disk does not give the ids. Nothing changed.
  absl::Status BeginSettle(uint64_t session_id, int64_t length, bool read_again);

 private:
  // Gives the session a log, if it is to have one and has none yet.
  absl::Status MakeLog(uint64_t session_id, ModelSession& session);

  ModelEngine engine_;
  TokenLogs* logs_ = nullptr;
  std::map<uint64_t, ModelSession> sessions_;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_MODEL_CONTENT_H_
