#include "ingest/hdf5_filters.h"

#include <zlib.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
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

// `packed` as zlib unpacks it; empty when that is not exactly `bytes` bytes.
std::vector<uint8_t> Inflated(absl::Span<const uint8_t> packed, size_t bytes) {
  std::vector<uint8_t> out(bytes);
  uLongf size = bytes;
  const int status = uncompress(out.data(), &size, packed.data(), packed.size());
  if (status != Z_OK || size != bytes) out.clear();
  return out;
}

// HDF5's shuffle puts the first bytes of all elements first, then all second bytes, and so on.
std::vector<uint8_t> Unshuffled(const std::vector<uint8_t>& shuffled, size_t element_bytes) {
  const size_t count = shuffled.size() / element_bytes;
  std::vector<uint8_t> out(shuffled.size());
  for (size_t byte = 0; byte < element_bytes; ++byte) {
    const uint8_t* const plane = &shuffled[byte * count];
    for (size_t i = 0; i < count; ++i) out[i * element_bytes + byte] = plane[i];
  }
  return out;
}

}  // namespace

absl::StatusOr<FilterPipeline> FilterPipeline::Of(hid_t plist, const std::string& name) {
  FilterPipeline out;
  const auto unreadable = [&name] { return Error(absl::StrCat(name, ": cannot read how it is compressed")); };
  out.filters_ = H5Pget_nfilters(plist);
  if (out.filters_ < 0) return unreadable();
  for (int i = 0; i < out.filters_; ++i) {
    unsigned flags = 0;
    unsigned config = 0;
    unsigned parameter = 0;
    size_t parameters = 1;
    const H5Z_filter_t filter =
        H5Pget_filter2(plist, static_cast<unsigned>(i), &flags, &parameters, &parameter, 0, nullptr, &config);
    if (filter < 0) return unreadable();
    if (H5Zfilter_avail(filter) <= 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": is compressed with HDF5 filter ", filter, FilterName(filter),
                       ", which is not installed here; install its HDF5 plugin or write the file again with "
                       "compression='gzip'"));
    }
    // The filters must come in the order in which h5py writes them: only then is what is stored what was
    // packed.
    const bool packed = out.deflate_ >= 0 || out.lzf_ >= 0 || out.plugin_ >= 0;
    bool known = true;
    if (filter == H5Z_FILTER_SHUFFLE) {
      known = !packed && out.checksum_ < 0 && out.shuffle_ < 0;
      out.shuffle_ = i;
      out.shuffled_bytes_ = parameters == 1 ? parameter : 0;
    } else if (filter == H5Z_FILTER_FLETCHER32) {
      known = out.checksum_ < 0;
      out.checksum_ = i;
    } else {
      known = !packed && out.checksum_ < 0 &&
              (filter == H5Z_FILTER_DEFLATE || filter == kLzfFilter || filter >= kPluginFilterMin);
      (filter == H5Z_FILTER_DEFLATE ? out.deflate_ : filter == kLzfFilter ? out.lzf_ : out.plugin_) = i;
    }
    if (!known) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": found HDF5 filter ", filter, " at place ", i, " of ", out.filters_,
                       ", wanted shuffle, one of gzip, lzf or a plugin's, fletcher32", kWriteAgain));
    }
  }
  return out;
}

bool FilterPipeline::gives_elements(size_t element_bytes) const {
  return plugin_ < 0 && checksum_ < 0 && (shuffle_ < 0 || shuffled_bytes_ == element_bytes);
}

std::vector<uint8_t> FilterPipeline::Unpack(const std::vector<uint8_t>& chunk, uint32_t skipped,
                                            size_t bytes) const {
  const auto applied = [skipped](int place) { return place >= 0 && (skipped >> place & 1) == 0; };
  absl::Span<const uint8_t> packed = absl::MakeConstSpan(chunk);
  if (applied(checksum_)) {
    if (packed.size() < kChecksumBytes) return {};
    packed.remove_suffix(kChecksumBytes);
  }
  std::vector<uint8_t> out;
  if (applied(plugin_)) {
    out.resize(bytes);  // Its size is the plugin's to check.
  } else if (applied(deflate_)) {
    out = Inflated(packed, bytes);
  } else if (applied(lzf_)) {
    auto unpacked = LzfDecompress(packed, bytes);
    if (unpacked.ok()) out = *std::move(unpacked);
  } else {
    out.assign(packed.begin(), packed.end());
  }
  if (out.size() != bytes) return {};
  if (!applied(shuffle_) || shuffled_bytes_ <= 1) return out;
  return Unshuffled(out, shuffled_bytes_);
}

}  // namespace eduba::hdf5
