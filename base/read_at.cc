#include "base/read_at.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/status/status.h"

namespace eduba {

absl::StatusOr<int64_t> ReadAt(int fd, int64_t offset, absl::Span<char> out) {
  int64_t done = 0;
  while (done < std::ssize(out)) {
    const ssize_t got = pread(fd, out.data() + done, out.size() - done, offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      const int error = errno;
      return absl::Status(absl::ErrnoToStatusCode(error), std::strerror(error));
    }
    if (got == 0) break;
    done += got;
  }
  return done;
}

}  // namespace eduba
