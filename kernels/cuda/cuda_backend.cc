#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
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
using cuda::Memory;
using cuda::PageEntry;
using cuda::PageLayout;
using cuda::Staging;
using cuda::Stream;
using cuda::SumArgs;
using cuda::SumTarget;

static_assert(cuda::kFault == uint64_t{kFaultFlag});
static_assert(static_cast<int>(Element::kF32) == static_cast<int>(DType::kF32) &&
              static_cast<int>(Element::kBf16) == static_cast<int>(DType::kBf16) &&
              static_cast<int>(Element::kF16) == static_cast<int>(DType::kF16));

// Uploads that may be under way at a time.
constexpr int kUploadSlots = 4;
// Bytes of an upload that are staged at a time.
constexpr int64_t kUploadBytes = int64_t{8} << 20;
// Of shared memory for one block: two blocks, or more, share what a multiprocessor has.
constexpr int64_t kSharedBytesMax = int64_t{80} << 10;
// Blocks of one launch.
constexpr int64_t kBlocksMax = (int64_t{1} << 31) - 1;

Element ElementOf(const AttentionShape& shape) { return static_cast<Element>(shape.dtype); }

PageLayout LayoutOf(const AttentionShape& shape) {
  return cuda::MakePageLayout(static_cast<int>(DTypeBytes(shape.dtype)), shape.kv_heads, shape.head_dim,
                              shape.value_dim);
}

// Arrays one behind the other in one block, so that one copy carries them all. First every array is added,
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

// What steps work with: one of them has it, until another takes it.
struct Workspace {
  Workspace(Device& owner, CudaPrecision how, int threads)
      : device(owner),
        precision(how),
        pool(threads),
        step(owner),
        sum(owner),
        words(owner),
        sinks(owner),
        state(owner),
        partials(owner, Memory::Kind::kDevice) {}

  Device& device;
  const CudaPrecision precision;
  ThreadPool pool;
  const CudaStep* owner = nullptr;  // Whose `step`, `state` and `partials` these are.
  Stream stream = nullptr;          // Of the step.
  Stream sink_stream = nullptr;     // Reads sinks while the step's kernel runs.
  Staging step;                     // In: queries, visible ranges, pages.
  Staging sum;                      // In: targets and units.
  Staging words;                    // Out: sums.
  Staging sinks;                    // In: page addresses. Out: sinks' keys and values.
  Staging state;                    // Out: the fault, and the maxima.
  Memory partials;
};

class CudaStep final : public MergingStep {
 public:
  CudaStep(const StepArgs& args, Workspace& workspace)
      : MergingStep(args, workspace.pool),
        layout_(LayoutOf(args.shape)),
        on_tensor_cores_(workspace.precision == CudaPrecision::kTensor && args.shape.dtype != DType::kF32),
        workspace_(workspace),
        device_(workspace.device),
        pages_(SeenPages()) {}

  // Nothing of the step is running any more when its memory is used again.
  ~CudaStep() override {
    if (workspace_.owner == this) workspace_.owner = nullptr;
    if (!started_ || !device_.Attach().ok()) return;
    device_.Synchronize(workspace_.stream).IgnoreError();
    device_.Synchronize(workspace_.sink_stream).IgnoreError();
  }

  // Queues the kernel and returns: the host prepares the sinks while it runs. Where there are none, other
  // steps may come before anything is asked of this one, so the kernel waits for that.
  absl::Status Attend() override {
    EDUBA_RETURN_IF_ERROR(CheckCancelled());
    EDUBA_RETURN_IF_ERROR(device_.Attach());
    started_ = true;
    ChooseTile();
    EDUBA_RETURN_IF_ERROR(ChooseParts());
    return args_.has_sinks() ? TakeWorkspace() : absl::OkStatus();
  }

