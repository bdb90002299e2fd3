#ifndef EDUBA_COLLECTIVE_BYTES_H_
#define EDUBA_COLLECTIVE_BYTES_H_

#include <type_traits>

#include "absl/types/span.h"

namespace eduba {

// Numbers as a message's bytes, as this machine stores them: char where they may be written, else const char.
template <typename T>
auto AsBytes(absl::Span<T> numbers) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return absl::Span<Byte>(reinterpret_cast<Byte*>(numbers.data()), numbers.size() * sizeof(T));
}

}  // namespace eduba

#endif  // EDUBA_COLLECTIVE_BYTES_H_
