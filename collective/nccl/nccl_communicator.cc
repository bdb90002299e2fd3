#include "collective/nccl/nccl_communicator.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "collective/nccl/nccl_link.h"
#include "collective/operation.h"
#include "collective/parts.h"
#include "collective/reduce.h"
#include "collective/transfer.h"

namespace eduba {
namespace {

// Every call begins with an all-reduce of exactly this many words, whatever it sums, because what NCCL does
// is undefined when ranks pass different sizes. The first two words tell whether all ranks made the same
// call. The rest has room for the sums of one query row of 64 heads with value_dim 128 (8320 words).
constexpr int64_t kFrameWords = 8704;
constexpr int64_t kHeaderWords = 2;
constexpr int64_t kHeaderBytes = kHeaderWords * sizeof(int64_t);
// The words that exceed the frame follow in blocks of this many bytes, once the ranks are known to agree.
constexpr int64_t kBlockBytes = int64_t{8} << 20;
// The wait for a call that takes longer than this gives up the processor between two looks.
constexpr absl::Duration kSpin = absl::Microseconds(200);
constexpr absl::Duration kLookAgain = absl::Microseconds(20);
constexpr char kIdKey[] = "nccl/id";
constexpr int kExitStuck = 137;

// Returns a number that differs where the calls differ. About half of its bits are set.
uint64_t CallNumber(Operation operation, uint64_t count, uint64_t call) {
  uint64_t x = static_cast<uint64_t>(operation) * 0x9e3779b97f4a7c15U + count + (call << 40);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

// How the elements of a reduction travel. Floats travel as integers of the same order, so that their maximum
// is exact to the bit, including the signs of zeros.
struct Sum {
  using Element = int64_t;
  using Wire = int64_t;
  static constexpr NcclType kType = kNcclInt64;
  static constexpr NcclOperation kOperation = kNcclSum;
  static Wire Encode(Element x) { return x; }
  static Element Decode(Wire x) { return x; }
  // The result for a word of the header that all of the `size` ranks pass alike.
  static uint64_t Together(uint64_t word, int size) { return word * static_cast<uint64_t>(size); }
};
struct Max {
  using Element = float;
  using Wire = int32_t;
  static constexpr NcclType kType = kNcclInt32;
  static constexpr NcclOperation kOperation = kNcclMax;
  static Wire Encode(Element x) { return FloatOrder(x); }
  static Element Decode(Wire x) { return std::bit_cast<float>(x < 0 ? x ^ 0x7fffffff : x); }
  static uint64_t Together(uint64_t word, int /*size*/) { return word; }
};

// Memory of the device and memory of the host, of the same size, for as long as the communicator lives.
struct Buffers {
  GpuStream& stream;
  int64_t bytes = 0;
  void* device = nullptr;
  void* host = nullptr;

  explicit Buffers(GpuStream& gpu) : stream(gpu) {}
  ~Buffers() {
    if (device != nullptr) stream.FreeDevice(device);
    if (host != nullptr) stream.FreeHost(host);
  }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  absl::Status Allocate(int64_t wanted) {
    if (bytes > 0) return absl::OkStatus();
    EDUBA_ASSIGN_OR_RETURN(device, stream.AllocateDevice(wanted));
    EDUBA_ASSIGN_OR_RETURN(host, stream.AllocateHost(wanted));
    bytes = wanted;
    return absl::OkStatus();
  }
};

// Memory of the device that grows when more is needed.
struct DeviceBlock {
  GpuStream& stream;
  int64_t bytes = 0;
  void* device = nullptr;

  explicit DeviceBlock(GpuStream& gpu) : stream(gpu) {}
  ~DeviceBlock() {
    if (device != nullptr) stream.FreeDevice(device);
  }
  DeviceBlock(const DeviceBlock&) = delete;
  DeviceBlock& operator=(const DeviceBlock&) = delete;

  absl::Status Reserve(int64_t wanted) {
    if (wanted <= bytes) return absl::OkStatus();
    if (device != nullptr) stream.FreeDevice(std::exchange(device, nullptr));
    bytes = 0;
    EDUBA_ASSIGN_OR_RETURN(device, stream.AllocateDevice(wanted + wanted / 2));
    bytes = wanted + wanted / 2;
    // It is zeroed on this stream and will be used on others, so the zeroing must be over.
    EDUBA_RETURN_IF_ERROR(stream.Mark());
    while (true) {
      EDUBA_ASSIGN_OR_RETURN(const bool reached, stream.Reached());
      if (reached) return absl::OkStatus();
    }
  }
};

class NcclCommunicator final : public Communicator, public DeviceSums {
 public:
  NcclCommunicator(int rank, int size, NcclParts parts)
      : rank_(rank),
        size_(size),
        gpu_(parts.gpu),
        stream_(std::move(parts.stream)),
        frame_(*stream_),
        block_(*stream_),
        words_(*stream_),
        link_(*parts.api, *stream_, parts.abort_limit, std::move(parts.on_stuck_abort)) {}

  absl::Status Join(const NcclUniqueId& id, absl::Time deadline) {
    EDUBA_RETURN_IF_ERROR(stream_->Attach());
    EDUBA_RETURN_IF_ERROR(frame_.Allocate(kFrameWords * static_cast<int64_t>(sizeof(int64_t))));
    return Once([&] { return link_.Join(rank_, size_, id, deadline); }, deadline);
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  const char* transport() const override { return "nccl"; }

  absl::Status SumI64(absl::Span<int64_t> data, absl::Time deadline) override {
    return Once([&] { return Reduce<Sum>(Operation::kSumI64, data, deadline); }, deadline);
  }
  absl::Status ReduceScatterI64(absl::Span<int64_t> data, absl::Span<const int64_t> counts,
                                absl::Time deadline) override {
    const std::vector<int64_t> begins = PartBegins(counts, size_, data.size());
    return Once([&] { return ReduceScatter(data, counts, begins, deadline); }, deadline);
  }
  absl::Status MaxF32(absl::Span<float> data, absl::Time deadline) override {
    return Once([&] { return Reduce<Max>(Operation::kMaxF32, data, deadline); }, deadline);
  }
  absl::Status SendReceive(absl::Span<const char> send, int to, absl::Span<char> receive, int from,
                           absl::Time deadline) override {
    const Transfer own = MakeTransfer(rank_, size_, send, to, receive, from);
    return Once([&] { return Deliver(own, send, receive, deadline); }, deadline);
  }
  absl::Status Barrier(absl::Time deadline) override {
    return Once([&] { return Reduce<Sum>(Operation::kBarrier, absl::Span<int64_t>(), deadline); }, deadline);
  }

  DeviceSums* device_sums() override { return this; }
  int gpu() const override { return gpu_; }
  absl::StatusOr<int64_t*> Words(int64_t count) override {
    EDUBA_RETURN_IF_ERROR(stream_->Attach());
    count_ = count;
    const int64_t words = std::max(kFrameWords, kHeaderWords + count);
    EDUBA_RETURN_IF_ERROR(words_.Reserve(words * static_cast<int64_t>(sizeof(int64_t))));
    return static_cast<int64_t*>(words_.device) + kHeaderWords;
  }
  absl::Status Start(void* stream, absl::Span<const int64_t> counts, absl::Time deadline) override {
    return Once(
        [&] {
          EDUBA_RETURN_IF_ERROR(stream_->Attach());
          if (queue_ == nullptr || queue_->handle() != stream) {
            EDUBA_ASSIGN_OR_RETURN(queue_, stream_->Over(stream));
            EDUBA_ASSIGN_OR_RETURN(earlier_work_, stream_->Over(stream));
          }
          EDUBA_RETURN_IF_ERROR(earlier_work_->Mark());
          link_.SetEarlierWork(earlier_work_);
          return counts.empty() ? StartSums(deadline) : StartScatter(counts, deadline);
        },
        deadline, /*is_part=*/true);
  }
  absl::Status Finish(absl::Time deadline) override {
    return Once(
        [&] {
          EDUBA_RETURN_IF_ERROR(stream_->Attach());
          EDUBA_RETURN_IF_ERROR(WaitForStream(*queue_, started_what_, deadline));
          return CheckHeader<Sum>(started_, started_what_);
        },
        deadline);
  }

  void Abort(const absl::Status& reason) override {
    link_.Fail(absl::AbortedError(std::string(reason.message())));
  }

 private:
  // Runs `body`, unless a call has failed before: after the first error every call returns ABORTED with that
  // error's text. `is_part` says that the next call is a part of the same collective.
  template <typename Body>
  absl::Status Once(const Body& body, absl::Time deadline, bool is_part = false) {
    if (!first_error_.ok()) return absl::AbortedError(std::string(first_error_.message()));
    first_error_ = link_.failure();
    if (!first_error_.ok()) return first_error_;
    if (size_ == 1) return absl::OkStatus();
    link_.BeginCall(deadline);
    first_error_ = body();
    if (!first_error_.ok()) link_.Fail(first_error_);
    if (!is_part) link_.EndCall();
    return first_error_;
  }

  template <typename Kind>
  absl::Status Reduce(Operation operation, absl::Span<typename Kind::Element> data, absl::Time deadline) {
    using Wire = typename Kind::Wire;
    EDUBA_RETURN_IF_ERROR(stream_->Attach());  // The next call may come from another thread.
    const auto count = static_cast<int64_t>(data.size());
    const std::string what = DescribeCall(operation, count);
    const uint64_t number = CallNumber(operation, static_cast<uint64_t>(count), call_++);
    uint64_t* const header = WriteHeader(number);
    auto* elements = reinterpret_cast<Wire*>(header + kHeaderWords);
    constexpr int64_t kFrameBytes = kFrameWords * sizeof(int64_t);
    constexpr int64_t kCapacity = (kFrameBytes - kHeaderBytes) / sizeof(Wire);
    const int64_t first = std::min(count, kCapacity);
    std::transform(data.begin(), data.begin() + first, elements, Kind::Encode);
    EDUBA_RETURN_IF_ERROR(Exchange<Kind>(frame_, kHeaderBytes + first * sizeof(Wire),
                                         kFrameBytes / sizeof(Wire), what, deadline));
    EDUBA_RETURN_IF_ERROR(CheckHeader<Kind>(number, what));
    std::transform(elements, elements + first, data.begin(), Kind::Decode);

    if (first < count) EDUBA_RETURN_IF_ERROR(block_.Allocate(kBlockBytes));
    constexpr int64_t kBlock = kBlockBytes / sizeof(Wire);
    for (int64_t begin = first; begin < count; begin += kBlock) {
      const auto part = data.subspan(begin, kBlock);
      auto* wire = static_cast<Wire*>(block_.host);
      std::transform(part.begin(), part.end(), wire, Kind::Encode);
      const auto size = static_cast<int64_t>(part.size());
      EDUBA_RETURN_IF_ERROR(Exchange<Kind>(block_, size * sizeof(Wire), size, what, deadline));
      std::transform(wire, wire + size, part.begin(), Kind::Decode);
    }
    return absl::OkStatus();
  }

  uint64_t* WriteHeader(uint64_t number) {
    auto* const header = static_cast<uint64_t*>(frame_.host);
    header[0] = number;
    header[1] = ~number;  // The maximum of different calls may keep one of the two words, but not both.
    return header;
  }

  template <typename Kind>
  absl::Status CheckHeader(uint64_t number, const std::string& what) const {
    const auto* const header = static_cast<const uint64_t*>(frame_.host);
    if (header[0] == Kind::Together(number, size_) && header[1] == Kind::Together(~number, size_)) {
      return absl::OkStatus();
    }
    return absl::InternalError(absl::StrCat("the ranks made different calls: rank ", rank_, " ", what,
                                            " (call ", call_ - 1, "), another something else"));
  }

  // Sends the same frame and blocks as Reduce does.
  absl::Status StartSums(absl::Time deadline) {
    const std::string what = started_what_ = DescribeCall(Operation::kSumI64, count_);
    started_ = CallNumber(Operation::kSumI64, static_cast<uint64_t>(count_), call_++);
    uint64_t* const header = WriteHeader(started_);
    auto* const words = static_cast<int64_t*>(words_.device);
    EDUBA_RETURN_IF_ERROR(queue_->CopyIn(words, header, kHeaderBytes));
    EDUBA_RETURN_IF_ERROR(link_.AllReduce(words, kFrameWords, kNcclInt64, kNcclSum, *queue_, deadline));
    EDUBA_RETURN_IF_ERROR(queue_->CopyOut(header, words, kHeaderBytes));
    const int64_t end = kHeaderWords + count_;
    if (end <= kFrameWords) return absl::OkStatus();
    // The size of what follows depends on the call, so the ranks must be known to agree first.
    EDUBA_RETURN_IF_ERROR(WaitForStream(*queue_, what, deadline));
    EDUBA_RETURN_IF_ERROR(CheckHeader<Sum>(started_, what));
    constexpr int64_t kBlock = kBlockBytes / sizeof(int64_t);
    for (int64_t begin = kFrameWords; begin < end; begin += kBlock) {
      EDUBA_RETURN_IF_ERROR(link_.AllReduce(words + begin, std::min(kBlock, end - begin), kNcclInt64,
                                            kNcclSum, *queue_, deadline));
    }
    return absl::OkStatus();
  }

  // First comes a frame that has only the header, then a slice of every rank's part at a time, alike for host
  // and device memory. Last comes a barrier. Without it, a rank that has sent its words could leave while
  // another is still receiving them, and NCCL would tell that one that a peer is gone.
  absl::Status ReduceScatter(absl::Span<int64_t> data, absl::Span<const int64_t> counts,
                             absl::Span<const int64_t> begins, absl::Time deadline) {
    EDUBA_RETURN_IF_ERROR(stream_->Attach());
    const std::string what = DescribeCall(Operation::kReduceScatterI64, static_cast<int64_t>(data.size()));
    const uint64_t number = CallNumber(Operation::kReduceScatterI64, PartsNumber(counts), call_++);
    EDUBA_RETURN_IF_ERROR(QueueHeader(*stream_, number, deadline));
    EDUBA_RETURN_IF_ERROR(WaitForStream(*stream_, what, deadline));
    EDUBA_RETURN_IF_ERROR(CheckHeader<Sum>(number, what));
    if (!data.empty()) EDUBA_RETURN_IF_ERROR(block_.Allocate(kBlockBytes));
    auto* const host = static_cast<int64_t*>(block_.host);
    auto* const device = static_cast<int64_t*>(block_.device);
    EDUBA_RETURN_IF_ERROR(ForSlices(counts, [&](absl::Span<const PartSlice> slices) {
      std::vector<absl::Span<int64_t>> parts;
      parts.reserve(size_);
      int64_t words = 0;
      for (int r = 0; r < size_; ++r) {
        const auto from = data.subspan(begins[r] + slices[r].begin, slices[r].size);
        std::copy(from.begin(), from.end(), host + words);
        parts.emplace_back(device + words, from.size());
        words += slices[r].size;
      }
      EDUBA_RETURN_IF_ERROR(stream_->CopyIn(device, host, words * static_cast<int64_t>(sizeof(int64_t))));
      EDUBA_RETURN_IF_ERROR(link_.ReduceScatter(parts, *stream_, deadline));
      const absl::Span<int64_t> own = parts[rank_];
      int64_t* const sums = host + (own.data() - device);
      if (!own.empty()) {
        EDUBA_RETURN_IF_ERROR(
            stream_->CopyOut(sums, own.data(), static_cast<int64_t>(own.size() * sizeof(int64_t))));
      }
      EDUBA_RETURN_IF_ERROR(WaitForStream(*stream_, what, deadline));
      std::copy_n(sums, own.size(), data.begin() + begins[rank_] + slices[rank_].begin);
      return absl::OkStatus();
    }));
    return Reduce<Sum>(Operation::kBarrier, absl::Span<int64_t>(), deadline);
  }

  absl::Status StartScatter(absl::Span<const int64_t> counts, absl::Time deadline) {
    const std::vector<int64_t> begins = PartBegins(counts, size_, count_);
    started_what_ = DescribeCall(Operation::kReduceScatterI64, count_);
    const uint64_t number = CallNumber(Operation::kReduceScatterI64, PartsNumber(counts), call_++);
    EDUBA_RETURN_IF_ERROR(QueueHeader(*queue_, number, deadline));
    EDUBA_RETURN_IF_ERROR(WaitForStream(*queue_, started_what_, deadline));
    EDUBA_RETURN_IF_ERROR(CheckHeader<Sum>(number, started_what_));
    auto* const words = static_cast<int64_t*>(words_.device) + kHeaderWords;
    EDUBA_RETURN_IF_ERROR(ForSlices(counts, [&](absl::Span<const PartSlice> slices) {
      std::vector<absl::Span<int64_t>> parts;
      parts.reserve(size_);
      for (int r = 0; r < size_; ++r) {
        parts.emplace_back(words + begins[r] + slices[r].begin, slices[r].size);
      }
      return link_.ReduceScatter(parts, *queue_, deadline);
    }));
    started_ = CallNumber(Operation::kBarrier, 0, call_++);
    return QueueHeader(*queue_, started_, deadline);
  }

  // A range of words within one rank's part.
  struct PartSlice {
    int64_t begin;
    int64_t size;
  };
  // Calls body(slices [ranks]) for the words of every rank's part that are reduced together, until all are
  // reduced.
  template <typename Body>
  absl::Status ForSlices(absl::Span<const int64_t> counts, const Body& body) {
    const int64_t most = kBlockBytes / static_cast<int64_t>(sizeof(int64_t)) / size_;
    const int64_t longest = *std::max_element(counts.begin(), counts.end());
    for (int64_t at = 0; at < longest; at += most) {
      std::vector<PartSlice> slices;
      slices.reserve(size_);
      for (const int64_t count : counts) {
        const int64_t begin = std::min(at, count);
        slices.push_back({begin, std::min(most, count - begin)});
      }
      EDUBA_RETURN_IF_ERROR(body(slices));
    }
    return absl::OkStatus();
  }

  // Queues the all-reduce of a frame that has only a header.
  absl::Status QueueHeader(GpuStream& stream, uint64_t number, absl::Time deadline) {
    uint64_t* const header = WriteHeader(number);
    EDUBA_RETURN_IF_ERROR(stream.CopyIn(frame_.device, header, kHeaderBytes));
    EDUBA_RETURN_IF_ERROR(
        link_.AllReduce(frame_.device, kFrameWords, kNcclInt64, kNcclSum, stream, deadline));
    return stream.CopyOut(header, frame_.device, kHeaderBytes);
  }

  // First every rank learns what all others send and receive, from a sum in which each rank has a place of
  // its own. Then the bytes travel, in blocks.
  absl::Status Deliver(const Transfer& own, absl::Span<const char> send, absl::Span<char> receive,
                       absl::Time deadline) {
    constexpr int64_t kWords = 4;
    std::vector<int64_t> table(kWords * size_);
    int64_t* const mine = &table[kWords * rank_];
    mine[0] = own.to;
    mine[1] = own.send_bytes;
    mine[2] = own.from;
    mine[3] = own.receive_bytes;
    EDUBA_RETURN_IF_ERROR(Reduce<Sum>(Operation::kSendReceive, absl::MakeSpan(table), deadline));
    std::vector<Transfer> transfers;
    for (int64_t rank = 0; rank < size_; ++rank) {
      const int64_t* const words = &table[kWords * rank];
      transfers.push_back({words[0], words[1], words[2], words[3]});
    }
    EDUBA_RETURN_IF_ERROR(CheckTransfers(transfers));
    const int64_t longest = std::max(own.send_bytes, own.receive_bytes);
    if (longest > 0) EDUBA_RETURN_IF_ERROR(block_.Allocate(kBlockBytes));
    // One half of the buffers is for the bytes that are sent, the other for those that are received.
    constexpr int64_t kHalf = kBlockBytes / 2;
    char* const device_in = static_cast<char*>(block_.device) + kHalf;
    char* const host_in = static_cast<char*>(block_.host) + kHalf;
    for (int64_t at = 0; at < longest; at += kHalf) {
      const int64_t out = std::clamp<int64_t>(own.send_bytes - at, 0, kHalf);
      const int64_t in = std::clamp<int64_t>(own.receive_bytes - at, 0, kHalf);
      if (out > 0) {
        std::memcpy(block_.host, send.data() + at, out);
        EDUBA_RETURN_IF_ERROR(stream_->CopyIn(block_.device, block_.host, out));
      }
      EDUBA_RETURN_IF_ERROR(link_.SendReceive(block_.device, out, own.to, device_in, in, own.from, deadline));
      if (in > 0) EDUBA_RETURN_IF_ERROR(stream_->CopyOut(host_in, device_in, in));
      EDUBA_RETURN_IF_ERROR(WaitForStream(*stream_, DescribeCall(Operation::kSendReceive, 0), deadline));
      if (in > 0) std::memcpy(receive.data() + at, host_in, in);
    }
    // Without this barrier a rank that is done could leave while another is still receiving what it sent, and
    // NCCL would tell that one that a peer is gone.
    return Reduce<Sum>(Operation::kBarrier, absl::Span<int64_t>(), deadline);
  }

  // Reduces `count` elements of the buffers over the ranks. The first `bytes` are copied to the device and
  // back.
  template <typename Kind>
  absl::Status Exchange(Buffers& buffers, int64_t bytes, int64_t count, const std::string& what,
                        absl::Time deadline) {
    EDUBA_RETURN_IF_ERROR(stream_->CopyIn(buffers.device, buffers.host, bytes));
    // AllReduce returns when NCCL has put it into the stream, so the copy back is queued after it.
    EDUBA_RETURN_IF_ERROR(
        link_.AllReduce(buffers.device, count, Kind::kType, Kind::kOperation, *stream_, deadline));
    EDUBA_RETURN_IF_ERROR(stream_->CopyOut(buffers.host, buffers.device, bytes));
    return WaitForStream(*stream_, what, deadline);
  }

  absl::Status WaitForStream(GpuStream& stream, const std::string& what, absl::Time deadline) {
    EDUBA_RETURN_IF_ERROR(stream.Mark());
    const absl::Time spin_until = absl::Now() + kSpin;
    while (true) {
      // The order matters. Work that is aborted reaches the mark too, without a result. But an abort begins
      // only after failure() has been set, so failure() must be asked after the mark.
      EDUBA_ASSIGN_OR_RETURN(const bool reached, stream.Reached());
      EDUBA_RETURN_IF_ERROR(link_.failure());
      if (reached) return absl::OkStatus();
      const absl::Time now = absl::Now();
      if (now >= deadline) {
        return absl::DeadlineExceededError(
            absl::StrCat(what, ": not all of the ", size_, " ranks came in time"));
      }
      if (now >= spin_until) absl::SleepFor(kLookAgain);
    }
  }

  const int rank_;
  const int size_;
  const int gpu_;
  const std::unique_ptr<GpuStream> stream_;
  Buffers frame_;
  Buffers block_;
  DeviceBlock words_;                 // A header, followed by the words that Words returned.
  int64_t count_ = 0;                 // The number of those words.
  uint64_t started_ = 0;              // The number of the last frame that Start has queued.
  std::string started_what_;          // The call to which that frame belongs, for errors.
  std::unique_ptr<GpuStream> queue_;  // The caller's stream on which it was queued.
  std::shared_ptr<GpuStream>
      earlier_work_;  // The same queue; its mark stands after all that was there before Start.
  // Declared after the buffers, so that it is destroyed before them: then nothing on the device uses them any
  // more.
  NcclLink link_;
  uint64_t call_ = 0;
  absl::Status first_error_;  // Only calls touch it, and they come from one thread at a time.
};

absl::StatusOr<NcclUniqueId> ShareUniqueId(int rank, const NcclApi& api, Rendezvous& rendezvous,
                                           absl::Time deadline) {
  NcclUniqueId id;
  if (rank == 0) {
    if (const int result = api.get_unique_id(&id); result != kNcclSuccess) {
      return absl::FailedPreconditionError(
          absl::StrCat("NCCL makes no unique id: ", NcclErrorText(api, result),
                       "; NCCL_DEBUG=WARN in the environment says more"));
    }
    EDUBA_RETURN_IF_ERROR(rendezvous.Set(
        kIdKey, absl::BytesToHexString(absl::string_view(id.internal, sizeof(id.internal))), deadline));
    return id;
  }
  EDUBA_ASSIGN_OR_RETURN(const std::string text, rendezvous.Get(kIdKey, deadline));
  if (text.size() != 2 * sizeof(id.internal)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "rank 0 published ", text.size(), " digits as NCCL's unique id, wanted ", 2 * sizeof(id.internal)));
  }
  const std::string bytes = absl::HexStringToBytes(text);
  std::memcpy(id.internal, bytes.data(), sizeof(id.internal));
  return id;
}

absl::StatusOr<std::unique_ptr<Communicator>> Connect(int rank, int size, Rendezvous& rendezvous,
                                                      NcclParts parts, absl::Time deadline) {
  NcclUniqueId id = {};
  if (size > 1) {
    EDUBA_ASSIGN_OR_RETURN(id, ShareUniqueId(rank, *parts.api, rendezvous, deadline));
  }
  auto communicator = std::make_unique<NcclCommunicator>(rank, size, std::move(parts));
  EDUBA_RETURN_IF_ERROR(communicator->Join(id, deadline));
  // NCCL connects lazily, so the first call finds the trouble that there is. A query should not be that call.
  EDUBA_RETURN_IF_ERROR(communicator->Barrier(deadline));
  return communicator;
}

void ExitStuck() {
  LogError(
      "NCCL did not let go of a broken group, so the device cannot be freed; the worker ends with 137, to be "
      "started again");
  _exit(kExitStuck);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> ConnectNccl(int rank, int size, Rendezvous& rendezvous,
                                                          const NcclOptions& options, absl::Time deadline) {
  NcclParts parts;
  EDUBA_ASSIGN_OR_RETURN(parts.api, LoadNccl());
  EDUBA_ASSIGN_OR_RETURN(parts.stream, OpenCudaStream(options.device));
  parts.gpu = options.device;
  parts.on_stuck_abort = ExitStuck;
  return ConnectNcclForTest(rank, size, rendezvous, std::move(parts), deadline);
}

absl::StatusOr<std::unique_ptr<Communicator>> ConnectNcclForTest(int rank, int size, Rendezvous& rendezvous,
                                                                 NcclParts parts, absl::Time deadline) {
  if (rank < 0 || rank >= size) {
    return absl::InvalidArgumentError(
        absl::StrCat("nccl group: rank is ", rank, ", must be in [0, ", size, ")"));
  }
  auto communicator = Connect(rank, size, rendezvous, std::move(parts), deadline);
  if (!communicator.ok()) {
    return Annotate(communicator.status(), absl::StrCat("nccl group: rank ", rank, " of ", size));
  }
  return communicator;
}

}  // namespace eduba
