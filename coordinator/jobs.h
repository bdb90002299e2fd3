#ifndef EDUBA_COORDINATOR_JOBS_H_
#define EDUBA_COORDINATOR_JOBS_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/group.h"
#include "coordinator/journal.h"
#include "coordinator/outbox.h"
#include "coordinator/sessions.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

// Calls on model sessions. Each becomes a job that all ranks run, step by step beside the others, until they
// answer its command. One call at a time extends a session, and nothing else is asked of it meanwhile: what a
// client cannot know, it cannot ask about. Token ids are compared by the workers, which keep them.
class Jobs {
 public:
  Jobs(Group* group, Sessions* sessions, Journal* journal, Outbox* outbox)
      : group_(group), sessions_(sessions), journal_(journal), outbox_(outbox) {}

  // ---- Calls. `at`: as AppendTokensRequest's.
  void Append(RequestId request, const std::string& name, std::optional<int64_t> at, std::vector<int32_t> ids,
              int64_t now_ms);
  void Generate(RequestId request, const v1::GenerateRequest& args, int64_t now_ms);
  void Score(RequestId request, const v1::ScoreRequest& args, int64_t now_ms);
  void Embed(RequestId request, const v1::EmbedRequest& args, int64_t now_ms);
  // False: it is no call of this kind.
  bool Cancel(RequestId request, int64_t now_ms);

  // A usable model session that no call extends; ABORTED when one does.
  absl::StatusOr<SessionEntry*> FindIdle(const std::string& name);

  // A job has made a step.
  void OnProgress(int rank, v1::ModelProgress progress, int64_t now_ms);
  // Ends what has passed its caller's time limit.
  void Tick(int64_t now_ms);
  void OnOver(const absl::Status& status);
  // The session is being deleted: nobody waits for its jobs any more.
  void FailOf(uint64_t session_id, const absl::Status& status);
  // The jobs of a session that was not deleted after all end with what they have.
  void CancelOf(uint64_t session_id, int64_t now_ms);

 private:
  struct Job {
    enum class Kind { kAppend, kGenerate, kScore, kEmbed };
    Kind kind = Kind::kAppend;
    RequestId request = 0;  // 0: nobody waits any more
    uint64_t session_id = 0;
    std::optional<int> owner_rank;  // kGenerate: the rank that computes it; none: all do
    int64_t tokens = 0;             // kAppend, kScore: that were sent; kGenerate: that have come
    int64_t at = 0;                 // kAppend: where the client's tokens start, ...
    int64_t count = 0;              // ... how many there are, ...
    int64_t already_stored = 0;     // ... how many of them count as being there before, ...
    int64_t sent_at = 0;     // ... and where the command's tokens start: with sinks, if they are read first.
    int64_t read = 0;        // When it has ended: by how many tokens the session grew.
    bool sink_mass = false;  // kGenerate, kScore: wanted
    int64_t ranges = 0;      // kEmbed: that were asked for
    int64_t embedded = 0;    // kEmbed: that have come
    int64_t started_ms = 0;
    int64_t deadline_ms = 0;  // 0: none
    bool cancelled = false;

    bool extends() const { return kind == Kind::kAppend || kind == Kind::kGenerate; }
    // The rank that says what comes of it.
    int reporting_rank() const { return owner_rank.value_or(0); }
  };
  // A job that has ended, whose tokens are being written down.
  struct Recording {
    Job job;
    v1::CommandResult result;
  };

  absl::Status CheckAppend(const SessionEntry& session, int64_t at, const std::vector<int32_t>& ids) const;
  absl::Status CheckSinkMass(bool wanted, const std::string& what) const;
  // The rank that computes a generation of the session alone: the one that computes the fewest. None: all
  // ranks do.
  std::optional<int> OwnerRankFor(const SessionEntry& session) const;
  void Start(Job job, v1::Command command, int64_t now_ms);
  void OnEnded(const Answered& answered, int64_t now_ms);
  // How the first rank that did not do the same as the reporting rank differs; "" when all did the same.
  std::string Difference(const Job& job, const Answered& answered) const;
  // What in the reporting rank's answer cannot be, or "".
  std::string Nonsense(const Job& job, const SessionEntry& session, const v1::CommandResult& told) const;
  void Record(Job job, SessionEntry* session, v1::CommandResult told);
  void OnRecorded(uint64_t session_id, int64_t length, const absl::Status& status, int64_t now_ms);
  void Reply(const Job& job, const SessionEntry& session, const v1::CommandResult& told, int64_t now_ms);
  absl::Status FailureOf(const Job& job, const SessionEntry& session, const v1::CommandResult& told) const;
  void CancelJob(uint64_t ordinal, int64_t now_ms);

  Group* const group_;
  Sessions* const sessions_;
  Journal* const journal_;
  Outbox* const outbox_;
  std::map<uint64_t, Job> jobs_;             // By ordinal.
  std::map<uint64_t, Recording> recording_;  // By session.
  std::set<uint64_t> extended_;  // Sessions with an append or a generation under way or being written down.
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_JOBS_H_
