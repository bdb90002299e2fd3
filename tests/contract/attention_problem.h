#ifndef EDUBA_TESTS_CONTRACT_ATTENTION_PROBLEM_H_
#define EDUBA_TESTS_CONTRACT_ATTENTION_PROBLEM_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/page_lists.h"
#include "kernels/reference/attention.h"
#include "kernels/row_set.h"
#include "kernels/seen_pages.h"

namespace eduba {

// One attention problem, all of it: two equal specs make the same arrays. A failing test prints it; paste it
// back to replay.
struct ProblemSpec {
  uint64_t seed = 1;
  AttentionShape shape;
  int rows = 1;
  int64_t positions = 300;
  int sink_tokens = 0;
  std::optional<float> sink_logit;  // Learned sink of every head (a little different from head to head).
  float logit_size = 3;             // The largest |scale * (q . k)|, before rounding to the dtype.
  float sink_pull =
      0;  // > 0: token sinks outweigh keys for the first query of a KV head; < 0: the other way.
  enum class Values {
    kNormal,
    kMixed
  } values = Values::kNormal;  // kMixed: tiny, huge and all-zero channels.
  enum class Visible { kAll, kCausal, kRandom, kWindow, kOneOrNone } visible = Visible::kAll;
  bool partly_visible_sinks = false;  // Rows see only the first few token sinks.

  std::string ToString() const;
};

// What a spec makes: dense arrays, and what each row sees.
struct Problem {
  explicit Problem(const ProblemSpec& problem_spec);

  ProblemSpec spec;
  std::vector<float> queries;  // [rows, query_heads, head_dim]
  std::vector<float>
      sink_queries;  // The same for the token sinks, or empty: `queries`. The oracle does not know them.
  std::vector<float> keys;    // [positions, kv_heads, head_dim], rounded to the dtype
  std::vector<float> values;  // [positions, kv_heads, value_dim], rounded to the dtype
  std::vector<PositionRange> visible;
  std::vector<int32_t> visible_sinks;
  // Live masks of some pages, by page; the others' rows are all live.
  std::map<int64_t, RowSet> live;
  // [rows]: what each row's list names, by page; empty: one list for all rows, of all pages.
  std::vector<std::map<int64_t, PageRows>> listed;
  std::vector<float> sink_logits;
  std::vector<int16_t> exponents;

  bool Sees(int row, int64_t position) const;
  // The same problem with only these rows of queries.
  Problem WithRows(const std::vector<int>& rows) const;
  DenseResult Oracle() const;
  // The oracle's outputs with |v| for v: what the output would be without cancellation, and so what errors
  // are measured against.
  std::vector<double> Magnitudes() const;
  // The same attention as fp32 programs compute it (PyTorch's scaled_dot_product_attention on a CPU): fp32
  // dot products, blocks of 512 keys with a running maximum, fp32 sums; `fused`: on a chip with fused
  // multiply-add. [rows, query_heads, value_dim]
  std::vector<float> PlainFloatAttention(bool fused) const;
};

struct Answer {
  std::vector<float> outputs;
  std::vector<float> lse;
  std::vector<float> sink_mass;
  PathCounts paths;
  int64_t bytes_read = 0;

  // Every bit of outputs, lse and sink mass, and the paths.
  bool operator==(const Answer& other) const;
};

// A group of ranks in one process, without a transport: each has a backend of its own, and sums are added up
// here.
class RankGroup {
 public:
  explicit RankGroup(std::vector<std::unique_ptr<Backend>> backends) : backends_(std::move(backends)) {}
  ~RankGroup();

  // Writes the problem's positions into pages, with NaN in every row that no query sees and that is no sink:
  // where the lists or the live masks leave a row out, too.
  void Load(const Problem& problem);
  // Attention with page p on rank owners[p % owners.size()]; `reversed` gives each rank its pages last to
  // first. REQUIRES: Load was called with a problem of the same keys and values.
  absl::StatusOr<Answer> Attend(const Problem& problem, const std::vector<int>& owners,
                                bool reversed = false);
  // The same with a step for each problem, all in progress at once: every call comes to all of them before
  // the next does.
  absl::StatusOr<std::vector<Answer>> AttendTogether(absl::Span<const Problem> problems,
                                                     const std::vector<int>& owners, bool reversed = false);
  // Step i is rank i % size()'s: the others learn what it selects, but get neither its sums nor its answer.
  bool one_answers = false;
  // Page memory, to be harmed.
  void* page(int64_t index) { return static_cast<char*>(slab_) + index * page_bytes_; }
  Backend& backend(int rank) { return *backends_[rank]; }
  // The summed words of the last Attend: sink path, then maximum path.
  const std::vector<int64_t>& words() const { return words_; }
  int size() const { return static_cast<int>(backends_.size()); }

 private:
  void Free();

  std::vector<std::unique_ptr<Backend>> backends_;
  void* slab_ = nullptr;
  int64_t slab_bytes_ = 0;
  int64_t page_bytes_ = 0;
  std::vector<int64_t> words_;
};

// The largest of |out - wanted| / |scale| over rows and heads, each norm over the channels. With `scale` =
// `wanted` it is the relative norm error. Below 1e-36 fp32 has no digits to compare.
double WorstError(const std::vector<float>& out, const std::vector<double>& wanted,
                  const std::vector<double>& scale, int value_dim);
// The root mean square of the same.
double TypicalError(const std::vector<float>& out, const std::vector<double>& wanted,
                    const std::vector<double>& scale, int value_dim);

}  // namespace eduba

#endif  // EDUBA_TESTS_CONTRACT_ATTENTION_PROBLEM_H_
