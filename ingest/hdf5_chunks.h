#ifndef EDUBA_INGEST_HDF5_CHUNKS_H_
#define EDUBA_INGEST_HDF5_CHUNKS_H_

#include <hdf5.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Internal to ingest/.
namespace eduba::hdf5 {

// Finds out, before HDF5 unpacks a chunk, that it unpacks to exactly the bytes of its shape. HDF5 1.10
// inflates whatever is there, so that a file of megabytes takes gigabytes of memory, and reads past the end
// of what is too short. Costs a second inflation of every chunk that is read. Not thread-safe, as HDF5 is
// not.
class ChunkCheck {
 public:
  // For a chunked dataset of this shape (one or two axes) and type. kInvalidArgument, beginning with `name`,
  // when its filters are not installed or are none that can be checked (those of plugins are trusted), or a
  // chunk is larger than kChunkBytesMax.
  static absl::StatusOr<std::unique_ptr<ChunkCheck>> Of(hid_t dataset, hid_t type,
                                                        const std::vector<int64_t>& shape,
                                                        const std::string& name);

  // Checks the chunks that hold a part of the block [begin, begin + count), each once in this object's life.
  // REQUIRES: the block is not empty and lies in the shape.
  absl::Status CheckBlock(const std::vector<int64_t>& begin, const std::vector<int64_t>& count);

 private:
  ChunkCheck() = default;

  // Fills in deflate_, lzf_, plugin_ and checksum_.
  absl::Status ReadFilters(hid_t plist);
  absl::Status CheckChunk(const hsize_t* offset) const;
  // `chunk` as stored; `skipped` has a bit for every filter that was not applied to it.
  absl::Status CheckPacked(const std::vector<uint8_t>& chunk, uint32_t skipped, hsize_t row) const;

  hid_t dataset_ = -1;  // Not owned.
  std::string name_;
  size_t bytes_ = 0;  // Of a chunk, unpacked.
  std::vector<hsize_t> chunk_;
  // Places in the pipeline, -1 for a filter that is not in it. At most one of the first three is.
  int deflate_ = -1;
  int lzf_ = -1;
  int plugin_ = -1;
  int checksum_ = -1;
  int filters_ = 0;
  hsize_t chunks_wide_ = 1;  // Along the second axis.
  std::vector<bool> checked_;
};

// No writer of .h5ad comes near: h5py's own chunks have a megabyte at most.
inline constexpr size_t kChunkBytesMax = size_t{1} << 28;

}  // namespace eduba::hdf5

#endif  // EDUBA_INGEST_HDF5_CHUNKS_H_
