#ifndef EDUBA_BASE_READ_AT_H_
#define EDUBA_BASE_READ_AT_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace eduba {

// Reads from byte `offset` of an open file until `out` is full or the file ends, and says how many bytes that
// were. Signals do not end it early. An error has the system's words and no name: the caller knows which file
// it is. Threads may read the same descriptor at once.
absl::StatusOr<int64_t> ReadAt(int fd, int64_t offset, absl::Span<char> out);

}  // namespace eduba

#endif  // EDUBA_BASE_READ_AT_H_
