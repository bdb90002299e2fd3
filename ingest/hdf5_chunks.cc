#include "ingest/hdf5_chunks.h"

#include <zlib.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "ingest/hdf5_file.h"
#include "ingest/lzf.h"

namespace eduba::hdf5 {
namespace {

constexpr char kWriteAgain[] = "; write the file again with compression='gzip'";
// Filters below this number are HDF5's own.
constexpr H5Z_filter_t kPluginFilterMin = 256;
constexpr size_t kChecksumBytes = 4;

// The filters that hdf5plugin adds to h5py, for the message.
const char* FilterName(H5Z_filter_t filter) {
  switch (filter) {
    case 32001:
      return " (Blosc)";
    case 32004:
      return " (LZ4)";
    case 32008:
      return " (Bitshuffle)";
    case 32015:
      return " (Zstandard)";
    case 32026:
      return " (Blosc2)";
    default:
      return "";
  }
}

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

// Whether `packed` is a zlib stream of exactly `bytes` bytes. Needs memory for neither.
bool InflatesTo(absl::Span<const uint8_t> packed, size_t bytes) {
  z_stream stream = {};
  if (inflateInit(&stream) != Z_OK) return false;
  stream.next_in = const_cast<Bytef*>(packed.data());  // zlib only reads there.
  stream.avail_in = static_cast<uInt>(packed.size());
  std::vector<uint8_t> scratch(size_t{1} << 16);
  int status = Z_OK;
  while (status == Z_OK && stream.total_out <= bytes) {
    stream.next_out = scratch.data();
    stream.avail_out = static_cast<uInt>(scratch.size());
    status = inflate(&stream, Z_NO_FLUSH);
  }
  const size_t total = stream.total_out;
  inflateEnd(&stream);
  return status == Z_STREAM_END && total == bytes;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ChunkCheck>> ChunkCheck::Of(hid_t dataset, hid_t type,
                                                           const std::vector<int64_t>& shape,
                                                           const std::string& name) {
  std::unique_ptr<ChunkCheck> check(new ChunkCheck());
  check->dataset_ = dataset;
  check->name_ = name;
  check->chunk_.resize(shape.size());
  const Id plist(H5Dget_create_plist(dataset));
  unsigned options = 0;
  if (!plist.ok() || H5Pget_chunk(plist.get(), static_cast<int>(shape.size()), check->chunk_.data()) < 0 ||
      H5Pget_chunk_opts(plist.get(), &options) < 0) {
    return Error(absl::StrCat(name, ": cannot read how it is stored"));
  }
  if (options != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": found chunks at its edge stored apart from the others", kWriteAgain));
  }
  unsigned __int128 bytes = StoredBytes(type, AddressBytes(dataset));
  unsigned __int128 chunks = 1;
  for (size_t i = 0; i < shape.size(); ++i) {
    bytes *= check->chunk_[i];  // Chunks have 32-bit sizes: no overflow with two of them.
    const hsize_t along = (static_cast<hsize_t>(shape[i]) + check->chunk_[i] - 1) / check->chunk_[i];
    chunks *= along;
    if (i == 1) check->chunks_wide_ = along;
  }
  if (bytes == 0 || bytes > kChunkBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": found chunks of ", bytes > UINT64_MAX ? UINT64_MAX : static_cast<uint64_t>(bytes),
        " bytes, wanted 1 to ", kChunkBytesMax, "; write the file again with smaller chunks"));
  }
  check->bytes_ = static_cast<size_t>(bytes);
  EDUBA_RETURN_IF_ERROR(check->ReadFilters(plist.get()));
  // Every chunk has an entry in the file (IsWholeInFile), so the file is larger than this.
  check->checked_.resize(static_cast<size_t>(chunks), false);
  return check;
}

