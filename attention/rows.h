#ifndef EDUBA_ATTENTION_ROWS_H_
#define EDUBA_ATTENTION_ROWS_H_

#include <cstdint>

#include "base/dtype.h"
#include "base/elements.h"

namespace eduba {

// Loops over arrays of keys and values on their way in. Arrays are aligned to their elements.

// A magnitude is an element's bits without its sign; for finite elements of one type it grows with |element|.
// magnitudes[c] = max(magnitudes[c], those of data[r][c]) over `rows` rows of `columns` elements.
void RaiseMagnitudes(const void* data, DType dtype, int64_t rows, int64_t columns, uint32_t* magnitudes);

// The smallest e with |element| <= 2^e; kNoExponent (sequence.h) for 0. REQUIRES: finite.
int16_t ExponentOfMagnitude(uint32_t magnitude, DType dtype);

}  // namespace eduba

#endif  // EDUBA_ATTENTION_ROWS_H_
