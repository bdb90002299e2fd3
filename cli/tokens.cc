#include "cli/tokens.h"

#include <limits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "ingest/npy.h"
#include "model/read_file.h"

namespace eduba {
namespace {

template <typename T>
absl::StatusOr<std::vector<int32_t>> ReadAs(const NpyFile& file) {
  std::vector<T> stored(file.elements());
  EDUBA_RETURN_IF_ERROR(file.Read(0, file.elements(), stored.data()));
  std::vector<int32_t> ids;
  ids.reserve(stored.size());
  for (size_t i = 0; i < stored.size(); ++i) {
    const auto id = static_cast<int64_t>(stored[i]);
    if (id < 0 || id > std::numeric_limits<int32_t>::max()) {
      return absl::InvalidArgumentError(
          absl::StrCat(file.path(), ": token ", i, " is ", id, ", wanted 0 or more"));
    }
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

}  // namespace

absl::StatusOr<std::vector<int32_t>> ReadTokenIds(const std::string& path) {
  EDUBA_ASSIGN_OR_RETURN(const std::unique_ptr<NpyFile> file, NpyFile::Open(path));
  EDUBA_RETURN_IF_ERROR(file->Expect(
      {NpyType::kI32, NpyType::kI64, NpyType::kU8, NpyType::kU16, NpyType::kU32}, {-1}, "[tokens]"));
  switch (file->type()) {
    case NpyType::kI32:
      return ReadAs<int32_t>(*file);
    case NpyType::kI64:
      return ReadAs<int64_t>(*file);
    case NpyType::kU8:
      return ReadAs<uint8_t>(*file);
    case NpyType::kU16:
      return ReadAs<uint16_t>(*file);
    default:
      return ReadAs<uint32_t>(*file);
  }
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadModelTokenizer(Client& client, std::string folder) {
  if (folder.empty()) {
    EDUBA_ASSIGN_OR_RETURN(const v1::Model model, client.GetModel());
    if (model.tokenizer().empty()) {
      return absl::FailedPreconditionError(
          absl::StrCat("model ", model.name(),
                       " has no tokenizer in its folder; give token ids with "
                       "--tokens, or a folder with --tokenizer"));
    }
    folder = model.folder();
  }
  auto tokenizer = LoadTokenizer(folder);
  if (!tokenizer.ok()) {
    return Annotate(tokenizer.status(),
                    "text needs the model's tokenizer here; name its folder with --tokenizer");
  }
  return tokenizer;
}

absl::StatusOr<std::vector<int32_t>> ReadTokens(Client& client, const TokenFlags& flags, bool at_beginning) {
  if (!flags.ids_path.empty()) return ReadTokenIds(flags.ids_path);
  std::string text = flags.text;
  if (!flags.text_path.empty()) {
    EDUBA_ASSIGN_OR_RETURN(text, ReadWholeFile(flags.text_path, kEncodeBytesMax));
  }
  EDUBA_ASSIGN_OR_RETURN(const auto tokenizer, LoadModelTokenizer(client, flags.tokenizer));
  Tokenizer::EncodeOptions options;
  options.add_special_tokens = at_beginning;
  return tokenizer->Encode(text, options);
}

}  // namespace eduba
