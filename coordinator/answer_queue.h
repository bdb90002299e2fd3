#ifndef EDUBA_COORDINATOR_ANSWER_QUEUE_H_
#define EDUBA_COORDINATOR_ANSWER_QUEUE_H_

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <utility>
#include <variant>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/runtime.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

// A caller that is a thread which passes on what comes, piece by piece. What a slow client has not taken
// waits here: at most all tokens of one generation, or all vectors of one embedding.
class AnswerQueue final : public Caller {
 public:
  using Piece = std::variant<v1::GenerateResponse::Tokens, v1::EmbedResponse>;

  // Begins the request and hands its pieces to `take` until it says false, then waits for the answer.
  // `cancelled` is asked now and then. CANCELLED when either ended it.
  static absl::StatusOr<Answer> Run(Runtime* runtime, const Runtime::Event& event,
                                    const std::function<bool()>& cancelled,
                                    const std::function<bool(Piece&& piece)>& take);

  void OnGenerated(v1::GenerateResponse::Tokens&& tokens) override { Push(std::move(tokens)); }
  void OnEmbedded(v1::EmbedResponse&& rows) override { Push(std::move(rows)); }
  void OnReply(absl::StatusOr<Answer> answer) override;

 private:
  void Push(Piece piece);
  // Waits for a piece. Nothing: the answer is there, or `cancelled` says so.
  std::optional<Piece> Next(const std::function<bool()>& cancelled);

  std::mutex mutex_;  // Guards all below.
  std::condition_variable changed_;
  std::deque<Piece> pieces_;
  std::optional<absl::StatusOr<Answer>> answer_;
};

}  // namespace eduba

#endif  // EDUBA_COORDINATOR_ANSWER_QUEUE_H_
