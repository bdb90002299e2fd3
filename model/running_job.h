#ifndef EDUBA_MODEL_RUNNING_JOB_H_
#define EDUBA_MODEL_RUNNING_JOB_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "attention/page_store.h"
#include "model/job.h"
#include "model/model_content.h"
#include "model/pooler.h"
#include "model/sequence_parallel_prefill.h"
#include "model/tokenizer/tokenizer.h"

namespace eduba {

// How a job ends.
struct JobEnd {
  absl::Status status;
  FinishReason reason = FinishReason::kNone;
  bool cancelled = false;
};

// A job under way: what the job loop remembers of it between two steps. A job either reads ids that it was
// given, or generates.
struct RunningJob {
  enum class Kind : uint8_t { kAppend, kGenerate, kScore, kEmbed, kReadAgain };

  JobId id;
  // The job has not begun: its session is being read again. Nothing below but the session is set.
  std::optional<JobRequest> waiting;
  Kind kind = Kind::kAppend;
  ModelSession* session = nullptr;
  std::optional<Context> fork;  // kScore, kEmbed: what they read into.
  Context* context = nullptr;   // The fork, or the session's.

  // Tokens to be read; a generation: those that it has chosen so far (on ranks that do not compute it: none).
  std::vector<int32_t> ids;
  int64_t done = 0;            // Tokens of the job that are in the context now.
  int64_t already_stored = 0;  // kAppend: tokens that were in the session before, which `ids` does not have.
  std::vector<int64_t> sink_mass;  // Sums [layers, query_heads] in kSinkMassUnit; empty: not wanted.

  // Reading.
  std::unique_ptr<SequenceParallelPrefill> prefill;  // Reads the ids after `done`, over some steps.
  int64_t in_chunks_until = 0;   // Up to this value of `done` no prefill is tried, because one failed.
  std::vector<float> before;     // kScore: the hidden state before the chunk under way.
  std::vector<float> log_probs;  // kScore
  EmbedJob embed;                // kEmbed
  std::optional<Pooler> pooler;  // kEmbed, once it has its memory.
  // kEmbed, kReadAgain: memory for ids, pooler and answer is still to be taken, in the first step of the job,
  // because ranks agree there on who has none; `no_memory` says why this rank has none.
  bool needs_memory = false;
  ReservedBytes memory;
  absl::Status no_memory;

  // Generating.
  GenerateJob generate;
  TokenChoice chosen;  // The token that the step under way reads.
  std::unique_ptr<TextStream> text_stream;
  std::string text_end;      // The last bytes of the text, in which a stop string may have begun.
  int64_t rows_skipped = 0;  // On ranks that do not compute it: how often they called SkipRow.
  bool cancelled = false;    // It has an owner rank, and ends in the next step.
  std::optional<JobEnd>
      ended;  // On its owner rank: it ended in the last step, and the others hear so in the next.
};

}  // namespace eduba

#endif  // EDUBA_MODEL_RUNNING_JOB_H_
