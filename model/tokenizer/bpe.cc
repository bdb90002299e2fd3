#include "model/tokenizer/bpe.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <queue>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "model/json.h"
#include "model/json_fields.h"
#include "model/tokenizer/utf8.h"

namespace eduba {
namespace {

using nlohmann::json;

uint64_t PairKey(int32_t left, int32_t right) {
  return static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
}

// A character or a merged run of them, linked to its neighbours. id < 0: swallowed by the left one.
struct Symbol {
  int32_t id;
  int32_t previous;
  int32_t next;  // -1: none
};

struct Candidate {
  int32_t rank;
  int32_t at;
  int32_t merged;
  // std::priority_queue gives the largest: the lowest rank, then the leftmost.
  bool operator<(const Candidate& other) const {
    return rank != other.rank ? rank > other.rank : at > other.at;
  }
};

}  // namespace

absl::StatusOr<Bpe> Bpe::Parse(const json& component, const std::string& name) {
  if (!component.is_object() || component.value("type", json()) != "BPE") {
    return absl::UnimplementedError(absl::StrCat(
        name, " of type ", JsonText(component.is_object() ? component.value("type", json()) : component),
        " is not supported; known is BPE"));
  }
  Bpe bpe;
  JsonFields fields(component, name, "BPE");
  fields.Ignore({"type"});
  fields.RefuseUnlessOff({"dropout", "continuing_subword_prefix", "end_of_word_suffix"});
  const bool byte_fallback = fields.Flag("byte_fallback", false);
  bpe.fuse_unknown_ = fields.Flag("fuse_unk", false);
  bpe.ignore_merges_ = fields.Flag("ignore_merges", false);
  const json& unknown = fields.Get("unk_token");
  const json& vocabulary = fields.Get("vocab");
  const json& merges = fields.Get("merges");
  EDUBA_RETURN_IF_ERROR(fields.Finish());
  EDUBA_RETURN_IF_ERROR(bpe.ReadVocabulary(vocabulary, name));
  EDUBA_RETURN_IF_ERROR(bpe.ReadMerges(merges, name));
  if (!unknown.is_null()) {
    if (unknown.is_string()) bpe.unknown_ = bpe.Id(unknown.get_ref<const std::string&>());
    if (!bpe.unknown_.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": unk_token ", JsonText(unknown), " is not in the vocabulary"));
    }
  }
  if (byte_fallback) {
    for (int byte = 0; byte < 256; ++byte) {
      bpe.byte_tokens_.push_back(bpe.Id(absl::StrFormat("<0x%02X>", byte)).value_or(-1));
    }
  }
  return bpe;
}

absl::Status Bpe::ReadVocabulary(const json& vocabulary, const std::string& name) {
  if (!vocabulary.is_object() || static_cast<int64_t>(vocabulary.size()) > kVocabularyMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": vocab is no object of at most ", kVocabularyMax, " tokens"));
  }
  ids_.reserve(vocabulary.size());
  for (const auto& [token, id] : vocabulary.items()) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(kVocabularyMax)) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": token ", JsonText(json(token)), " has the id ",
                                                     JsonText(id), ", wanted a number below ",
                                                     kVocabularyMax));
    }
    if (token.empty() || static_cast<int64_t>(token.size()) > kTokenBytesMax) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": token ", JsonText(json(token)), " is ",
                                                     token.size(), " bytes long, wanted 1 to ",
                                                     kTokenBytesMax));
    }
    const auto number = id.get<int32_t>();
    if (number >= id_end()) tokens_.resize(number + 1);
    if (!tokens_[number].empty()) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": tokens ", JsonText(json(tokens_[number])),
                                                     " and ", JsonText(json(token)), " have the same id ",
                                                     number));
    }
    tokens_[number] = token;
    ids_.emplace(token, number);
  }
  return absl::OkStatus();
}

