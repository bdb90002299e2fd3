#ifndef EDUBA_BASE_WIRE_ARRAY_H_
#define EDUBA_BASE_WIRE_ARRAY_H_

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

// Arrays of numbers as messages carry them: little-endian, one after another, nothing in between.
namespace eduba {

// Numbers travel as this machine stores them; a machine of the other byte order would have to swap them here.
static_assert(std::endian::native == std::endian::little, "arrays travel little-endian");

// INVALID_ARGUMENT "WHAT have N bytes, wanted ...": the bytes are not `count_min` to `count_max` whole
// numbers of `number_bytes` bytes each.
absl::Status CheckNumberBytes(absl::string_view what, int64_t bytes, int64_t number_bytes, int64_t count_min,
                              int64_t count_max);

// The bytes of `numbers`, in place: writable where the numbers are.
template <typename T>
auto AsBytes(absl::Span<T> numbers) {
  static_assert(std::is_arithmetic_v<std::remove_const_t<T>>);
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return absl::Span<Byte>(reinterpret_cast<Byte*>(numbers.data()), numbers.size() * sizeof(T));
}

// A copy of them, as a message's setters take it.
template <typename T>
std::string BytesOf(absl::Span<const T> numbers) {
  const absl::Span<const char> bytes = AsBytes(numbers);
  return std::string(bytes.data(), bytes.size());
}
template <typename T>
std::string BytesOf(const std::vector<T>& numbers) {
  return BytesOf(absl::MakeConstSpan(numbers));
}

// Makes `numbers` what `bytes` hold, and keeps its memory where that suffices. Fails as CheckNumberBytes, and
// then leaves `numbers` alone. `what` begins the message: "token ids". The bytes need no alignment.
template <typename T>
absl::Status ReadNumbers(absl::string_view bytes, absl::string_view what, std::vector<T>& numbers,
                         int64_t count_min = 0, int64_t count_max = std::numeric_limits<int64_t>::max()) {
  static_assert(std::is_arithmetic_v<T>);
  const absl::Status status = CheckNumberBytes(what, static_cast<int64_t>(bytes.size()),
                                               static_cast<int64_t>(sizeof(T)), count_min, count_max);
  if (!status.ok()) return status;
  numbers.resize(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(numbers.data(), bytes.data(), bytes.size());
  return absl::OkStatus();
}

// The same into a new vector.
template <typename T>
absl::StatusOr<std::vector<T>> NumbersOf(absl::string_view bytes, absl::string_view what,
                                         int64_t count_min = 0,
                                         int64_t count_max = std::numeric_limits<int64_t>::max()) {
  std::vector<T> numbers;
  const absl::Status status = ReadNumbers(bytes, what, numbers, count_min, count_max);
  if (!status.ok()) return status;
  return numbers;
}

// Exactly `count` numbers.
template <typename T>
absl::Status ReadExactNumbers(absl::string_view bytes, absl::string_view what, int64_t count,
                              std::vector<T>& numbers) {
  return ReadNumbers(bytes, what, numbers, count, count);
}

}  // namespace eduba

#endif  // EDUBA_BASE_WIRE_ARRAY_H_