 protected:
  absl::Status ReadSinks(int64_t tokens, float* keys, float* values) override {
    EDUBA_RETURN_IF_ERROR(device_.Attach());
    const int64_t key_bytes = tokens * layout_.kv_heads * layout_.head_dim * int64_t{sizeof(float)};
    const int64_t value_bytes = tokens * layout_.kv_heads * layout_.value_dim * int64_t{sizeof(float)};
    const int64_t page_count = PageCount(tokens);
    Packing packing;
    const int64_t key_at = packing.Add(key_bytes);
    const int64_t value_at = packing.Add(value_bytes);
    const int64_t page_at = packing.Add(page_count * int64_t{sizeof(PageEntry)});
    Staging& staging = workspace_.sinks;
    EDUBA_RETURN_IF_ERROR(staging.Reserve(packing.bytes()));
    for (int64_t p = 0; p < page_count; ++p) {
      At<PageEntry>(staging.host, page_at)[p] = {args_.sink_pages[p].data, args_.sink_pages[p].index};
    }
    const Stream stream = workspace_.sink_stream;
    EDUBA_RETURN_IF_ERROR(device_.CopyIn(stream, At<char>(staging.device, page_at),
                                         At<char>(staging.host, page_at),
                                         page_count * int64_t{sizeof(PageEntry)}));
    const cuda::ReadArgs read = {layout_, At<PageEntry>(staging.device, page_at), tokens,
                                 At<float>(staging.device, key_at), At<float>(staging.device, value_at)};
    EDUBA_RETURN_IF_ERROR(device_.Read(stream, ElementOf(args_.shape), read));
    EDUBA_RETURN_IF_ERROR(
        device_.CopyOut(stream, staging.host.data(), staging.device.data(), value_at + value_bytes));
    EDUBA_RETURN_IF_ERROR(device_.Synchronize(stream));
    std::memcpy(keys, At<char>(staging.host, key_at), key_bytes);
    std::memcpy(values, At<char>(staging.host, value_at), value_bytes);
    return absl::OkStatus();
  }

  absl::Status LocalMaxima(absl::Span<const int64_t> row_heads, float* maxima) override {
    EDUBA_RETURN_IF_ERROR(TakeWorkspace());
    if (!kept_ && !maxima_known_) {
      for (int64_t part = 0; part < parts(); ++part) EDUBA_RETURN_IF_ERROR(AttendPart(part));
      maxima_known_ = true;
    }
    EDUBA_RETURN_IF_ERROR(ReadState());
    const auto* orders = At<uint32_t>(workspace_.state.host, kMaximaAt);
    for (const int64_t row_head : row_heads) *maxima++ = cuda::FloatOfOrder(orders[row_head]);
    return absl::OkStatus();
  }

  absl::Status RaiseMagnitudes(absl::Span<const int64_t> row_heads, float* magnitudes) override {
    EDUBA_RETURN_IF_ERROR(TakeWorkspace());
    Packing packing;
    const auto count = static_cast<int64_t>(row_heads.size());
    const int64_t size = count * layout_.value_dim;
    const int64_t row_head_at = packing.Add(count * int64_t{sizeof(int64_t)});
    const int64_t magnitude_at = packing.Add(size * int64_t{sizeof(uint32_t)});
    Staging& staging = workspace_.sum;
    EDUBA_RETURN_IF_ERROR(staging.Reserve(packing.bytes()));
    std::copy(row_heads.begin(), row_heads.end(), At<int64_t>(staging.host, row_head_at));
    std::fill_n(At<uint32_t>(staging.host, magnitude_at), size, 0U);
    EDUBA_RETURN_IF_ERROR(
        device_.CopyIn(workspace_.stream, staging.device.data(), staging.host.data(), packing.bytes()));
    cuda::MagnitudeArgs args = {};
    args.value_dim = layout_.value_dim;
    args.value_pitch = layout_.value_pitch;
    args.row_heads = this->row_heads();
    args.targets = count;
    args.row_head = At<int64_t>(staging.device, row_head_at);
    args.m = m();
    args.o = o();
    args.magnitudes = At<uint32_t>(staging.device, magnitude_at);
    for (int64_t part = 0; part < parts(); ++part) {
      if (!kept_) EDUBA_RETURN_IF_ERROR(AttendPart(part));
      args.pages = PagesOf(part);
      EDUBA_RETURN_IF_ERROR(device_.Magnitudes(workspace_.stream, args));
    }
    EDUBA_RETURN_IF_ERROR(device_.CopyOut(workspace_.stream, At<char>(staging.host, magnitude_at),
                                          At<char>(staging.device, magnitude_at),
                                          size * int64_t{sizeof(uint32_t)}));
    EDUBA_RETURN_IF_ERROR(device_.Synchronize(workspace_.stream));
    const auto* orders = At<uint32_t>(staging.host, magnitude_at);
    for (int64_t i = 0; i < size; ++i) {
      magnitudes[i] = std::max(magnitudes[i], cuda::FloatOfOrder(orders[i]));
    }
    return absl::OkStatus();
  }

