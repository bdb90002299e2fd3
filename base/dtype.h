#ifndef EDUBA_BASE_DTYPE_H_
#define EDUBA_BASE_DTYPE_H_

#include <bit>
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

// The four conversions are inline and free of branches, so that loops over arrays of them vectorise.

// Round to nearest, ties to even, as IEEE 754 defines. A finite float beyond the range becomes an infinity
// (and is refused where keys and values enter); NaN stays NaN.
inline uint16_t Bf16FromF32(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40;  // NaN, payload kept
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

inline uint16_t F16FromF32(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  // Below 2^-14 the result is subnormal, in units of 2^-24: adding 0.5 aligns the value's last kept bit with
  // the float's last bit, so the FPU does the rounding.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  uint32_t result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x477ff000 ? 0x7c00 : result;  // 65520 and above round to infinity
  result = magnitude > 0x7f800000 ? 0x7e00 : result;   // NaN
  return static_cast<uint16_t>(((bits >> 16) & 0x8000) | result);
}

// Exact.
inline float F32FromBf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline float F32FromF16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7fff;
  const uint32_t normal = (magnitude << 13) + 0x38000000;
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  uint32_t result = magnitude < 0x400 ? subnormal : normal;
  result = magnitude >= 0x7c00 ? (0x7f800000 | (magnitude << 13)) : result;  // Inf and NaN
  return std::bit_cast<float>(sign | result);
}

// Element `index` of an array of `dtype`, exactly.
float LoadElement(const void* data, DType dtype, int64_t index);
// Rounds `value` into element `index`.
void StoreElement(void* data, DType dtype, int64_t index, float value);

}  // namespace eduba

#endif  // EDUBA_BASE_DTYPE_H_
