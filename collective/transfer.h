#ifndef EDUBA_COLLECTIVE_TRANSFER_H_
#define EDUBA_COLLECTIVE_TRANSFER_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/check.h"

namespace eduba {

// What one rank sends and receives in Communicator::SendReceive. A rank -1 means nobody, and no bytes.
struct Transfer {
  int64_t to = -1;
  int64_t send_bytes = 0;
  int64_t from = -1;
  int64_t receive_bytes = 0;
};

// The transfer of one call of SendReceive. REQUIRES: the arguments are as communicator.h requires, for a
// group of `size` ranks.
inline Transfer MakeTransfer(int rank, int size, absl::Span<const char> send, int to,
                             absl::Span<char> receive, int from) {
  EDUBA_CHECK(to >= -1 && to < size && to != rank && from >= -1 && from < size && from != rank);
  EDUBA_CHECK((to >= 0 || send.empty()) && (from >= 0 || receive.empty()));
  return {to, static_cast<int64_t>(send.size()), from, static_cast<int64_t>(receive.size())};
}

// Checks that every rank receives what its peer sends. INTERNAL names the first pair that differs. The answer
// depends on `ranks` [ranks] alone, so all ranks fail alike.
inline absl::Status CheckTransfers(absl::Span<const Transfer> ranks) {
  const auto size = static_cast<int64_t>(ranks.size());
  const auto different = [](int64_t rank, const char* does, int64_t bytes, int64_t peer) {
    return absl::InternalError(absl::StrCat("the ranks made different calls: rank ", rank, does, bytes,
                                            " bytes, and rank ", peer, " says otherwise"));
  };
  for (int64_t rank = 0; rank < size; ++rank) {
    const Transfer& own = ranks[rank];
    if (own.to >= 0 &&
        (own.to >= size || ranks[own.to].from != rank || ranks[own.to].receive_bytes != own.send_bytes)) {
      return different(rank, " sends ", own.send_bytes, own.to);
    }
    if (own.from >= 0 && (own.from >= size || ranks[own.from].to != rank)) {
      return different(rank, " receives ", own.receive_bytes, own.from);
    }
  }
  return absl::OkStatus();
}

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_TRANSFER_H_