  absl::Status SumPages(const SumPlan& plan, int64_t* words) override {
    EDUBA_RETURN_IF_ERROR(TakeWorkspace());
    const auto count = static_cast<int64_t>(plan.targets.size());
    const int64_t bytes = count * words_per_target() * int64_t{sizeof(int64_t)};
    EDUBA_RETURN_IF_ERROR(workspace_.words.Reserve(bytes));
    EDUBA_ASSIGN_OR_RETURN(SumArgs args, SendPlan(plan));
    args.words = At<uint64_t>(workspace_.words.device, 0);
    EDUBA_RETURN_IF_ERROR(device_.Zero(workspace_.stream, args.words, bytes));
    for (int64_t part = 0; part < parts(); ++part) {
      if (!kept_) EDUBA_RETURN_IF_ERROR(AttendPart(part));
      args.pages = PagesOf(part);
      args.page = page_entries() + part * part_pages_;
      EDUBA_RETURN_IF_ERROR(device_.Sum(workspace_.stream, args));
    }
    maxima_known_ = true;
    EDUBA_RETURN_IF_ERROR(device_.CopyOut(workspace_.stream, workspace_.words.host.data(),
                                          workspace_.words.device.data(), bytes));
    EDUBA_RETURN_IF_ERROR(device_.Synchronize(workspace_.stream));

    std::atomic<bool> fault = false;
    ForWords(count, [&](int64_t i) {
      const int64_t* const from = At<int64_t>(workspace_.words.host, 0) + i * words_per_target();
      int64_t* const to = words + i * words_per_target();
      std::copy_n(from, words_per_target(), to);
      const int64_t flag = from[layout_.value_dim + 1];
      if (flag != 0) std::fill_n(to, layout_.value_dim + 1, 0);
      if (flag >= kFaultFlag) fault = true;
    });
    return fault ? LookForFault() : absl::OkStatus();
  }

 private:
  // Of Workspace::state.
  static constexpr int64_t kFaultAt = 0;
  static constexpr int64_t kMaximaAt = 16;

  // Has the step and, where they are kept, its partials on the device, also if another step took their place.
  absl::Status TakeWorkspace() {
    EDUBA_RETURN_IF_ERROR(device_.Attach());
    if (workspace_.owner == this) return absl::OkStatus();
    // What the other has queued may still be reading there.
    if (workspace_.owner != nullptr) EDUBA_RETURN_IF_ERROR(device_.Synchronize(workspace_.stream));
    workspace_.owner = this;
    maxima_known_ = false;
    EDUBA_RETURN_IF_ERROR(SendStep());
    return kept_ ? AttendPart(0) : absl::OkStatus();
  }

  // As many query vectors together as there are, and as shared memory holds. Does not change a bit.
  void ChooseTile() {
    const int64_t vectors = int64_t{args_.rows} * args_.shape.group();
    if (on_tensor_cores_) {
      tile_ = cuda::kTileRows;
      while (tile_ < vectors && tile_ < cuda::kTensorWarpsMax * cuda::kTileRows) tile_ *= 2;
      tiles_ = static_cast<int>((vectors + tile_ - 1) / tile_);
      return;
    }
    const int64_t most = std::min(kSharedBytesMax, device_.shared_bytes_max());
    const auto fits = [&](int tile) {
      return cuda::MakeAttendShared(tile, layout_.head_pitch, layout_.value_pitch).floats *
                 int64_t{sizeof(float)} <=
             most;
    };
    tile_ = 1;
    while (2 * tile_ <= cuda::kMaxTile && tile_ < vectors && fits(2 * tile_)) tile_ *= 2;
    tiles_ = static_cast<int>((vectors + tile_ - 1) / tile_);
  }

  absl::Status ChooseParts() {
    const int64_t page_bytes = row_heads() * (layout_.value_pitch + 2) * int64_t{sizeof(float)};
    const int64_t fit =
        std::min(workspace_.partials.bytes() / page_bytes, kBlocksMax / (int64_t{layout_.kv_heads} * tiles_));
    if (fit == 0) {
      return absl::ResourceExhaustedError(
          absl::StrCat("a step of ", args_.rows, " rows and ", args_.shape.query_heads,
                       " heads leaves partials of ", page_bytes, " bytes a page, the device has room for ",
                       workspace_.partials.bytes(), "; send steps of fewer rows"));
    }
    part_pages_ = std::clamp<int64_t>(static_cast<int64_t>(pages_.size()), 1, fit);
    kept_ = parts() <= 1;
    return absl::OkStatus();
  }

