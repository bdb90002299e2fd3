#include "collective/nccl/fake_nccl.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "base/check.h"
#include "base/testing/emulated_queue.h"

namespace eduba {
namespace {

using Bytes = std::vector<char>;

// One all-reduce of a group, or one reduce.
struct Round {
  int arrived = 0;
  Bytes sum;

  void Add(const char* own, size_t bytes, int type, int operation);
};

// Sender, receiver, and the how many'th between the two.
using Message = std::tuple<int, int, int64_t>;

struct Group {
  std::mutex mutex;
  int size = 0;
  int joined = 0;
  int left = 0;
  std::map<int64_t, Round> rounds;
  std::map<Message, Bytes> messages;  // Sent, not yet received.
};

// What a communicator has put on a stream.
struct Kernel {
  EmulatedQueue* stream = nullptr;
  std::shared_ptr<std::atomic<bool>> is_done = std::make_shared<std::atomic<bool>>(false);
};

// A communicator as NCCL has it; outlives the pointer in what is queued on streams.
struct Member {
  std::shared_ptr<Group> group;
  std::mutex mutex;
  std::function<void()> to_queue;  // A call that is "in progress".
  std::vector<Kernel> kernels;     // Some of them are done.
  int64_t next_round = 0;
  int rank = 0;
  std::map<int, int64_t> sent, received;  // Messages, by peer.
  std::atomic<bool> aborted{false};

  // Under mutex. `work` goes to the stream when the call is asked about.
  void Queue(EmulatedQueue* stream, std::function<bool()> work) {
    EDUBA_CHECK(to_queue == nullptr);
    to_queue = [this, stream, work = std::move(work)] {
      std::erase_if(kernels, [](const Kernel& kernel) { return kernel.is_done->load(); });
      const Kernel kernel{stream};
      kernels.push_back(kernel);
      stream->Push([work, kernel] {
        if (!work()) return false;
        *kernel.is_done = true;
        return true;
      });
    };
  }
};

std::mutex groups_mutex;
std::map<std::string, std::weak_ptr<Group>>& Groups() {
  static auto* const groups = new std::map<std::string, std::weak_ptr<Group>>();
  return *groups;
}

class FakeStream final : public GpuStream {
 public:
  // Null: a queue of its own.
  explicit FakeStream(EmulatedQueue* another) : queue_(another != nullptr ? *another : own_) {}
  ~FakeStream() override {
    if (&queue_ == &own_) Drain();
  }
  absl::Status Attach() override { return absl::OkStatus(); }
  void* handle() override { return &queue_; }
  absl::StatusOr<std::unique_ptr<GpuStream>> Over(void* stream) override {
    return std::make_unique<FakeStream>(static_cast<EmulatedQueue*>(stream));
  }
  absl::StatusOr<void*> AllocateDevice(int64_t bytes) override { return std::calloc(1, bytes); }
  absl::StatusOr<void*> AllocateHost(int64_t bytes) override { return std::calloc(1, bytes); }
  void FreeDevice(void* data) override {
    Drain();
    std::free(data);
  }
  void FreeHost(void* data) override { FreeDevice(data); }
  absl::Status CopyIn(void* device, const void* host, int64_t bytes) override {
    queue_.Push([=] {
      std::memcpy(device, host, bytes);
      return true;
    });
    return absl::OkStatus();
  }
  absl::Status CopyOut(void* host, const void* device, int64_t bytes) override {
    return CopyIn(host, device, bytes);
  }
  absl::Status Mark() override {
    mark_ = std::make_shared<std::atomic<bool>>(false);
    queue_.Push([mark = mark_] {
      *mark = true;
      return true;
    });
    return absl::OkStatus();
  }
  absl::StatusOr<bool> Reached() override {
    if (TheFakeNccl().device_fails) return absl::UnavailableError("CUDA: waiting: the device is lost");
    if (TheFakeNccl().look_takes_ms > 0) absl::SleepFor(absl::Milliseconds(int{TheFakeNccl().look_takes_ms}));
    while (!queue_.Run() && TheFakeNccl().looks_wait) std::this_thread::yield();
    return mark_->load();
  }

 private:
  // Whoever frees has aborted before, so that everything can end.
  void Drain() { EDUBA_CHECK(own_.Run()); }

