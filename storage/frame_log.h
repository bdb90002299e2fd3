#ifndef EDUBA_STORAGE_FRAME_LOG_H_
#define EDUBA_STORAGE_FRAME_LOG_H_

#include <compare>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/mutex.h"
#include "storage/file.h"
#include "storage/frame.h"

namespace eduba {

// A place between two frames of a log.
struct LogPlace {
  uint32_t segment = 1;  // Segments are numbered from 1.
  int64_t offset = 0;

  auto operator<=>(const LogPlace&) const = default;
};

// A frame as it is read again. Valid during the call that gets it.
struct Frame {
  FrameHeader header;
  absl::Span<const char> payload;  // Aligned to 8 bytes.
  LogPlace place;                  // The place of its first byte.
};

// Frames, one after another, in the segment files of one folder: 00000001.frames, 00000002.frames and so on.
// A segment takes frames until it has kSegmentBytes. Nothing that is on the disk is changed by reading it;
// what lies after the last whole frame is cut off when the next frame is written.
//
// Append, CutTo and end are thread-safe, and so is Sync, which does not hold up the others.
class FrameLog {
 public:
  static constexpr int64_t kSegmentBytes = int64_t{64} << 20;

  // Reads the folder's frames in order and calls `visit` with each, until one is not whole or is not what was
  // written (damage() says so then), or until visit returns an error, which is returned. The folder is there,
  // and nobody else writes to it.
  static absl::StatusOr<std::unique_ptr<FrameLog>> Open(
      const std::string& folder, absl::FunctionRef<absl::Status(const Frame& frame)> visit);

  // Adds a frame; `header` is without checksum and size. RESOURCE_EXHAUSTED or UNAVAILABLE: the log is as
  // before.
  absl::Status Append(FrameHeader header, absl::Span<const absl::Span<const char>> payload);
  // Makes room for frames of `bytes` in all, headers included: Append takes as many, where the file system
  // can promise it. RESOURCE_EXHAUSTED or UNAVAILABLE as Append.
  absl::Status Reserve(int64_t bytes);
  // All frames that were appended before are on the disk when this returns. Errors: AppendFile::Sync.
  absl::Status Sync();
  // Drops all frames from `place` on, which is where a frame begins, or the end. The disk has dropped them
  // when the next Sync returns.
  absl::Status CutTo(LogPlace place);
  // Closes the files until the next Append. REQUIRES: nobody waits for a Sync.
  void Rest();

  // Where the next frame begins.
  LogPlace end() const;
  // What Open found wrong after the last whole frame, as a sentence; empty: nothing.
  const std::string& damage() const { return damage_; }

 private:
  explicit FrameLog(std::string folder) : folder_(std::move(folder)) {}

  std::string PathOf(uint32_t segment) const;
  // Reads one segment. False: no frame comes after those that were read.
  absl::StatusOr<bool> ReadSegment(uint32_t segment, std::vector<uint64_t>& buffer,
                                   absl::FunctionRef<absl::Status(const Frame& frame)> visit);
  // Opens the last segment, or the next one where that is full.
  absl::Status PrepareToWrite() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status BeginSegment(uint32_t segment) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status WriteFrame(FrameHeader header, absl::Span<const absl::Span<const char>> payload)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status RemoveSegmentsAfter(uint32_t segment);

  const std::string folder_;
  std::string damage_;

  mutable Mutex mutex_;
  LogPlace end_ ABSL_GUARDED_BY(mutex_);
  // The segments that have been written to since Rest; the last one takes the next frame. Empty: none is
  // open.
  std::vector<std::shared_ptr<AppendFile>> open_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace eduba

#endif  // EDUBA_STORAGE_FRAME_LOG_H_
