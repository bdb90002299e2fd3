#ifndef EDUBA_COLLECTIVE_COMMUNICATOR_H_
#define EDUBA_COLLECTIVE_COMMUNICATOR_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace eduba {

// Sums of words in a GPU's memory that do not pass through the host, for transports that reduce there. One
// sum takes three calls: Words, Start, Finish. No other call than Abort may come between Start and Finish. It
// is the same collective as the Communicator's own call with as many words, so other ranks may make that one.
// The errors are those of the Communicator's calls.
class DeviceSums {
 public:
  virtual ~DeviceSums() = default;

  // CUDA's number of the GPU.
  virtual int gpu() const = 0;
  // Returns memory for `count` words, which work on a stream fills. It belongs to the communicator, because
  // an all-reduce that is aborted late may still write there. It is valid until the next call of Words.
  virtual absl::StatusOr<int64_t*> Words(int64_t count) = 0;
  // Queues the sum of the words on `stream` (a cudaStream_t), after the work that fills them. It is SumI64,
  // or ReduceScatterI64 when `counts` is not empty. The caller may queue work there that reads the sums; the
  // results of that work are valid only when Finish has returned OK.
  virtual absl::Status Start(void* stream, absl::Span<const int64_t> counts, absl::Time deadline) = 0;
  // Returns when all the work that is queued on the stream is done.
  virtual absl::Status Finish(absl::Time deadline) = 0;
};

// One rank's place in the group of one epoch. After any error the group is dead: every later call returns
// ABORTED with the first error's text, and only a new group at a new epoch helps.
//
// All ranks make the same calls in the same order with the same counts (for SendReceive, the sizes agree pair
// by pair). The ordered stream of commands from the coordinator guarantees that. Calls come from one thread
// at a time; Abort may come from any thread. Each call returns when the result is in `data`, or returns an
// error:
//   DEADLINE_EXCEEDED  a rank did not arrive by `deadline`
//   UNAVAILABLE        a rank that this call needs is gone, or its connection broke
//   ABORTED            Abort was called, or an earlier call failed
//   INTERNAL           the ranks did not make the same call
// Every rank that is alive gets the error at `deadline` + 200 ms at the latest. After an error `data` is
// undefined.
//
// An error is the view of one rank. Another rank may have received all it needed for the same call, and
// return OK with the right result; it then meets the error in its next call. A rank leaves the group by
// destroying its Communicator. It may do so as soon as its last call has returned, and the others still
// complete that call.
//
// `data` is host memory for every transport. Only device_sums works in a GPU's memory (docs/adr/0005-gpu.md).
class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  // "local", "gloo" or "nccl".
  virtual const char* transport() const = 0;

  // data[i] becomes the sum of data[i] over all ranks, modulo 2^64. An empty span takes part like any other.
  virtual absl::Status SumI64(absl::Span<int64_t> data, absl::Time deadline) = 0;
  // A SumI64 of which each rank gets only a part. `data` is one part of `counts[r]` words for each rank r, in
  // the order of ranks. This rank's part becomes the sum; the other parts are undefined afterwards. It moves
  // half of the bytes that SumI64 moves. REQUIRES: size() counts, none of them negative, that add up to
  // data.size().
  virtual absl::Status ReduceScatterI64(absl::Span<int64_t> data, absl::Span<const int64_t> counts,
                                        absl::Time deadline) = 0;
  // SumI64 and ReduceScatterI64 in a GPU's memory; null where this transport cannot do them there.
  virtual DeviceSums* device_sums() { return nullptr; }
  // data[i] becomes the largest data[i] of all ranks. REQUIRES: no NaN.
  virtual absl::Status MaxF32(absl::Span<float> data, absl::Time deadline) = 0;
  // Sends one message from each rank to one other rank, all at the same time. `send` goes to rank `to`;
  // `receive` is filled by rank `from`, whose `send` has the same size. A rank that sends or receives nothing
  // passes -1 and an empty span. All ranks make the call, also those without a message. REQUIRES: neither is
  // this rank, and the two spans do not overlap.
  virtual absl::Status SendReceive(absl::Span<const char> send, int to, absl::Span<char> receive, int from,
                                   absl::Time deadline) = 0;
  // Returns once every rank has called it.
  virtual absl::Status Barrier(absl::Time deadline) = 0;

  // Ends the group. A call under way on this rank returns ABORTED with `reason`'s text within 200 ms, later
  // calls return it at once. The other ranks learn of it through their transport or from the coordinator.
  // Thread-safe and idempotent.
  virtual void Abort(const absl::Status& reason) = 0;
};

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_COMMUNICATOR_H_
