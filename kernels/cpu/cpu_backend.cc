#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/parallel.h"
#include "base/status_macros.h"
#include "kernels/cpu/huge_memory.h"
#include "kernels/cpu/kept_partials.h"
#include "kernels/cpu/page_kernels.h"
#include "kernels/cpu/page_layout.h"
#include "kernels/cpu/page_sums.h"
#include "kernels/merging_step.h"

namespace eduba {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Most units of work that one thread takes at a time: neighbours in memory, so that one fetches the next.
constexpr int64_t kUnitsPerTask = 32;
// Tasks that each thread should have at least, so that none is idle for long at the end.
constexpr int64_t kTasksPerThread = 16;

// Lives as long as the backend. All steps use it, but for kept partials one call at a time.
struct Workspace {
  Workspace(int threads, int64_t kept_partials_bytes)
      : pool(threads), kept(kept_partials_bytes), page_scratch(threads) {}

  ThreadPool pool;
  KeptPartials kept;
  ScratchMemory partials;  // Of a step whose partials are not kept: a unit's for each thread.
  std::vector<ScratchMemory> page_scratch;  // [threads]
};

// Where the partials of some query vectors of one page lie.
struct PartialView {
  const float* m;  // [rows * group], by row, then by head of the group
  const float* l;
  const float* o;  // [rows * group, value_pitch]
};

// A unit of work is (page, KV head, block of rows): as many query vectors as a kernel takes at once.
class CpuStep final : public MergingStep {
 public:
  CpuStep(const StepArgs& args, const PageKernels& kernels, Workspace& workspace)
      : MergingStep(args, workspace.pool),
        layout_(args.shape),
        kernels_(kernels),
        workspace_(workspace),
        group_(args.shape.group()),
        rows_per_block_(std::clamp(kMaxPageQueries / group_, 1, args.rows)) {
    pages_ = SeenPages();
    row_blocks_ = (args.rows + rows_per_block_ - 1) / rows_per_block_;
    unit_queries_ = int64_t{rows_per_block_} * group_;
  }

  ~CpuStep() override {
    if (kept_ != nullptr) workspace_.kept.Return();
  }

  // Takes the memory that the step needs.
  absl::Status Prepare() {
    if (units() > 0) kept_ = workspace_.kept.Take(units() * PartialBytes());
    if (kept_ == nullptr &&
        workspace_.partials.Reserve(workspace_.pool.threads() * PartialBytes()) == nullptr) {
      return absl::ResourceExhaustedError("no memory for the threads' partials");
    }
    for (ScratchMemory& memory : workspace_.page_scratch) {
      const int64_t floats = PageScratchFloats(static_cast<int>(layout_.value_pitch));
      if (memory.Reserve(floats * static_cast<int64_t>(sizeof(float))) == nullptr) {
        return absl::ResourceExhaustedError("no memory for a thread's scratch");
      }
    }
    return absl::OkStatus();
  }

  absl::Status Attend() override {
    const int threads = workspace_.pool.threads();
    std::vector<float> maxima(threads * row_heads(), -kInfinity);
    // The sinks' reference is known already: the sink path's sums are made while the partials are in the
    // cache.
    if (args_.has_sinks()) {
      EDUBA_ASSIGN_OR_RETURN(const SumPlan plan, SinkPlan());
      sink_sums_ = std::make_unique<PageSums>(MakeSums(plan));
    }
    ForEachUnit([&](int64_t unit, int thread) {
      const PartialView view = Compute(unit, thread);
      if (sink_sums_) AddUnit(unit, thread, view, *sink_sums_);
      float* maximum = &maxima[thread * row_heads()];
      ForEachQuery(unit, [&](int64_t query, int64_t row_head) {
        maximum[row_head] = std::max(maximum[row_head], view.m[query]);
        if (view.m[query] == kInfinity) RecordFault(PageOfUnit(unit).index, row_head);
      });
    });
    maxima_.assign(maxima.begin(), maxima.begin() + row_heads());
    for (int thread = 1; thread < threads; ++thread) {
      for (int64_t i = 0; i < row_heads(); ++i) {
        maxima_[i] = std::max(maxima_[i], maxima[thread * row_heads() + i]);
      }
    }
    return CheckCancelled();
  }

