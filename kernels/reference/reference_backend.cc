#include "kernels/reference/reference_backend.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/merging_step.h"
#include "kernels/page_header.h"
#include "kernels/portable_math.h"
#include "kernels/row_set.h"

namespace eduba {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Where a page keeps its rows: the header, then keys [256, kv_heads, head_dim], then values [256, kv_heads,
// value_dim].
struct Layout {
  explicit Layout(const AttentionShape& s)
      : key_row(int64_t{s.kv_heads} * s.head_dim * static_cast<int64_t>(DTypeBytes(s.key_dtype))),
        value_row(int64_t{s.kv_heads} * s.value_dim * static_cast<int64_t>(DTypeBytes(s.value_dtype))) {}
  int64_t bytes() const { return value(kPageRows); }
  int64_t key(int row) const { return static_cast<int64_t>(sizeof(PageHeader)) + row * key_row; }
  int64_t value(int row) const { return key(kPageRows) + row * value_row; }

  int64_t key_row;  // Bytes.
  int64_t value_row;
};

// What one page adds to one query row and head.
struct Partial {
  double m = -kInfinity;
  double l = 0;
  std::vector<double> o;  // [value_dim]
};

class ReferenceStep final : public MergingStep {
 public:
  ReferenceStep(const StepArgs& args, ThreadPool& pool) : MergingStep(args, pool), layout_(args.shape) {}

  absl::Status Attend() override {
    for (size_t page = 0; page < seen_.pages().size(); ++page) {
      EDUBA_RETURN_IF_ERROR(CheckCancelled());
      for (int64_t i = 0; i < row_heads(); ++i) partials_.push_back(AttendPage(page, i));
    }
    return absl::OkStatus();
  }

 protected:
  absl::Status ReadSinks(int64_t tokens, float* keys, float* values) override {
    ReadSinksWith(tokens, keys, values,
                  [this](const void* page, int row, int kv_head, float* key, float* value) {
                    ReadRow(page, row, kv_head, key, value);
                  });
    return absl::OkStatus();
  }

  absl::Status LocalMaxima(absl::Span<const int64_t> row_heads, float* maxima) override {
    for (const int64_t row_head : row_heads) *maxima++ = LocalMaximum(row_head);
    return absl::OkStatus();
  }

  absl::Status RaiseMagnitudes(absl::Span<const int64_t> row_heads, float* magnitudes) override {
    for (const int64_t row_head : row_heads) {
      for (size_t page = 0; page < seen_.pages().size(); ++page) {
        const Partial& partial = PartialOf(page, row_head);
        for (int c = 0; c < args_.shape.value_dim; ++c) {
          magnitudes[c] = std::max(
              magnitudes[c], LogMagnitude(static_cast<float>(partial.m), static_cast<float>(partial.o[c])));
        }
      }
      magnitudes += args_.shape.value_dim;
    }
    return absl::OkStatus();
  }

  absl::Status SumPages(const SumPlan& plan, int64_t* words) override {
    const double one = PowerOfTwo(plan.fraction_bits);
    const int value_dim = args_.shape.value_dim;
    for (const Target& target : plan.targets) {
      const double* unit = &plan.units[target.unit_row * value_dim];
      int64_t flag = 0;
      for (size_t page = 0; page < seen_.pages().size() && flag == 0; ++page) {
        const Partial& partial = PartialOf(page, target.row_head);
        if (partial.m == -kInfinity || target.reference == -kInfinity) continue;
        if (partial.m == kInfinity || target.reference == kInfinity) {
          flag = kFaultFlag;
          continue;
        }
        const double weight = std::exp(partial.m - target.reference);
        const double l = partial.l * weight * one;
        if (!(l <= static_cast<double>(plan.limit)) || (words[value_dim] += std::llrint(l)) > plan.limit) {
          flag = 1;
          continue;
        }
        const double most = plan.value_limit > 0 ? plan.value_limit : 1.001 * l + 1;
        for (int c = 0; c < value_dim; ++c) {
          const double o = partial.o[c] * weight * unit[c];
          if (std::abs(o) > most) {  // A value beyond its channel's exponent.
            RecordFault(seen_.pages()[page].index, target.row_head);
            flag = kFaultFlag;
            break;
          }
          words[c] += std::llrint(o);
        }
      }
      if (flag != 0) std::fill_n(words, value_dim + 1, 0);
      words[value_dim + 1] = flag;
      words += words_per_target();
    }
    return absl::OkStatus();
  }

 private:
  void ReadRow(const void* page, int row, int kv_head, float* key, float* value) const {
    const AttentionShape& shape = args_.shape;
    const char* base = static_cast<const char*>(page);
    for (int d = 0; d < shape.head_dim; ++d) {
      key[d] = LoadElement(base + layout_.key(row), shape.key_dtype, kv_head * shape.head_dim + d);
    }
    for (int c = 0; c < shape.value_dim; ++c) {
      value[c] = LoadElement(base + layout_.value(row), shape.value_dtype, kv_head * shape.value_dim + c);
    }
  }

  float LocalMaximum(int64_t row_head) const {
    double largest = -kInfinity;
    for (size_t page = 0; page < seen_.pages().size(); ++page) {
      largest = std::max(largest, PartialOf(page, row_head).m);
    }
    return static_cast<float>(largest);
  }

  const Partial& PartialOf(size_t page, int64_t row_head) const {
    return partials_[page * row_heads() + row_head];
  }

  // The rows of seen_'s page `slot` that a query row sees, ascending.
  std::vector<int> RowsSeen(int64_t row, size_t slot) const {
    const PageRows range = seen_.RowsOf(row, static_cast<int64_t>(slot));
    const uint64_t* live = seen_.pages()[slot].live;
    std::vector<int> rows;
    for (int i = range.begin; i < range.end; ++i) {
      if (live == nullptr || IsLive(live, i)) rows.push_back(i);
    }
    return rows;
  }

  Partial AttendPage(size_t slot, int64_t row_head) {
    const AttentionShape& shape = args_.shape;
    const PageRef& page = seen_.pages()[slot];
    const std::vector<int> rows = RowsSeen(row_head / shape.query_heads, slot);
    const int kv_head = static_cast<int>(row_head % shape.query_heads) / shape.gqa_group();
    const float* query = args_.queries + row_head * shape.head_dim;
    std::vector<float> key(shape.head_dim);
    std::vector<float> value(shape.value_dim);
    std::vector<double> logits(kPageRows);
    Partial partial;
    partial.o.resize(shape.value_dim);

    bool finite = true;
    for (const int row : rows) {
      ReadRow(page.data, row, kv_head, key.data(), value.data());
      double dot = 0;
      for (int d = 0; d < shape.head_dim; ++d) dot += static_cast<double>(query[d]) * key[d];
      logits[row] = shape.scale * dot;
      if (shape.softcap > 0) logits[row] = shape.softcap * std::tanh(logits[row] / shape.softcap);
      finite &= std::abs(logits[row]) <= std::numeric_limits<float>::max();
      partial.m = std::max(partial.m, logits[row]);
    }
    // The maximum travels as fp32, so that is what a page's weights refer to.
    partial.m = static_cast<float>(partial.m);
    for (const int row : rows) {
      if (!finite) break;
      ReadRow(page.data, row, kv_head, key.data(), value.data());
      // Beyond it fp32 is too coarse: the largest has to weigh 1.
      const double logit =
          std::abs(partial.m) <= kFusedLogitMax ? logits[row] : static_cast<float>(logits[row]);
      const double weight = std::exp(logit - partial.m);
      partial.l += weight;
      for (int c = 0; c < shape.value_dim; ++c) partial.o[c] += weight * value[c];
    }
    for (const double o : partial.o) finite &= std::isfinite(o);
    if (!finite) {
      partial.m = kInfinity;
      RecordFault(page.index, row_head);
    }
    return partial;
  }

  const Layout layout_;
  std::vector<Partial> partials_;  // [seen pages, row_heads]
};

class ReferenceBackend final : public Backend {
 public:
  std::string name() const override { return "reference"; }

  absl::StatusOr<void*> AllocateSlab(int64_t bytes) override {
    void* slab = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (slab == nullptr) {
      return absl::ResourceExhaustedError(absl::StrCat("no memory for a slab of ", bytes, " bytes"));
    }
    std::memset(slab, 0, bytes);
    return slab;
  }
  void FreeSlab(void* slab, int64_t /*bytes*/) override { std::free(slab); }

  int64_t PageBytes(const AttentionShape& shape) const override { return Layout(shape).bytes(); }

  absl::Status ResetPage(void* page) override {
    ResetHeader(page);
    return absl::OkStatus();
  }
  absl::Status SealPage(const AttentionShape& /*shape*/, void* page) override {
    SealHeader(page);
    return absl::OkStatus();
  }

  absl::Status WriteRows(const AttentionShape& shape, void* page, int row, int rows, const void* keys,
                         const void* values) override {
    CheckWritable(page);
    const Layout layout(shape);
    std::memcpy(static_cast<char*>(page) + layout.key(row), keys, rows * layout.key_row);
    std::memcpy(static_cast<char*>(page) + layout.value(row), values, rows * layout.value_row);
    return absl::OkStatus();
  }

  absl::Status ReadRows(const AttentionShape& shape, const void* page, int row, int rows, void* keys,
                        void* values) override {
    const Layout layout(shape);
    std::memcpy(keys, static_cast<const char*>(page) + layout.key(row), rows * layout.key_row);
    std::memcpy(values, static_cast<const char*>(page) + layout.value(row), rows * layout.value_row);
    return absl::OkStatus();
  }

  absl::Status CopyPage(const AttentionShape& shape, const void* from, void* to) override {
    std::memcpy(to, from, Layout(shape).bytes());
    UnsealCopy(to);
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<AttentionStep>> StartStep(const StepArgs& args) override {
    if (absl::Status status = ValidateStep(args); !status.ok()) return status;
    return std::make_unique<ReferenceStep>(args, pool_);
  }

 private:
  ThreadPool pool_{1};
};

}  // namespace

std::unique_ptr<Backend> MakeReferenceBackend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace eduba
