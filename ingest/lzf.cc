#include "ingest/lzf.h"

#include <hdf5.h>

#include <cstring>

#include "absl/status/status.h"

namespace eduba {
namespace {

// A back-reference of 3 bytes copies at most 264.
constexpr size_t kExpansionMax = 88;

// HDF5's interface: replaces *buffer, and returns the bytes in it, or 0 on failure. FilterPipeline has seen
// the chunk.
size_t LzfFilter(unsigned flags, size_t /*parameters*/, const unsigned /*parameter*/[], size_t bytes,
                 size_t* buffer_bytes, void** buffer) {
  if ((flags & H5Z_FLAG_REVERSE) == 0) return 0;
  const auto chunk = LzfDecompress({static_cast<const uint8_t*>(*buffer), bytes}, bytes * kExpansionMax);
  if (!chunk.ok() || chunk->empty()) return 0;
  void* out = H5allocate_memory(chunk->size(), /*clear=*/false);
  if (out == nullptr) return 0;
  std::memcpy(out, chunk->data(), chunk->size());
  H5free_memory(*buffer);
  *buffer = out;
  *buffer_bytes = chunk->size();
  return chunk->size();
}

}  // namespace

absl::StatusOr<std::vector<uint8_t>> LzfDecompress(absl::Span<const uint8_t> block, size_t bytes_max) {
  const absl::Status broken = absl::InvalidArgumentError("broken LZF block");
  std::vector<uint8_t> out;
  size_t at = 0;
  while (at < block.size()) {
    const size_t control = block[at++];
    if (control < 32) {  // control + 1 bytes as they are.
      const size_t count = control + 1;
      if (count > block.size() - at || count > bytes_max - out.size()) return broken;
      out.insert(out.end(), block.begin() + static_cast<ptrdiff_t>(at),
                 block.begin() + static_cast<ptrdiff_t>(at + count));
      at += count;
      continue;
    }
    // A copy of what came before: three bits of length (all set: one more byte of it), 13 bits of distance.
    size_t count = (control >> 5) + 2;
    if (count == 9) {
      if (at == block.size()) return broken;
      count += block[at++];
    }
    if (at == block.size()) return broken;
    const size_t distance = ((control & 31) << 8 | block[at++]) + 1;
    if (distance > out.size() || count > bytes_max - out.size()) return broken;
    // Byte by byte: the copy may overlap itself, which is how LZF writes runs.
    for (size_t i = 0; i < count; ++i) out.push_back(out[out.size() - distance]);
  }
  return out;
}

void RegisterLzfFilter() {
  const H5Z_class2_t filter = {
      H5Z_CLASS_T_VERS, kLzfFilter, /*encoder_present=*/0, /*decoder_present=*/1, "lzf", nullptr,
      nullptr,          LzfFilter};
  H5Zregister(&filter);  // Again changes nothing. Where it fails, such arrays are refused by name.
}

}  // namespace eduba