  EmulatedQueue own_;
  EmulatedQueue& queue_;
  std::shared_ptr<std::atomic<bool>> mark_;  // Outlives this, in the queue.
};

// As a ring does it: every rank combines what came so far with what it has, in its own way.
void Combine(Bytes& sum, const Bytes& own, int type, int operation) {
  const size_t bytes = std::min(sum.size(), own.size());
  if (type == kNcclInt64) {
    auto* to = reinterpret_cast<uint64_t*>(sum.data());
    const auto* from = reinterpret_cast<const uint64_t*>(own.data());
    EDUBA_CHECK_EQ(operation, int{kNcclSum});
    for (size_t i = 0; i < bytes / sizeof(uint64_t); ++i) to[i] += from[i];
  } else {
    auto* to = reinterpret_cast<int32_t*>(sum.data());
    const auto* from = reinterpret_cast<const int32_t*>(own.data());
    EDUBA_CHECK_EQ(operation, int{kNcclMax});
    for (size_t i = 0; i < bytes / sizeof(int32_t); ++i) to[i] = std::max(to[i], from[i]);
  }
}

void Round::Add(const char* own, size_t bytes, int type, int operation) {
  const Bytes copy(own, own + bytes);
  if (arrived++ == 0) {
    sum = copy;
  } else {
    Combine(sum, copy, type, operation);
  }
}

}  // namespace
}  // namespace eduba

struct ncclComm {  // NOLINT: NCCL's name.
  std::shared_ptr<eduba::Member> member;
};

