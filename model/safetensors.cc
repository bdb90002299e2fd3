#include "model/safetensors.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "model/json.h"
#include "model/read_file.h"

namespace eduba {
namespace {

using nlohmann::json;

constexpr int64_t kLengthBytes = 8;
// An index names every tensor of a model with its shard.
constexpr int64_t kIndexBytesMax = int64_t{16} << 20;

struct StoredDType {
  absl::string_view name;
  int64_t bytes;
};
// The format's types of whole bytes. All are measured, so that offsets can be checked; only three are
// weights.
constexpr StoredDType kStoredDTypes[] = {
    {"F32", 4},  {"F16", 2}, {"BF16", 2},    {"F64", 8},     {"I64", 8},     {"I32", 4},
    {"I16", 2},  {"I8", 1},  {"U64", 8},     {"U32", 4},     {"U16", 2},     {"U8", 1},
    {"BOOL", 1}, {"C64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
};

const StoredDType* FindStoredDType(absl::string_view name) {
  const auto* found = std::find_if(std::begin(kStoredDTypes), std::end(kStoredDTypes),
                                   [&](const StoredDType& type) { return type.name == name; });
  return found == std::end(kStoredDTypes) ? nullptr : found;
}

// A whole number >= 0 that fits an int64; -1 for anything else.
int64_t Unsigned(const json& value) {
  if (!value.is_number_unsigned()) return -1;
  const auto number = value.get<uint64_t>();
  return number > INT64_MAX ? -1 : static_cast<int64_t>(number);
}

absl::StatusOr<StoredTensor> ParseTensor(const json& entry, int64_t data_bytes, const std::string& where) {
  const auto bad = [&](auto&&... what) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": ", what...));
  };
  if (!entry.is_object() || entry.size() != 3 || !entry.contains("dtype") || !entry.contains("shape") ||
      !entry.contains("data_offsets")) {
    return bad("is ", JsonText(entry), ", wanted {dtype, shape, data_offsets}");
  }
  const json& dtype = entry["dtype"];
  const StoredDType* type =
      dtype.is_string() ? FindStoredDType(dtype.get_ref<const std::string&>()) : nullptr;
  if (type == nullptr) return bad("unknown dtype ", JsonText(dtype), "; weights are F32, F16 or BF16");

  StoredTensor tensor;
  tensor.dtype = std::string(type->name);
  const json& shape = entry["shape"];
  if (!shape.is_array() || shape.size() > kSafetensorsRankMax) {
    return bad("shape ", JsonText(shape), " is no list of at most ", kSafetensorsRankMax, " sizes");
  }
  int64_t bytes = type->bytes;
  for (const json& dimension : shape) {
    const int64_t size = Unsigned(dimension);
    if (size < 1) return bad("shape ", JsonText(shape), " has a size that is not a whole number above 0");
    if (__builtin_mul_overflow(bytes, size, &bytes)) {
      return bad("shape ", JsonText(shape), " is more bytes than 2^63");
    }
    tensor.shape.push_back(size);
  }

  const json& offsets = entry["data_offsets"];
  const bool pair = offsets.is_array() && offsets.size() == 2;
  const int64_t begin = pair ? Unsigned(offsets[0]) : -1;
  const int64_t end = pair ? Unsigned(offsets[1]) : -1;
  if (begin < 0 || end < begin) return bad("data_offsets ", JsonText(offsets), " are not [begin, end]");
  if (end > data_bytes) {
    return bad("its bytes end at ", end, " of ", data_bytes,
               " in the file; the file is truncated or damaged");
  }
  if (end - begin != bytes) {
    return bad("shape ", ShapeText(tensor.shape), " of ", tensor.dtype, " is ", bytes,
               " bytes, data_offsets hold ", end - begin);
  }
  tensor.begin = begin;
  tensor.bytes = bytes;
  return tensor;
}

absl::Status CheckMetadata(const json& metadata, const std::string& name) {
  const bool texts = metadata.is_object() && std::all_of(metadata.begin(), metadata.end(),
                                                         [](const json& value) { return value.is_string(); });
  if (texts) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, ": __metadata__ is no object of texts"));
}

// Tensors lie one after the other and fill the data: nothing is shared, nothing hidden.
absl::Status CheckTiling(const SafetensorsHeader& header, int64_t data_bytes, const std::string& name) {
  std::vector<std::pair<int64_t, const std::pair<const std::string, StoredTensor>*>> order;
  for (const auto& entry : header.tensors) order.emplace_back(entry.second.begin, &entry);
  std::sort(order.begin(), order.end());
  int64_t at = 0;
  const std::string* before = nullptr;
  for (const auto& [begin, entry] : order) {
    if (begin < at) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": tensor ", JsonText(json(entry->first)),
                                                     " overlaps ", JsonText(json(*before)), " at byte ",
                                                     begin, " of the data"));
    }
    if (begin > at) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": bytes [", at, ", ", begin,
                                                     ") of the data belong to no tensor, before ",
                                                     JsonText(json(entry->first))));
    }
    at = begin + entry->second.bytes;
    before = &entry->first;
  }
  if (at == data_bytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, ": the tensors end at byte ", at, " of the data, the file has ", data_bytes));
}

}  // namespace

