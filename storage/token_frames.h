#ifndef EDUBA_STORAGE_TOKEN_FRAMES_H_
#define EDUBA_STORAGE_TOKEN_FRAMES_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "storage/frame_log.h"

namespace eduba {

// The token ids of one model session as frames of a log, in one folder. One thread, but for frames()->Sync().
class TokenFrames {
 public:
  // What the log says, in order.
  class Reader {
   public:
    virtual ~Reader() = default;
    // Ids at position `at`, where those so far end.
    virtual absl::Status Add(int64_t at, absl::Span<const int32_t> ids, bool generated) = 0;
    // The first `length` ids stay.
    virtual absl::Status SetLength(int64_t length) = 0;
  };

  // Reads what is there. The first error of `reader` is returned, and DATA_LOSS for frames that do not follow
  // one another; nothing on the disk has changed then.
  static absl::StatusOr<std::unique_ptr<TokenFrames>> Open(const std::string& folder, Reader& reader);

  // RESOURCE_EXHAUSTED or UNAVAILABLE: nothing has changed. After a success of Reserve(n), Add takes n ids,
  // in any number of calls.
  absl::Status Reserve(int64_t count);
  absl::Status Add(int64_t at, absl::Span<const int32_t> ids, bool generated);
  absl::Status SetLength(int64_t length);

  // What is to be synced.
  const std::shared_ptr<FrameLog>& frames() const { return frames_; }

 private:
  TokenFrames() = default;

  std::shared_ptr<FrameLog> frames_;
};

}  // namespace eduba

#endif  // EDUBA_STORAGE_TOKEN_FRAMES_H_
