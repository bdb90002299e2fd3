#include "model/tokenizer/added_tokens.h"

#include <algorithm>

#include "model/tokenizer/utf8.h"

namespace eduba {
namespace {

// Unicode's White_Space.
bool IsWhiteSpace(char32_t code) {
  return (code >= 0x9 && code <= 0xD) || code == 0x20 || code == 0x85 || code == 0xA0 || code == 0x1680 ||
         (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 || code == 0x202F ||
         code == 0x205F || code == 0x3000;
}

size_t SpaceAtStart(absl::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const auto bytes = static_cast<size_t>(FirstUtf8(text.substr(at)).bytes);
    if (!IsWhiteSpace(CodePoint(text.substr(at, bytes)))) break;
    at += bytes;
  }
  return at;
}

// Where the white space at the end begins.
size_t SpaceAtEnd(absl::string_view text) {
  size_t at = text.size();
  while (at > 0) {
    size_t start = at - 1;
    while (start > 0 && (static_cast<uint8_t>(text[start]) & 0xC0) == 0x80) --start;
    if (!IsWhiteSpace(CodePoint(text.substr(start, at - start)))) break;
    at = start;
  }
  return at;
}

}  // namespace

void AddedTokenFinder::Add(const AddedToken& token) {
  const std::string& written = token.written;
  if (written.empty()) return;
  int32_t node = 0;
  for (const char byte : written) {
    const uint64_t edge = static_cast<uint64_t>(node) << 8 | static_cast<uint8_t>(byte);
    const auto [next, fresh] = edges_.emplace(edge, static_cast<int32_t>(ends_.size()));
    if (fresh) ends_.push_back(-1);
    node = next->second;
  }
  if (ends_[node] >= 0) return;
  ends_[node] = static_cast<int32_t>(tokens_.size());
  tokens_.push_back(token);
  starts_[static_cast<uint8_t>(written[0])] = true;
}

AddedTokenFinder::Found AddedTokenFinder::LongestAt(absl::string_view text) const {
  Found found;
  int32_t node = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto next = edges_.find(static_cast<uint64_t>(node) << 8 | static_cast<uint8_t>(text[i]));
    if (next == edges_.end()) break;
    node = next->second;
    if (ends_[node] >= 0) found = {&tokens_[ends_[node]], i + 1};
  }
  return found;
}

std::vector<AddedTokenFinder::Section> AddedTokenFinder::Cut(absl::string_view text) const {
  std::vector<Section> sections;
  size_t taken = 0;  // Sections reach to here.
  size_t at = 0;
  while (at < text.size()) {
    const Found found = starts_[static_cast<uint8_t>(text[at])] ? LongestAt(text.substr(at)) : Found{};
    if (found.token == nullptr) {
      ++at;
      continue;
    }
    size_t begin = at;
    size_t end = at + found.bytes;
    at = end;  // The next one may begin in the space that this one strips.
    if (found.token->left_strip) begin = std::max(SpaceAtEnd(text.substr(0, begin)), taken);
    if (found.token->right_strip) end += SpaceAtStart(text.substr(end));
    if (taken < begin) sections.push_back({-1, static_cast<int64_t>(taken), static_cast<int64_t>(begin)});
    sections.push_back({found.token->id, static_cast<int64_t>(begin), static_cast<int64_t>(end)});
    taken = end;
  }
  if (taken < text.size()) {
    sections.push_back({-1, static_cast<int64_t>(taken), static_cast<int64_t>(text.size())});
  }
  return sections;
}

}  // namespace eduba
