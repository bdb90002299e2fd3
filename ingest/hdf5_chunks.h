#ifndef EDUBA_INGEST_HDF5_CHUNKS_H_
#define EDUBA_INGEST_HDF5_CHUNKS_H_

#include <hdf5.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "ingest/hdf5_filters.h"

// Internal to ingest/.
namespace eduba::hdf5 {

// The chunks of a dataset, unpacked in bounded memory: one at a time, at most kChunkBytesMax, and never to
// more or less than the bytes of its shape. Not thread-safe, as HDF5 is not.
class Chunks {
 public:
  // For a chunked dataset of this shape (one or two axes) and type. kInvalidArgument, beginning with `name`,
  // as FilterPipeline::Of, or when a chunk is larger than kChunkBytesMax.
  static absl::StatusOr<std::unique_ptr<Chunks>> Of(hid_t dataset, hid_t type,
                                                    const std::vector<int64_t>& shape,
                                                    const std::string& name);

  // Whether Read serves this dataset: numbers, booleans and text of fixed length, compressed or shuffled.
  // Everything else HDF5 has to read (after CheckBlock), because only it can follow references to text of
  // variable length, pick fields out of records, and call plugins.
  bool serves() const { return serves_; }

  // Reads the block that starts at `begin` with `count` per axis, converted to the memory type `type`.
  // kInvalidArgument when a chunk does not unpack to its size. REQUIRES: serves(); the block is not empty and
  // lies in the shape.
  absl::Status Read(hid_t type, const std::vector<int64_t>& begin, const std::vector<int64_t>& count,
                    void* out);

  // Checks, each once in this object's life, that the chunks that hold a part of the block unpack to their
  // size. REQUIRES: the block is not empty and lies in the shape.
  absl::Status CheckBlock(const std::vector<int64_t>& begin, const std::vector<int64_t>& count);

 private:
  // Positions along two axes; a dataset of one axis is one row.
  struct Block {
    int64_t begin[2] = {0, 0};
    int64_t end[2] = {1, 1};
  };

  explicit Chunks(FilterPipeline filters) : filters_(filters) {}

  Block BlockOf(const std::vector<int64_t>& begin, const std::vector<int64_t>& count) const;
  // The chunk of these places along the axes: where it is, what is stored, unpacked.
  Block Place(int64_t row, int64_t column) const;
  absl::StatusOr<std::vector<uint8_t>> Unpacked(const Block& chunk) const;
  // The same, from the few that are kept, or new.
  absl::StatusOr<const std::vector<uint8_t>*> Kept(int64_t row, int64_t column);

  hid_t dataset_ = -1;  // Not owned, as type_.
  hid_t type_ = -1;
  std::string name_;
  const FilterPipeline filters_;
  bool serves_ = false;
  int axes_ = 1;
  int64_t chunk_[2] = {1, 1};
  int64_t chunks_wide_ = 1;                       // Along the second axis.
  size_t element_bytes_ = 0;                      // In the file.
  size_t bytes_ = 0;                              // The bytes of an unpacked chunk.
  std::map<int64_t, std::vector<uint8_t>> kept_;  // By place: row * chunks_wide_ + column.
  std::vector<bool> checked_;                     // By place.
};

// No writer of .h5ad comes near: h5py's own chunks have a megabyte at most.
inline constexpr size_t kChunkBytesMax = size_t{1} << 28;

}  // namespace eduba::hdf5

#endif  // EDUBA_INGEST_HDF5_CHUNKS_H_