namespace eduba {
namespace {

int GetVersion(int* version) {
  *version = 22809;
  return kNcclSuccess;
}

const char* GetErrorString(int result) {
  return result == kNcclRemoteError ? "remote process exited" : "fake error";
}

int GetUniqueId(NcclUniqueId* id) {
  static std::atomic<int64_t> count{0};
  const int64_t number = ++count;
  std::memset(id->internal, 7, sizeof(id->internal));
  std::memcpy(id->internal, &number, sizeof(number));
  return kNcclSuccess;
}

const char* GetLastError(NcclComm /*comm*/) { return TheFakeNccl().last_error; }

int InitRank(NcclComm* comm, int ranks, NcclUniqueId id, int rank, NcclConfig* config) {
  EDUBA_CHECK(config->magic == 0xcafebeef && config->blocking == 0);
  const std::scoped_lock lock(groups_mutex);
  auto& known = Groups()[std::string(id.internal, sizeof(id.internal))];
  auto group = known.lock();
  if (group == nullptr) known = group = std::make_shared<Group>();
  *comm = new ncclComm{std::make_shared<Member>()};
  (*comm)->member->group = group;
  (*comm)->member->rank = rank;
  const std::scoped_lock group_lock(group->mutex);
  group->size = ranks;
  ++group->joined;
  return kNcclInProgress;
}

int GetAsyncError(NcclComm comm, int* error) {
  Member& member = *comm->member;
  {
    const std::scoped_lock lock(member.mutex);
    if (member.to_queue) std::exchange(member.to_queue, nullptr)();
  }
  const std::scoped_lock lock(member.group->mutex);
  *error = member.group->joined < member.group->size ? kNcclInProgress : kNcclSuccess;
  if (member.group->left > 0 && TheFakeNccl().peers_are_told) *error = kNcclRemoteError;
  if (TheFakeNccl().async_error != 0) *error = TheFakeNccl().async_error;
  return kNcclSuccess;
}

int AllReduce(const void* send, void* receive, size_t count, int type, int operation, NcclComm comm,
              void* stream) {
  EDUBA_CHECK(send == receive);
  while (TheFakeNccl().call_is_stuck) std::this_thread::yield();
  if (TheFakeNccl().all_reduce_result != 0) return TheFakeNccl().all_reduce_result;
  const std::shared_ptr<Member> member = comm->member;
  const size_t bytes = count * (type == kNcclInt64 ? 8 : 4);
  const int64_t number = member->next_round++;
  const auto work = [=, arrived = false]() mutable {
    if (member->aborted) return true;  // Ends, and leaves what it has.
    const std::scoped_lock lock(member->group->mutex);
    Round& round = member->group->rounds[number];
    if (!arrived) {
      round.Add(static_cast<const char*>(receive), bytes, type, operation);
      arrived = true;
    }
    if (round.arrived < member->group->size) return false;
    std::memcpy(receive, round.sum.data(), std::min(bytes, round.sum.size()));
    return true;
  };
  const std::scoped_lock lock(member->mutex);
  member->Queue(static_cast<EmulatedQueue*>(stream), work);
  return kNcclInProgress;
}

// What the calling thread has put into its group so far.
struct OpenGroup {
  NcclComm comm = nullptr;
  EmulatedQueue* stream = nullptr;
  std::vector<std::function<bool()>> parts;
};
thread_local std::unique_ptr<OpenGroup> open_group;

int GroupStart() {
  EDUBA_CHECK(open_group == nullptr);
  open_group = std::make_unique<OpenGroup>();
  return kNcclSuccess;
}

int Reduce(const void* send, void* receive, size_t count, int type, int operation, int root, NcclComm comm,
           void* stream) {
  EDUBA_CHECK(send == receive && open_group != nullptr && type == kNcclInt64);
  const std::shared_ptr<Member> member = comm->member;
  const size_t bytes = count * sizeof(int64_t);
  const int64_t number = member->next_round++;
  open_group->comm = comm;
  open_group->stream = static_cast<EmulatedQueue*>(stream);
  open_group->parts.push_back([=, arrived = false]() mutable {
    const std::scoped_lock lock(member->group->mutex);
    Round& round = member->group->rounds[number];
    if (!arrived) {
      round.Add(static_cast<const char*>(send), bytes, type, operation);
      arrived = true;
    }
    // Who has sent its words has done its part.
    if (member->rank != root) return true;
    if (round.arrived < member->group->size) return false;
    EDUBA_CHECK_EQ(round.sum.size(), bytes);  // Undefined in NCCL.
    std::memcpy(receive, round.sum.data(), bytes);
    return true;
  });
  return kNcclInProgress;
}

int Send(const void* data, size_t count, int type, int peer, NcclComm comm, void* stream) {
  EDUBA_CHECK(open_group != nullptr && type == kNcclInt8);
  const std::shared_ptr<Member> member = comm->member;
  const Message message = {member->rank, peer, member->sent[peer]++};
  open_group->comm = comm;
  open_group->stream = static_cast<EmulatedQueue*>(stream);
  open_group->parts.push_back([=] {
    const char* const bytes = static_cast<const char*>(data);
    const std::scoped_lock lock(member->group->mutex);
    member->group->messages[message] = Bytes(bytes, bytes + count);
    return true;
  });
  return kNcclInProgress;
}

int Receive(void* data, size_t count, int type, int peer, NcclComm comm, void* stream) {
  EDUBA_CHECK(open_group != nullptr && type == kNcclInt8);
  const std::shared_ptr<Member> member = comm->member;
  const Message message = {peer, member->rank, member->received[peer]++};
  open_group->comm = comm;
  open_group->stream = static_cast<EmulatedQueue*>(stream);
  open_group->parts.push_back([=] {
    const std::scoped_lock lock(member->group->mutex);
    const auto found = member->group->messages.find(message);
    if (found == member->group->messages.end()) return false;
    EDUBA_CHECK_EQ(found->second.size(), count);  // Undefined in NCCL.
    std::memcpy(data, found->second.data(), count);
    member->group->messages.erase(found);
    return true;
  });
  return kNcclInProgress;
}

int GroupEnd() {
  EDUBA_CHECK(open_group != nullptr);
  const std::unique_ptr<OpenGroup> group = std::move(open_group);
  if (group->parts.empty()) return kNcclSuccess;
  const std::shared_ptr<Member> member = group->comm->member;
  const auto work = [member, parts = group->parts]() mutable {
    if (member->aborted) return true;
    std::erase_if(parts, [](const std::function<bool()>& part) { return part(); });
    return parts.empty();
  };
  const std::scoped_lock lock(member->mutex);
  member->Queue(group->stream, work);
  return kNcclInProgress;
}

int Finalize(NcclComm /*comm*/) { return kNcclInProgress; }

int Abort(NcclComm comm) {
  ++TheFakeNccl().aborts;
  while (TheFakeNccl().abort_is_stuck) std::this_thread::yield();
  comm->member->aborted = true;
  std::vector<Kernel> kernels;
  {
    // What was not queued yet never will be; it holds its member, so it has to go for the member to go.
    const std::scoped_lock lock(comm->member->mutex);
    comm->member->to_queue = nullptr;
    kernels = comm->member->kernels;
  }
  // As NCCL's teardown waits for its streams.
  for (const Kernel& kernel : kernels) {
    while (!*kernel.is_done) {
      kernel.stream->Run();
      std::this_thread::yield();
    }
  }
  {
    const std::scoped_lock lock(comm->member->group->mutex);
    ++comm->member->group->left;
  }
  delete comm;  // A call that still used it would be seen by AddressSanitizer.
  return kNcclSuccess;
}

}  // namespace

void FakeNccl::Reset() {
  peers_are_told = true;
  abort_is_stuck = false;
  call_is_stuck = false;
  async_error = 0;
  all_reduce_result = 0;
  last_error = "";
  device_fails = false;
  look_takes_ms = 0;
  looks_wait = false;
  aborts = 0;
}

FakeNccl& TheFakeNccl() {
  static auto* const fake = new FakeNccl();
  return *fake;
}

const NcclApi& FakeNcclApi() {
  static const NcclApi api = {GetVersion, GetErrorString, GetUniqueId, InitRank,    GetAsyncError,
                              Finalize,   Abort,          AllReduce,   Reduce,      GroupStart,
                              GroupEnd,   Send,           Receive,     GetLastError};
  return api;
}

std::unique_ptr<GpuStream> NewFakeStream() { return std::make_unique<FakeStream>(nullptr); }

NcclParts FakeNcclParts() {
  NcclParts parts;
  parts.api = &FakeNcclApi();
  parts.stream = NewFakeStream();
  parts.on_stuck_abort = [] { std::abort(); };
  return parts;
}

}  // namespace eduba
