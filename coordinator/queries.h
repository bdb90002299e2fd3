#ifndef EDUBA_COORDINATOR_QUERIES_H_
#define EDUBA_COORDINATOR_QUERIES_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/batcher.h"
#include "coordinator/group.h"
#include "coordinator/outbox.h"
#include "coordinator/sessions.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

// Attend calls: their rows are packed into steps (batcher.h), all ranks compute a step together, and rank 0's
// rows go back to their calls in order.
class Queries {
 public:
  Queries(Group* group, Sessions* sessions, Outbox* outbox)
      : group_(group), sessions_(sessions), outbox_(outbox) {}

  // ---- Calls
  void Start(RequestId request, const v1::AttendRequest::Header& header);
  void Submit(RequestId request, std::string queries, std::vector<int64_t> positions, int64_t now_ms);
  void Finish(RequestId request);
  // False: it is no call of this kind.
  bool Cancel(RequestId request);

  void OnOver(const absl::Status& status);
  // The session is deleted.
  void FailOf(uint64_t session_id, const absl::Status& status);

 private:
  struct Call {
    uint64_t session_id = 0;
    std::shared_ptr<const v1::SessionSpec> spec;
    bool positions = false;
    bool finished = false;  // No more rows will come.
    int64_t submitted = 0;
    int64_t answered = 0;
    int again = 0;  // Parts that are asked again by themselves: later rows must wait for them.
    AttendTotals totals;
  };
  // A step that the ranks have.
  struct Step {
    uint64_t session_id = 0;
    Batch batch;  // Its queries and positions are in `message`.
    std::shared_ptr<const v1::GroupMessage> message;
    Answered answered;
    bool complete = false;
  };

  absl::Status CheckHeader(const SessionEntry& session, const v1::AttendRequest::Header& header) const;
  static absl::Status CheckRows(const Call& call, const std::string& queries,
                                const std::vector<int64_t>& positions);
  void Pump(int64_t now_ms);
  void SendStep(Batch batch, int64_t now_ms);
  void OnStep(Answered answered, int64_t now_ms);
  void Deliver(const Step& step, int64_t now_ms);
  // Returns the one of the ranks' errors that says most; OK when there is none. Adds up `totals`.
  absl::Status Sum(const Step& step, AttendTotals* totals) const;
  void DeliverFailure(const Step& step, const absl::Status& failure);
  // `first`: the part's first row in the step.
  void AskAgain(const Step& step, const Batch::Part& part, int64_t first);
  void DeliverPart(Call* call, const Batch::Part& part, int64_t first, const v1::AttendResult& result,
                   const AttendTotals& totals);
  void Fail(RequestId request, const absl::Status& status);
  void EndIfDone(RequestId request, Call* call);

  Group* const group_;
  Sessions* const sessions_;
  Outbox* const outbox_;
  Batcher batcher_;
  std::deque<Batch> again_;  // Go before what the batcher has.
  std::map<RequestId, Call> calls_;
  std::deque<Step> steps_;  // On their way, oldest first; delivered in this order.
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_QUERIES_H_