 protected:
  absl::Status ReadSinks(int64_t tokens, float* keys, float* values) override {
    const auto read = [this](const void* page, int row, int kv_head, float* key, float* value) {
      const char* base = static_cast<const char*>(page);
      const DType dtype = args_.shape.dtype;
      for (int d = 0; d < layout_.head_dim; ++d) {
        key[d] = LoadElement(base + layout_.keys(kv_head), dtype, layout_.key(row, d));
      }
      for (int c = 0; c < layout_.value_dim; ++c) {
        value[c] = LoadElement(base + layout_.values(kv_head), dtype, layout_.value(row, c));
      }
    };
    ReadSinksWith(tokens, keys, values, read);
    return absl::OkStatus();
  }

  absl::Status LocalMaxima(absl::Span<const int64_t> row_heads, float* maxima) override {
    for (const int64_t row_head : row_heads) *maxima++ = maxima_[row_head];
    return absl::OkStatus();
  }

  absl::Status RaiseMagnitudes(absl::Span<const int64_t> row_heads, float* magnitudes) override {
    std::vector<int32_t> index_of(this->row_heads(), -1);
    for (size_t i = 0; i < row_heads.size(); ++i) index_of[row_heads[i]] = static_cast<int32_t>(i);
    const int64_t value_dim = layout_.value_dim;
    const int64_t size = static_cast<int64_t>(row_heads.size()) * value_dim;
    std::vector<std::vector<float>> threads(workspace_.pool.threads());
    ForEachUnit([&](int64_t unit, int thread) {
      std::vector<float>& own = threads[thread];
      if (own.empty()) own.assign(size, -kInfinity);
      const PartialView view = KeptOrComputed(unit, thread);
      ForEachQuery(unit, [&](int64_t query, int64_t row_head) {
        if (index_of[row_head] < 0 || view.m[query] == -kInfinity) return;
        float* to = &own[index_of[row_head] * value_dim];
        const float* o = view.o + query * layout_.value_pitch;
        for (int64_t c = 0; c < value_dim; ++c) to[c] = std::max(to[c], LogMagnitude(view.m[query], o[c]));
      });
    });
    for (const std::vector<float>& own : threads) {
      for (size_t i = 0; i < own.size(); ++i) magnitudes[i] = std::max(magnitudes[i], own[i]);
    }
    return absl::OkStatus();
  }

  absl::Status SumPages(const SumPlan& plan, int64_t* words) override {
    if (sink_sums_ && plan.value_limit == 0) {
      sink_sums_->Collect(words);
      sink_sums_.reset();
      return absl::OkStatus();
    }
    PageSums sums = MakeSums(plan);
    ForEachUnit([&](int64_t unit, int thread) { AddUnit(unit, thread, KeptOrComputed(unit, thread), sums); });
    sums.Collect(words);
    return absl::OkStatus();
  }

 private:
  int64_t units() const { return static_cast<int64_t>(pages_.size()) * layout_.kv_heads * row_blocks_; }
  const PageRef& PageOfUnit(int64_t unit) const { return pages_[unit / (layout_.kv_heads * row_blocks_)]; }
  int64_t KvHeadOfUnit(int64_t unit) const { return unit / row_blocks_ % layout_.kv_heads; }
  const char* KeysOfUnit(int64_t unit) const {
    return static_cast<const char*>(PageOfUnit(unit).data) + layout_.keys(KvHeadOfUnit(unit));
  }
  int64_t PartialBytes() const {
    return unit_queries_ * (layout_.value_pitch + 2) * static_cast<int64_t>(sizeof(float));
  }

  template <class Body>
  void ForEachUnit(const Body& body) {
    const int64_t per_task =
        std::clamp<int64_t>(units() / (kTasksPerThread * workspace_.pool.threads()), 1, kUnitsPerTask);
    workspace_.pool.ParallelFor((units() + per_task - 1) / per_task, [&](int64_t task, int thread) {
      const int64_t end = std::min(units(), (task + 1) * per_task);
      for (int64_t unit = task * per_task; unit < end && !Cancelled(); ++unit) body(unit, thread);
    });
  }

  // body(index among the unit's queries, row_head)
  template <class Body>
  void ForEachQuery(int64_t unit, const Body& body) const {
    const int64_t first_row = unit % row_blocks_ * rows_per_block_;
    const int64_t end_row = std::min<int64_t>(first_row + rows_per_block_, args_.rows);
    int64_t query = 0;
    for (int64_t row = first_row; row < end_row; ++row) {
      for (int g = 0; g < group_; ++g, ++query) {
        body(query, row * args_.shape.query_heads + KvHeadOfUnit(unit) * group_ + g);
      }
    }
  }

