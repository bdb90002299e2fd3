#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/mutex.h"
#include "base/parallel.h"
#include "base/status_macros.h"
#include "hwy/targets.h"
#include "kernels/cpu/huge_memory.h"
#include "kernels/cpu/kept_partials.h"
#include "kernels/cpu/page_kernels.h"
#include "kernels/cpu/page_layout.h"
#include "kernels/cpu/page_sums.h"
#include "kernels/merging_step.h"
#include "kernels/page_header.h"

namespace eduba {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Most units of work that one thread takes at a time: pages for the same rows, so that one fetches the next.
constexpr int64_t kUnitsPerTask = 32;
// Tasks that each thread should have at least, so that none is idle for long at the end.
constexpr int64_t kTasksPerThread = 16;

// Lives as long as the backend. All steps use it, but for kept partials one call at a time.
struct Workspace {
  Workspace(int threads, int64_t kept_partials_bytes)
      : pool(threads), kept(kept_partials_bytes), page_scratch(threads) {}

  ThreadPool pool;
  KeptPartials kept;
  ScratchMemory partials;  // Used by a step whose partials are not kept: one unit's for each thread.
  std::vector<ScratchMemory> page_scratch;  // [threads]
};

// Where the partials of some query vectors of one page lie.
struct PartialView {
  const float* m;  // [rows * group], by row, then by head of the group
  const float* l;
  const float* o;  // [rows * group, value_pitch]
};

// Rounding is the same on every target.
RoundToPairsFunction RoundQueries() {
  static const RoundToPairsFunction round = RoundToPairsFor(hwy::SupportedAndGeneratedTargets().front());
  return round;
}

// A unit of work is (page, KV head, block of rows): as many query vectors as a kernel takes at once.
class CpuStep final : public MergingStep {
 public:
  // `score_dots`: what multiplies bf16 keys with rounded queries; null: queries are not rounded.
  CpuStep(const StepArgs& args, const PageKernels& kernels, const ScoreDotFunction* score_dots,
          Workspace& workspace)
      : MergingStep(args, workspace.pool),
        layout_(args.shape),
        kernels_(kernels),
        score_dots_(args.shape.key_dtype == DType::kBf16 ? score_dots : nullptr),
        workspace_(workspace),
        gqa_group_(args.shape.gqa_group()),
        rows_per_block_(std::clamp(kMaxPageQueries / gqa_group_, 1, args.rows)) {
    row_blocks_ = (args.rows + rows_per_block_ - 1) / rows_per_block_;
    unit_queries_ = int64_t{rows_per_block_} * gqa_group_;
    if (score_dots_ != nullptr) {
      query_pairs_.resize(row_heads() * QueryPairs());
      const RoundToPairsFunction round = RoundQueries();
      ForWords(row_heads(), [&](int64_t i) {
        round(args_.queries + i * layout_.head_dim, layout_.head_dim, &query_pairs_[i * QueryPairs()]);
      });
    }
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
    maxima_.assign(row_heads(), -kInfinity);
    // The sinks' reference is known already: the sink path's sums are made while the partials are in the
    // cache.
    std::unique_ptr<PageSums> sums;
    if (args_.has_sinks()) {
      EDUBA_ASSIGN_OR_RETURN(const SumPlan* plan, SinkPlan());
      sink_words_.assign(row_heads() * words_per_target(), 0);
      sums = MakeSums(*plan, sink_words_.data());
    }
    std::vector<std::vector<float>> largest(workspace_.pool.threads());
    ForEachUnit(
        [&](int thread, const RowHeads& row_heads) {
          if (sums) sums->Begin(thread, row_heads);
          largest[thread].assign(row_heads.size(), -kInfinity);
        },
        [&](int64_t unit, int thread, const RowHeads& row_heads, int64_t first) {
          const PartialView view = Compute(unit, thread);
          if (sums) AddUnit(unit, thread, row_heads, first, view, *sums);
          for (int64_t i = 0; i < QueriesOfUnit(unit); ++i) {
            largest[thread][first + i] = std::max(largest[thread][first + i], view.m[i]);
            if (view.m[i] == kInfinity) RecordFault(PageOfUnit(unit).index, row_heads[first + i]);
          }
        },
        [&](int thread, const RowHeads& row_heads) {
          if (sums) sums->End(thread);
          for (size_t i = 0; i < row_heads.size(); ++i) {
            maxima_[row_heads[i]] = std::max(maxima_[row_heads[i]], largest[thread][i]);
          }
        });
    return CheckCancelled();
  }

