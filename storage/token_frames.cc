#include "storage/token_frames.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "base/wire_array.h"

namespace eduba {
namespace {

// Ids of one frame at most.
constexpr int64_t kFrameIds = int64_t{1} << 18;

absl::Status ReadFrame(const Frame& frame, int64_t& length, TokenFrames::Reader& reader) {
  const FrameHeader& header = frame.header;
  const bool adds = header.kind == FrameKind::kTokens && header.first == length &&
                    frame.payload.size() % sizeof(int32_t) == 0 && (header.layer == 0 || header.layer == 1);
  if (adds) {
    const auto* ids = reinterpret_cast<const int32_t*>(frame.payload.data());
    const size_t count = frame.payload.size() / sizeof(int32_t);
    length += static_cast<int64_t>(count);
    return reader.Add(header.first, absl::MakeConstSpan(ids, count), header.layer == 1);
  }
  if (header.kind == FrameKind::kLength && header.first >= 0 && header.first <= length) {
    length = header.first;
    return reader.SetLength(length);
  }
  return absl::DataLossError(absl::StrCat("the frame at byte ", frame.place.offset, " of segment ",
                                          frame.place.segment, " does not follow the ", length,
                                          " tokens before it"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<TokenFrames>> TokenFrames::Open(const std::string& folder, Reader& reader) {
  auto tokens = std::unique_ptr<TokenFrames>(new TokenFrames);
  int64_t length = 0;
  EDUBA_ASSIGN_OR_RETURN(tokens->frames_, FrameLog::Open(folder, [&](const Frame& frame) {
                           return ReadFrame(frame, length, reader);
                         }));
  return tokens;
}

absl::Status TokenFrames::Reserve(int64_t count) {
  // Every id may come in a frame of its own.
  return frames_->Reserve(count * static_cast<int64_t>(sizeof(FrameHeader) + sizeof(int32_t)));
}

absl::Status TokenFrames::Add(int64_t at, absl::Span<const int32_t> ids, bool generated) {
  for (; !ids.empty(); ids.remove_prefix(std::min<size_t>(kFrameIds, ids.size()))) {
    const absl::Span<const int32_t> some = ids.subspan(0, kFrameIds);
    FrameHeader header;
    header.kind = FrameKind::kTokens;
    header.layer = generated ? 1 : 0;
    header.first = at;
    header.count = std::ssize(some);
    EDUBA_RETURN_IF_ERROR(frames_->Append(header, {AsBytes(some)}));
    at += std::ssize(some);
  }
  return absl::OkStatus();
}

absl::Status TokenFrames::SetLength(int64_t length) {
  FrameHeader header;
  header.kind = FrameKind::kLength;
  header.first = length;
  return frames_->Append(header, {});
}

}  // namespace eduba
