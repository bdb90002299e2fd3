#ifndef EDUBA_INGEST_LZF_H_
#define EDUBA_INGEST_LZF_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace eduba {

// HDF5's number for it, as registered with The HDF Group.
inline constexpr int kLzfFilter = 32000;

// Decompresses one LZF block, the compression that h5py and anndata 0.7 made popular. (Debian's plugin for it
// lacks a library and does not load.) kInvalidArgument when the block is broken or holds more than
// `bytes_max`.
absl::StatusOr<std::vector<uint8_t>> LzfDecompress(absl::Span<const uint8_t> block, size_t bytes_max);

// Makes HDF5 read arrays that h5py compressed with 'lzf' (filter 32000), in this process. They cannot be
// written.
void RegisterLzfFilter();

}  // namespace eduba

#endif  // EDUBA_INGEST_LZF_H_