  // Of a unit. The workspace's memory is looked up anew each time: other steps may make it larger.
  float* PartialMemory(int64_t unit, int thread) const {
    float* const memory = kept_ != nullptr ? kept_ : static_cast<float*>(workspace_.partials.data());
    const int64_t slot = kept_ != nullptr ? unit : thread;
    return memory + slot * (PartialBytes() / static_cast<int64_t>(sizeof(float)));
  }
  PartialView ViewOf(const float* memory) const {
    return {memory, memory + unit_queries_, memory + 2 * unit_queries_};
  }
  // Behind Attend.
  PartialView KeptOrComputed(int64_t unit, int thread) {
    return kept_ != nullptr ? ViewOf(PartialMemory(unit, thread)) : Compute(unit, thread);
  }

  // Runs the kernel over the unit's queries, and returns where their partials are.
  PartialView Compute(int64_t unit, int thread) {
    float* m = PartialMemory(unit, thread);
    float* l = m + unit_queries_;
    float* o = l + unit_queries_;
    const PageRef& page = PageOfUnit(unit);
    const AttentionShape& shape = args_.shape;
    auto* const scratch = static_cast<float*>(workspace_.page_scratch[thread].data());

    PageQueries call;
    call.dtype = shape.dtype;
    call.keys = KeysOfUnit(unit);
    call.values = static_cast<const char*>(call.keys) + layout_.key_bytes();
    // The last rows that read these keys fetch the next unit's.
    const int64_t next = unit + 1;
    if (next % row_blocks_ == 0 && next < units()) {
      call.ahead = static_cast<int64_t>(reinterpret_cast<uintptr_t>(KeysOfUnit(next)) -
                                        reinterpret_cast<uintptr_t>(KeysOfUnit(unit)));
    }
    call.head_dim = shape.head_dim;
    call.value_pitch = static_cast<int>(layout_.value_pitch);
    call.scale = shape.scale;
    call.softcap = shape.softcap;
    ForEachQuery(unit, [&](int64_t query, int64_t row_head) {
      m[query] = -kInfinity;
      l[query] = 0;
      const PositionRange rows = RowsInPage(visible_[row_head / shape.query_heads], page.index);
      if (rows.empty()) return;
      const int i = call.queries++;
      call.query[i] = args_.queries + row_head * shape.head_dim;
      call.begin[i] = static_cast<int>(rows.begin);
      call.end[i] = static_cast<int>(rows.end);
      call.m[i] = m + query;
      call.l[i] = l + query;
      call.o[i] = o + query * layout_.value_pitch;
      if (call.queries == kMaxPageQueries) {
        kernels_.attend_page(call, scratch);
        call.queries = 0;
      }
    });
    if (call.queries > 0) kernels_.attend_page(call, scratch);
    return ViewOf(m);
  }

  PageSums MakeSums(const SumPlan& plan) const {
    return {kernels_, workspace_.pool.threads(), row_heads(), plan, layout_.value_dim, layout_.value_pitch};
  }

  void AddUnit(int64_t unit, int thread, const PartialView& view, PageSums& sums) {
    ForEachQuery(unit, [&](int64_t query, int64_t row_head) {
      if (!sums.Add(thread, row_head, view.m[query], view.l[query], view.o + query * layout_.value_pitch)) {
        RecordFault(PageOfUnit(unit).index, row_head);
      }
    });
  }