absl::Status ChunkCheck::ReadFilters(hid_t plist) {
  filters_ = H5Pget_nfilters(plist);
  if (filters_ < 0) return Error(absl::StrCat(name_, ": cannot read how it is compressed"));
  for (int i = 0; i < filters_; ++i) {
    unsigned flags = 0;
    unsigned config = 0;
    size_t values = 0;
    const H5Z_filter_t filter =
        H5Pget_filter2(plist, static_cast<unsigned>(i), &flags, &values, nullptr, 0, nullptr, &config);
    if (filter < 0) return Error(absl::StrCat(name_, ": cannot read how it is compressed"));
    if (H5Zfilter_avail(filter) <= 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(name_, ": is compressed with HDF5 filter ", filter, FilterName(filter),
                       ", which is not installed here; install its HDF5 plugin or write the file again with "
                       "compression='gzip'"));
    }
    // As h5py writes: shuffled, then packed once, then a checksum. Only so is what is stored what was packed.
    const bool packed = deflate_ >= 0 || lzf_ >= 0 || plugin_ >= 0;
    bool known = true;
    if (filter == H5Z_FILTER_SHUFFLE) {
      known = !packed && checksum_ < 0;
    } else if (filter == H5Z_FILTER_FLETCHER32) {
      known = checksum_ < 0;
      checksum_ = i;
    } else {
      known = !packed && checksum_ < 0 &&
              (filter == H5Z_FILTER_DEFLATE || filter == kLzfFilter || filter >= kPluginFilterMin);
      (filter == H5Z_FILTER_DEFLATE ? deflate_ : filter == kLzfFilter ? lzf_ : plugin_) = i;
    }
    if (!known) {
      return absl::InvalidArgumentError(
          absl::StrCat(name_, ": found HDF5 filter ", filter, " at place ", i, " of ", filters_,
                       ", wanted shuffle, one of gzip, lzf or a plugin's, fletcher32", kWriteAgain));
    }
  }
  return absl::OkStatus();
}

absl::Status ChunkCheck::CheckBlock(const std::vector<int64_t>& begin, const std::vector<int64_t>& count) {
  hsize_t first[2] = {0, 0};
  hsize_t last[2] = {0, 0};
  for (size_t i = 0; i < chunk_.size(); ++i) {
    first[i] = static_cast<hsize_t>(begin[i]) / chunk_[i];
    last[i] = static_cast<hsize_t>(begin[i] + count[i] - 1) / chunk_[i];
  }
  for (hsize_t row = first[0]; row <= last[0]; ++row) {
    for (hsize_t column = first[1]; column <= last[1]; ++column) {
      const auto index = static_cast<size_t>(row * chunks_wide_ + column);
      if (checked_[index]) continue;
      const hsize_t offset[2] = {row * chunk_[0], chunk_.size() > 1 ? column * chunk_[1] : 0};
      EDUBA_RETURN_IF_ERROR(CheckChunk(offset));
      checked_[index] = true;
    }
  }
  return absl::OkStatus();
}

absl::Status ChunkCheck::CheckChunk(const hsize_t* offset) const {
  if (filters_ == 0) return absl::OkStatus();
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
  std::vector<uint8_t> chunk(static_cast<size_t>(stored));
  uint32_t skipped = 0;
  if (H5Dread_chunk(dataset_, H5P_DEFAULT, offset, &skipped, chunk.data()) < 0) {
    return Error(absl::StrCat(name_, ": cannot read the chunk of row ", offset[0]));
  }
  return CheckPacked(chunk, skipped, offset[0]);
}

absl::Status ChunkCheck::CheckPacked(const std::vector<uint8_t>& chunk, uint32_t skipped, hsize_t row) const {
  const auto applied = [skipped](int place) { return place >= 0 && (skipped >> place & 1) == 0; };
  absl::Span<const uint8_t> packed = absl::MakeConstSpan(chunk);
  bool right = true;
  if (applied(checksum_)) {
    right = packed.size() >= kChecksumBytes;
    if (right) packed.remove_suffix(kChecksumBytes);
  }
  if (right && !applied(plugin_)) {
    if (applied(deflate_)) {
      right = InflatesTo(packed, bytes_);
    } else if (applied(lzf_)) {
      const auto unpacked = LzfDecompress(packed, bytes_);
      right = unpacked.ok() && unpacked->size() == bytes_;
    } else {
      right = packed.size() == bytes_;
    }
  }
  if (right) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name_, ": found a chunk at row ", row, " that does not unpack to the ", bytes_,
                   " bytes of its shape; the file is broken: copy or write it again"));
}

}  // namespace eduba::hdf5
