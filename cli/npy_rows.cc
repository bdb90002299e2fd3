#include "cli/npy_rows.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

absl::StatusOr<std::unique_ptr<NpyFile>> OpenRows(const std::string& path, const v1::SessionSpec& spec,
                                                  int64_t dim, const std::string& dim_name) {
  EDUBA_ASSIGN_OR_RETURN(auto file, NpyFile::Open(path));
  std::vector<int64_t> shape = {-1, spec.kv_heads(), dim};
  std::string axes = absl::StrCat("[tokens, kv_heads, ", dim_name, "]");
  if (spec.layers() > 1) {
    shape.insert(shape.begin(), spec.layers());
    axes = absl::StrCat("[layers, tokens, kv_heads, ", dim_name, "]");
  }
  EDUBA_RETURN_IF_ERROR(file->Expect({NpyType::kF32, NpyType::kF16}, shape, axes));
  return file;
}

// Elements [begin, begin + count) as `dtype`, which is f32 or the file's own type.
absl::Status ReadAs(const NpyFile& file, DType dtype, int64_t begin, int64_t count, void* out) {
  if (file.type() == NpyType::kF32 || dtype == DType::kF16) return file.Read(begin, count, out);
  std::vector<uint16_t> halves(count);
  EDUBA_RETURN_IF_ERROR(file.Read(begin, count, halves.data()));
  auto* floats = static_cast<float*>(out);
  for (int64_t i = 0; i < count; ++i) floats[i] = F32FromF16(halves[i]);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<NpyRows>> NpyRows::Open(const std::string& keys, const std::string& values,
                                                       const v1::SessionSpec& spec) {
  EDUBA_ASSIGN_OR_RETURN(auto key_file, OpenRows(keys, spec, spec.head_dim(), "head_dim"));
  EDUBA_ASSIGN_OR_RETURN(auto value_file, OpenRows(values, spec, spec.value_dim(), "value_dim"));
  const size_t token_axis = spec.layers() > 1 ? 1 : 0;
  const int64_t key_tokens = key_file->shape()[token_axis];
  const int64_t value_tokens = value_file->shape()[token_axis];
  if (key_tokens != value_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(keys, " has ", key_tokens, " tokens, ", values, " has ",
                                                   value_tokens, "; every token needs a key and a value"));
  }
  if (key_tokens == 0) {
    return absl::InvalidArgumentError(absl::StrCat(keys, " has no tokens; append at least one"));
  }
  return std::unique_ptr<NpyRows>(new NpyRows(std::move(key_file), std::move(value_file), spec));
}

NpyRows::NpyRows(std::unique_ptr<NpyFile> keys, std::unique_ptr<NpyFile> values, const v1::SessionSpec& spec)
    : keys_(std::move(keys)),
      values_(std::move(values)),
      tokens_(keys_->shape()[spec.layers() > 1 ? 1 : 0]),
      key_elements_(int64_t{spec.kv_heads()} * spec.head_dim()),
      value_elements_(int64_t{spec.kv_heads()} * spec.value_dim()),
      dtype_(keys_->type() == NpyType::kF16 && values_->type() == NpyType::kF16 ? DType::kF16 : DType::kF32) {
}

absl::Status NpyRows::Read(int layer, int64_t first, int64_t count, void* keys, void* values) const {
  const int64_t row = layer * tokens_ + first;
  EDUBA_RETURN_IF_ERROR(ReadAs(*keys_, dtype_, row * key_elements_, count * key_elements_, keys));
  return ReadAs(*values_, dtype_, row * value_elements_, count * value_elements_, values);
}

}  // namespace eduba