  const CpuPageLayout layout_;
  const PageKernels& kernels_;
  Workspace& workspace_;
  const int group_;
  const int rows_per_block_;
  int64_t row_blocks_ = 0;
  int64_t unit_queries_ = 0;
  std::vector<PageRef> pages_;  // Those that some row sees.
  // [units] of m [unit_queries], l [unit_queries], o [unit_queries, value_pitch]; null: not kept.
  float* kept_ = nullptr;
  std::vector<float> maxima_;            // [row_heads]
  std::unique_ptr<PageSums> sink_sums_;  // Made by Attend where there are sinks, until they are asked for.
};

// Copies rows of one KV head's keys into the transposed blocks.
template <class T>
void WriteKeys(const CpuPageLayout& layout, T* page, int row, int rows, const T* keys, int64_t stride) {
  for (int begin = row; begin < row + rows;) {
    const int end = std::min(row + rows, (begin / kKeyBlockRows + 1) * kKeyBlockRows);
    const T* from = keys + (begin - row) * stride;
    int64_t slot[kKeyBlockRows];
    for (int i = 0; i < end - begin; ++i) slot[i] = layout.key(begin + i, 0);
    for (int64_t d = 0; d < layout.head_dim; ++d) {
      for (int i = 0; i < end - begin; ++i) page[slot[i] + d * kKeyBlockRows] = from[i * stride + d];
    }
    begin = end;
  }
}

class CpuBackend final : public Backend {
 public:
  CpuBackend(int threads, const PageKernels& kernels, int64_t kept_partials_bytes)
      : kernels_(kernels), workspace_(threads, kept_partials_bytes) {}

  std::string name() const override { return absl::StrCat("cpu/", kernels_.target); }

  absl::StatusOr<void*> AllocateSlab(int64_t bytes) override {
    void* slab = AllocateHuge(bytes);
    if (slab == nullptr) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the machine has no memory for a slab of ", bytes, " bytes"));
    }
    return slab;
  }
  void FreeSlab(void* slab, int64_t bytes) override { FreeHuge(slab, bytes); }

  int64_t PageBytes(const AttentionShape& shape) const override { return CpuPageLayout(shape).page_bytes(); }

  absl::Status WriteRows(const AttentionShape& shape, void* page, int row, int rows, const void* keys,
                         const void* values) override {
    const CpuPageLayout layout(shape);
    char* base = static_cast<char*>(page);
    const int64_t key_stride = layout.kv_heads * layout.head_dim;
    for (int64_t head = 0; head < layout.kv_heads; ++head) {
      if (layout.element == 4) {
        WriteKeys(layout, reinterpret_cast<uint32_t*>(base + layout.keys(head)), row, rows,
                  static_cast<const uint32_t*>(keys) + head * layout.head_dim, key_stride);
      } else {
        WriteKeys(layout, reinterpret_cast<uint16_t*>(base + layout.keys(head)), row, rows,
                  static_cast<const uint16_t*>(keys) + head * layout.head_dim, key_stride);
      }
      const int64_t used = layout.value_dim * layout.element;
      for (int i = 0; i < rows; ++i) {
        char* to = base + layout.values(head) + layout.value(row + i, 0) * layout.element;
        std::memcpy(to, static_cast<const char*>(values) + (i * layout.kv_heads + head) * used, used);
        std::memset(to + used, 0, (layout.value_pitch - layout.value_dim) * layout.element);
      }
    }
    return absl::OkStatus();
  }

  absl::Status CopyPage(const AttentionShape& shape, const void* from, void* to) override {
    std::memcpy(to, from, CpuPageLayout(shape).page_bytes());
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<AttentionStep>> StartStep(const StepArgs& args) override {
    if (absl::Status status = ValidateStep(args); !status.ok()) return status;
    auto step = std::make_unique<CpuStep>(args, kernels_, workspace_);
    if (absl::Status status = step->Prepare(); !status.ok()) return status;
    return step;
  }

 private:
  const PageKernels& kernels_;
  Workspace workspace_;
};

const PageKernels& KernelsFor(const std::string& target) {
  for (const PageKernels* kernels : RunnablePageKernels()) {
    if (kernels->target == target) return *kernels;
  }
  internal::CheckFailed(__FILE__, __LINE__, absl::StrCat("this machine does not run target ", target));
}

}  // namespace

std::unique_ptr<Backend> MakeCpuBackend(int threads) {
  return MakeCpuBackendForTest(threads, CpuTargets().front());
}

std::vector<std::string> CpuTargets() {
  std::vector<std::string> names;
  for (const PageKernels* kernels : RunnablePageKernels()) names.emplace_back(kernels->target);
  return names;
}

std::vector<std::string> BuiltCpuTargets() { return BuiltPageKernels(); }

std::unique_ptr<Backend> MakeCpuBackendForTest(int threads, const std::string& target,
                                               int64_t kept_partials_bytes) {
  EDUBA_CHECK(threads >= 1);
  return std::make_unique<CpuBackend>(threads, KernelsFor(target), kept_partials_bytes);
}

bool CpuTargetHasFma(const std::string& target) { return KernelsFor(target).has_fma; }

}  // namespace eduba