  int64_t parts() const { return (static_cast<int64_t>(pages_.size()) + part_pages_ - 1) / part_pages_; }
  int64_t PagesOf(int64_t part) const {
    return std::min(part_pages_, static_cast<int64_t>(pages_.size()) - part * part_pages_);
  }
  const PageEntry* page_entries() const { return At<PageEntry>(workspace_.step.device, page_at_); }

  absl::Status SendStep() {
    Packing packing;
    const int64_t query_bytes = row_heads() * args_.shape.head_dim * static_cast<int64_t>(sizeof(float));
    query_at_ = packing.Add(query_bytes);
    visible_at_ = packing.Add(static_cast<int64_t>(visible_.size() * sizeof(PositionRange)));
    page_at_ = packing.Add(static_cast<int64_t>(pages_.size() * sizeof(PageEntry)));
    Staging& staging = workspace_.step;
    EDUBA_RETURN_IF_ERROR(staging.Reserve(packing.bytes()));
    std::memcpy(At<char>(staging.host, query_at_), args_.queries, query_bytes);
    std::copy(visible_.begin(), visible_.end(), At<PositionRange>(staging.host, visible_at_));
    auto* entries = At<PageEntry>(staging.host, page_at_);
    for (const PageRef& page : pages_) *entries++ = {page.data, page.index};
    EDUBA_RETURN_IF_ERROR(
        device_.CopyIn(workspace_.stream, staging.device.data(), staging.host.data(), packing.bytes()));
    state_bytes_ = kMaximaAt + row_heads() * static_cast<int64_t>(sizeof(uint32_t));
    EDUBA_RETURN_IF_ERROR(workspace_.state.Reserve(state_bytes_));
    return device_.Zero(workspace_.stream, workspace_.state.device.data(), state_bytes_);
  }

  absl::Status AttendPart(int64_t part) {
    EDUBA_RETURN_IF_ERROR(CheckCancelled());
    if (part >= parts()) return absl::OkStatus();  // No page that a row sees.
    AttendArgs args;
    args.layout = layout_;
    args.scale = args_.shape.scale;
    args.softcap = args_.shape.softcap;
    args.dot_segment = args_.shape.head_dim <= 16 ? 8 : 16;
    args.dot_group = args_.shape.head_dim <= 32 ? args.dot_segment : 32;
    args.rows = args_.rows;
    args.query_heads = args_.shape.query_heads;
    args.group = args_.shape.group();
    args.tile = tile_;
    args.tiles = tiles_;
    args.pages = PagesOf(part);
    args.queries = At<float>(workspace_.step.device, query_at_);
    args.visible = At<PositionRange>(workspace_.step.device, visible_at_);
    args.page = page_entries() + part * part_pages_;
    args.m = m();
    args.l = l();
    args.o = o();
    args.maxima = At<uint32_t>(workspace_.state.device, kMaximaAt);
    args.fault = At<uint64_t>(workspace_.state.device, kFaultAt);
    return on_tensor_cores_ ? device_.AttendTensor(workspace_.stream, ElementOf(args_.shape), args)
                            : device_.Attend(workspace_.stream, ElementOf(args_.shape), args);
  }

  // Partials of one part.
  float* m() const { return At<float>(workspace_.partials, 0); }
  float* l() const { return m() + part_pages_ * row_heads(); }
  float* o() const { return l() + part_pages_ * row_heads(); }

  absl::StatusOr<SumArgs> SendPlan(const SumPlan& plan) {
    Packing packing;
    const int64_t target_at = packing.Add(static_cast<int64_t>(plan.targets.size() * sizeof(SumTarget)));
    const int64_t unit_at = packing.Add(static_cast<int64_t>(plan.units.size() * sizeof(double)));
    Staging& staging = workspace_.sum;
    EDUBA_RETURN_IF_ERROR(staging.Reserve(packing.bytes()));
    auto* to = At<SumTarget>(staging.host, target_at);
    for (const Target& target : plan.targets) *to++ = {target.row_head, target.reference, target.unit_row};
    std::copy(plan.units.begin(), plan.units.end(), At<double>(staging.host, unit_at));
    EDUBA_RETURN_IF_ERROR(
        device_.CopyIn(workspace_.stream, staging.device.data(), staging.host.data(), packing.bytes()));
    SumArgs args = {};
    args.value_dim = layout_.value_dim;
    args.value_pitch = layout_.value_pitch;
    args.one = PowerOfTwo(plan.fraction_bits);
    args.limit = static_cast<uint64_t>(plan.limit);
    args.value_limit = plan.value_limit;
    args.row_heads = row_heads();
    args.targets = static_cast<int64_t>(plan.targets.size());
    args.target = At<SumTarget>(staging.device, target_at);
    args.unit = At<double>(staging.device, unit_at);
    args.m = m();
    args.l = l();
    args.o = o();
    args.fault = At<uint64_t>(workspace_.state.device, kFaultAt);
    return args;
  }

