#include "ingest/hdf5_chunks.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "ingest/hdf5_file.h"

namespace eduba::hdf5 {
namespace {

// How many bytes of unpacked chunks are kept for the next block, which often begins in the last chunk of this
// one. Where one chunk is larger, one is kept.
constexpr size_t kKeptBytesMax = size_t{4} << 20;
constexpr size_t kKeptChunkOverhead = 128;  // About what keeping a chunk costs besides its bytes.

// Bytes of one element in the file. H5Tget_size gives those in memory, where a reference to a value of
// variable length is a pointer; in the file it is a length, an address and an index.
size_t StoredBytes(hid_t type, size_t address_bytes) {
  const size_t bytes = H5Tget_size(type);
  switch (H5Tget_class(type)) {
    case H5T_VLEN:
      return 8 + address_bytes;
    case H5T_STRING:
      return H5Tis_variable_str(type) > 0 ? 8 + address_bytes : bytes;
    case H5T_ARRAY: {
      const Id element(H5Tget_super(type));
      const size_t element_bytes = H5Tget_size(element.get());
      return element_bytes == 0 ? bytes : bytes / element_bytes * StoredBytes(element.get(), address_bytes);
    }
    case H5T_COMPOUND: {
      size_t stored = bytes;
      for (int i = 0; i < H5Tget_nmembers(type); ++i) {
        const Id member(H5Tget_member_type(type, static_cast<unsigned>(i)));
        stored +=
            StoredBytes(member.get(), address_bytes) - H5Tget_size(member.get());  // Modulo 2^64: may shrink.
      }
      return stored;
    }
    default:
      return bytes;
  }
}

size_t AddressBytes(hid_t dataset) {
  const Id file(H5Iget_file_id(dataset));
  const Id plist(file.ok() ? H5Fget_create_plist(file.get()) : -1);
  size_t address_bytes = 8;
  size_t length_bytes = 8;
  if (plist.ok()) H5Pget_sizes(plist.get(), &address_bytes, &length_bytes);
  return address_bytes;
}

// Types whose elements have in the file the bytes that they have in memory, and that H5Tconvert can convert
// one by one.
bool IsPlain(hid_t type) {
  switch (H5Tget_class(type)) {
    case H5T_INTEGER:
    case H5T_FLOAT:
    case H5T_ENUM:
      return true;
    case H5T_STRING:
      return H5Tis_variable_str(type) == 0;
    default:
      return false;
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Chunks>> Chunks::Of(hid_t dataset, hid_t type,
                                                   const std::vector<int64_t>& shape,
                                                   const std::string& name) {
  hsize_t sizes[2] = {1, 1};
  const int axes = static_cast<int>(shape.size());
  const Id plist(H5Dget_create_plist(dataset));
  unsigned options = 0;
  if (!plist.ok() || H5Pget_chunk(plist.get(), axes, sizes) < 0 ||
      H5Pget_chunk_opts(plist.get(), &options) < 0) {
    return Error(absl::StrCat(name, ": cannot read how it is stored"));
  }
  if (options != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": found chunks at its edge stored apart from the others; write the file again"));
  }
  EDUBA_ASSIGN_OR_RETURN(const FilterPipeline filters, FilterPipeline::Of(plist.get(), name));
  std::unique_ptr<Chunks> out(new Chunks(filters));
  out->dataset_ = dataset;
  out->type_ = type;
  out->name_ = name;
  out->axes_ = axes;
  out->element_bytes_ = StoredBytes(type, AddressBytes(dataset));
  unsigned __int128 bytes = out->element_bytes_;
  unsigned __int128 chunks = 1;
  for (int i = 0; i < axes; ++i) {
    const int axis = 2 - axes + i;
    bytes *= sizes[i];  // Chunks have 32-bit sizes: no overflow with two of them.
    out->chunk_[axis] = static_cast<int64_t>(sizes[i]);
    const hsize_t along = (static_cast<hsize_t>(shape[i]) + sizes[i] - 1) / sizes[i];
    chunks *= along;
    if (axis == 1) out->chunks_wide_ = static_cast<int64_t>(along);
  }
  if (bytes == 0 || bytes > kChunkBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": found chunks of ", bytes > UINT64_MAX ? UINT64_MAX : static_cast<uint64_t>(bytes),
        " bytes, wanted 1 to ", kChunkBytesMax, "; write the file again with smaller chunks"));
  }
  out->bytes_ = static_cast<size_t>(bytes);
  out->serves_ = !filters.empty() && IsPlain(type) && filters.gives_elements(out->element_bytes_);
  // Every chunk has an entry in the file (IsWholeInFile), so the file is larger than this.
  out->checked_.resize(static_cast<size_t>(chunks), false);
  return out;
}

Chunks::Block Chunks::BlockOf(const std::vector<int64_t>& begin, const std::vector<int64_t>& count) const {
  Block block;
  for (int i = 0; i < axes_; ++i) {
    const int axis = 2 - axes_ + i;
    block.begin[axis] = begin[i];
    block.end[axis] = begin[i] + count[i];
  }
  return block;
}

