#include "storage/session_log.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "base/wire_array.h"

namespace eduba {
namespace {

// REQUIRES: whole elements.
template <typename T>
std::vector<T> ElementsIn(absl::Span<const char> bytes) {
  std::vector<T> elements(bytes.size() / sizeof(T));
  if (!elements.empty()) std::memcpy(elements.data(), bytes.data(), elements.size() * sizeof(T));
  return elements;
}

// A frame has passed its checksum, and still says what no release writes.
absl::Status Strange(const Frame& frame) {
  return absl::DataLossError(absl::StrCat(
      "the frame at byte ", frame.place.offset, " of segment ", frame.place.segment, " makes no sense (kind ",
      static_cast<uint32_t>(frame.header.kind), "); was it written by a newer release?"));
}

absl::Status ReplayFrame(const Frame& frame, const RowBytes& row, AppendLog& replay) {
  const FrameHeader& header = frame.header;
  switch (header.kind) {
    case FrameKind::kBegin: {
      if (frame.payload.size() % (2 * sizeof(int64_t)) != 0) return Strange(frame);
      AppendShare share;
      share.at = header.first;
      share.count = header.count;
      const std::vector<int64_t> bounds = ElementsIn<int64_t>(frame.payload);
      for (size_t i = 0; i < bounds.size(); i += 2) share.owned.push_back({bounds[i], bounds[i + 1]});
      return replay.Begin(share);
    }
    case FrameKind::kRows: {
      const auto size = static_cast<int64_t>(frame.payload.size());
      if (header.count < 1 || header.count > size || header.count * row.total() != size)
        return Strange(frame);
      const auto keys = static_cast<size_t>(header.count * row.keys);
      return replay.AddRows(header.layer, header.first, header.count, frame.payload.first(keys),
                            frame.payload.subspan(keys));
    }
    case FrameKind::kSeal: {
      if (frame.payload.size() % sizeof(int16_t) != 0) return Strange(frame);
      AppendSeal seal;
      seal.digest = {static_cast<uint64_t>(header.first), static_cast<uint64_t>(header.count)};
      seal.exponents = ElementsIn<int16_t>(frame.payload);
      return replay.Seal(seal);
    }
    case FrameKind::kPublish:
      if (frame.payload.size() % sizeof(int16_t) != 0) return Strange(frame);
      return replay.Publish(ElementsIn<int16_t>(frame.payload));
    default:
      return Strange(frame);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<SessionLog>> SessionLog::Open(const std::string& folder, const RowBytes& row,
                                                             AppendLog& replay) {
  auto log = std::unique_ptr<SessionLog>(new SessionLog);
  EDUBA_ASSIGN_OR_RETURN(log->log_, FrameLog::Open(folder, [&](const Frame& frame) {
                           if (frame.header.kind == FrameKind::kBegin) log->begun_ = frame.place;
                           if (frame.header.kind == FrameKind::kPublish) log->begun_.reset();
                           return ReplayFrame(frame, row, replay);
                         }));
  return log;
}

absl::Status SessionLog::Begin(const AppendShare& share) {
  if (unwritten_) EDUBA_RETURN_IF_ERROR(WritePublish(*unwritten_));
  if (begun_) return absl::FailedPreconditionError("another append to this session is under way");
  const LogPlace place = log_->end();
  std::vector<int64_t> bounds;
  for (const PositionRange& range : share.owned) {
    bounds.push_back(range.begin);
    bounds.push_back(range.end);
  }
  FrameHeader header;
  header.kind = FrameKind::kBegin;
  header.first = share.at;
  header.count = share.count;
  EDUBA_RETURN_IF_ERROR(log_->Append(header, {AsBytes(absl::MakeConstSpan(bounds))}));
  begun_ = place;
  return absl::OkStatus();
}

absl::Status SessionLog::AddRows(int layer, int64_t first, int64_t count, absl::Span<const char> keys,
                                 absl::Span<const char> values) {
  FrameHeader header;
  header.kind = FrameKind::kRows;
  header.layer = layer;
  header.first = first;
  header.count = count;
  return log_->Append(header, {keys, values});
}

absl::Status SessionLog::Seal(const AppendSeal& seal) {
  FrameHeader header;
  header.kind = FrameKind::kSeal;
  header.first = static_cast<int64_t>(seal.digest.low);
  header.count = static_cast<int64_t>(seal.digest.high);
  return log_->Append(header, {AsBytes(absl::MakeConstSpan(seal.exponents))});
}

absl::Status SessionLog::Publish(absl::Span<const int16_t> exponents) {
  const absl::Status status = WritePublish(exponents);
  if (status.ok()) return status;
  LogWarning(absl::StrCat(std::string(status.message()), "; reads go on, and appends when there is space"));
  unwritten_.emplace(exponents.begin(), exponents.end());
  return absl::OkStatus();
}

absl::Status SessionLog::WritePublish(absl::Span<const int16_t> exponents) {
  FrameHeader header;
  header.kind = FrameKind::kPublish;
  EDUBA_RETURN_IF_ERROR(log_->Append(header, {AsBytes(exponents)}));
  unwritten_.reset();
  begun_.reset();
  log_->Rest();  // There may be more sessions than a process may have files.
  return absl::OkStatus();
}

absl::Status SessionLog::Cut() {
  if (!begun_ || unwritten_) return absl::OkStatus();
  EDUBA_RETURN_IF_ERROR(log_->CutTo(*begun_));
  begun_.reset();
  return absl::OkStatus();
}

}  // namespace eduba