  absl::Status ReadState() {
    EDUBA_RETURN_IF_ERROR(device_.CopyOut(workspace_.stream, workspace_.state.host.data(),
                                          workspace_.state.device.data(), state_bytes_));
    return device_.Synchronize(workspace_.stream);
  }

  // Remembers the page that the device noted, if it is one of ours: a fault may be another rank's.
  absl::Status LookForFault() {
    EDUBA_RETURN_IF_ERROR(ReadState());
    const uint64_t key = *At<uint64_t>(workspace_.state.host, kFaultAt);
    if (key == 0) return absl::OkStatus();
    RecordFault(static_cast<int64_t>(~key >> 32), static_cast<int64_t>(~key & 0xffffffffU));
    return absl::OkStatus();
  }

  const PageLayout layout_;
  const bool on_tensor_cores_;
  Workspace& workspace_;
  Device& device_;
  const std::vector<PageRef> pages_;  // Those that some row sees.
  bool started_ = false;
  int tile_ = 1;
  int tiles_ = 1;
  int64_t part_pages_ = 1;  // Pages whose partials fit at a time.
  bool kept_ = true;        // All fit: they are computed once.
  bool maxima_known_ = false;
  int64_t query_at_ = 0;  // Of Workspace::step.
  int64_t visible_at_ = 0;
  int64_t page_at_ = 0;
  int64_t state_bytes_ = 0;
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::unique_ptr<Device> device, const CudaOptions& options, int64_t pool_bytes)
      : device_(std::move(device)),
        pool_(pool_bytes),
        pool_memory_(*device_, Memory::Kind::kDevice),
        workspace_(*device_, options.precision, options.threads) {}

  ~CudaBackend() override {
    device_->Attach().IgnoreError();
    for (const Slot& slot : slots_) {
      if (slot.stream != nullptr) device_->DestroyStream(slot.stream);
    }
    for (const Stream stream : {workspace_.stream, workspace_.sink_stream}) {
      if (stream != nullptr) device_->DestroyStream(stream);
    }
  }

  absl::Status Init(const CudaOptions& options, int64_t pool_bytes) {
    EDUBA_RETURN_IF_ERROR(device_->Attach());
    EDUBA_RETURN_IF_ERROR(pool_memory_.ReserveExactly(pool_bytes));
    EDUBA_RETURN_IF_ERROR(workspace_.partials.ReserveExactly(options.partial_bytes));
    EDUBA_ASSIGN_OR_RETURN(workspace_.stream, device_->CreateStream());
    EDUBA_ASSIGN_OR_RETURN(workspace_.sink_stream, device_->CreateStream());
    for (Slot& slot : slots_) {
      slot.staging = std::make_unique<Staging>(*device_);
      EDUBA_ASSIGN_OR_RETURN(slot.stream, device_->CreateStream());
    }
    return absl::OkStatus();
  }

  std::string name() const override {
    return absl::StrCat(device_->kind(), workspace_.precision == CudaPrecision::kTensor ? "/tensor" : "");
  }
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

  int64_t PageBytes(const AttentionShape& shape) const override { return LayoutOf(shape).page_bytes(); }

  // Through page-locked memory, on a stream of its own: uploads from several threads, and a step, overlap.
  absl::Status WriteRows(const AttentionShape& shape, void* page, int row, int rows, const void* keys,
                         const void* values) override {
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
        EDUBA_RETURN_IF_ERROR(slot.staging->Reserve(packing.bytes()));
        std::memcpy(At<char>(slot.staging->host, key_at), static_cast<const char*>(keys) + begin * key_row,
                    count * key_row);
        std::memcpy(At<char>(slot.staging->host, value_at),
                    static_cast<const char*>(values) + begin * value_row, count * value_row);
        EDUBA_RETURN_IF_ERROR(device_->CopyIn(slot.stream, slot.staging->device.data(),
                                              slot.staging->host.data(), packing.bytes()));
        EDUBA_RETURN_IF_ERROR(device_->Write(
            slot.stream, {layout, page, row + begin, count, At<char>(slot.staging->device, key_at),
                          At<char>(slot.staging->device, value_at)}));
        // Steps on other streams must find the rows.
        EDUBA_RETURN_IF_ERROR(device_->Synchronize(slot.stream));
      }
      return absl::OkStatus();
    });
  }

  // The whole page comes, and the host picks its rows: this happens at the end of a generation, not in a
  // step.
  absl::Status ReadRows(const AttentionShape& shape, const void* page, int row, int rows, void* keys,
                        void* values) override {
    EDUBA_RETURN_IF_ERROR(device_->Attach());
    const PageLayout layout = LayoutOf(shape);
    return WithSlot([&](Slot& slot) {
      EDUBA_RETURN_IF_ERROR(slot.staging->host.Reserve(layout.page_bytes()));
      EDUBA_RETURN_IF_ERROR(
          device_->CopyOut(slot.stream, slot.staging->host.data(), page, layout.page_bytes()));
      EDUBA_RETURN_IF_ERROR(device_->Synchronize(slot.stream));
      const char* const elements = slot.staging->host.data();
      for (int i = 0; i < rows; ++i) {
        for (int head = 0; head < layout.kv_heads; ++head) {
          const int64_t to = int64_t{i} * layout.kv_heads + head;
          for (int d = 0; d < layout.head_dim; ++d) {
            std::memcpy(static_cast<char*>(keys) + (to * layout.head_dim + d) * layout.element,
                        elements + layout.key(head, row + i, d) * layout.element, layout.element);
          }
          std::memcpy(static_cast<char*>(values) + to * layout.value_dim * layout.element,
                      elements + layout.value(head, row + i, 0) * layout.element,
                      int64_t{layout.value_dim} * layout.element);
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
    EDUBA_RETURN_IF_ERROR(device_->health());
    return std::make_unique<CudaStep>(args, workspace_);
  }

 private:
  struct Slot {
    Stream stream = nullptr;
    std::unique_ptr<Staging> staging;
    bool taken = false;  // Guarded by slots_mutex_.
  };

  template <class Work>
  absl::Status WithSlot(const Work& work) {
    Slot* slot = nullptr;
    {
      std::unique_lock lock(slots_mutex_);
      const auto is_free = [](const Slot& s) { return !s.taken; };
      slot_freed_.wait(lock, [&] { return std::any_of(slots_.begin(), slots_.end(), is_free); });
      slot = &*std::find_if(slots_.begin(), slots_.end(), is_free);
      slot->taken = true;
    }
    absl::Status status = work(*slot);
    const std::scoped_lock lock(slots_mutex_);
    slot->taken = false;
    slot_freed_.notify_one();
    return status;
  }

  const std::unique_ptr<Device> device_;
  cuda::SlabPool pool_;
  Memory pool_memory_;
  Workspace workspace_;
  std::mutex slots_mutex_;
  std::condition_variable slot_freed_;
  std::array<Slot, kUploadSlots> slots_;
};

}  // namespace

absl::StatusOr<CudaPrecision> ParseCudaPrecision(const std::string& name) {
  if (name == "exact") return CudaPrecision::kExact;
  if (name == "tensor") return CudaPrecision::kTensor;
  return absl::InvalidArgumentError(absl::StrCat(
      "precision '", name, "' is not known: use exact, or tensor (GPUs' tensor cores, errors to 3e-4)"));
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

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackendOn(std::unique_ptr<Device> device,
                                                           const CudaOptions& options) {
  EDUBA_CHECK(options.page_bytes >= 0 && options.partial_bytes > 0 && options.threads >= 1);
  // What the store's slabs may lose between each other, and the fingerprint's.
  const int64_t pool_bytes = options.page_bytes + options.page_bytes / 32 + (int64_t{32} << 20);
  auto backend = std::make_unique<CudaBackend>(std::move(device), options, pool_bytes);
  EDUBA_RETURN_IF_ERROR(backend->Init(options, pool_bytes));
  return backend;
}

}  // namespace eduba