 protected:
  absl::Status ReadSinks(int64_t tokens, float* keys, float* values) override {
    const auto read = [this](const void* page, int row, int kv_head, float* key, float* value) {
      const char* base = static_cast<const char*>(page);
      const AttentionShape& shape = args_.shape;
      for (int d = 0; d < layout_.head_dim; ++d) {
        key[d] = LoadElement(base + layout_.keys(kv_head), shape.key_dtype, layout_.key(row, d));
      }
      for (int c = 0; c < layout_.value_dim; ++c) {
        value[c] = LoadElement(base + layout_.values(kv_head), shape.value_dtype, layout_.value(row, c));
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
    const int64_t pitch = layout_.value_pitch;
    std::vector<std::vector<float>> largest(workspace_.pool.threads());
    ForEachUnit(
        [&](int thread, const RowHeads& all) { largest[thread].assign(all.size() * pitch, -kInfinity); },
        [&](int64_t unit, int thread, const RowHeads& all, int64_t first) {
          const PartialView view = KeptOrComputed(unit, thread);
          for (int64_t i = 0; i < QueriesOfUnit(unit); ++i) {
            if (index_of[all[first + i]] < 0 || view.m[i] == -kInfinity) continue;
            kernels_.raise_magnitudes(view.m[i], view.o + i * pitch, static_cast<int>(pitch),
                                      &largest[thread][(first + i) * pitch]);
          }
        },
        [&](int thread, const RowHeads& all) {
          for (size_t i = 0; i < all.size(); ++i) {
            if (index_of[all[i]] < 0) continue;
            float* to = magnitudes + index_of[all[i]] * layout_.value_dim;
            for (int64_t c = 0; c < layout_.value_dim; ++c) {
              to[c] = std::max(to[c], largest[thread][i * pitch + c]);
            }
          }
        });
    return absl::OkStatus();
  }

  absl::Status SumPages(const SumPlan& plan, int64_t* words) override {
    if (plan.value_limit == 0) {
      std::copy(sink_words_.begin(), sink_words_.end(), words);
      sink_words_ = {};
      return absl::OkStatus();
    }
    const std::unique_ptr<PageSums> sums = MakeSums(plan, words);
    ForEachUnit([&](int thread, const RowHeads& row_heads) { sums->Begin(thread, row_heads); },
                [&](int64_t unit, int thread, const RowHeads& row_heads, int64_t first) {
                  AddUnit(unit, thread, row_heads, first, KeptOrComputed(unit, thread), *sums);
                },
                [&](int thread, const RowHeads&) { sums->End(thread); });
    return absl::OkStatus();
  }

 private:
  using RowHeads = std::vector<int64_t>;

  int64_t QueryPairs() const { return (layout_.head_dim + 1) / 2; }
  int64_t pages() const { return static_cast<int64_t>(seen_.pages().size()); }
  int64_t units() const { return pages() * layout_.kv_heads * row_blocks_; }
  // One block of rows reads every page once, best in the order of memory. Of several, each takes all pages
  // before the next: what pages add to a row is summed while it is in the first cache, and the pages of a KV
  // head stay in the second.
  bool IsByPage() const { return row_blocks_ == 1; }
  int64_t SlotOfUnit(int64_t unit) const { return IsByPage() ? unit / layout_.kv_heads : unit % pages(); }
  const PageRef& PageOfUnit(int64_t unit) const { return seen_.pages()[SlotOfUnit(unit)]; }
  int64_t BlockOfUnit(int64_t unit) const { return IsByPage() ? 0 : unit / pages() % row_blocks_; }
  int64_t KvHeadOfUnit(int64_t unit) const {
    return IsByPage() ? unit % layout_.kv_heads : unit / pages() / row_blocks_;
  }
  int64_t QueriesOfUnit(int64_t unit) const {
    return std::min<int64_t>(rows_per_block_, args_.rows - BlockOfUnit(unit) * rows_per_block_) * gqa_group_;
  }
  const char* KeysOfUnit(int64_t unit) const {
    return static_cast<const char*>(PageOfUnit(unit).data) + layout_.keys(KvHeadOfUnit(unit));
  }
  int64_t PartialBytes() const {
    return unit_queries_ * (layout_.value_pitch + 2) * static_cast<int64_t>(sizeof(float));
  }

  // Units on threads: between begin(thread, row_heads) and end(thread, row_heads), which are for what a
  // thread keeps of these rows and heads, body(unit, thread, row_heads, first) for some units, whose queries
  // are row_heads from `first` on. Different threads' ends for the same rows do not meet.
  template <class Begin, class Body, class End>
  void ForEachUnit(const Begin& begin, const Body& body, const End& end) {
    const int threads = workspace_.pool.threads();
    const int64_t per_task = std::clamp<int64_t>(units() / (kTasksPerThread * threads), 1, kUnitsPerTask);
    std::vector<RowHeads> row_heads(threads);
    const auto add_queries = [&](int64_t unit, int thread) {
      ForEachQuery(unit, [&](int64_t, int64_t row_head) { row_heads[thread].push_back(row_head); });
    };
    const auto run = [&](int64_t first, int64_t stop, int thread) {
      for (int64_t unit = first; unit < stop && !Cancelled(); ++unit) {
        body(unit, thread, row_heads[thread], IsByPage() ? KvHeadOfUnit(unit) * QueriesOfUnit(unit) : 0);
      }
    };
    if (IsByPage()) {
      // All tasks are for all rows, so a thread begins once.
      workspace_.pool.ParallelFor((units() + per_task - 1) / per_task, [&](int64_t task, int thread) {
        if (row_heads[thread].empty()) {
          for (int64_t head = 0; head < layout_.kv_heads; ++head) add_queries(head, thread);
          begin(thread, row_heads[thread]);
        }
        run(task * per_task, std::min(units(), (task + 1) * per_task), thread);
      });
      for (int thread = 0; thread < threads; ++thread) {
        if (!row_heads[thread].empty()) end(thread, row_heads[thread]);
      }
      return;
    }
    const int64_t parts = (pages() + per_task - 1) / per_task;
    workspace_.pool.ParallelFor(layout_.kv_heads * row_blocks_ * parts, [&](int64_t task, int thread) {
      const int64_t rows = task / parts;
      const int64_t part = task % parts;
      row_heads[thread].clear();
      add_queries(rows * pages(), thread);
      begin(thread, row_heads[thread]);
      run(rows * pages() + pages() * part / parts, rows * pages() + pages() * (part + 1) / parts, thread);
      const MutexLock lock(end_mutexes_[rows % std::size(end_mutexes_)]);
      end(thread, row_heads[thread]);
    });
  }

  // body(index among the unit's queries, row_head)
  template <class Body>
  void ForEachQuery(int64_t unit, const Body& body) const {
    const int64_t first_row = BlockOfUnit(unit) * rows_per_block_;
    const int64_t end_row = std::min<int64_t>(first_row + rows_per_block_, args_.rows);
    int64_t query = 0;
    for (int64_t row = first_row; row < end_row; ++row) {
      for (int g = 0; g < gqa_group_; ++g, ++query) {
        body(query, row * args_.shape.query_heads + KvHeadOfUnit(unit) * gqa_group_ + g);
      }
    }
  }

  // Where a unit's partials lie. The workspace's memory is looked up anew each time, because other steps may
  // make it larger.
  float* PartialMemory(int64_t unit, int thread) const {
    float* const memory = kept_ != nullptr ? kept_ : static_cast<float*>(workspace_.partials.data());
    const int64_t slot = kept_ != nullptr ? unit : thread;
    return memory + slot * (PartialBytes() / static_cast<int64_t>(sizeof(float)));
  }
  PartialView ViewOf(const float* memory) const {
    return {memory, memory + unit_queries_, memory + 2 * unit_queries_};
  }
  // May be called after Attend.
  PartialView KeptOrComputed(int64_t unit, int thread) {
    return kept_ != nullptr ? ViewOf(PartialMemory(unit, thread)) : Compute(unit, thread);
  }

  // Runs the kernel over the unit's queries, and returns where their partials are.
  PartialView Compute(int64_t unit, int thread) {
    float* m = PartialMemory(unit, thread);
    float* l = m + unit_queries_;
    float* o = l + unit_queries_;
    const int64_t slot = SlotOfUnit(unit);
    const AttentionShape& shape = args_.shape;
    auto* const scratch = static_cast<float*>(workspace_.page_scratch[thread].data());

    PageQueries call;
    call.key_dtype = shape.key_dtype;
    call.value_dtype = shape.value_dtype;
    call.live = seen_.pages()[slot].live;
    call.keys = KeysOfUnit(unit);
    call.values = static_cast<const char*>(call.keys) + layout_.key_bytes();
    if (const int64_t next = unit + 1; next < units()) {
      call.ahead = static_cast<int64_t>(reinterpret_cast<uintptr_t>(KeysOfUnit(next)) -
                                        reinterpret_cast<uintptr_t>(KeysOfUnit(unit)));
    }
    call.head_dim = shape.head_dim;
    call.value_pitch = static_cast<int>(layout_.value_pitch);
    call.scale = shape.scale;
    call.softcap = shape.softcap;
    call.score_dots = score_dots_;
    ForEachQuery(unit, [&](int64_t query, int64_t row_head) {
      m[query] = -kInfinity;
      l[query] = 0;
      const PageRows rows = seen_.RowsOf(row_head / shape.query_heads, slot);
      if (rows.empty()) return;
      const int i = call.queries++;
      call.query[i] = args_.queries + row_head * shape.head_dim;
      if (score_dots_ != nullptr) call.rounded[i] = &query_pairs_[row_head * QueryPairs()];
      call.begin[i] = rows.begin;
      call.end[i] = rows.end;
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

  std::unique_ptr<PageSums> MakeSums(const SumPlan& plan, int64_t* words) const {
    return std::make_unique<PageSums>(kernels_, workspace_.pool.threads(), row_heads(), plan,
                                      layout_.value_dim, layout_.value_pitch, words);
  }

  void AddUnit(int64_t unit, int thread, const RowHeads& row_heads, int64_t first, const PartialView& view,
               PageSums& sums) {
    sums.Add(thread, first, QueriesOfUnit(unit), view.m, view.l, view.o,
             [&](int64_t i) { RecordFault(PageOfUnit(unit).index, row_heads[first + i]); });
  }

  const CpuPageLayout layout_;
  const PageKernels& kernels_;
  const ScoreDotFunction* const score_dots_;  // With rounded queries; or null.
  Workspace& workspace_;
  const int gqa_group_;
  const int rows_per_block_;
  int64_t row_blocks_ = 0;
  int64_t unit_queries_ = 0;
  std::vector<Bf16Pair> query_pairs_;  // [row_heads, QueryPairs()] where score_dots_.
  // [units] of m [unit_queries], l [unit_queries], o [unit_queries, value_pitch]; null: not kept.
  float* kept_ = nullptr;
  Mutex end_mutexes_[32];            // ForEachUnit's; rows share them.
  std::vector<float> maxima_;        // [row_heads]
  std::vector<int64_t> sink_words_;  // What SinkSums returns; Attend makes them where there are sinks.
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
  CpuBackend(int threads, const PageKernels& kernels, const ScoreDotFunction* score_dots,
             int64_t kept_partials_bytes)
      : kernels_(kernels), score_dots_(score_dots), workspace_(threads, kept_partials_bytes) {}

  std::string name() const override {
    return absl::StrCat("cpu/", kernels_.target, score_dots_ != nullptr ? "/bf16" : "");
  }

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
    const CpuPageLayout layout(shape);
    char* base = static_cast<char*>(page);
    const int64_t key_stride = layout.kv_heads * layout.head_dim;
    for (int64_t head = 0; head < layout.kv_heads; ++head) {
      if (layout.key_element == 4) {
        WriteKeys(layout, reinterpret_cast<uint32_t*>(base + layout.keys(head)), row, rows,
                  static_cast<const uint32_t*>(keys) + head * layout.head_dim, key_stride);
      } else {
        WriteKeys(layout, reinterpret_cast<uint16_t*>(base + layout.keys(head)), row, rows,
                  static_cast<const uint16_t*>(keys) + head * layout.head_dim, key_stride);
      }
      const int64_t used = layout.value_dim * layout.value_element;
      for (int i = 0; i < rows; ++i) {
        char* to = base + layout.values(head) + layout.value(row + i, 0) * layout.value_element;
        std::memcpy(to, static_cast<const char*>(values) + (i * layout.kv_heads + head) * used, used);
        std::memset(to + used, 0, (layout.value_pitch - layout.value_dim) * layout.value_element);
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadRows(const AttentionShape& shape, const void* page, int row, int rows, void* keys,
                        void* values) override {
    const CpuPageLayout layout(shape);
    const auto* base = static_cast<const char*>(page);
    const int64_t used = layout.value_dim * layout.value_element;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t head = 0; head < layout.kv_heads; ++head) {
        const int64_t to = i * layout.kv_heads + head;
        for (int64_t d = 0; d < layout.head_dim; ++d) {
          std::memcpy(static_cast<char*>(keys) + (to * layout.head_dim + d) * layout.key_element,
                      base + layout.keys(head) + layout.key(row + i, d) * layout.key_element,
                      layout.key_element);
        }
        std::memcpy(static_cast<char*>(values) + to * used,
                    base + layout.values(head) + layout.value(row + i, 0) * layout.value_element, used);
      }
    }
    return absl::OkStatus();
  }

  absl::Status CopyPage(const AttentionShape& shape, const void* from, void* to) override {
    std::memcpy(to, from, CpuPageLayout(shape).page_bytes());
    UnsealCopy(to);
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<AttentionStep>> StartStep(const StepArgs& args) override {
    if (absl::Status status = ValidateStep(args); !status.ok()) return status;
    auto step = std::make_unique<CpuStep>(args, kernels_, score_dots_, workspace_);
    if (absl::Status status = step->Prepare(); !status.ok()) return status;
    return step;
  }

 private:
  const PageKernels& kernels_;
  const ScoreDotFunction* const score_dots_;
  Workspace workspace_;
};

const PageKernels& KernelsFor(const std::string& target) {
  for (const PageKernels* kernels : RunnablePageKernels()) {
    if (kernels->target == target) return *kernels;
  }
  internal::CheckFailed(__FILE__, __LINE__, absl::StrCat("this machine does not run target ", target));
}

}  // namespace

std::unique_ptr<Backend> MakeCpuBackend(int threads, Activations activations) {
  EDUBA_CHECK(threads >= 1);
  const PageKernels& kernels = KernelsFor(CpuTargets().front());
  const ScoreDotFunction* const chip = ScoreDotsOfTheChip();
  const ScoreDotFunction* const score_dots = chip != nullptr ? chip : kernels.score_dots;
  return std::make_unique<CpuBackend>(
      threads, kernels, activations == Activations::kBf16 ? score_dots : nullptr, kKeptPartialsBytesMax);
}

std::vector<std::string> CpuTargets() {
  std::vector<std::string> names;
  for (const PageKernels* kernels : RunnablePageKernels()) names.emplace_back(kernels->target);
  return names;
}

std::vector<std::string> BuiltCpuTargets() { return BuiltPageKernels(); }

std::unique_ptr<Backend> MakeCpuBackendForTest(int threads, const std::string& target,
                                               int64_t kept_partials_bytes, Activations activations) {
  EDUBA_CHECK(threads >= 1);
  const PageKernels& kernels = KernelsFor(target);
  return std::make_unique<CpuBackend>(threads, kernels,
                                      activations == Activations::kBf16 ? kernels.score_dots : nullptr,
                                      kept_partials_bytes);
}

bool CpuTargetHasFma(const std::string& target) { return KernelsFor(target).has_fma; }

}  // namespace eduba
