#ifndef EDUBA_CLIENT_CLIENT_H_
#define EDUBA_CLIENT_CLIENT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/dtype.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

// What is appended: the same rows of keys and values, for every layer. Rows are asked for in pieces of less
// than 1 MiB, in any order and from several threads at once, so a source may be larger than memory.
class RowSource {
 public:
  virtual ~RowSource() = default;

  // Element type of both arrays that Read delivers.
  virtual DType dtype() const = 0;
  // Writes rows [first, first + count) of `layer`, counted from the start of the append:
  //   keys    [count, kv_heads, head_dim]
  //   values  [count, kv_heads, value_dim]
  // A row may be asked for more than once (token sinks go to every worker).
  virtual absl::Status Read(int layer, int64_t first, int64_t count, void* keys, void* values) const = 0;
};

// Called with the bytes sent so far and in all, one call at a time, from any thread.
using Progress = std::function<void(int64_t done, int64_t total)>;

struct AppendOptions {
  // Where the append starts; absent: at the session's end. With it a repeated append of the same content is
  // a success.
  std::optional<int64_t> at;
  Progress progress;
};

struct AttendOptions {
  int layer = 0;
  v1::Policy policy = v1::POLICY_GLOBAL;
  // Every row has a position and sees positions <= it; otherwise rows see the whole sequence.
  bool positions = false;
};

// Writes query rows [first, first + count): queries [count, query_heads, head_dim] and, when the call has
// them, positions [count] (empty otherwise). Rows are asked for in order, from one thread that is not the
// caller's.
using QuerySource =
    std::function<absl::Status(int64_t first, absl::Span<float> queries, absl::Span<int64_t> positions)>;

// A run of answered rows. The memory is the client's and is gone after the call that delivers it.
struct AnsweredRows {
  int64_t first_row = 0;
  int64_t count = 0;
  absl::Span<const float> outputs;    // [count, query_heads, value_dim]
  absl::Span<const float> lse;        // [count, query_heads]
  absl::Span<const float> sink_mass;  // [count, query_heads]
};
// Takes the answers, in row order, on the caller's thread. An error ends the call with that error.
using ResultSink = std::function<absl::Status(const AnsweredRows& rows)>;

struct ClientOptions {
  std::string server = "127.0.0.1:7070";
  // The time limit of one call of this class: a whole append or attend is one call.
  absl::Duration timeout = absl::Minutes(10);
};

// Talks to a coordinator, and straight to its workers for bulk data. Thread-safe. Errors are those of
// proto/eduba/v1/eduba.proto; UNAVAILABLE also when the server cannot be reached. `session` arguments are
// what CreateSession or GetSession returned: their specs give the shapes.
class Client {
 public:
  explicit Client(ClientOptions options);
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  absl::StatusOr<v1::Session> CreateSession(const std::string& name, const v1::SessionSpec& spec);
  absl::StatusOr<v1::Session> GetSession(const std::string& name);
  // All sessions, in order of their names, without notes.
  absl::StatusOr<std::vector<v1::Session>> ListSessions();
  absl::Status DeleteSession(const std::string& name);

  // Appends `count` positions: plan, parallel uploads to the owners, commit. All or nothing: on an error the
  // append is given up and the session is as it was, except when the commit itself got no answer; then the
  // message says how to find out.
  absl::StatusOr<v1::AppendReceipt> Append(const v1::Session& session, int64_t count, const RowSource& source,
                                           const AppendOptions& options);
  // The same through the coordinator, for clients that cannot reach the workers.
  absl::StatusOr<v1::AppendReceipt> AppendProxied(const v1::Session& session, int64_t count,
                                                  const RowSource& source, const AppendOptions& options);

  // Asks `rows` queries. When it returns OK the sink has had every row exactly once.
  absl::StatusOr<v1::AttendSummary> Attend(const v1::Session& session, int64_t rows,
                                           const QuerySource& source, const ResultSink& sink,
                                           const AttendOptions& options);

  // The workers' model, and sessions of it: CreateSession with a spec that has a model part.
  absl::StatusOr<v1::Model> GetModel();
  // `at` as in AppendOptions. Not all or nothing: an error says how long the session is now, and the same
  // call with the same `at` goes on from there. `progress` counts tokens.
  absl::StatusOr<v1::AppendTokensReceipt> AppendTokens(const std::string& session,
                                                       absl::Span<const int32_t> ids,
                                                       const AppendOptions& options);
  // `sink` takes the tokens as they come, on the caller's thread; an error of it ends the generation, and the
  // session keeps what was generated. Where the request has no time limit, this client's is one: then the
  // answer says that it was the deadline, instead of being DEADLINE_EXCEEDED.
  absl::StatusOr<v1::GenerateSummary> Generate(
      v1::GenerateRequest request,
      const std::function<absl::Status(const v1::GenerateResponse::Tokens& tokens)>& sink);
  // [ids]: ln P(ids[i] | session, ids[..i)); at most 196608 ids. `sink_mass`, where wanted, gets [layers,
  // query_heads]: the token sinks' share of the weights, averaged over the rows of the ids.
  absl::StatusOr<std::vector<float>> Score(const std::string& session, absl::Span<const int32_t> ids,
                                           std::vector<float>* sink_mass = nullptr);
  // [ranges, hidden_size]: of positions [begin, end) that the session has; `ranges` [n, 2], ascending.
  absl::StatusOr<std::vector<float>> Embed(const std::string& session, absl::Span<const int64_t> ranges,
                                           v1::Pool pool);
  absl::StatusOr<v1::Session> ForkSession(const std::string& session, const std::string& name);

  absl::StatusOr<v1::ListWorkersResponse> ListWorkers();

 private:
  class Stub;

  const ClientOptions options_;
  std::unique_ptr<Stub> stub_;
};

}  // namespace eduba

#endif  // EDUBA_CLIENT_CLIENT_H_