std::string ShapeText(absl::Span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

std::optional<DType> WeightDType(const std::string& stored) {
  if (stored == "F32") return DType::kF32;
  if (stored == "F16") return DType::kF16;
  if (stored == "BF16") return DType::kBf16;
  return std::nullopt;
}

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::Span<const uint8_t> start, int64_t file_bytes,
                                                         const std::string& name) {
  if (file_bytes < kLengthBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": ", file_bytes, " bytes are no safetensors file; is the download complete?"));
  }
  EDUBA_CHECK(static_cast<int64_t>(start.size()) >=
              std::min(file_bytes, kLengthBytes + kSafetensorsHeaderBytesMax));
  uint64_t length = 0;
  std::memcpy(&length, start.data(), kLengthBytes);  // Little-endian, as every machine that Eduba runs on.
  if (length > static_cast<uint64_t>(kSafetensorsHeaderBytesMax)) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": header of ", length, " bytes, at most ",
                                                   kSafetensorsHeaderBytesMax,
                                                   " are read; is this a safetensors file?"));
  }
  const int64_t data_bytes = file_bytes - kLengthBytes - static_cast<int64_t>(length);
  if (data_bytes < 0) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": header of ", length, " bytes in a file of ",
                                                   file_bytes, "; the file is truncated"));
  }
  const absl::string_view text(reinterpret_cast<const char*>(start.data()) + kLengthBytes, length);
  if (!absl::StartsWith(text, "{")) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": header does not begin with {: not a safetensors file"));
  }
  EDUBA_ASSIGN_OR_RETURN(const json parsed,
                         ParseJson(text, {kSafetensorsHeaderBytesMax, /*depth_max=*/3}, name));

  SafetensorsHeader header;
  header.data_offset = kLengthBytes + static_cast<int64_t>(length);
  for (const auto& [key, entry] : parsed.items()) {
    if (key == "__metadata__") {
      EDUBA_RETURN_IF_ERROR(CheckMetadata(entry, name));
      continue;
    }
    if (static_cast<int64_t>(header.tensors.size()) == kSafetensorsTensorsMax) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": more than ", kSafetensorsTensorsMax, " tensors"));
    }
    const std::string where = absl::StrCat(name, ": tensor ", JsonText(json(key)));
    EDUBA_ASSIGN_OR_RETURN(StoredTensor tensor, ParseTensor(entry, data_bytes, where));
    header.tensors.emplace(key, std::move(tensor));
  }
  EDUBA_RETURN_IF_ERROR(CheckTiling(header, data_bytes, name));
  return header;
}

Safetensors::~Safetensors() {
  for (const File& file : files_) {
    if (file.memory != nullptr) munmap(file.memory, static_cast<size_t>(file.memory_bytes));
    close(file.fd);
  }
}

absl::Status Safetensors::Add(const std::string& path) {
  EDUBA_ASSIGN_OR_RETURN(const OpenedFile opened, OpenRegularFile(path));
  files_.push_back({path, opened.fd, opened.bytes});
  File& file = files_.back();
  struct stat info {};
  if (fstat(file.fd, &info) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", std::strerror(errno)));
  }
  file.changed_ns = info.st_mtim.tv_sec * 1'000'000'000 + info.st_mtim.tv_nsec;

  // The header is read, not mapped: a file that shrinks meanwhile is an error then, not a signal.
  std::vector<uint8_t> start(
      static_cast<size_t>(std::min(file.bytes, kLengthBytes + kSafetensorsHeaderBytesMax)));
  EDUBA_RETURN_IF_ERROR(ReadExactly(file.fd, 0, static_cast<int64_t>(start.size()), start.data(), path));
  EDUBA_ASSIGN_OR_RETURN(const SafetensorsHeader header, ParseSafetensorsHeader(start, file.bytes, path));
  if (header.tensors.empty()) return absl::OkStatus();

  // Writers of today pad the header so that the data is aligned. The data of older files is read into memory
  // instead, once, because elements cannot be used where they are.
  constexpr int64_t kAlignment = 8;
  const uint8_t* data = nullptr;
  const bool aligned = header.data_offset % kAlignment == 0;
  file.memory_bytes = aligned ? file.bytes : file.bytes - header.data_offset;
  void* memory =
      mmap(nullptr, static_cast<size_t>(file.memory_bytes), aligned ? PROT_READ : PROT_READ | PROT_WRITE,
           aligned ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, aligned ? file.fd : -1, 0);
  if (memory == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat(path, ": cannot map ", file.memory_bytes, " bytes: ", std::strerror(errno)));
  }
  file.memory = memory;
  if (aligned) {
    data = static_cast<const uint8_t*>(memory) + header.data_offset;
  } else {
    EDUBA_RETURN_IF_ERROR(ReadExactly(file.fd, header.data_offset, file.memory_bytes, memory, path));
    data = static_cast<const uint8_t*>(memory);
  }

  for (const auto& [name, stored] : header.tensors) {
    const int64_t element = FindStoredDType(stored.dtype)->bytes;
    if (stored.begin % element != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor ", JsonText(json(name)), " begins at byte ", stored.begin,
                       ", not a multiple of its ", element,
                       "-byte elements; write the file anew with safetensors >= 0.4"));
    }
    const auto [place, fresh] = tensors_.emplace(
        name, MappedTensor{stored.dtype, stored.shape, data + stored.begin, stored.bytes, path});
    if (!fresh) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor ", JsonText(json(name)), " is in ", place->second.file, " too"));
    }
  }
  return absl::OkStatus();
}

