#include "storage/frame_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/read_at.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

// "edubaLOG", and the version of the format, of the first frame of a segment.
constexpr int64_t kMagic = 0x474f4c6162756465;
constexpr int64_t kVersion = 1;
constexpr char kSuffix[] = ".frames";
// A frame holds one piece of an upload, which a message holds too: far fewer bytes than these.
constexpr uint64_t kPayloadBytesMax = uint64_t{1} << 30;

// Reads a segment from its beginning to its end, through a buffer.
class SegmentReader {
 public:
  // `buffer` may be used by one reader after another.
  SegmentReader(std::string path, int fd, int64_t size, std::vector<uint64_t>& buffer)
      : path_(std::move(path)), fd_(fd), size_(size), buffer_(buffer) {}
  ~SegmentReader() { close(fd_); }
  SegmentReader(const SegmentReader&) = delete;
  SegmentReader& operator=(const SegmentReader&) = delete;

  // Where the next frame begins.
  int64_t offset() const { return offset_; }

  // False: the file has fewer bytes after offset() + skip.
  absl::StatusOr<bool> Peek(int64_t skip, int64_t bytes, const char** found) {
    const int64_t begin = offset_ + skip;
    if (begin < from_ || begin + bytes > from_ + held_) {
      // Frames begin at any byte; what is given away begins at a multiple of 8 of the buffer.
      const int64_t wanted = std::min(std::max(bytes, kReadBytes), std::max<int64_t>(0, size_ - begin));
      const auto words = static_cast<size_t>((wanted + 7) / 8);
      if (buffer_.size() < words) buffer_.resize(words);
      from_ = begin;
      absl::StatusOr<int64_t> count = ReadAt(
          fd_, from_, absl::MakeSpan(reinterpret_cast<char*>(buffer_.data()), static_cast<size_t>(wanted)));
      if (!count.ok()) return Annotate(count.status(), absl::StrCat("cannot read ", path_));
      held_ = *count;
    }
    *found = reinterpret_cast<const char*>(buffer_.data()) + (begin - from_);
    return begin + bytes <= from_ + held_;
  }
  void Advance(int64_t bytes) { offset_ += bytes; }

 private:
  static constexpr int64_t kReadBytes = int64_t{16} << 20;

  const std::string path_;
  const int fd_;
  const int64_t size_;
  int64_t offset_ = 0;
  std::vector<uint64_t>& buffer_;
  int64_t from_ = 0;  // The file's byte at the buffer's beginning.
  int64_t held_ = 0;
};

}  // namespace

std::string FrameLog::PathOf(uint32_t segment) const {
  return absl::StrFormat("%s/%08d%s", folder_, segment, kSuffix);
}

absl::StatusOr<std::unique_ptr<FrameLog>> FrameLog::Open(
    const std::string& folder, absl::FunctionRef<absl::Status(const Frame& frame)> visit) {
  auto log = std::unique_ptr<FrameLog>(new FrameLog(folder));
  bool more = true;
  std::vector<uint64_t> buffer;
  for (uint32_t segment = 1; more; ++segment) {
    EDUBA_ASSIGN_OR_RETURN(more, log->ReadSegment(segment, buffer, visit));
  }
  return log;
}

absl::StatusOr<bool> FrameLog::ReadSegment(uint32_t segment, std::vector<uint64_t>& buffer,
                                           absl::FunctionRef<absl::Status(const Frame& frame)> visit) {
  const std::string path = PathOf(segment);
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0 && errno == ENOENT) return false;
  if (fd < 0) return absl::UnavailableError(absl::StrCat("cannot open ", path, ": ", std::strerror(errno)));
  const off_t size = lseek(fd, 0, SEEK_END);
  SegmentReader reader(path, fd, std::max<int64_t>(0, size), buffer);
  const auto stop = [&](const char* why) {
    damage_ = absl::StrCat(path, " is not whole from byte ", reader.offset(), " on: ", why);
    return false;
  };
  const MutexLock lock(mutex_);
  std::vector<uint64_t> aligned;
  while (true) {
    const char* bytes = nullptr;
    EDUBA_ASSIGN_OR_RETURN(const bool whole, reader.Peek(0, sizeof(FrameHeader), &bytes));
    if (!whole) {
      EDUBA_ASSIGN_OR_RETURN(const bool some, reader.Peek(0, 1, &bytes));
      if (some) return stop("a frame ends early");
      return true;
    }
    Frame frame;
    std::memcpy(&frame.header, bytes, sizeof(FrameHeader));
    const uint64_t bytes_after = frame.header.payload_bytes;
    if (bytes_after > kPayloadBytesMax) return stop("a frame's size is out of range");
    EDUBA_ASSIGN_OR_RETURN(const bool all,
                           reader.Peek(sizeof(FrameHeader), static_cast<int64_t>(bytes_after), &bytes));
    if (!all) return stop("a frame ends early");
    if (reinterpret_cast<uintptr_t>(bytes) % 8 != 0) {
      aligned.resize((bytes_after + 7) / 8);
      std::memcpy(aligned.data(), bytes, bytes_after);
      bytes = reinterpret_cast<const char*>(aligned.data());
    }
    frame.payload = absl::MakeConstSpan(bytes, bytes_after);
    frame.place = {segment, reader.offset()};
    if (ChecksumOf(frame.header, segment, reader.offset(), {frame.payload}) != frame.header.checksum) {
      return stop("a frame's checksum does not fit");
    }
    const bool is_first = reader.offset() == 0;
    if (is_first != (frame.header.kind == FrameKind::kSegment) ||
        (is_first && (frame.header.first != kMagic || frame.header.count != kVersion))) {
      return stop("it is not of this format");
    }
    if (!is_first) EDUBA_RETURN_IF_ERROR(visit(frame));
    reader.Advance(static_cast<int64_t>(sizeof(FrameHeader) + bytes_after));
    end_ = {segment, reader.offset()};
  }
}

