#include "attention/rows.h"

#include <bit>
#include <cmath>

#include "attention/sequence.h"
#include "base/check.h"

namespace eduba {
namespace {

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
