#ifndef EDUBA_COORDINATOR_EFFECTS_H_
#define EDUBA_COORDINATOR_EFFECTS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/records.h"
#include "eduba/v1/eduba.pb.h"
#include "eduba/v1/group.pb.h"

namespace eduba {

using WorkerId = uint64_t;   // one Join stream; never reused
using RequestId = uint64_t;  // one client call; never reused

// How a call's rows were computed, when all have been answered.
struct AttendTotals {
  int64_t rows = 0;
  int workers = 0;
  int64_t collectives = 0;
  int64_t row_heads_sink = 0;
  int64_t row_heads_maximum = 0;
  int64_t bytes_read = 0;
  int64_t length = 0;
};

struct Done {};

// A request's answer; which alternative follows from the request.
using Answer = std::variant<Done, v1::Session, v1::ListSessionsResponse, v1::AppendPlan, v1::AppendReceipt,
                            v1::ListWorkersResponse, AttendTotals, v1::Model, v1::AppendTokensReceipt,
                            v1::GenerateSummary, v1::ScoreResponse>;

// What ClusterState wants done. To be carried out in order.

// Messages to one worker arrive in the order in which they were asked for. Shared, because most go to all.
struct SendToWorker {
  WorkerId worker = 0;
  std::shared_ptr<const v1::GroupMessage> message;
};

// Ends the worker's stream. The state has forgotten the worker already.
struct CloseWorker {
  WorkerId worker = 0;
  absl::Status status;
};

// The last thing said to a request. Every request gets exactly one, unless it was cancelled: then none.
struct Reply {
  RequestId request = 0;
  absl::StatusOr<Answer> answer;
};

// An attend call may send its rows.
struct AttendStarted {
  RequestId request = 0;
  std::shared_ptr<const v1::SessionSpec> spec;
  int64_t length = 0;  // committed positions that all its rows see
};

// A run of a call's answered rows; runs come in row order and are small enough for one message.
struct AttendedRows {
  RequestId request = 0;
  v1::AttendResponse::Rows rows;
};

// A run of what a Generate or an Embed call gets, in order.
struct Generated {
  RequestId request = 0;
  v1::GenerateResponse::Tokens tokens;
};
struct Embedded {
  RequestId request = 0;
  v1::EmbedResponse rows;
};

// To be written down durably, then ClusterState::Persisted(id, status) is called.
struct Persist {
  uint64_t id = 0;
  Change change;
};

// Forget what is in the rendezvous store; from now on it belongs to this attempt, or (epoch 0) to none.
struct ResetRendezvous {
  uint64_t epoch = 0;
  uint32_t attempt = 0;
};

// Health.
struct SetServing {
  bool serving = false;
};

// For the operator's log.
struct Note {
  std::string text;
};

using Effect = std::variant<SendToWorker, CloseWorker, Reply, AttendStarted, AttendedRows, Generated,
                            Embedded, Persist, ResetRendezvous, SetServing, Note>;

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_EFFECTS_H_