Chunks::Block Chunks::Place(int64_t row, int64_t column) const {
  return {{row * chunk_[0], column * chunk_[1]}, {(row + 1) * chunk_[0], (column + 1) * chunk_[1]}};
}

absl::StatusOr<std::vector<uint8_t>> Chunks::Unpacked(const Block& chunk) const {
  hsize_t offset[2] = {0, 0};
  for (int i = 0; i < axes_; ++i) offset[i] = static_cast<hsize_t>(chunk.begin[2 - axes_ + i]);
  hsize_t stored = 0;
  if (H5Dget_chunk_storage_size(dataset_, offset, &stored) < 0) {
    return Error(absl::StrCat(name_, ": cannot find the chunk of row ", offset[0]));
  }
  // What cannot be packed grows a little.
  if (stored > bytes_ + bytes_ / 8 + 4096) {
    return absl::InvalidArgumentError(absl::StrCat(name_, ": found a chunk of ", stored, " bytes at row ",
                                                   offset[0], ", wanted about ", bytes_,
                                                   " at most; the file is broken: copy or write it again"));
  }
  std::vector<uint8_t> packed(static_cast<size_t>(stored));
  uint32_t skipped = 0;
  if (H5Dread_chunk(dataset_, H5P_DEFAULT, offset, &skipped, packed.data()) < 0) {
    return Error(absl::StrCat(name_, ": cannot read the chunk of row ", offset[0]));
  }
  std::vector<uint8_t> unpacked = filters_.Unpack(packed, skipped, bytes_);
  if (unpacked.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(name_, ": found a chunk at row ", offset[0], " that does not unpack to the ", bytes_,
                     " bytes of its shape; the file is broken: copy or write it again"));
  }
  return unpacked;
}

absl::StatusOr<const std::vector<uint8_t>*> Chunks::Kept(int64_t row, int64_t column) {
  const int64_t place = row * chunks_wide_ + column;
  const auto found = kept_.find(place);
  if (found != kept_.end()) return &found->second;
  if ((kept_.size() + 1) * (bytes_ + kKeptChunkOverhead) > kKeptBytesMax) kept_.clear();
  EDUBA_ASSIGN_OR_RETURN(std::vector<uint8_t> unpacked, Unpacked(Place(row, column)));
  return &kept_.emplace(place, std::move(unpacked)).first->second;
}

absl::Status Chunks::Read(hid_t type, const std::vector<int64_t>& begin, const std::vector<int64_t>& count,
                          void* out) {
  EDUBA_CHECK(serves_);
  const Block block = BlockOf(begin, count);
  const int64_t width = block.end[1] - block.begin[1];
  const int64_t elements = (block.end[0] - block.begin[0]) * width;
  const size_t memory_bytes = H5Tget_size(type);
  // H5Tconvert converts in place.
  std::vector<uint8_t> converted(static_cast<size_t>(elements) * std::max(element_bytes_, memory_bytes));
  for (int64_t row = block.begin[0] / chunk_[0]; row * chunk_[0] < block.end[0]; ++row) {
    for (int64_t column = block.begin[1] / chunk_[1]; column * chunk_[1] < block.end[1]; ++column) {
      EDUBA_ASSIGN_OR_RETURN(const std::vector<uint8_t>* const chunk, Kept(row, column));
      const Block place = Place(row, column);
      const int64_t left = std::max(block.begin[1], place.begin[1]);
      const int64_t right = std::min(block.end[1], place.end[1]);
      for (int64_t r = std::max(block.begin[0], place.begin[0]); r < std::min(block.end[0], place.end[0]);
           ++r) {
        const int64_t from = (r - place.begin[0]) * chunk_[1] + left - place.begin[1];
        const int64_t to = (r - block.begin[0]) * width + left - block.begin[1];
        std::memcpy(converted.data() + to * element_bytes_, chunk->data() + from * element_bytes_,
                    (right - left) * element_bytes_);
      }
    }
  }
  if (H5Tconvert(type_, type, static_cast<size_t>(elements), converted.data(), nullptr, H5P_DEFAULT) < 0) {
    return Error(absl::StrCat(name_, ": cannot convert rows ", begin[0], " to ", begin[0] + count[0]));
  }
  std::memcpy(out, converted.data(), static_cast<size_t>(elements) * memory_bytes);
  return absl::OkStatus();
}

absl::Status Chunks::CheckBlock(const std::vector<int64_t>& begin, const std::vector<int64_t>& count) {
  if (filters_.empty()) return absl::OkStatus();
  const Block block = BlockOf(begin, count);
  for (int64_t row = block.begin[0] / chunk_[0]; row * chunk_[0] < block.end[0]; ++row) {
    for (int64_t column = block.begin[1] / chunk_[1]; column * chunk_[1] < block.end[1]; ++column) {
      const auto place = static_cast<size_t>(row * chunks_wide_ + column);
      if (checked_[place]) continue;
      EDUBA_RETURN_IF_ERROR(Unpacked(Place(row, column)).status());
      checked_[place] = true;
    }
  }
  return absl::OkStatus();
}

}  // namespace eduba::hdf5
