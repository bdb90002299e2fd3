#ifndef EDUBA_MODEL_JOB_H_
#define EDUBA_MODEL_JOB_H_

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/pages.h"
#include "model/pooler.h"
#include "model/sampler.h"

namespace eduba {

// What a job is: one request to a model session, which the job loop (model/job_loop.h) carries out over many
// steps. Every rank of the group is given the same jobs in the same order.
struct JobId {
  uint64_t id = 0;  // Ascending: a later job has a larger one.
  uint64_t session_id = 0;
  // How long this rank waits for the others in one step of the job.
  absl::Duration timeout = absl::Seconds(30);
};

// The session reads `ids` at positions [at, at + ids).
struct AppendJob {
  std::vector<int32_t> ids;  // [n], at least one.
  // At most the session's length. Ids that the session has there already are compared and not read again.
  int64_t at = 0;
};

// The session reads tokens that it chooses itself.
struct GenerateJob {
  int64_t max_tokens = 0;  // At least 1.
  SamplingOptions sampling;
  std::vector<int32_t> stop_ids;          // Any of them ends the generation, and is its last token.
  std::vector<std::string> stop_strings;  // Likewise the token whose text completes any of these.
  bool sink_mass = false;                 // Wanted.
  // The rank that computes the generation alone; the others get the session's new rows from it at the end.
  // Only for sessions whose every layer sees a window. None: all ranks compute it.
  std::optional<int> owner_rank;
};

// ln P(ids[i] | session, ids[..i)). The session stays as it is.
struct ScoreJob {
  std::vector<int32_t> ids;  // [n], at least one.
  bool sink_mass = false;    // Wanted.
};

// The hidden states of the session's own positions, pooled over ranges. The session stays as it is.
struct EmbedJob {
  std::vector<PositionRange> ranges;  // Ascending, not empty, and not overlapping.
  Pool pool = Pool::kMean;
};

// The first job of a session in a group, once every rank has said what it holds of it
// (ModelContent::Describe): the session is `length` tokens long from now on. Ids that are not read then, are
// read by all ranks together, to the bits that the session had before. The session's other jobs wait
// meanwhile.
struct SettleJob {
  int64_t length = 0;
  bool read_again = false;  // The ranks stopped at different places: drop all keys and values first.
};

using JobRequest = std::variant<AppendJob, GenerateJob, ScoreJob, EmbedJob, SettleJob>;

// Why a generation ended by itself; kNone: it did not, or the job is none.
enum class FinishReason : uint8_t { kNone, kLength, kStop };

// What a step of a job brought. A progress without any token says that the job is alive.
struct JobProgress {
  std::optional<TokenChoice> token;  // GenerateJob: it is in the session now.
  std::string text;                  // The text that the token completed; valid UTF-8, often empty.
};

// How a job ended, also when it failed on the way.
struct JobResult {
  absl::Status status;
  int64_t done = 0;            // Tokens of this job that are in the session (score, embed: were read).
  int64_t already_stored = 0;  // AppendJob: those of them that were there before.
  int64_t length = 0;          // The session's length (score, embed: that of the fork that they read into).
  FinishReason finish_reason = FinishReason::kNone;
  bool cancelled = false;
  // Hash of all that was computed, from the ranks that computed it (else 0): ranks whose digests differ do
  // not compute alike.
  uint64_t digest = 0;
  // From the reporting rank; empty on the others.
  std::vector<float> log_probs;  // ScoreJob: [ids].
  std::vector<float> vectors;    // EmbedJob: [ranges, hidden_size].
  std::vector<float>
      sink_mass;  // [layers, query_heads], where wanted: averages over the rows that were read.
};

// Hears of jobs, on the thread that runs the loop. It may not call the loop.
class JobListener {
 public:
  virtual ~JobListener() = default;
  // A step brought something. Only the reporting rank says so: a generation's owner rank, else rank 0.
  virtual void OnProgress(uint64_t job, const JobProgress& progress) = 0;
  // The job has ended: once for each, on every rank.
  virtual void OnResult(uint64_t job, const JobResult& result) = 0;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_JOB_H_
