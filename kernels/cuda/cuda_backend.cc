#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/mutex.h"
#include "base/parallel.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/slab_pool.h"
#include "kernels/merging_step.h"

namespace eduba {
namespace {

using cuda::AttendArgs;
using cuda::Device;
using cuda::Element;
using cuda::FinaliseArgs;
using cuda::ListedRows;
using cuda::Memory;
using cuda::PageEntry;
using cuda::PageLayout;
using cuda::SinkArgs;
using cuda::Staging;
using cuda::StepState;
using cuda::Stream;
using cuda::SumArgs;

static_assert(cuda::kFault == uint64_t{kFaultFlag});
static_assert(static_cast<int>(Element::kF32) == static_cast<int>(DType::kF32) &&
              static_cast<int>(Element::kBf16) == static_cast<int>(DType::kBf16) &&
              static_cast<int>(Element::kF16) == static_cast<int>(DType::kF16));

// Uploads that may be under way at a time.
constexpr int kUploadSlots = 4;
// Bytes of rows, or of a page, that one of them stages at a time: more than the largest row, and than the
// largest KV head of a page, by rpc/limits.h.
constexpr int64_t kUploadBytes = int64_t{8} << 20;
// Room for such a piece, and for what aligns values after their keys.
constexpr int64_t kStagedBytes = kUploadBytes + 64;
// The most bytes of shared memory for one block: two blocks, or more, share what a multiprocessor has.
constexpr int64_t kSharedBytesMax = int64_t{80} << 10;
// Blocks of one launch.
constexpr int64_t kBlocksMax = (int64_t{1} << 31) - 1;

Element ElementOf(const AttentionShape& shape) { return static_cast<Element>(shape.key_dtype); }

// The kernels are instantiated for one type of both.
absl::Status CheckTypes(const AttentionShape& shape) {
  if (shape.key_dtype == shape.value_dtype) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat("keys in ", DTypeName(shape.key_dtype), " and values in ",
                                               DTypeName(shape.value_dtype),
                                               ": GPUs take keys and values of one type"));
}

// Layouts begin after the header.
char* AfterHeader(void* page) { return static_cast<char*>(page) + sizeof(PageHeader); }
const char* AfterHeader(const void* page) { return static_cast<const char*>(page) + sizeof(PageHeader); }

PageLayout LayoutOf(const AttentionShape& shape) {
  return cuda::MakePageLayout(static_cast<int>(DTypeBytes(shape.key_dtype)), shape.kv_heads, shape.head_dim,
                              shape.value_dim);
}

// Arrays one after the other in one block, so that one copy carries them all. First every array is added,
// then memory is taken, then they are written and pointed at.
class Packing {
 public:
  // The offset of `bytes` bytes.
  int64_t Add(int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ += (bytes + 15) / 16 * 16;
    return offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

template <class T>
T* At(const Memory& memory, int64_t offset) {
  return reinterpret_cast<T*>(memory.data() + offset);
}

class CudaStep;

// What one step has on the device and beside it. Steps in progress have one each; they keep their size.
struct StepMemory {
  explicit StepMemory(Device& device)
      : in(device),
        scores(device, Memory::Kind::kDevice),
        words(device),
        out(device),
        plan(device),
        selected(device) {}

  Staging in;        // In: what the caller gave.
  Memory scores;     // Sinks' logits and references.
  Staging words;     // Sums of one path.
  Staging out;       // Out: outcomes and answers.
  Staging plan;      // In: the targets of the maximum path, and their units.
  Staging selected;  // In: rows of the maximum path. Out: what was found in their pages.
};

// What the steps of a backend share.
struct Workspace {
  Workspace(Device& owner, CudaPrecision how, int threads)
      : device(owner), precision(how), pool(threads), partials(owner, Memory::Kind::kDevice) {}

  std::unique_ptr<StepMemory> Take() {
    const MutexLock lock(mutex);
    if (free.empty()) return std::make_unique<StepMemory>(device);
    std::unique_ptr<StepMemory> memory = std::move(free.back());
    free.pop_back();
    return memory;
  }
  void Give(std::unique_ptr<StepMemory> memory) {
    const MutexLock lock(mutex);
    free.push_back(std::move(memory));
  }

  Device& device;
  const CudaPrecision precision;
  ThreadPool pool;
  // The stream of all steps: their work is done in the order in which it was queued.
  Stream stream = nullptr;
  Memory partials;
  const CudaStep* partials_of = nullptr;  // The step whose partials of the maximum path lie there, if all do.
  Mutex mutex;
  std::vector<std::unique_ptr<StepMemory>> free ABSL_GUARDED_BY(mutex);
};

// The sink path goes through the device in three kernels: ScoreSinks, Attend, and, after the all-reduce,
// Finalise; on tensor cores Attend may leave partials, in parts, for a fourth. The maximum path computes
// partials of the rows that have selected heads, twice where they do not fit at once, and the host makes its
// plan in between.
class CudaStep final : public MergingStep, public QueuedStep {
 public:
  CudaStep(const StepArgs& args, Workspace& workspace)
      : MergingStep(args, workspace.pool),
        layout_(LayoutOf(args.shape)),
        element_(ElementOf(args.shape)),
        on_tensor_cores_(workspace.precision == CudaPrecision::kTensor &&
                         args.shape.key_dtype != DType::kF32),
        by_warpgroups_(on_tensor_cores_ && workspace.device.WarpgroupBlocksAtOnce() > 0 &&
                       cuda::TakesWarpgroups(layout_)),
        workspace_(workspace),
        device_(workspace.device),
        memory_(workspace.Take()),
        pages_(seen_.pages()),
        whole_lists_(
            std::all_of(seen_.list_rows().begin(), seen_.list_rows().end(), [](const PageRows& rows) {
              return rows == PageRows{0, kPageRows};
            })) {}

  // Nothing of the step is running any more when its memory is used again.
  ~CudaStep() override {
    if (workspace_.partials_of == this) workspace_.partials_of = nullptr;
    if (started_ && device_.Attach().ok()) device_.Synchronize(workspace_.stream).IgnoreError();
    workspace_.Give(std::move(memory_));
  }

  // Sends what the kernels need; these wait for what is asked.
  absl::Status Attend() override {
    EDUBA_RETURN_IF_ERROR(CheckCancelled());
    EDUBA_RETURN_IF_ERROR(device_.Attach());
    started_ = true;
    if (by_warpgroups_) ChooseQueryTerms();
    EDUBA_RETURN_IF_ERROR(PartPages(args_.rows, TileFor(args_.rows, false)).status());
    return Send();
  }

  QueuedStep* queued() override { return this; }

  absl::Status QueueSums(int64_t* words) override {
    EDUBA_RETURN_IF_ERROR(CheckCancelled());
    EDUBA_RETURN_IF_ERROR(device_.Attach());
    words_ = reinterpret_cast<uint64_t*>(words);
    if (words_ == nullptr) {
      EDUBA_RETURN_IF_ERROR(memory_->words.Reserve(row_heads() * words_per_target() * kWordBytes));
      words_ = At<uint64_t>(memory_->words.device, 0);
    }
    // Memory for QueueFinalise is taken now: after the all-reduce, memory that grows would wait for what is
    // queued, with no deadline.
    EDUBA_RETURN_IF_ERROR(ReserveOut());
    EDUBA_RETURN_IF_ERROR(ScoreSinks());
    return SumsDirectly() ? SumDirectly() : SumPartials();
  }

  absl::Status SinkSums(absl::Span<int64_t> words) override {
    EDUBA_CHECK_EQ(static_cast<int64_t>(words.size()), row_heads() * words_per_target());
    EDUBA_RETURN_IF_ERROR(QueueSums(nullptr));
    EDUBA_RETURN_IF_ERROR(TakeWords(row_heads(), words.data()).status());
    EDUBA_RETURN_IF_ERROR(CheckCancelled());
    host_words_ = words;
    return absl::OkStatus();
  }

  absl::Status QueueFinalise() override {
    EDUBA_RETURN_IF_ERROR(device_.Attach());
    FinaliseArgs args = FinaliseOf(row_heads(), words_, reference(), SinkUnits(), kSinkPathFractionBits);
    args.visible = At<PositionRange>(memory_->in.device, in_.visible);
    args.total_min = static_cast<uint64_t>(kSinkPathMin);
    args.total_max = static_cast<uint64_t>(kSinkPathMax);
    args.rounding = At<double>(memory_->in.device, in_.rounding);
    args.share = kRoundingShareSquared;
    args.outcome = At<uint8_t>(memory_->out.device, out_.outcome);
    args.state = At<StepState>(memory_->in.device, in_.state);
    args.state_out = At<StepState>(memory_->out.device, out_.state);
    EDUBA_RETURN_IF_ERROR(device_.Finalise(workspace_.stream, element_, args));
    is_finalised_ = true;
    return TakeOut();
  }

  // Waits for all that is queued.
  absl::StatusOr<absl::Span<const int64_t>> SelectForMaximum() override {
    std::vector<char> takes_maximum(row_heads());
    if (!args_.has_sinks()) {
      for (int64_t i = 0; i < row_heads(); ++i) takes_maximum[i] = SeesKeys(i) ? 1 : 0;
      Select(takes_maximum);
      return absl::MakeConstSpan(selected_);
    }
    EDUBA_RETURN_IF_ERROR(device_.Attach());
    if (!is_finalised_) {
      EDUBA_RETURN_IF_ERROR(SendWords(row_heads(), host_words_.data()));
      EDUBA_RETURN_IF_ERROR(QueueFinalise());
    }
    EDUBA_RETURN_IF_ERROR(device_.Synchronize(workspace_.stream));
    const auto* const outcomes = At<uint8_t>(memory_->out.host, out_.outcome);
    for (int64_t i = 0; i < row_heads(); ++i) {
      takes_maximum[i] = outcomes[i] == cuda::kNeedsMaximum ? 1 : 0;
      fault_somewhere_ |= outcomes[i] == cuda::kHasFault;
    }
    Select(takes_maximum);
    if (const uint64_t key = At<StepState>(memory_->out.host, out_.state)->fault; key != 0) {
      RecordFault(static_cast<int64_t>(~key >> 32), static_cast<int64_t>(~key & 0xffffffffU));
    }
    return absl::MakeConstSpan(selected_);
  }

  absl::Status Finish(float* outputs, float* lse, float* sink_mass) override {
    const bool has_sinks = args_.has_sinks();
    EDUBA_RETURN_IF_ERROR(
        CheckSums(!has_sinks || At<StepState>(memory_->out.host, out_.state)->has_bad_sinks == 0));
    const auto count = static_cast<int64_t>(selected_.size());
    if (count > 0) {
      EDUBA_RETURN_IF_ERROR(device_.Attach());
      EDUBA_RETURN_IF_ERROR(ReserveOut());
      EDUBA_RETURN_IF_ERROR(SendWords(count, maximum_sums_.data()));
      FinaliseArgs args = FinaliseOf(count, At<uint64_t>(memory_->words.device, 0),
                                     At<double>(memory_->plan.device, plan_.reference),
                                     At<double>(memory_->plan.device, plan_.unit), plan_.fraction_bits);
      args.row_head = At<int64_t>(memory_->plan.device, plan_.row_head);
      EDUBA_RETURN_IF_ERROR(device_.Finalise(workspace_.stream, element_, args));
      EDUBA_RETURN_IF_ERROR(TakeOut());
      EDUBA_RETURN_IF_ERROR(device_.Synchronize(workspace_.stream));
    }
    const int64_t value_dim = layout_.value_dim;
    ForWords(row_heads(), [&](int64_t i) {
      if (!has_sinks && !SeesKeys(i)) {
        std::fill_n(outputs + i * value_dim, value_dim, 0.0F);
        lse[i] = -std::numeric_limits<float>::infinity();
        sink_mass[i] = 0;
        return;
      }
      std::copy_n(At<float>(memory_->out.host, out_.outputs) + i * value_dim, value_dim,
                  outputs + i * value_dim);
      lse[i] = At<float>(memory_->out.host, out_.lse)[i];
      sink_mass[i] = At<float>(memory_->out.host, out_.sink_mass)[i];
    });
    return absl::OkStatus();
  }

 protected:
  // Finds the magnitudes as well.
  absl::Status LocalMaxima(absl::Span<const int64_t> row_heads, float* maxima) override {
    EDUBA_RETURN_IF_ERROR(device_.Attach());
    EDUBA_RETURN_IF_ERROR(SendSelected(row_heads));
    cuda::MagnitudeArgs args = {};
    args.value_dim = layout_.value_dim;
    args.value_pitch = layout_.value_pitch;
    args.row_heads = selected_rows_.row_heads(args_);
    args.targets = static_cast<int64_t>(row_heads.size());
    args.row_head = At<int64_t>(memory_->selected.device, selected_in_.row_head);
    args.magnitudes = At<uint32_t>(memory_->selected.device, selected_in_.magnitudes);
    EDUBA_RETURN_IF_ERROR(ForParts(selected_rows_, [&](const Partials& partials) {
      args.pages = partials.pages;
      args.m = partials.m;
      args.o = partials.o;
      return device_.Magnitudes(workspace_.stream, args);
    }));
    EDUBA_RETURN_IF_ERROR(TakeFound());
    const auto* const orders = At<uint32_t>(memory_->selected.host, selected_in_.maxima);
    for (size_t i = 0; i < row_heads.size(); ++i) {
      maxima[i] = cuda::FloatOfOrder(orders[At<int64_t>(memory_->selected.host, selected_in_.row_head)[i]]);
    }
    return absl::OkStatus();
  }

  absl::Status RaiseMagnitudes(absl::Span<const int64_t> row_heads, float* magnitudes) override {
    const auto* const orders = At<uint32_t>(memory_->selected.host, selected_in_.magnitudes);
    for (int64_t i = 0; i < static_cast<int64_t>(row_heads.size()) * layout_.value_dim; ++i) {
      magnitudes[i] = std::max(magnitudes[i], cuda::FloatOfOrder(orders[i]));
    }
    return absl::OkStatus();
  }

  absl::Status SumPages(const SumPlan& plan, int64_t* words) override {
    EDUBA_RETURN_IF_ERROR(device_.Attach());
    const auto count = static_cast<int64_t>(plan.targets.size());
    EDUBA_RETURN_IF_ERROR(memory_->words.Reserve(count * words_per_target() * kWordBytes));
    auto* const sums = At<uint64_t>(memory_->words.device, 0);
    EDUBA_RETURN_IF_ERROR(device_.Zero(workspace_.stream, sums, count * words_per_target() * kWordBytes));
    EDUBA_RETURN_IF_ERROR(SendPlan(plan));
    SumArgs args = SumOf(selected_rows_, At<double>(memory_->plan.device, plan_.reference),
                         At<double>(memory_->plan.device, plan_.unit), plan.fraction_bits, sums);
    args.limit = static_cast<uint64_t>(plan.limit);
    args.value_limit = plan.value_limit;
    args.targets = count;
    args.row_head = At<int64_t>(memory_->selected.device, selected_in_.row_head);
    EDUBA_RETURN_IF_ERROR(SumParts(selected_rows_, args));
    EDUBA_ASSIGN_OR_RETURN(const bool has_fault, TakeWords(count, words));
    return has_fault ? LookForFault() : absl::OkStatus();
  }

 private:
  static constexpr int64_t kWordBytes = sizeof(int64_t);

  // Rows on the device, some or all of the step's.
  struct Rows {
    int count = 0;
    const float* queries = nullptr;
    const PositionRange* visible = nullptr;
    const int32_t* row_list = nullptr;
    uint32_t* maxima = nullptr;
    uint64_t* fault = nullptr;
    bool is_kept = false;  // Their partials may stay for another pass.

    int64_t row_heads(const StepArgs& args) const { return int64_t{count} * args.shape.query_heads; }
  };
  // The partials of one part of the pages.
  struct Partials {
    int64_t first = 0;  // The part's first page in pages_.
    int64_t pages = 0;
    float* m = nullptr;
    float* l = nullptr;
    float* o = nullptr;
  };

  bool SeesKeys(int64_t row_head) const { return !visible_[row_head / args_.shape.query_heads].empty(); }

  // Whether the kernel adds up what it makes, or leaves partials. Does not change a bit either.
  bool SumsDirectly() const { return !on_tensor_cores_ || (by_warpgroups_ && TileFor(args_.rows, true) > 0); }

  // How many query vectors a block takes: as many as there are and as shared memory holds. The number changes
  // no bit of an answer.
  int TileFor(int rows, bool is_summed) const {
    const int64_t vectors = int64_t{rows} * args_.shape.gqa_group();
    if (by_warpgroups_) return cuda::ChooseWarpgroupTile(layout_, query_terms_, vectors, is_summed);
    if (on_tensor_cores_) {
      int tile = cuda::kTileRows;
      while (tile < vectors && tile < cuda::kTensorWarpsMax * cuda::kTileRows) tile *= 2;
      return tile;
    }
    const int64_t most = std::min(kSharedBytesMax, device_.shared_bytes_max());
    const auto fits = [&](int tile) {
      return cuda::MakeAttendShared(tile, layout_.head_pitch, layout_.value_pitch, is_summed).floats *
                 int64_t{sizeof(float)} <=
             most;
    };
    int tile = 1;
    while (2 * tile <= cuda::kMaxTile && tile < vectors && fits(2 * tile)) tile *= 2;
    return tile;
  }
  int64_t TilesFor(int rows, int tile) const {
    return (int64_t{rows} * args_.shape.gqa_group() + tile - 1) / tile;
  }

  // Pages whose partials of so many rows fit at a time.
  absl::StatusOr<int64_t> PartPages(int rows, int tile) const {
    const int64_t page_bytes = int64_t{rows} * args_.shape.query_heads * (layout_.value_pitch + 2) *
                               static_cast<int64_t>(sizeof(float));
    EDUBA_CHECK(page_bytes > 0);
    const int64_t fit = std::min(workspace_.partials.bytes() / page_bytes,
                                 kBlocksMax / (int64_t{layout_.kv_heads} * TilesFor(rows, tile)));
    if (fit == 0) {
      return absl::ResourceExhaustedError(
          absl::StrCat("a step of ", args_.rows, " rows and ", args_.shape.query_heads,
                       " heads leaves partials of ", page_bytes, " bytes a page, the device has room for ",
                       workspace_.partials.bytes(), "; send steps of fewer rows"));
    }
    return std::clamp<int64_t>(static_cast<int64_t>(pages_.size()), 1, fit);
  }

  void ChooseQueryTerms() {
    std::atomic<bool> is_one = true;
    ForWords(row_heads(), [&](int64_t i) {
      const float* const query = args_.queries + i * layout_.head_dim;
      const int terms = element_ == Element::kBf16 ? cuda::QueryTerms<cuda::Bf16>(query, layout_.head_dim)
                                                   : cuda::QueryTerms<cuda::F16>(query, layout_.head_dim);
      if (terms > 1) is_one = false;
    });
    query_terms_ = is_one ? 1 : 2;
  }

  void CopyQueries(const float* from, float* to) const {
    ForWords(row_heads(), [&](int64_t i) {
      std::copy_n(from + i * layout_.head_dim, layout_.head_dim, to + i * layout_.head_dim);
    });
  }

  int64_t CountMasks() const {
    return std::count_if(pages_.begin(), pages_.end(),
                         [](const PageRef& page) { return page.live != nullptr; });
  }

  // The pages' entries and live masks, which point at the device's memory.
  void PackPages() {
    auto* entry = At<PageEntry>(memory_->in.host, in_.page);
    auto* live = At<uint64_t>(memory_->in.host, in_.live);
    const auto* device_live = At<uint64_t>(memory_->in.device, in_.live);
    for (const PageRef& page : pages_) {
      *entry++ = {AfterHeader(page.data), page.index, page.live == nullptr ? nullptr : device_live};
      if (page.live == nullptr) continue;
      live = std::copy_n(page.live, kLiveWords, live);
      device_live += kLiveWords;
    }
  }

  absl::Status Send() {
    const AttentionShape& shape = args_.shape;
    const bool has_sinks = args_.has_sinks();
    const int64_t query_bytes = row_heads() * shape.head_dim * static_cast<int64_t>(sizeof(float));
    Packing packing;
    const absl::Span<const PageRows> list_rows = seen_.list_rows();
    in_.page = packing.Add(static_cast<int64_t>(pages_.size() * sizeof(PageEntry)));
    in_.listed = packing.Add(static_cast<int64_t>(list_rows.size() * sizeof(ListedRows)));
    in_.live = packing.Add(CountMasks() * kLiveWords * kWordBytes);
    const int64_t sink_page_count = PageCount(sink_tokens_);
    if (has_sinks) {
      in_.state = packing.Add(sizeof(StepState));
      in_.queries = packing.Add(query_bytes);
      in_.sink_queries = args_.sink_queries == nullptr ? in_.queries : packing.Add(query_bytes);
      in_.visible = packing.Add(static_cast<int64_t>(visible_.size() * sizeof(PositionRange)));
      in_.row_list = packing.Add(args_.rows * static_cast<int64_t>(sizeof(int32_t)));
      in_.visible_sinks = packing.Add(static_cast<int64_t>(args_.visible_sinks.size() * sizeof(int32_t)));
      in_.learned = packing.Add(static_cast<int64_t>(args_.sink_logits.size() * sizeof(float)));
      in_.unit = packing.Add(static_cast<int64_t>(args_.exponents.size() * sizeof(double)));
      in_.rounding = packing.Add(shape.kv_heads * static_cast<int64_t>(sizeof(double)));
      in_.sink_page = packing.Add(sink_page_count * static_cast<int64_t>(sizeof(PageEntry)));
    }
    Staging& staging = memory_->in;
    EDUBA_RETURN_IF_ERROR(staging.Reserve(packing.bytes()));
    PackPages();
    std::transform(list_rows.begin(), list_rows.end(), At<ListedRows>(staging.host, in_.listed),
                   [](const PageRows& rows) {
                     return ListedRows{rows.begin, rows.end};
                   });
    if (has_sinks) {
      *At<StepState>(staging.host, in_.state) = {};
      CopyQueries(args_.queries, At<float>(staging.host, in_.queries));
      if (args_.sink_queries != nullptr) {
        CopyQueries(args_.sink_queries, At<float>(staging.host, in_.sink_queries));
      }
      std::copy(visible_.begin(), visible_.end(), At<PositionRange>(staging.host, in_.visible));
      std::copy(args_.lists.row_list.begin(), args_.lists.row_list.end(),
                At<int32_t>(staging.host, in_.row_list));
      std::copy(args_.visible_sinks.begin(), args_.visible_sinks.end(),
                At<int32_t>(staging.host, in_.visible_sinks));
      std::copy(args_.sink_logits.begin(), args_.sink_logits.end(), At<float>(staging.host, in_.learned));
      auto* units = At<double>(staging.host, in_.unit);
      for (int64_t head = 0; head < shape.kv_heads; ++head) {
        double rounding = 0;
        for (int c = 0; c < shape.value_dim; ++c) {
          const int exponent = Exponent(head, c);
          const double unit = PowerOfTwo(exponent - kSinkPathFractionBits);
          rounding += unit * unit;
          *units++ = PowerOfTwo(kSinkPathFractionBits - exponent);
        }
        At<double>(staging.host, in_.rounding)[head] = rounding;
      }
      for (int64_t p = 0; p < sink_page_count; ++p) {
        At<PageEntry>(staging.host, in_.sink_page)[p] = {AfterHeader(args_.sink_pages[p].data),
                                                         args_.sink_pages[p].index, nullptr};
      }
    }
    return device_.CopyIn(workspace_.stream, staging.device.data(), staging.host.data(), packing.bytes());
  }

  // Numbers of the sink path, on the device.
  double* reference() const { return At<double>(memory_->scores, 0); }
  double* sink_logits() const { return reference() + row_heads(); }
  const double* SinkUnits() const { return At<double>(memory_->in.device, in_.unit); }
  const float* learned() const {
    return args_.sink_logits.empty() ? nullptr : At<float>(memory_->in.device, in_.learned);
  }
  const PageEntry* page_entries() const { return At<PageEntry>(memory_->in.device, in_.page); }
  const ListedRows* listed_rows() const { return At<ListedRows>(memory_->in.device, in_.listed); }

  absl::Status ScoreSinks() {
    EDUBA_RETURN_IF_ERROR(
        memory_->scores.Reserve(row_heads() * (1 + sink_tokens_) * static_cast<int64_t>(sizeof(double))));
    SinkArgs args = {};
    args.layout = layout_;
    args.scale = args_.shape.scale;
    args.softcap = args_.shape.softcap;
    args.rows = args_.rows;
    args.query_heads = args_.shape.query_heads;
    args.group = args_.shape.gqa_group();
    args.width = cuda::SinkWidth(sink_tokens_);
    args.tokens = sink_tokens_;
    args.queries = At<float>(memory_->in.device, in_.sink_queries);
    args.visible = At<int32_t>(memory_->in.device, in_.visible_sinks);
    args.learned = learned();
    args.page = At<PageEntry>(memory_->in.device, in_.sink_page);
    args.logits = sink_logits();
    args.reference = reference();
    args.has_bad_sinks = &At<StepState>(memory_->in.device, in_.state)->has_bad_sinks;
    args.words = words_;
    return device_.ScoreSinks(workspace_.stream, element_, args);
  }

  AttendArgs AttendOf(const Rows& rows, bool is_summed) const {
    AttendArgs args = {};
    args.layout = layout_;
    args.scale = args_.shape.scale;
    args.softcap = args_.shape.softcap;
    args.dot_segment = args_.shape.head_dim <= 16 ? 8 : 16;
    args.dot_group = args_.shape.head_dim <= 32 ? args.dot_segment : 32;
    args.rows = rows.count;
    args.query_heads = args_.shape.query_heads;
    args.group = args_.shape.gqa_group();
    args.query_terms = query_terms_;
    args.tile = TileFor(rows.count, is_summed);
    args.tiles = static_cast<int>(TilesFor(rows.count, args.tile));
    args.queries = rows.queries;
    args.visible = rows.visible;
    args.row_list = rows.row_list;
    args.list_stride = static_cast<int64_t>(pages_.size());
    args.whole_lists = whole_lists_;
    args.maxima = rows.maxima;
    args.fault = rows.fault;
    return args;
  }

  // Blocks take runs of pages, no more blocks than run at a time: each ends with as many atomics as it has
  // words, and one that had to wait for others would only add to them.
  void ChooseRuns(AttendArgs& args) {
    const int64_t tiles = int64_t{layout_.kv_heads} * args.tiles;
    const int64_t at_once =
        by_warpgroups_ ? device_.WarpgroupBlocksAtOnce() : device_.AttendBlocksAtOnce(element_, args);
    args.runs = std::clamp<int64_t>(at_once / tiles, 1, std::max<int64_t>(args.pages, 1));
  }

  absl::Status QueueAttend(AttendArgs& args) {
    if (on_tensor_cores_ && !by_warpgroups_) {
      args.runs = args.pages;
      return device_.AttendTensor(workspace_.stream, element_, args);
    }
    ChooseRuns(args);
    return by_warpgroups_ ? device_.AttendWarpgroups(workspace_.stream, element_, args)
                          : device_.Attend(workspace_.stream, element_, args);
  }

  Rows AllRows() const {
    const Memory& in = memory_->in.device;
    Rows rows;
    rows.count = args_.rows;
    rows.queries = At<float>(in, in_.queries);
    rows.visible = At<PositionRange>(in, in_.visible);
    rows.row_list = At<int32_t>(in, in_.row_list);
    rows.fault = &At<StepState>(in, in_.state)->fault;
    return rows;
  }

  absl::Status SumDirectly() {
    AttendArgs args = AttendOf(AllRows(), /*is_summed=*/true);
    args.pages = static_cast<int64_t>(pages_.size());
    args.page = page_entries();
    args.listed = listed_rows();
    args.one = PowerOfTwo(kSinkPathFractionBits);
    args.limit = static_cast<uint64_t>(kSinkPathMax);
    args.reference = reference();
    args.unit = SinkUnits();
    args.words = words_;
    return QueueAttend(args);
  }

  // The sink path where the kernel leaves partials.
  absl::Status SumPartials() {
    const Rows rows = AllRows();
    SumArgs args = SumOf(rows, reference(), SinkUnits(), kSinkPathFractionBits, words_);
    args.limit = static_cast<uint64_t>(kSinkPathMax);
    args.targets = row_heads();
    return SumParts(rows, args);
  }

  SumArgs SumOf(const Rows& rows, const double* reference, const double* unit, int fraction_bits,
                uint64_t* words) const {
    SumArgs args = {};
    args.value_dim = layout_.value_dim;
    args.value_pitch = layout_.value_pitch;
    args.one = PowerOfTwo(fraction_bits);
    args.row_heads = rows.row_heads(args_);
    args.reference = reference;
    args.unit = unit;
    args.query_heads = args_.shape.query_heads;
    args.group = args_.shape.gqa_group();
    args.words = words;
    args.fault = rows.fault;
    return args;
  }

  absl::Status SumParts(const Rows& rows, SumArgs args) {
    return ForParts(rows, [&](const Partials& partials) {
      args.pages = partials.pages;
      args.page = page_entries() + partials.first;
      args.m = partials.m;
      args.l = partials.l;
      args.o = partials.o;
      return device_.Sum(workspace_.stream, args);
    });
  }

  // Queues use(partials) after the partials of each part of the pages.
  template <class Use>
  absl::Status ForParts(const Rows& rows, const Use& use) {
    AttendArgs args = AttendOf(rows, /*is_summed=*/false);
    EDUBA_ASSIGN_OR_RETURN(const int64_t most, PartPages(rows.count, args.tile));
    const auto page_count = static_cast<int64_t>(pages_.size());
    const bool is_there = rows.is_kept && most >= page_count && workspace_.partials_of == this;
    // What lies there is written over from here on: after an error on the way, nobody may take it for a
    // step's partials.
    if (!is_there) workspace_.partials_of = nullptr;
    Partials partials;
    partials.m = At<float>(workspace_.partials, 0);
    partials.l = partials.m + most * rows.row_heads(args_);
    partials.o = partials.l + most * rows.row_heads(args_);
    for (partials.first = 0; partials.first < page_count; partials.first += most) {
      EDUBA_RETURN_IF_ERROR(CheckCancelled());
      partials.pages = std::min(most, page_count - partials.first);
      if (!is_there) {
        args.pages = partials.pages;
        args.page = page_entries() + partials.first;
        args.listed = listed_rows() + partials.first;
        args.m = partials.m;
        args.l = partials.l;
        args.o = partials.o;
        EDUBA_RETURN_IF_ERROR(QueueAttend(args));
      }
      EDUBA_RETURN_IF_ERROR(use(partials));
    }
    workspace_.partials_of = rows.is_kept ? this : nullptr;
    return absl::OkStatus();
  }

  // The rows that have one of `row_heads`, and where these are among them.
  absl::Status SendSelected(absl::Span<const int64_t> row_heads) {
    const int heads = args_.shape.query_heads;
    rows_.clear();
    for (const int64_t row_head : row_heads) {
      if (rows_.empty() || rows_.back() != row_head / heads) rows_.push_back(row_head / heads);
    }
    const auto rows = static_cast<int64_t>(rows_.size());
    const int64_t query_size = int64_t{heads} * layout_.head_dim;
    Packing packing;
    selected_in_.row_head = packing.Add(static_cast<int64_t>(row_heads.size() * sizeof(int64_t)));
    selected_in_.queries = packing.Add(rows * query_size * static_cast<int64_t>(sizeof(float)));
    selected_in_.visible = packing.Add(rows * static_cast<int64_t>(sizeof(PositionRange)));
    selected_in_.row_list = packing.Add(rows * static_cast<int64_t>(sizeof(int32_t)));
    // From here on: zeroed, and brought back.
    selected_in_.fault = packing.Add(sizeof(uint64_t));
    selected_in_.maxima = packing.Add(rows * heads * static_cast<int64_t>(sizeof(uint32_t)));
    selected_in_.magnitudes =
        packing.Add(static_cast<int64_t>(row_heads.size() * sizeof(uint32_t)) * layout_.value_dim);
    selected_in_.bytes = packing.bytes();
    Staging& staging = memory_->selected;
    EDUBA_RETURN_IF_ERROR(staging.Reserve(packing.bytes()));
    auto* where = At<int64_t>(staging.host, selected_in_.row_head);
    int64_t row = 0;
    for (const int64_t row_head : row_heads) {
      if (rows_[row] != row_head / heads) ++row;
      *where++ = row * heads + row_head % heads;
    }
    for (row = 0; row < rows; ++row) {
      std::copy_n(args_.queries + rows_[row] * query_size, query_size,
                  At<float>(staging.host, selected_in_.queries) + row * query_size);
      At<PositionRange>(staging.host, selected_in_.visible)[row] = visible_[rows_[row]];
      At<int32_t>(staging.host, selected_in_.row_list)[row] = args_.lists.row_list[rows_[row]];
    }
    EDUBA_RETURN_IF_ERROR(
        device_.CopyIn(workspace_.stream, staging.device.data(), staging.host.data(), selected_in_.fault));
    selected_rows_.count = static_cast<int>(rows);
    selected_rows_.queries = At<float>(staging.device, selected_in_.queries);
    selected_rows_.visible = At<PositionRange>(staging.device, selected_in_.visible);
    selected_rows_.row_list = At<int32_t>(staging.device, selected_in_.row_list);
    selected_rows_.maxima = At<uint32_t>(staging.device, selected_in_.maxima);
    selected_rows_.fault = At<uint64_t>(staging.device, selected_in_.fault);
    selected_rows_.is_kept = true;
    return device_.Zero(workspace_.stream, At<char>(staging.device, selected_in_.fault),
                        selected_in_.bytes - selected_in_.fault);
  }

  absl::Status TakeFound() {
    const Staging& staging = memory_->selected;
    EDUBA_RETURN_IF_ERROR(device_.CopyOut(workspace_.stream, At<char>(staging.host, selected_in_.fault),
                                          At<char>(staging.device, selected_in_.fault),
                                          selected_in_.bytes - selected_in_.fault));
    return device_.Synchronize(workspace_.stream);
  }

  absl::Status SendPlan(const SumPlan& plan) {
    Packing packing;
    plan_.row_head = packing.Add(static_cast<int64_t>(plan.targets.size() * sizeof(int64_t)));
    plan_.reference = packing.Add(static_cast<int64_t>(plan.targets.size() * sizeof(double)));
    plan_.unit = packing.Add(static_cast<int64_t>(plan.units.size() * sizeof(double)));
    plan_.fraction_bits = plan.fraction_bits;
    Staging& staging = memory_->plan;
    EDUBA_RETURN_IF_ERROR(staging.Reserve(packing.bytes()));
    auto* row_head = At<int64_t>(staging.host, plan_.row_head);
    auto* reference = At<double>(staging.host, plan_.reference);
    for (const Target& target : plan.targets) {
      *row_head++ = target.row_head;
      *reference++ = target.reference;
    }
    std::copy(plan.units.begin(), plan.units.end(), At<double>(staging.host, plan_.unit));
    return device_.CopyIn(workspace_.stream, staging.device.data(), staging.host.data(), packing.bytes());
  }

  // Brings `count` row heads' words to the host, whose contract is stricter: zeros where a flag is set.
  // Whether this rank met a fault.
  absl::StatusOr<bool> TakeWords(int64_t count, int64_t* words) {
    const int64_t bytes = count * words_per_target() * kWordBytes;
    EDUBA_RETURN_IF_ERROR(
        device_.CopyOut(workspace_.stream, memory_->words.host.data(), memory_->words.device.data(), bytes));
    EDUBA_RETURN_IF_ERROR(device_.Synchronize(workspace_.stream));
    std::atomic<bool> has_fault = false;
    ForWords(count, [&](int64_t i) {
      const int64_t* const from = At<int64_t>(memory_->words.host, 0) + i * words_per_target();
      int64_t* const to = words + i * words_per_target();
      std::copy_n(from, words_per_target(), to);
      const int64_t flag = from[layout_.value_dim + 1];
      if (flag != 0) std::fill_n(to, layout_.value_dim + 1, 0);
      if (flag >= kFaultFlag) has_fault = true;
    });
    return has_fault.load();
  }

  absl::Status SendWords(int64_t count, const int64_t* words) {
    const int64_t bytes = count * words_per_target() * kWordBytes;
    EDUBA_RETURN_IF_ERROR(memory_->words.Reserve(bytes));
    ForWords(count, [&](int64_t i) {
      std::copy_n(words + i * words_per_target(), words_per_target(),
                  At<int64_t>(memory_->words.host, 0) + i * words_per_target());
    });
    return device_.CopyIn(workspace_.stream, memory_->words.device.data(), memory_->words.host.data(), bytes);
  }

  FinaliseArgs FinaliseOf(int64_t targets, const uint64_t* words, const double* key_reference,
                          const double* unit, int fraction_bits) const {
    FinaliseArgs args = {};
    args.layout = layout_;
    args.query_heads = args_.shape.query_heads;
    args.group = args_.shape.gqa_group();
    args.targets = targets;
    args.words = words;
    args.key_reference = key_reference;
    args.unit = unit;
    args.one = PowerOfTwo(fraction_bits);
    if (args_.has_sinks()) {
      args.tokens = sink_tokens_;
      args.visible_sinks = At<int32_t>(memory_->in.device, in_.visible_sinks);
      args.learned = learned();
      args.page = At<PageEntry>(memory_->in.device, in_.sink_page);
      args.logits = sink_logits();
      args.reference = reference();
    }
    args.outputs = At<float>(memory_->out.device, out_.outputs);
    args.lse = At<float>(memory_->out.device, out_.lse);
    args.sink_mass = At<float>(memory_->out.device, out_.sink_mass);
    return args;
  }

  absl::Status ReserveOut() {
    Packing packing;
    out_.state = packing.Add(sizeof(StepState));
    out_.outcome = packing.Add(row_heads());
    out_.lse = packing.Add(row_heads() * static_cast<int64_t>(sizeof(float)));
    out_.sink_mass = packing.Add(row_heads() * static_cast<int64_t>(sizeof(float)));
    out_.outputs = packing.Add(row_heads() * layout_.value_dim * static_cast<int64_t>(sizeof(float)));
    out_.bytes = packing.bytes();
    return memory_->out.Reserve(packing.bytes());
  }
  absl::Status TakeOut() {
    return device_.CopyOut(workspace_.stream, memory_->out.host.data(), memory_->out.device.data(),
                           out_.bytes);
  }

  // Remembers the page that the device noted, if it is one of ours: a fault may be another rank's.
  absl::Status LookForFault() {
    EDUBA_RETURN_IF_ERROR(TakeFound());
    const uint64_t key = *At<uint64_t>(memory_->selected.host, selected_in_.fault);
    if (key == 0) return absl::OkStatus();
    const auto row_head = static_cast<int64_t>(~key & 0xffffffffU);
    const int64_t heads = args_.shape.query_heads;
    RecordFault(static_cast<int64_t>(~key >> 32), rows_[row_head / heads] * heads + row_head % heads);
    return absl::OkStatus();
  }

  const PageLayout layout_;
  const Element element_;
  const bool on_tensor_cores_;
  const bool by_warpgroups_;  // Which of tensor cores' two kernels: the device and the session alone decide.
  Workspace& workspace_;
  Device& device_;
  std::unique_ptr<StepMemory> memory_;
  const std::vector<PageRef>& pages_;  // Those that some row sees.
  const bool whole_lists_;             // Every list has all of every page.
  bool started_ = false;
  int query_terms_ = 2;  // Means what AttendArgs::query_terms means.
  bool is_finalised_ = false;
  uint64_t* words_ = nullptr;       // The words of the sink path, on the device.
  absl::Span<int64_t> host_words_;  // The same, the caller's, if they went there.
  std::vector<int64_t> rows_;       // The rows that have selected heads, ascending.
  Rows selected_rows_;              // The same, on the device.

  // Offsets in StepMemory's blocks.
  struct {
    int64_t page, listed, live, row_list, state, queries, sink_queries, visible, visible_sinks, learned, unit,
        rounding, sink_page;
  } in_ = {};
  struct {
    int64_t state, outcome, lse, sink_mass, outputs, bytes;
  } out_ = {};
  struct {
    int64_t row_head, reference, unit;
    int fraction_bits;
  } plan_ = {};
  struct {
    int64_t row_head, queries, visible, row_list, fault, maxima, magnitudes, bytes;
  } selected_in_ = {};
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::shared_ptr<Device> device, const CudaOptions& options, int64_t pool_bytes)
      : device_(std::move(device)),
        pool_(pool_bytes),
        pool_memory_(*device_, Memory::Kind::kDevice),
        workspace_(*device_, options.precision, options.threads) {}

  ~CudaBackend() override {
    device_->Attach().IgnoreError();
    for (const Slot& slot : slots_) {
      if (slot.stream != nullptr) device_->DestroyStream(slot.stream);
    }
    if (workspace_.stream != nullptr) device_->DestroyStream(workspace_.stream);
  }

  absl::Status Init(const CudaOptions& options, int64_t pool_bytes) {
    EDUBA_RETURN_IF_ERROR(device_->Attach());
    EDUBA_RETURN_IF_ERROR(pool_memory_.ReserveExactly(pool_bytes));
    EDUBA_RETURN_IF_ERROR(workspace_.partials.ReserveExactly(options.partial_bytes));
    EDUBA_ASSIGN_OR_RETURN(workspace_.stream, device_->CreateStream());
    // All that uploads will ever need: later there may be none, and taking it would wait for what is running,
    // a sum with others among it.
    for (Slot& slot : slots_) {
      slot.staging = std::make_unique<Staging>(*device_);
      EDUBA_RETURN_IF_ERROR(slot.staging->host.ReserveExactly(kStagedBytes));
      EDUBA_RETURN_IF_ERROR(slot.staging->device.ReserveExactly(kStagedBytes));
      EDUBA_ASSIGN_OR_RETURN(slot.stream, device_->CreateUrgentStream());
    }
    return absl::OkStatus();
  }

  std::string name() const override {
    return absl::StrCat(device_->kind(), workspace_.precision == CudaPrecision::kTensor ? "/tensor" : "");
  }
  int gpu() const override { return device_->index(); }
  void* stream() const override { return workspace_.stream; }
  absl::Status health() const override { return device_->health(); }

  absl::StatusOr<void*> AllocateSlab(int64_t bytes) override {
    EDUBA_RETURN_IF_ERROR(device_->Attach());
    const int64_t offset = pool_.Take(bytes);
    if (offset < 0) {
      return absl::ResourceExhaustedError(absl::StrCat(device_->name(), ": no room for a slab of ", bytes,
                                                       " bytes, ", pool_.free_bytes(), " of ",
                                                       pool_memory_.bytes(), " are free, in pieces"));
    }
    char* const slab = pool_memory_.data() + offset;
    const absl::Status zeroed = WithSlot([&](Slot& slot) {
      EDUBA_RETURN_IF_ERROR(device_->Zero(slot.stream, slab, bytes));
      return device_->Synchronize(slot.stream);
    });
    if (!zeroed.ok()) {
      pool_.Give(offset, bytes);
      return zeroed;
    }
    return slab;
  }
  void FreeSlab(void* slab, int64_t bytes) override {
    pool_.Give(static_cast<char*>(slab) - pool_memory_.data(), bytes);
  }

  int64_t PageBytes(const AttentionShape& shape) const override {
    return static_cast<int64_t>(sizeof(PageHeader)) + LayoutOf(shape).page_bytes();
  }

  // Headers are zeros as yet.
  absl::Status ResetPage(void* /*page*/) override { return absl::OkStatus(); }
  absl::Status SealPage(const AttentionShape& /*shape*/, void* /*page*/) override { return absl::OkStatus(); }

  // Through page-locked memory, on a stream of its own, which goes before a step's blocks: uploads from
  // several threads, and a step, overlap.
  absl::Status WriteRows(const AttentionShape& shape, void* page, int row, int rows, const void* keys,
                         const void* values) override {
    EDUBA_RETURN_IF_ERROR(CheckTypes(shape));
    EDUBA_RETURN_IF_ERROR(device_->Attach());
    const PageLayout layout = LayoutOf(shape);
    const int64_t key_row = int64_t{layout.kv_heads} * layout.head_dim * layout.element;
    const int64_t value_row = int64_t{layout.kv_heads} * layout.value_dim * layout.element;
    const int most = static_cast<int>(std::clamp<int64_t>(kUploadBytes / (key_row + value_row), 1, rows));
    return WithSlot([&](Slot& slot) {
      for (int begin = 0; begin < rows; begin += most) {
        const int count = std::min(most, rows - begin);
        Packing packing;
        const int64_t key_at = packing.Add(count * key_row);
        const int64_t value_at = packing.Add(count * value_row);
        EDUBA_CHECK(packing.bytes() <= kStagedBytes);
        std::memcpy(At<char>(slot.staging->host, key_at), static_cast<const char*>(keys) + begin * key_row,
                    count * key_row);
        std::memcpy(At<char>(slot.staging->host, value_at),
                    static_cast<const char*>(values) + begin * value_row, count * value_row);
        EDUBA_RETURN_IF_ERROR(device_->CopyIn(slot.stream, slot.staging->device.data(),
                                              slot.staging->host.data(), packing.bytes()));
        EDUBA_RETURN_IF_ERROR(device_->Write(
            slot.stream, {layout, AfterHeader(page), row + begin, count,
                          At<char>(slot.staging->device, key_at), At<char>(slot.staging->device, value_at)}));
        // Steps on other streams must find the rows.
        EDUBA_RETURN_IF_ERROR(device_->Synchronize(slot.stream));
      }
      return absl::OkStatus();
    });
  }

  // The whole page comes, as many heads at a time as are staged, and the host picks its rows: this happens at
  // the end of a generation, not in a step.
  absl::Status ReadRows(const AttentionShape& shape, const void* page, int row, int rows, void* keys,
                        void* values) override {
    EDUBA_RETURN_IF_ERROR(CheckTypes(shape));
    EDUBA_RETURN_IF_ERROR(device_->Attach());
    const PageLayout layout = LayoutOf(shape);
    const int64_t head_bytes = layout.head_elements() * layout.element;
    const auto most = static_cast<int>(std::min<int64_t>(kStagedBytes / head_bytes, layout.kv_heads));
    EDUBA_CHECK(most > 0);
    return WithSlot([&](Slot& slot) {
      const char* const elements = slot.staging->host.data();
      for (int first = 0; first < layout.kv_heads; first += most) {
        const int heads = std::min(most, layout.kv_heads - first);
        EDUBA_RETURN_IF_ERROR(device_->CopyOut(slot.stream, slot.staging->host.data(),
                                               AfterHeader(page) + first * head_bytes, heads * head_bytes));
        EDUBA_RETURN_IF_ERROR(device_->Synchronize(slot.stream));
        for (int i = 0; i < rows; ++i) {
          for (int head = 0; head < heads; ++head) {
            const int64_t to = int64_t{i} * layout.kv_heads + first + head;
            for (int d = 0; d < layout.head_dim; ++d) {
              std::memcpy(static_cast<char*>(keys) + (to * layout.head_dim + d) * layout.element,
                          elements + layout.key(head, row + i, d) * layout.element, layout.element);
            }
            std::memcpy(static_cast<char*>(values) + to * layout.value_dim * layout.element,
                        elements + layout.value(head, row + i, 0) * layout.element,
                        int64_t{layout.value_dim} * layout.element);
          }
        }
      }
      return absl::OkStatus();
    });
  }

  absl::Status CopyPage(const AttentionShape& shape, const void* from, void* to) override {
    EDUBA_RETURN_IF_ERROR(device_->Attach());
    return WithSlot([&](Slot& slot) {
      EDUBA_RETURN_IF_ERROR(device_->CopyWithin(slot.stream, to, from, PageBytes(shape)));
      return device_->Synchronize(slot.stream);
    });
  }

  absl::StatusOr<std::unique_ptr<AttentionStep>> StartStep(const StepArgs& args) override {
    EDUBA_RETURN_IF_ERROR(ValidateStep(args));
    EDUBA_RETURN_IF_ERROR(CheckTypes(args.shape));
    EDUBA_RETURN_IF_ERROR(device_->health());
    return std::make_unique<CudaStep>(args, workspace_);
  }

 private:
  struct Slot {
    Stream stream = nullptr;
    std::unique_ptr<Staging> staging;
    bool taken = false;
  };

  template <class Work>
  absl::Status WithSlot(const Work& work) {
    Slot* slot = nullptr;
    {
      const MutexLock lock(slots_mutex_);
      const auto is_free = [](const Slot& s) { return !s.taken; };
      auto found = std::find_if(slots_.begin(), slots_.end(), is_free);
      while (found == slots_.end()) {
        slot_freed_.Wait(slots_mutex_);
        found = std::find_if(slots_.begin(), slots_.end(), is_free);
      }
      slot = &*found;
      slot->taken = true;
    }
    absl::Status status = work(*slot);
    const MutexLock lock(slots_mutex_);
    slot->taken = false;
    slot_freed_.NotifyOne();
    return status;
  }

  const std::shared_ptr<Device> device_;
  cuda::SlabPool pool_;
  Memory pool_memory_;
  Workspace workspace_;
  Mutex slots_mutex_;
  CondVar slot_freed_;
  std::array<Slot, kUploadSlots> slots_;  // Whether each is taken is guarded by slots_mutex_.
};

}  // namespace

absl::StatusOr<CudaPrecision> ParseCudaPrecision(const std::string& name) {
  if (name == "exact") return CudaPrecision::kExact;
  if (name == "tensor") return CudaPrecision::kTensor;
  return absl::InvalidArgumentError(
      absl::StrCat("precision '", name,
                   "' is not known: use exact, or tensor (GPUs' tensor cores, errors to 3e-4, f16 6e-4)"));
}

absl::StatusOr<int> CudaDeviceIndex(const std::string& name) {
  if (name == "cuda") return 0;
  int index = 0;
  if (name.rfind("cuda:", 0) == 0 && absl::SimpleAtoi(name.substr(5), &index) && index >= 0) return index;
  return absl::InvalidArgumentError(
      absl::StrCat("device '", name, "' is not known: use cpu, cuda, or cuda:N for the N-th GPU from 0"));
}

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int device, const CudaOptions& options) {
  EDUBA_ASSIGN_OR_RETURN(std::unique_ptr<Device> opened, cuda::OpenCudaDevice(device));
  return MakeCudaBackendOn(std::move(opened), options);
}

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackendOn(std::shared_ptr<Device> device,
                                                           const CudaOptions& options) {
  EDUBA_CHECK(options.page_bytes >= 0 && options.partial_bytes > 0 && options.threads >= 1);
  // What the store's slabs may lose between each other, and the fingerprint's.
  const int64_t pool_bytes = options.page_bytes + options.page_bytes / 32 + (int64_t{32} << 20);
  auto backend = std::make_unique<CudaBackend>(std::move(device), options, pool_bytes);
  EDUBA_RETURN_IF_ERROR(backend->Init(options, pool_bytes));
  return backend;
}

}  // namespace eduba
