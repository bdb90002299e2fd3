#include "kernels/fingerprint.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/fixed_numbers.h"
#include "kernels/page_lists.h"

namespace eduba {
namespace {

struct Case {
  AttentionShape shape;
  int64_t positions;
  int sink_tokens;
  bool learned_sinks;
  float key_size;  // Large enough, and rows leave the sink path.
};

constexpr int kRows = 7;
const Case kCases[] = {
    {{8, 2, 64, 64, DType::kBf16, DType::kBf16, 0.125F, 0}, 600, 4, true, 1},
    {{4, 4, 80, 16, DType::kF16, DType::kF16, 0.5F, 0}, 300, 0, false, 2},
    {{6, 1, 33, 21, DType::kF32, DType::kF32, 1, 30}, 513, 1, false, 1},
    {{5, 1, 128, 128, DType::kBf16, DType::kBf16, 1, 0}, 257, 0, true, 4},
};

// A slab that goes back to its backend.
struct Slab {
  Backend& backend;
  int64_t bytes;
  void* data;
  Slab(Backend& owner, int64_t size, void* memory) : backend(owner), bytes(size), data(memory) {}
  ~Slab() { backend.FreeSlab(data, bytes); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;
};

// The bits of one row: outputs, lse and sink mass.
using RowBits = std::vector<float>;

struct Run {
  std::vector<RowBits> rows;
  std::vector<int64_t> words;
};

absl::StatusOr<Run> Attend(Backend& backend, const StepArgs& args) {
  EDUBA_ASSIGN_OR_RETURN(const std::unique_ptr<AttentionStep> step, backend.StartStep(args));
  Run run;
  std::vector<int64_t> sink_words(args.has_sinks() ? args.row_heads() * args.words_per_row_head() : 0);
  EDUBA_RETURN_IF_ERROR(step->Attend());
  if (args.has_sinks()) EDUBA_RETURN_IF_ERROR(step->SinkSums(absl::MakeSpan(sink_words)));
  EDUBA_ASSIGN_OR_RETURN(const auto selected, step->SelectForMaximum());
  std::vector<float> maxima(selected.size() * args.maxima_per_row_head());
  std::vector<int64_t> maximum_words(selected.size() * args.words_per_row_head());
  if (!selected.empty()) {
    EDUBA_RETURN_IF_ERROR(step->Maxima(absl::MakeSpan(maxima)));
    EDUBA_RETURN_IF_ERROR(step->MaximumSums(absl::MakeSpan(maximum_words)));
  }
  run.words = sink_words;
  run.words.insert(run.words.end(), maximum_words.begin(), maximum_words.end());
  const size_t heads = args.shape.query_heads;
  const size_t width = heads * args.shape.value_dim;
  std::vector<float> outputs(args.rows * width);
  std::vector<float> lse(args.rows * heads);
  std::vector<float> sink_mass(args.rows * heads);
  EDUBA_RETURN_IF_ERROR(step->Finish(outputs.data(), lse.data(), sink_mass.data()));
  for (int row = 0; row < args.rows; ++row) {
    RowBits bits(&outputs[row * width], &outputs[row * width] + width);
    bits.insert(bits.end(), &lse[row * heads], &lse[row * heads] + heads);
    bits.insert(bits.end(), &sink_mass[row * heads], &sink_mass[row * heads] + heads);
    run.rows.push_back(std::move(bits));
  }
  return run;
}

// Appends what the backend makes of `problem` to `bits`.
absl::Status AddCase(Backend& backend, const Case& problem, std::vector<char>& bits) {
  const AttentionShape& shape = problem.shape;
  FixedNumbers numbers;
  const int64_t key_row = static_cast<int64_t>(shape.kv_heads) * shape.head_dim;
  const int64_t value_row = static_cast<int64_t>(shape.kv_heads) * shape.value_dim;
  const auto key_bytes = static_cast<int64_t>(DTypeBytes(shape.key_dtype));
  const auto value_bytes = static_cast<int64_t>(DTypeBytes(shape.value_dtype));
  std::vector<char> keys(problem.positions * key_row * 4);
  std::vector<char> values(problem.positions * value_row * 4);
  for (int64_t i = 0; i < problem.positions * key_row; ++i) {
    StoreElement(keys.data(), shape.key_dtype, i, problem.key_size * numbers.Next());
  }
  for (int64_t i = 0; i < problem.positions * value_row; ++i) {
    StoreElement(values.data(), shape.value_dtype, i, numbers.Next());
  }
  std::vector<float> queries(kRows * static_cast<size_t>(shape.query_heads) * shape.head_dim);
  for (float& x : queries) x = numbers.Next();

  const int64_t pages = PageCount(problem.positions);
  const int64_t page_bytes = backend.PageBytes(shape);
  EDUBA_ASSIGN_OR_RETURN(void* memory, backend.AllocateSlab(pages * page_bytes));
  const Slab slab(backend, pages * page_bytes, memory);
  std::vector<PageRef> refs;
  refs.reserve(pages);
  for (int64_t p = 0; p < pages; ++p) {
    void* page = static_cast<char*>(memory) + p * page_bytes;
    const int64_t rows = std::min<int64_t>(kPageRows, problem.positions - PageBegin(p));
    EDUBA_RETURN_IF_ERROR(backend.WriteRows(shape, page, 0, static_cast<int>(rows),
                                            &keys[PageBegin(p) * key_row * key_bytes],
                                            &values[PageBegin(p) * value_row * value_bytes]));
    refs.push_back({page, p});
  }

  std::vector<PositionRange> visible;
  visible.reserve(kRows);
  for (int row = 0; row < kRows; ++row) {
    visible.push_back({problem.sink_tokens + row * 17, problem.positions - row});
  }
  const std::vector<int32_t> visible_sinks(kRows, problem.sink_tokens);
  const std::vector<float> sink_logits(problem.learned_sinks ? shape.query_heads : 0, 0.5F);
  const std::vector<int16_t> exponents(value_row, 0);
  StepArgs args;
  args.shape = shape;
  args.rows = kRows;
  args.queries = queries.data();
  args.visible = visible;
  args.pages = refs;
  const OwnedPageLists lists(pages, kRows);
  args.lists = lists.view();
  args.sink_pages = absl::MakeConstSpan(refs).subspan(0, problem.sink_tokens > 0 ? 1 : 0);
  args.visible_sinks = visible_sinks;
  args.sink_logits = sink_logits;
  args.exponents = exponents;
  args.positions = problem.positions;
  EDUBA_ASSIGN_OR_RETURN(const Run batch, Attend(backend, args));

  for (int row = 0; row < kRows; ++row) {
    StepArgs one = args;
    one.rows = 1;
    one.queries = &queries[row * static_cast<size_t>(shape.query_heads) * shape.head_dim];
    one.lists.row_list = args.lists.row_list.subspan(row, 1);
    one.visible = args.visible.subspan(row, 1);
    one.visible_sinks = args.visible_sinks.subspan(row, 1);
    EDUBA_ASSIGN_OR_RETURN(const Run alone, Attend(backend, one));
    const RowBits& a = alone.rows[0];
    const RowBits& b = batch.rows[row];
    if (std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) != 0) {
      return absl::InternalError(absl::StrCat(
          backend.name(), ": row ", row, " of a fixed problem with head_dim ", shape.head_dim,
          " has other bits alone than in a batch of ", kRows, "; this build must not serve on this machine"));
    }
  }

  const auto add = [&](const void* data, size_t size) {
    bits.insert(bits.end(), static_cast<const char*>(data), static_cast<const char*>(data) + size);
  };
  add(batch.words.data(), batch.words.size() * sizeof(int64_t));
  for (const RowBits& row : batch.rows) add(row.data(), row.size() * sizeof(float));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<uint64_t> Fingerprint(Backend& backend) {
  std::vector<char> bits;
  for (const Case& problem : kCases) EDUBA_RETURN_IF_ERROR(AddCase(backend, problem, bits));
  return XXH3_64bits(bits.data(), bits.size());
}

}  // namespace eduba
