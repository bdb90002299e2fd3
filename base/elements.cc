#include "base/elements.h"

#include <cstring>

namespace eduba {
namespace {

template <typename Source, typename Target, typename Function>
void Map(const void* source, void* target, int64_t count, Function function) {
  const auto* __restrict__ in = static_cast<const Source*>(source);
  auto* __restrict__ out = static_cast<Target*>(target);
  for (int64_t i = 0; i < count; ++i) out[i] = function(in[i]);
}

// Bits that are all one exactly in Inf and NaN.
uint32_t ExponentBits(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 0x7f800000;
    case DType::kBf16:
      return 0x7f80;
    case DType::kF16:
      return 0x7c00;
  }
  return 0;
}

template <typename Bits>
int64_t FirstWithAll(const void* data, Bits exponent, int64_t count) {
  const auto* bits = static_cast<const Bits*>(data);
  // Without an exit in the middle the loop vectorises; the answer is nearly always "none".
  Bits found = 0;
  for (int64_t i = 0; i < count; ++i) found |= static_cast<Bits>((bits[i] & exponent) == exponent ? 1 : 0);
  if (found == 0) return -1;
  for (int64_t i = 0; i < count; ++i) {
    if ((bits[i] & exponent) == exponent) return i;
  }
  return -1;
}

}  // namespace

void ConvertElements(const void* source, DType from, void* target, DType to, int64_t count) {
  if (from == to) {
    if (count > 0) std::memcpy(target, source, count * DTypeBytes(to));
    return;
  }
  if (from == DType::kF32) {
    if (to == DType::kBf16) return Map<float, uint16_t>(source, target, count, Bf16FromF32);
    return Map<float, uint16_t>(source, target, count, F16FromF32);
  }
  if (from == DType::kBf16) {
    if (to == DType::kF32) return Map<uint16_t, float>(source, target, count, F32FromBf16);
    return Map<uint16_t, uint16_t>(source, target, count,
                                   [](uint16_t v) { return F16FromF32(F32FromBf16(v)); });
  }
  if (to == DType::kF32) return Map<uint16_t, float>(source, target, count, F32FromF16);
  return Map<uint16_t, uint16_t>(source, target, count,
                                 [](uint16_t v) { return Bf16FromF32(F32FromF16(v)); });
}

int64_t FirstNonFinite(const void* data, DType dtype, int64_t count) {
  if (dtype == DType::kF32) return FirstWithAll<uint32_t>(data, ExponentBits(dtype), count);
  return FirstWithAll<uint16_t>(data, static_cast<uint16_t>(ExponentBits(dtype)), count);
}

}  // namespace eduba