absl::Status FrameLog::Append(FrameHeader header, absl::Span<const absl::Span<const char>> payload) {
  header.payload_bytes = 0;
  for (const absl::Span<const char> piece : payload) header.payload_bytes += piece.size();
  const MutexLock lock(mutex_);
  EDUBA_RETURN_IF_ERROR(PrepareToWrite());
  return WriteFrame(header, payload);
}

absl::Status FrameLog::Reserve(int64_t bytes) {
  const MutexLock lock(mutex_);
  EDUBA_RETURN_IF_ERROR(PrepareToWrite());
  return open_.back()->Reserve(bytes);
}

absl::Status FrameLog::WriteFrame(FrameHeader header, absl::Span<const absl::Span<const char>> payload) {
  AppendFile& file = *open_.back();
  header.checksum = ChecksumOf(header, end_.segment, end_.offset, payload);
  std::vector<absl::Span<const char>> pieces = {
      absl::MakeConstSpan(reinterpret_cast<const char*>(&header), sizeof(header))};
  pieces.insert(pieces.end(), payload.begin(), payload.end());
  EDUBA_RETURN_IF_ERROR(file.Append(pieces));
  end_.offset = file.size();
  return absl::OkStatus();
}

absl::Status FrameLog::PrepareToWrite() {
  if (end_.offset == 0) return BeginSegment(end_.segment);
  if (open_.empty()) {
    EDUBA_ASSIGN_OR_RETURN(AppendFile file, AppendFile::Open(PathOf(end_.segment), end_.offset));
    EDUBA_RETURN_IF_ERROR(RemoveSegmentsAfter(end_.segment));
    open_.push_back(std::make_shared<AppendFile>(std::move(file)));
  }
  return end_.offset < kSegmentBytes ? absl::OkStatus() : BeginSegment(end_.segment + 1);
}

absl::Status FrameLog::BeginSegment(uint32_t segment) {
  EDUBA_RETURN_IF_ERROR(RemoveSegmentsAfter(segment - 1));
  EDUBA_ASSIGN_OR_RETURN(AppendFile file, AppendFile::Open(PathOf(segment), 0));
  EDUBA_RETURN_IF_ERROR(SyncFolder(folder_));
  const LogPlace before = std::exchange(end_, LogPlace{segment, 0});
  open_.push_back(std::make_shared<AppendFile>(std::move(file)));
  FrameHeader header;
  header.kind = FrameKind::kSegment;
  header.first = kMagic;
  header.count = kVersion;
  absl::Status status = WriteFrame(header, {});
  if (status.ok()) return status;
  open_.pop_back();
  end_ = before;
  return status;
}

absl::Status FrameLog::RemoveSegmentsAfter(uint32_t segment) {
  EDUBA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListFolder(folder_));
  for (const std::string& name : names) {
    uint32_t number = 0;
    if (!absl::EndsWith(name, kSuffix) || !absl::SimpleAtoi(name.substr(0, name.find('.')), &number))
      continue;
    if (number <= segment) continue;
    const std::string path = absl::StrCat(folder_, "/", name);
    if (unlink(path.c_str()) != 0) {
      return absl::UnavailableError(absl::StrCat("cannot remove ", path, ": ", std::strerror(errno)));
    }
  }
  return absl::OkStatus();
}

absl::Status FrameLog::Sync() {
  std::vector<std::shared_ptr<AppendFile>> files;
  {
    const MutexLock lock(mutex_);
    files = open_;
  }
  for (const auto& file : files) EDUBA_RETURN_IF_ERROR(file->Sync());
  // Full segments that are on the disk are done with; the last one takes more.
  const MutexLock lock(mutex_);
  const std::shared_ptr<AppendFile> last = open_.empty() ? nullptr : open_.back();
  std::erase_if(open_, [&](const std::shared_ptr<AppendFile>& file) {
    return file != last && std::find(files.begin(), files.end(), file) != files.end();
  });
  return absl::OkStatus();
}

absl::Status FrameLog::CutTo(LogPlace place) {
  const MutexLock lock(mutex_);
  if (place == end_) return absl::OkStatus();
  end_ = place;
  open_.clear();
  EDUBA_ASSIGN_OR_RETURN(AppendFile file, AppendFile::Open(PathOf(place.segment), place.offset));
  open_.push_back(std::make_shared<AppendFile>(std::move(file)));
  return RemoveSegmentsAfter(place.segment);
}

void FrameLog::Rest() {
  const MutexLock lock(mutex_);
  open_.clear();
}

LogPlace FrameLog::end() const {
  const MutexLock lock(mutex_);
  return end_;
}

}  // namespace eduba
