#include "collective/gloo/gloo_communicator.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "collective/gloo/mesh.h"
#include "collective/operation.h"
#include "collective/parts.h"
#include "collective/reduce.h"
#include "collective/transfer.h"

namespace eduba {
namespace {

template <typename T>
absl::Span<const std::byte> Bytes(absl::Span<T> data) {
  return {reinterpret_cast<const std::byte*>(data.data()), data.size() * sizeof(T)};
}

template <typename T>
absl::Span<const T> Elements(const std::byte* payload, size_t count) {
  return {reinterpret_cast<const T*>(payload), count};
}

// Up to this many received bytes, each rank sends its whole payload to every other. Above, an exchange in two
// steps is faster: the bytes that it saves are worth more than its second step costs.
constexpr int64_t kDirectBytes = int64_t{1} << 18;

class GlooCommunicator final : public Communicator {
 public:
  explicit GlooCommunicator(std::unique_ptr<GlooMesh> mesh) : mesh_(std::move(mesh)) {}

  int rank() const override { return mesh_->rank(); }
  int size() const override { return mesh_->size(); }
  const char* transport() const override { return "gloo"; }

  absl::Status SumI64(absl::Span<int64_t> data, absl::Time deadline) override {
    return Once([&] { return AllReduce(Operation::kSumI64, data, AddInto, deadline); });
  }
  absl::Status ReduceScatterI64(absl::Span<int64_t> data, absl::Span<const int64_t> counts,
                                absl::Time deadline) override {
    const std::vector<int64_t> begins = PartBegins(counts, size(), data.size());
    return Once([&] { return ReduceScatter(data, counts, begins, deadline); });
  }
  absl::Status MaxF32(absl::Span<float> data, absl::Time deadline) override {
    return Once([&] { return AllReduce(Operation::kMaxF32, data, MaxInto, deadline); });
  }
  absl::Status SendReceive(absl::Span<const char> send, int to, absl::Span<char> receive, int from,
                           absl::Time deadline) override {
    const Transfer own = MakeTransfer(rank(), size(), send, to, receive, from);
    return Once([&] { return Deliver(own, send, receive, deadline); });
  }
  absl::Status Barrier(absl::Time deadline) override {
    return Once([&] { return AllReduce(Operation::kBarrier, absl::Span<int64_t>(), AddInto, deadline); });
  }

  void Abort(const absl::Status& reason) override {
    mesh_->Fail(absl::AbortedError(std::string(reason.message())));
  }

 private:
  // Runs `body`, unless a call has failed before: after the first error every call returns ABORTED with that
  // error's text.
  template <typename Body>
  absl::Status Once(const Body& body) {
    if (!first_error_.ok()) return absl::AbortedError(std::string(first_error_.message()));
    first_error_ = body();
    return first_error_;
  }

  template <typename T, typename Combine>
  absl::Status AllReduce(Operation operation, absl::Span<T> data, Combine combine, absl::Time deadline) {
    const GlooMesh::Collective call = {operation, static_cast<int64_t>(data.size())};
    const int64_t size = mesh_->size();
    const int64_t frame = mesh_->capacity() / static_cast<int64_t>(sizeof(T));
    const int64_t received_bytes = call.count * static_cast<int64_t>(sizeof(T)) * (size - 1);
    if (call.count <= frame && received_bytes <= kDirectBytes) return Direct(call, data, combine, deadline);
    for (int64_t begin = 0; begin < call.count; begin += frame * size) {
      EDUBA_RETURN_IF_ERROR(InTwoSteps(call, data.subspan(begin, frame * size), combine, deadline));
    }
    return absl::OkStatus();
  }

  // One exchange: every rank sends all its data to every other, and combines what it receives.
  template <typename T, typename Combine>
  absl::Status Direct(const GlooMesh::Collective& call, absl::Span<T> data, Combine combine,
                      absl::Time deadline) {
    return mesh_->Exchange(
        call, {}, [&](int /*peer*/) { return Bytes(data); },
        [&](int /*peer*/, const std::byte* payload, const GlooMesh::Notes& /*notes*/) {
          combine(data, Elements<T>(payload, data.size()));
        },
        deadline);
  }

  // Two exchanges, with 1/size of the bytes in each message: every rank combines one slice of the data, and
  // then sends the result to all.
  template <typename T, typename Combine>
  absl::Status InTwoSteps(const GlooMesh::Collective& call, absl::Span<T> data, Combine combine,
                          absl::Time deadline) {
    const size_t each = (data.size() + size() - 1) / size();
    const auto slice = [&](int owner) { return data.subspan(std::min(owner * each, data.size()), each); };
    const absl::Span<T> mine = slice(rank());
    EDUBA_RETURN_IF_ERROR(mesh_->Exchange(
        call, {}, [&](int peer) { return Bytes(slice(peer)); },
        [&](int /*peer*/, const std::byte* payload, const GlooMesh::Notes& /*notes*/) {
          combine(mine, Elements<T>(payload, mine.size()));
        },
        deadline));
    return mesh_->Exchange(
        call, {}, [&](int /*peer*/) { return Bytes(mine); },
        [&](int peer, const std::byte* payload, const GlooMesh::Notes& /*notes*/) {
          const absl::Span<T> theirs = slice(peer);
          if (!theirs.empty()) std::memcpy(theirs.data(), payload, theirs.size() * sizeof(T));
        },
        deadline);
  }

