#include "model/tokenizer/byte_level.h"

#include <array>
#include <cstdint>

#include "model/tokenizer/utf8.h"

namespace eduba {
namespace {

constexpr int kBytes = 256;

struct Alphabet {
  std::array<char32_t, kBytes> character{};
  std::array<int16_t, 2 * kBytes> byte{};  // -1: no character of the alphabet.

  Alphabet() {
    byte.fill(-1);
    char32_t next = kBytes;
    for (int b = 0; b < kBytes; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      character[b] = printable ? static_cast<char32_t>(b) : next++;
      byte[character[b]] = static_cast<int16_t>(b);
    }
  }
};

const Alphabet& TheAlphabet() {
  static const Alphabet alphabet;
  return alphabet;
}

}  // namespace

void AppendByteLevel(std::string& out, absl::string_view bytes) {
  const Alphabet& alphabet = TheAlphabet();
  for (const char byte : bytes) AppendUtf8(out, alphabet.character[static_cast<uint8_t>(byte)]);
}

std::string BytesOfToken(absl::string_view token) {
  const Alphabet& alphabet = TheAlphabet();
  std::string bytes;
  for (absl::string_view rest = token; !rest.empty();) {
    const auto length = static_cast<size_t>(FirstUtf8(rest).bytes);
    const char32_t code = CodePoint(rest.substr(0, length));
    if (code >= alphabet.byte.size() || alphabet.byte[code] < 0) return std::string(token);
    bytes.push_back(static_cast<char>(alphabet.byte[code]));
    rest.remove_prefix(length);
  }
  return bytes;
}

}  // namespace eduba
