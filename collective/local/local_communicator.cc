#include "collective/local/local_communicator.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "collective/local/local_group.h"
#include "collective/parts.h"
#include "collective/transfer.h"

namespace eduba {
namespace {

class LocalCommunicator final : public Communicator {
 public:
  LocalCommunicator(std::shared_ptr<LocalGroup> group, int rank) : group_(std::move(group)), rank_(rank) {}
  ~LocalCommunicator() override {
    group_->Leave(rank_, "this rank left the group", absl::StrCat("rank ", rank_, " left the group"));
  }

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }
  const char* transport() const override { return "local"; }

  absl::Status SumI64(absl::Span<int64_t> data, absl::Time deadline) override {
    return Run(CallOn(Operation::kSumI64, data), deadline);
  }
  absl::Status ReduceScatterI64(absl::Span<int64_t> data, absl::Span<const int64_t> counts,
                                absl::Time deadline) override {
    const std::vector<int64_t> begins = PartBegins(counts, size(), data.size());
    LocalCall call = CallOn(Operation::kReduceScatterI64, data);
    call.part_begins = begins;
    return Run(call, deadline);
  }
  absl::Status MaxF32(absl::Span<float> data, absl::Time deadline) override {
    return Run(CallOn(Operation::kMaxF32, data), deadline);
  }
  absl::Status SendReceive(absl::Span<const char> send, int to, absl::Span<char> receive, int from,
                           absl::Time deadline) override {
    LocalCall call;
    call.operation = Operation::kSendReceive;
    call.data = receive.data();
    call.transfer = MakeTransfer(rank_, size(), send, to, receive, from);
    call.send = send.data();
    return Run(call, deadline);
  }
  absl::Status Barrier(absl::Time deadline) override { return Run({}, deadline); }

  void Abort(const absl::Status& reason) override {
    const std::string text(reason.message());
    group_->Leave(rank_, text, absl::StrCat("rank ", rank_, " aborted: ", text));
  }

 private:
  template <typename T>
  static LocalCall CallOn(Operation operation, absl::Span<T> data) {
    LocalCall call;
    call.operation = operation;
    call.data = data.data();
    call.count = static_cast<int64_t>(data.size());
    return call;
  }

  absl::Status Run(const LocalCall& call, absl::Time deadline) {
    if (!first_error_.ok()) return absl::AbortedError(std::string(first_error_.message()));
    first_error_ = group_->Run(rank_, call, deadline);
    return first_error_;
  }

  const std::shared_ptr<LocalGroup> group_;
  const int rank_;
  absl::Status first_error_;  // Only calls touch it, and they come from one thread at a time.
};

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> LocalHub::Join(uint64_t epoch, uint32_t attempt, int rank,
                                                             int size, absl::Time deadline) {
  const std::string where = absl::StrCat("local group of epoch ", epoch, ", attempt ", attempt);
  if (rank < 0 || rank >= size) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": rank is ", rank, ", must be in [0, ", size, ")"));
  }
  std::shared_ptr<LocalGroup> group;
  {
    MutexLock lock(mutex_);
    std::erase_if(groups_, [](const auto& entry) { return entry.second.expired(); });
    auto& known = groups_[{epoch, attempt}];
    group = known.lock();
    if (group == nullptr) known = group = std::make_shared<LocalGroup>(size);
  }
  if (group->size() != size) {
    return absl::FailedPreconditionError(absl::StrCat(where, ": rank ", rank, " wants ", size,
                                                      " ranks, others joined it with ", group->size()));
  }
  if (!group->Claim(rank)) {
    return absl::AlreadyExistsError(
        absl::StrCat(where, ": rank ", rank, " has joined before; use a new attempt"));
  }
  auto communicator = std::make_unique<LocalCommunicator>(std::move(group), rank);
  const absl::Status formed = communicator->Barrier(deadline);
  if (!formed.ok()) {
    return absl::Status(formed.code(),
                        absl::StrCat(where, ": did not form: ", std::string(formed.message())));
  }
  return communicator;
}

}  // namespace eduba
