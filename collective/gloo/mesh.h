#ifndef EDUBA_COLLECTIVE_GLOO_MESH_H_
#define EDUBA_COLLECTIVE_GLOO_MESH_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/mutex.h"
#include "collective/gloo/gloo_communicator.h"
#include "collective/operation.h"
#include "collective/rendezvous.h"

namespace gloo::transport {
class Context;
class Device;
class UnboundBuffer;
}  // namespace gloo::transport

namespace eduba {

// One rank's connections to all the others, and the one primitive that the collectives are made of: an
// exchange, in which every rank sends one frame to every other.
//
// It is a primitive of our own over Gloo's send and receive, for three reasons (docs/adr/0003-collectives.md
// has the numbers):
// - A Gloo message waits until its receiver has announced the receive. Here two receives per peer are
//   announced in advance at all times. So a message goes out at once, and an exchange costs one way through
//   the network, not three.
// - Gloo ends the process when a message is longer than its receive. Here every receive has the frame's full
//   size and no message is longer, whatever the ranks call. The header in the frame then says whether all
//   ranks made the same call.
// - Gloo's timeouts close the sockets one by one inside the waiting call, which takes 10 ms for each. Here a
//   watcher thread keeps the deadline: it wakes the call at once, and closes the sockets after that.
class GlooMesh {
 public:
  // The collective that an exchange is part of. All ranks must be in the same one.
  struct Collective {
    Operation operation = Operation::kBarrier;
    int64_t count = 0;  // In elements.
  };
  // Numbers that go with every frame of a rank, for its peers to read. They may differ between ranks.
  using Notes = std::array<int64_t, 4>;
  // Returns the bytes that go to `peer`: at most capacity() of them.
  using Outgoing = std::function<absl::Span<const std::byte>(int peer)>;
  // Called once for each peer. `payload` is the whole room of the frame (capacity() bytes, aligned to 64).
  // The peer has set as many of them as it sent; how many follows from the call, which is the same on all
  // ranks.
  using Incoming = std::function<void(int peer, const std::byte* payload, const Notes& notes)>;

  static absl::StatusOr<std::unique_ptr<GlooMesh>> Connect(int rank, int size, Rendezvous& rendezvous,
                                                           const GlooOptions& options, absl::Time deadline);
  ~GlooMesh();
  GlooMesh(const GlooMesh&) = delete;
  GlooMesh& operator=(const GlooMesh&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  int64_t capacity() const { return capacity_; }

  // Sends one frame to every peer and receives one from each. The errors are those of Communicator; the first
  // one ends the mesh.
  absl::Status Exchange(const Collective& call, const Notes& notes, const Outgoing& outgoing,
                        const Incoming& incoming, absl::Time deadline);

  // Ends the mesh. An Exchange under way returns `status`, unless an earlier failure has ended the mesh
  // already. May be called from any thread.
  void Fail(const absl::Status& status);

 private:
  struct FreeDeleter {
    void operator()(std::byte* p) const;
  };
  // Three frames: one that is sent, and two that are received, at even and at odd exchanges. Each frame is a
  // wire header followed by the payload. One Gloo buffer lies over all three. It is one buffer, because when
  // a connection breaks Gloo tells only the buffers whose receive has not begun, not the buffer that it is
  // just sending from or receiving into. In the shared buffer the next receive is always announced, so the
  // buffer is always told.
  struct Peer {
    std::unique_ptr<std::byte, FreeDeleter> frames;
    std::unique_ptr<gloo::transport::UnboundBuffer> buffer;
  };

  GlooMesh(int rank, int size);
  absl::Status MakePairs(const GlooOptions& options);
  absl::Status ConnectPairs(Rendezvous& rendezvous, absl::Time deadline);
  void MakeFrames(Peer& peer) const;
  int64_t FrameBytes() const;
  int64_t ReceiveOffset(uint64_t sequence) const;
  void Announce(int peer, uint64_t sequence);
  // Wait until the frame has been sent, or the next one has been received. False: Fail was called.
  bool WaitSent(int peer);
  bool WaitReceived(int peer);
  // `waiting_for` becomes the peer that it is waiting for at the moment, for errors.
  absl::Status RunExchange(uint64_t sequence, const Collective& call, const Notes& notes,
                           const Outgoing& outgoing, const Incoming& incoming, int& waiting_for);
  // Begin and End enclose what may be interrupted. The watcher interrupts it at `deadline`.
  absl::Status Begin(absl::Time deadline);
  absl::Status End(const absl::Status& outcome, const std::string& waiting_for, absl::Time deadline);
  // The watcher thread: waits for the end of the mesh or for a deadline, then closes the connections.
  void Watch();
  absl::Status AwaitFailure();

  const int rank_;
  const int size_;
  const int64_t capacity_;
  std::shared_ptr<gloo::transport::Device> device_;
  std::shared_ptr<gloo::transport::Context> context_;
  std::vector<Peer> peers_;  // By rank; this rank's own entry is empty.
  // The number of the next exchange, the same on all ranks. It is also Gloo's tag, so no tag is used twice.
  uint64_t next_sequence_ = 0;
  // Not empty: a receive could not be announced, so the next exchange cannot complete.
  std::string announce_error_;

  Mutex mutex_;
  CondVar watcher_wakes_;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);  // Not OK: the mesh is dead.
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;     // A call is under way.
  // The deadline of the call under way, or of the last one.
  absl::Time deadline_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();
  // When the watcher will next wake by itself.
  absl::Time watcher_until_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread watcher_;
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_GLOO_MESH_H_
