#ifndef EDUBA_COLLECTIVE_BYTES_H_
#define EDUBA_COLLECTIVE_BYTES_H_

#include <type_traits>

#include "absl/types/span.h"

namespace eduba {

// A view of the numbers as bytes, in the order in which this machine stores them. The bytes are const where
// the numbers are.
template <typename T>
auto AsBytes(absl::Span<T> numbers) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return absl::Span<Byte>(reinterpret_cast<Byte*>(numbers.data()), numbers.size() * sizeof(T));
}

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_BYTES_H_
