#ifndef EDUBA_TESTS_CLUSTER_SESSION_PROBLEM_H_
#define EDUBA_TESTS_CLUSTER_SESSION_PROBLEM_H_

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/client.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

using Random = std::mt19937_64;

// A number in [0, n).
inline int64_t Below(Random& random, int64_t n) { return static_cast<int64_t>(random() % n); }

// Keys and values of all layers: [layers, length, kv_heads, dim], as the caller has them (f32).
struct Content {
  v1::SessionSpec spec;  // completed
  int64_t length = 0;
  std::vector<float> keys;
  std::vector<float> values;

  int64_t key_row() const { return int64_t{spec.kv_heads()} * spec.head_dim(); }
  int64_t value_row() const { return int64_t{spec.kv_heads()} * spec.value_dim(); }
};

// One attend call.
struct Call {
  AttendOptions options;
  int64_t rows = 0;
  std::vector<float> queries;  // [rows, query_heads, head_dim]
  std::vector<int64_t> positions;
};

// What a call was told.
struct Answers {
  std::vector<float> outputs;
  std::vector<float> lse;
  std::vector<float> sink_mass;
  v1::AttendSummary summary;

  // Every bit, and the paths.
  bool operator==(const Answers& other) const;
};

// A session's content and the calls made on it. Everything follows from the seed.
struct Problem {
  uint64_t seed = 0;
  Content content;
  std::vector<Call> calls;

  std::string Text() const;
};

Content MakeContent(const v1::SessionSpec& spec, int64_t length, Random& random);
Call MakeCall(const Content& content, Random& random);
Problem MakeProblem(uint64_t seed);

// Positions [at, at + count) of the content, straight to the workers or (`thin`) through the coordinator.
absl::StatusOr<v1::AppendReceipt> Append(Client& client, const v1::Session& session, const Content& content,
                                         int64_t at, int64_t count, bool thin, bool say_at);
// Creates a session and appends the whole content.
absl::StatusOr<v1::Session> StoreSession(Client& client, const std::string& name, const Content& content);

absl::StatusOr<Answers> Ask(Client& client, const v1::Session& session, const Call& call);

// Fails the test where an answer is not the reference's (of the first rows of a large call).
void ExpectOracle(const Content& content, const Call& call, const Answers& answers);

}  // namespace eduba

#endif  // EDUBA_TESTS_CLUSTER_SESSION_PROBLEM_H_
