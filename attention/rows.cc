#include "attention/rows.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "attention/sequence.h"
#include "base/check.h"

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

template <typename Bits>
void Raise(const void* data, Bits magnitude_bits, int64_t rows, int64_t columns,
           uint32_t* __restrict__ magnitudes) {
  const auto* bits = static_cast<const Bits*>(data);
  for (int64_t row = 0; row < rows; ++row, bits += columns) {
    for (int64_t c = 0; c < columns; ++c) {
      const uint32_t magnitude = bits[c] & magnitude_bits;
      magnitudes[c] = magnitude > magnitudes[c] ? magnitude : magnitudes[c];
    }
  }
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

void RaiseMagnitudes(const void* data, DType dtype, int64_t rows, int64_t columns, uint32_t* magnitudes) {
  if (dtype == DType::kF32) return Raise<uint32_t>(data, 0x7fffffff, rows, columns, magnitudes);
  Raise<uint16_t>(data, 0x7fff, rows, columns, magnitudes);
}

int16_t ExponentOfMagnitude(uint32_t magnitude, DType dtype) {
  if (magnitude == 0) return kNoExponent;
  float value = 0;
  if (dtype == DType::kF32) {
    value = std::bit_cast<float>(magnitude);
  } else {
    const auto bits = static_cast<uint16_t>(magnitude);
    value = dtype == DType::kBf16 ? F32FromBf16(bits) : F32FromF16(bits);
  }
  EDUBA_CHECK(std::isfinite(value));
  int exponent = 0;
  // value = fraction * 2^exponent, fraction in [0.5, 1): 0.5 is a power of two, which is its own bound.
  const float fraction = std::frexp(value, &exponent);
  return static_cast<int16_t>(fraction == 0.5f ? exponent - 1 : exponent);
}

}  // namespace eduba
