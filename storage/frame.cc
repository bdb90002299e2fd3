#include "storage/frame.h"

#include <bit>
#include <cstddef>

#define XXH_STATIC_LINKING_ONLY  // For a state that needs no allocation.
#include "xxhash.h"

namespace eduba {

static_assert(std::endian::native == std::endian::little, "frames are little-endian");

uint64_t ChecksumOf(const FrameHeader& header, uint32_t segment, int64_t offset,
                    absl::Span<const absl::Span<const char>> payload) {
  XXH3_state_t state;
  XXH3_64bits_reset_withSeed(&state, (uint64_t{segment} << 40) ^ static_cast<uint64_t>(offset));
  constexpr size_t kFrom = offsetof(FrameHeader, kind);
  XXH3_64bits_update(&state, reinterpret_cast<const char*>(&header) + kFrom, sizeof(header) - kFrom);
  for (const absl::Span<const char> piece : payload) XXH3_64bits_update(&state, piece.data(), piece.size());
  return XXH3_64bits_digest(&state);
}

}  // namespace eduba