absl::Status Bpe::ReadMerges(const json& merges, const std::string& name) {
  if (!merges.is_array() || static_cast<int64_t>(merges.size()) > kVocabularyMax) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": merges is no list of at most ", kVocabularyMax));
  }
  merges_.reserve(merges.size());
  int32_t rank = 0;
  for (const json& merge : merges) {
    // ["a", "b"], or in older files "a b".
    std::string left;
    std::string right;
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      left = merge[0].get<std::string>();
      right = merge[1].get<std::string>();
    } else if (merge.is_string()) {
      const auto& text = merge.get_ref<const std::string&>();
      if (absl::StartsWith(text, "#version")) continue;
      const size_t space = text.find(' ');
      if (space != std::string::npos && text.find(' ', space + 1) == std::string::npos) {
        left = text.substr(0, space);
        right = text.substr(space + 1);
      }
    }
    const std::optional<int32_t> left_id = Id(left);
    const std::optional<int32_t> right_id = Id(right);
    const std::optional<int32_t> merged = Id(left + right);
    if (!left_id.has_value() || !right_id.has_value() || !merged.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": merge ", rank, ", ", JsonText(merge),
                       ", is no pair of tokens that makes a token of the vocabulary"));
    }
    // Where a pair is repeated its last rank counts, as in tokenizers.
    merges_[PairKey(*left_id, *right_id)] = {rank++, *merged};
  }
  return absl::OkStatus();
}

std::optional<int32_t> Bpe::Id(absl::string_view token) const {
  const auto found = ids_.find(token);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

absl::string_view Bpe::Token(int32_t id) const {
  if (id < 0 || id >= id_end()) return "";
  return tokens_[id];
}

const Bpe::Merge* Bpe::FindMerge(int32_t left, int32_t right) const {
  const auto found = merges_.find(PairKey(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

std::vector<int32_t> Bpe::Characters(absl::string_view word) const {
  std::vector<int32_t> symbols;
  symbols.reserve(word.size());
  bool unknown_waits = false;
  while (!word.empty()) {
    const absl::string_view character = word.substr(0, static_cast<size_t>(FirstUtf8(word).bytes));
    word.remove_prefix(character.size());
    if (const std::optional<int32_t> id = Id(character); id.has_value()) {
      if (unknown_waits) symbols.push_back(*unknown_);
      unknown_waits = false;
      symbols.push_back(*id);
      continue;
    }
    const auto has_token = [&](char byte) { return byte_tokens_[static_cast<uint8_t>(byte)] >= 0; };
    if (!byte_tokens_.empty() && std::all_of(character.begin(), character.end(), has_token)) {
      // An unknown character that waits comes after these bytes: tokenizers does it so.
      for (const char byte : character) symbols.push_back(byte_tokens_[static_cast<uint8_t>(byte)]);
      continue;
    }
    if (!unknown_.has_value()) continue;
    if (unknown_waits && !fuse_unknown_) symbols.push_back(*unknown_);
    unknown_waits = true;
  }
  if (unknown_waits) symbols.push_back(*unknown_);
  return symbols;
}

void Bpe::EncodeWord(absl::string_view word, std::vector<int32_t>& ids) const {
  if (ignore_merges_) {
    if (const std::optional<int32_t> id = Id(word); id.has_value()) {
      ids.push_back(*id);
      return;
    }
  }
  const std::vector<int32_t> characters = Characters(word);
  const auto count = static_cast<int32_t>(characters.size());
  std::vector<Symbol> symbols(characters.size());
  std::vector<Candidate> first;
  for (int32_t i = 0; i < count; ++i) {
    symbols[i] = {characters[i], i - 1, i + 1 < count ? i + 1 : -1};
    if (i + 1 == count) break;
    if (const Merge* merge = FindMerge(characters[i], characters[i + 1])) {
      first.push_back({merge->rank, i, merge->merged});
    }
  }
  std::priority_queue<Candidate> queue(std::less<Candidate>(), std::move(first));
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Symbol& left = symbols[top.at];
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    // A candidate is stale when its pair has changed meanwhile, unless the new pair makes the same token.
    const Merge* merge = FindMerge(left.id, right.id);
    if (merge == nullptr || merge->merged != top.merged) continue;
    left.id = top.merged;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) symbols[left.next].previous = top.at;
    if (left.previous >= 0) {
      if (const Merge* before = FindMerge(symbols[left.previous].id, left.id)) {
        queue.push({before->rank, left.previous, before->merged});
      }
    }
    if (left.next >= 0) {
      if (const Merge* after = FindMerge(left.id, symbols[left.next].id)) {
        queue.push({after->rank, top.at, after->merged});
      }
    }
  }
  for (int32_t i = count > 0 ? 0 : -1; i >= 0; i = symbols[i].next) ids.push_back(symbols[i].id);
}

}  // namespace eduba