  // Each exchange carries one frame of every rank's part, until no rank has anything left. One number goes
  // with the frames and says which parts the sender works with, so all ranks see a difference after the first
  // exchange.
  absl::Status ReduceScatter(absl::Span<int64_t> data, absl::Span<const int64_t> counts,
                             absl::Span<const int64_t> begins, absl::Time deadline) {
    const auto number = static_cast<int64_t>(PartsNumber(counts));
    const int64_t frame = mesh_->capacity() / static_cast<int64_t>(sizeof(int64_t));
    const int64_t longest = *std::max_element(counts.begin(), counts.end());
    for (int64_t at = 0; at == 0 || at < longest; at += frame) {
      const auto part = [&](int owner) {
        const int64_t from = std::min(at, counts[owner]);
        return data.subspan(begins[owner] + from, std::min(frame, counts[owner] - from));
      };
      const absl::Span<int64_t> mine = part(rank());
      int different = -1;
      EDUBA_RETURN_IF_ERROR(mesh_->Exchange(
          {Operation::kReduceScatterI64, static_cast<int64_t>(data.size())}, {number, 0, 0, 0},
          [&](int peer) { return Bytes(part(peer)); },
          [&](int peer, const std::byte* payload, const GlooMesh::Notes& notes) {
            if (notes[0] == number) return AddInto(mine, Elements<int64_t>(payload, mine.size()));
            different = peer;
          },
          deadline));
      if (different >= 0) {
        absl::Status status = absl::InternalError(
            absl::StrCat("the ranks made different calls: the parts of ",
                         DescribeCall(Operation::kReduceScatterI64, static_cast<int64_t>(data.size())),
                         " are not of the same sizes on ranks ", rank(), " and ", different));
        mesh_->Fail(status);
        return status;
      }
    }
    return absl::OkStatus();
  }

  // Each exchange carries one frame of the message, until no rank has anything left; frames to other ranks
  // are empty. Every frame also says what its sender sends and receives, so all ranks see a difference after
  // the first exchange.
  absl::Status Deliver(const Transfer& own, absl::Span<const char> send, absl::Span<char> receive,
                       absl::Time deadline) {
    std::vector<Transfer> transfers(size());
    transfers[rank()] = own;
    const int64_t frame = mesh_->capacity();
    int64_t longest = own.send_bytes;
    for (int64_t at = 0; at == 0 || at < longest; at += frame) {
      const auto part = [&](auto bytes) {
        return bytes.subspan(std::min<size_t>(at, bytes.size()), static_cast<size_t>(frame));
      };
      EDUBA_RETURN_IF_ERROR(mesh_->Exchange(
          {Operation::kSendReceive, 0}, {own.to, own.send_bytes, own.from, own.receive_bytes},
          [&](int peer) { return peer == own.to ? Bytes(part(send)) : absl::Span<const std::byte>(); },
          [&](int peer, const std::byte* payload, const GlooMesh::Notes& notes) {
            transfers[peer] = {notes[0], notes[1], notes[2], notes[3]};
            longest = std::max(longest, notes[1]);
            if (peer == own.from && notes[0] == rank() && notes[1] == own.receive_bytes) {
              const absl::Span<char> to = part(receive);
              if (!to.empty()) std::memcpy(to.data(), payload, to.size());
            }
          },
          deadline));
      if (at > 0) continue;
      absl::Status agreed = CheckTransfers(transfers);
      if (!agreed.ok()) {
        mesh_->Fail(agreed);
        return agreed;
      }
    }
    return absl::OkStatus();
  }

  const std::unique_ptr<GlooMesh> mesh_;
  absl::Status first_error_;  // Only calls touch it, and they come from one thread at a time.
};

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> ConnectGloo(int rank, int size, Rendezvous& rendezvous,
                                                          const GlooOptions& options, absl::Time deadline) {
  if (rank < 0 || rank >= size) {
    return absl::InvalidArgumentError(
        absl::StrCat("gloo group: rank is ", rank, ", must be in [0, ", size, ")"));
  }
  auto mesh = GlooMesh::Connect(rank, size, rendezvous, options, deadline);
  if (!mesh.ok()) return Annotate(mesh.status(), absl::StrCat("gloo group: rank ", rank, " of ", size));
  return std::make_unique<GlooCommunicator>(*std::move(mesh));
}

}  // namespace eduba
