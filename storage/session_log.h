#ifndef EDUBA_STORAGE_SESSION_LOG_H_
#define EDUBA_STORAGE_SESSION_LOG_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/append_log.h"
#include "base/elements.h"
#include "storage/frame_log.h"

namespace eduba {

// The appends of one tensor session as frames of a log, in one folder.
//
// Begin, Seal, Publish and Cut come from one thread; AddRows from any, and frames()->Sync().
class SessionLog final : public AppendLog {
 public:
  // Reads what is there and gives it to `replay`, in order: of the last append perhaps only a part. The first
  // error of `replay` is returned, and nothing on the disk has changed then. `row` is of one position of one
  // layer.
  static absl::StatusOr<std::unique_ptr<SessionLog>> Open(const std::string& folder, const RowBytes& row,
                                                          AppendLog& replay);

  // RESOURCE_EXHAUSTED or UNAVAILABLE: the frame was not written, and the append cannot go on.
  absl::Status Begin(const AppendShare& share) override;
  absl::Status AddRows(int layer, int64_t first, int64_t count, absl::Span<const char> keys,
                       absl::Span<const char> values) override;
  absl::Status Seal(const AppendSeal& seal) override;
  // Always OK: what the disk does not take now is written before the next append begins. Until then the
  // append is one that is sealed.
  absl::Status Publish(absl::Span<const int16_t> exponents) override;

  // Drops the append that has begun and is not published, if there is one.
  absl::Status Cut();
  // What is to be synced.
  const std::shared_ptr<FrameLog>& frames() const { return log_; }

  // What is wrong after the last whole frame; empty: nothing.
  const std::string& damage() const { return log_->damage(); }

 private:
  SessionLog() = default;

  absl::Status WritePublish(absl::Span<const int16_t> exponents);

  std::shared_ptr<FrameLog> log_;
  // Where the append that has begun and is not published begins in the log; none: there is no such append.
  std::optional<LogPlace> begun_;
  // Exponents of a publication that the disk did not take.
  std::optional<std::vector<int16_t>> unwritten_;
};

}  // namespace eduba

#endif  // EDUBA_STORAGE_SESSION_LOG_H_
