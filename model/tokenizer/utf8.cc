#include "model/tokenizer/utf8.h"

#include <cstdint>

#include "absl/strings/str_cat.h"

namespace eduba {

Utf8Prefix FirstUtf8(absl::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {1, true, false};
  int more = 0;
  // The range of the second byte excludes overlong forms, surrogates and what lies beyond U+10FFFF.
  uint8_t low = 0x80;
  uint8_t high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    more = 1;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    more = 2;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    more = 3;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {1, false, false};
  }
  for (int i = 1; i <= more; ++i) {
    if (static_cast<size_t>(i) == text.size()) return {i, false, true};
    if (byte(i) < low || byte(i) > high) return {i, false, false};
    low = 0x80;
    high = 0xBF;
  }
  return {more + 1, true, false};
}

char32_t CodePoint(absl::string_view character) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(character[i]); };
  if (byte(0) < 0x80) return byte(0);
  if (byte(0) < 0xE0) return (byte(0) & 0x1F) << 6 | (byte(1) & 0x3F);
  if (byte(0) < 0xF0) return (byte(0) & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
  return (byte(0) & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
}

void AppendUtf8(std::string& text, char32_t code) {
  const auto put = [&](char32_t byte) { text.push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6);
    put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3F));
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  }
}

absl::Status CheckUtf8(absl::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const Utf8Prefix next = FirstUtf8(text.substr(at));
    if (!next.valid) {
      return absl::InvalidArgumentError(
          absl::StrCat("the text is no valid UTF-8 at byte ", at, "; convert it to UTF-8"));
    }
    at += next.bytes;
  }
  return absl::OkStatus();
}

std::string Utf8Assembler::Push(absl::string_view bytes) {
  std::string joined;
  if (!begun_.empty()) {
    joined = begun_;
    joined.append(bytes.data(), bytes.size());
    bytes = joined;
    begun_.clear();
  }
  std::string text;
  while (!bytes.empty()) {
    const Utf8Prefix next = FirstUtf8(bytes);
    if (next.cut) {
      begun_ = std::string(bytes);
      break;
    }
    absl::StrAppend(&text, next.valid ? bytes.substr(0, next.bytes) : kReplacementCharacter);
    bytes.remove_prefix(next.valid || invalid_ == Invalid::kMaximalSubpart ? next.bytes : 1);
  }
  return text;
}

std::string Utf8Assembler::Finish() {
  std::string text;
  const size_t replaced = invalid_ == Invalid::kByte ? begun_.size() : begun_.empty() ? 0 : 1;
  for (size_t i = 0; i < replaced; ++i) absl::StrAppend(&text, kReplacementCharacter);
  begun_.clear();
  return text;
}

}  // namespace eduba
