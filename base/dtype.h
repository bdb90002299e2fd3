#ifndef EDUBA_BASE_DTYPE_H_
#define EDUBA_BASE_DTYPE_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace eduba {

// Storage type of keys and values. All arithmetic on them is fp32 or wider.
enum class DType : uint8_t { kF32, kBf16, kF16 };

// Bytes of one element.
size_t DTypeBytes(DType dtype);

// "f32", "bf16" or "f16": the spelling of the command line, the wire and error messages.
const char* DTypeName(DType dtype);
absl::StatusOr<DType> ParseDType(const std::string& name);

// Round to nearest, ties to even, as IEEE 754 defines. A finite float beyond the range becomes an infinity
// (and is refused where keys and values enter); NaN stays NaN.
uint16_t Bf16FromF32(float value);
uint16_t F16FromF32(float value);
// Exact.
float F32FromBf16(uint16_t bits);
float F32FromF16(uint16_t bits);

// Element `index` of an array of `dtype`, exactly.
float LoadElement(const void* data, DType dtype, int64_t index);
// Rounds `value` into element `index`.
void StoreElement(void* data, DType dtype, int64_t index, float value);

}  // namespace eduba

#endif  // EDUBA_BASE_DTYPE_H_