namespace {

// Tensor name -> file name, as an index says it.
absl::StatusOr<std::map<std::string, std::string>> ParseIndex(const std::string& path) {
  EDUBA_ASSIGN_OR_RETURN(const std::string text, ReadWholeFile(path, kIndexBytesMax));
  EDUBA_ASSIGN_OR_RETURN(const json parsed, ParseJson(text, {kIndexBytesMax, /*depth_max=*/8}, path));
  if (!parsed.is_object() || !parsed.contains("weight_map") || !parsed["weight_map"].is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": has no object weight_map"));
  }
  std::map<std::string, std::string> map;
  for (const auto& [tensor, file] : parsed["weight_map"].items()) {
    const std::string shard = file.is_string() ? file.get<std::string>() : "";
    // A name in this folder: an index may not point at files elsewhere.
    if (!absl::EndsWith(shard, ".safetensors") || absl::StrContains(shard, '/') ||
        absl::StrContains(shard, absl::string_view("\0", 1))) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": tensor ", JsonText(json(tensor)), " lies in ",
                                                     JsonText(file),
                                                     ", wanted NAME.safetensors in the same folder"));
    }
    map.emplace(tensor, shard);
  }
  return map;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Safetensors>> Safetensors::Open(const std::string& folder) {
  auto weights = std::unique_ptr<Safetensors>(new Safetensors());
  const absl::Status single = weights->Add(folder + "/model.safetensors");
  if (single.ok()) return weights;
  if (!absl::IsNotFound(single)) return single;

  const std::string index = folder + "/model.safetensors.index.json";
  const auto map = ParseIndex(index);
  if (absl::IsNotFound(map.status())) {
    return absl::NotFoundError(absl::StrCat(folder,
                                            ": neither model.safetensors nor model.safetensors.index.json; "
                                            "convert other weights to safetensors"));
  }
  EDUBA_RETURN_IF_ERROR(map.status());
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : *map) shards.insert(shard);
  if (static_cast<int64_t>(shards.size()) > kSafetensorsShardsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(index, ": ", shards.size(), " shards, at most ", kSafetensorsShardsMax, " are opened"));
  }
  for (const std::string& shard : shards) {
    EDUBA_RETURN_IF_ERROR(weights->Add(absl::StrCat(folder, "/", shard)));
  }

  for (const auto& [tensor, shard] : *map) {
    const auto found = weights->tensors_.find(tensor);
    if (found == weights->tensors_.end() || found->second.file != absl::StrCat(folder, "/", shard)) {
      return absl::InvalidArgumentError(absl::StrCat(index, ": tensor ", JsonText(json(tensor)),
                                                     " is not in ", shard, ", where the index says it is"));
    }
  }
  for (const auto& [tensor, mapped] : weights->tensors_) {
    if (map->count(tensor) > 0) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(mapped.file, ": tensor ", JsonText(json(tensor)), " is not in ", index));
  }
  return weights;
}

int64_t Safetensors::bytes() const {
  int64_t bytes = 0;
  for (const auto& [name, tensor] : tensors_) bytes += tensor.bytes;
  return bytes;
}

absl::Status Safetensors::CheckUnchanged() const {
  for (const File& file : files_) {
    struct stat info {};
    if (fstat(file.fd, &info) == 0 && info.st_size == file.bytes &&
        info.st_mtim.tv_sec * 1'000'000'000 + info.st_mtim.tv_nsec == file.changed_ns) {
      continue;
    }
    return absl::DataLossError(
        absl::StrCat(file.path, ": changed since it was opened; restart with files that nobody writes to"));
  }
  return absl::OkStatus();
}

}  // namespace eduba
