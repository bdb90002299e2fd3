#ifndef EDUBA_INGEST_HDF5_FILTERS_H_
#define EDUBA_INGEST_HDF5_FILTERS_H_

#include <hdf5.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

// Internal to ingest/.
namespace eduba::hdf5 {

// The filters through which the chunks of a dataset went when they were written: shuffled, then packed once,
// then given a checksum, each of which is optional. HDF5 1.10 inflates whatever is there, so that a file of
// megabytes takes gigabytes of memory, and reads past the end of what is too short; so chunks are unpacked
// here, into exactly the bytes of their shape.
class FilterPipeline {
 public:
  // The filters of the dataset whose creation properties are `plist`. kInvalidArgument, beginning with
  // `name`, when a filter is not installed, or they are others or in another order.
  static absl::StatusOr<FilterPipeline> Of(hid_t plist, const std::string& name);

  // Whether HDF5 may unpack chunks that nobody has looked at: there are no filters.
  bool empty() const { return filters_ == 0; }
  // Whether Unpack gives the elements, each of `element_bytes`: not where a checksum has to be compared or a
  // plugin knows how, which HDF5 does.
  bool gives_elements(size_t element_bytes) const;

  // Undoes the filters on a chunk as it is stored; `skipped` has a bit for every filter that was not applied
  // to it. Empty when that does not give exactly `bytes` bytes. Where the pipeline does not give elements, so
  // much as can be checked is checked, and what is returned means nothing.
  std::vector<uint8_t> Unpack(const std::vector<uint8_t>& chunk, uint32_t skipped, size_t bytes) const;

 private:
  int filters_ = 0;
  // Places in the pipeline, -1 for a filter that is not in it. At most one of deflate, lzf and plugin is.
  int shuffle_ = -1;
  int deflate_ = -1;
  int lzf_ = -1;
  int plugin_ = -1;
  int checksum_ = -1;
  size_t shuffled_bytes_ = 0;  // The size of the elements whose bytes were shuffled.
};

}  // namespace eduba::hdf5

#endif  // EDUBA_INGEST_HDF5_FILTERS_H_
