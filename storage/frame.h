#ifndef EDUBA_STORAGE_FRAME_H_
#define EDUBA_STORAGE_FRAME_H_

#include <cstdint>

#include "absl/types/span.h"

namespace eduba {

// What a frame says. The numbers are in files: they never change their meaning.
enum class FrameKind : uint32_t {
  kSegment = 1,  // The first of each segment.
  kBegin = 2,    // An append begins: its positions, and the owned ranges among them.
  kRows = 3,     // Keys and values of some positions of one layer.
  kSeal = 4,     // All rows of the append are here: their digest, and the exponents.
  kPublish = 5,  // The append is in the session, with these exponents.
  kTokens = 6,   // Ids of a model session's tokens.
  kLength = 7,   // The number of a model session's tokens that stay.
};

// The header of a frame, little-endian, 40 bytes in this order. A payload follows.
struct FrameHeader {
  uint64_t checksum = 0;  // ChecksumOf.
  FrameKind kind = FrameKind::kSegment;
  int32_t layer = 0;
  int64_t first = 0;  // What these two count depends on the kind.
  int64_t count = 0;
  uint64_t payload_bytes = 0;
};
static_assert(sizeof(FrameHeader) == 40);

// XXH3, 64 bits, seeded with the number of the frame's segment and its place in it, of the header after the
// checksum, and of the payload, which may come in pieces. A frame that is not where it was written does not
// pass.
uint64_t ChecksumOf(const FrameHeader& header, uint32_t segment, int64_t offset,
                    absl::Span<const absl::Span<const char>> payload);

}  // namespace eduba

#endif  // EDUBA_STORAGE_FRAME_H_
