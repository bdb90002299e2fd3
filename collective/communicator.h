#ifndef EDUBA_COLLECTIVE_COMMUNICATOR_H_
#define EDUBA_COLLECTIVE_COMMUNICATOR_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace eduba {

// Sums of words in a GPU's memory, without the host in between: for transports that reduce there. A sum
// takes three calls, and there is no other call (but Abort) from Start to Finish. Ranks that make the
// communicator's own call with as many words take part alike. Errors are a communicator's, as its own calls'.
class DeviceSums {
 public:
  virtual ~DeviceSums() = default;

  // CUDA's number of the GPU.
  virtual int gpu() const = 0;
  // Memory for `count` words, for work on a stream to fill; the communicator's own, because an all-reduce
  // that is aborted late may still write there. Valid until the next call of Words.
  virtual absl::StatusOr<int64_t*> Words(int64_t count) = 0;
  // Queues their sum on `stream` (cudaStream_t), behind what fills them: SumI64, or, with `counts`,
  // ReduceScatterI64. More may be queued there that reads the sums; what it makes of them counts only when
  // Finish has returned OK.
  virtual absl::Status Start(void* stream, absl::Span<const int64_t> counts, absl::Time deadline) = 0;
  // Returns when all that is queued on the stream is done.
  virtual absl::Status Finish(absl::Time deadline) = 0;
};

// The ranks of one epoch. One-shot: after any error the group is dead, and every later call returns ABORTED
// with the first error's text until a new group is formed at a new epoch.
//
// All ranks make the same calls in the same order with the same counts (SendReceive: sizes agree pair by
// pair); the ordered command stream sees to it. Calls come from one thread at a time; Abort may come from any
// thread. Each call returns when the result is in `data`, or an error:
//   DEADLINE_EXCEEDED  a rank did not arrive by `deadline`
//   UNAVAILABLE        a rank that this call needs is gone, or its connection broke
//   ABORTED            Abort was called, or an earlier call failed
//   INTERNAL           the ranks did not make the same call
// within `deadline` + 200 ms at the latest, on every rank that is alive. After an error `data` is undefined.
//
// An error is one rank's view: another may have got all it needed for the same call and return OK with the
// right result; it then meets the error in its next call. Destroying a Communicator is leaving the group; a
// rank may do so as soon as its last call has returned, and the others still complete that call.
//
// Memory: `data` is host memory, for every transport; device_sums takes a GPU's (docs/adr/0005-gpu.md).
class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  // "local", "gloo" or "nccl".
  virtual const char* transport() const = 0;

  // data[i] becomes the sum of data[i] over all ranks, modulo 2^64. An empty span takes part like any other.
  virtual absl::Status SumI64(absl::Span<int64_t> data, absl::Time deadline) = 0;
  // SumI64 of which each rank gets a part: `data` has one of `counts[r]` words for each rank r, in their
  // order, and this rank's becomes the sum; the other parts are undefined then. Half of what SumI64 moves.
  // REQUIRES: size() counts, none of them negative, that add up to data.size().
  virtual absl::Status ReduceScatterI64(absl::Span<int64_t> data, absl::Span<const int64_t> counts,
                                        absl::Time deadline) = 0;
  // The same two in a GPU's memory; null where this transport has none.
  virtual DeviceSums* device_sums() { return nullptr; }
  // data[i] becomes the largest data[i] of all ranks. REQUIRES: no NaN.
  virtual absl::Status MaxF32(absl::Span<float> data, absl::Time deadline) = 0;
  // One message from each rank to one other, all at the same time: `send` goes to rank `to`, and `receive` is
  // filled by rank `from`, whose `send` is as long. -1: nobody, and an empty span. All ranks call it, those
  // without a message too.
  // REQUIRES: neither is this rank, and the two spans do not overlap.
  virtual absl::Status SendReceive(absl::Span<const char> send, int to, absl::Span<char> receive, int from,
                                   absl::Time deadline) = 0;
  // Returns once every rank has called it.
  virtual absl::Status Barrier(absl::Time deadline) = 0;

  // Ends the group: a call under way on this rank returns ABORTED with `reason`'s text promptly (200 ms),
  // later ones at once. The other ranks learn of it through their transport or from the coordinator.
  // Thread-safe, idempotent.
  virtual void Abort(const absl::Status& reason) = 0;
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_COMMUNICATOR_H_
