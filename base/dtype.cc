#include "base/dtype.h"

#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace eduba {

size_t DTypeBytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBf16:
      return "bf16";
    case DType::kF16:
      return "f16";
  }
  return "?";
}

absl::StatusOr<DType> ParseDType(const std::string& name) {
  if (name == "f32") return DType::kF32;
  if (name == "bf16") return DType::kBf16;
  if (name == "f16") return DType::kF16;
  return absl::InvalidArgumentError(absl::StrCat("dtype '", name, "' is not known: use f32, bf16 or f16"));
}

float LoadElement(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<const float*>(data)[index];
    case DType::kBf16:
      return F32FromBf16(static_cast<const uint16_t*>(data)[index]);
    case DType::kF16:
      return F32FromF16(static_cast<const uint16_t*>(data)[index]);
  }
  return 0;
}

void StoreElement(void* data, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kF32:
      static_cast<float*>(data)[index] = value;
      return;
    case DType::kBf16:
      static_cast<uint16_t*>(data)[index] = Bf16FromF32(value);
      return;
    case DType::kF16:
      static_cast<uint16_t*>(data)[index] = F16FromF32(value);
      return;
  }
}

}  // namespace eduba
