#ifndef EDUBA_COLLECTIVE_GLOO_GLOO_COMMUNICATOR_H_
#define EDUBA_COLLECTIVE_GLOO_GLOO_COMMUNICATOR_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "collective/communicator.h"
#include "collective/rendezvous.h"

namespace eduba {

struct GlooOptions {
  // A name or address of this machine that the other ranks can reach. The sockets are bound to it, on ports
  // that the system chooses. There is no authentication and no encryption: Gloo trusts whoever connects, so
  // use it only on a network that is yours.
  std::string host = "127.0.0.1";
};

// Connects this rank with every other over TCP and returns its Communicator. The rendezvous store is used
// only during the call, for one Set (key "gloo/RANK") and size-1 Gets. A Communicator has size-1 sockets, two
// threads and about 3 MiB of memory. Threads of one process may connect as different ranks.
//   INVALID_ARGUMENT     rank is not in [0, size), or `options.host` is no address of this machine
//   DEADLINE_EXCEEDED    a rank did not come by `deadline`
//   UNAVAILABLE          a rank's connection broke or was refused
//   FAILED_PRECONDITION  a rank runs another version of the transport
//   anything else        is the error of `rendezvous`
// From the first call on the process ignores SIGPIPE, unless it has a handler of its own.
//
// An attempt that failed on one rank also fails on the ranks that wait for it. Start again with a fresh
// store.
//
// The transport checks each message's header, and its receives have a fixed size. So ranks that make
// different calls (another operation, another count) get INTERNAL, and Gloo never sees more bytes than it
// expects, which would end the process. A rank that finds a difference closes its connections, so a slower
// one may be told UNAVAILABLE instead.
absl::StatusOr<std::unique_ptr<Communicator>> ConnectGloo(int rank, int size, Rendezvous& rendezvous,
                                                          const GlooOptions& options, absl::Time deadline);

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_GLOO_GLOO_COMMUNICATOR_H_
