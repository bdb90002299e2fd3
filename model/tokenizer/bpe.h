#ifndef EDUBA_MODEL_TOKENIZER_BPE_H_
#define EDUBA_MODEL_TOKENIZER_BPE_H_

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace eduba {

// Tokens of a vocabulary, and their bytes: limits of what is read.
inline constexpr int64_t kVocabularyMax = int64_t{1} << 22;
inline constexpr int64_t kTokenBytesMax = 4096;

// The "model" of a tokenizer.json, of type BPE: a word is taken apart into characters, then the pair of
// neighbours whose merge comes first in the list is merged, the leftmost of equals, until no pair is in the
// list.
class Bpe {
 public:
  static absl::StatusOr<Bpe> Parse(const nlohmann::json& component, const std::string& name);

  // Entries of the vocabulary, and the largest id + 1.
  int64_t size() const { return static_cast<int64_t>(ids_.size()); }
  int64_t id_end() const { return static_cast<int64_t>(tokens_.size()); }
  std::optional<int32_t> Id(absl::string_view token) const;
  // Empty for ids without a token.
  absl::string_view Token(int32_t id) const;

  // Appends the ids of one word (valid UTF-8, not empty). A character that is not in the vocabulary becomes
  // its bytes (byte_fallback, "<0x41>"), else unk_token, else nothing.
  void EncodeWord(absl::string_view word, std::vector<int32_t>& ids) const;

 private:
  struct Merge {
    int32_t rank = 0;
    int32_t merged = 0;
  };
  absl::Status ReadVocabulary(const nlohmann::json& vocabulary, const std::string& name);
  absl::Status ReadMerges(const nlohmann::json& merges, const std::string& name);
  const Merge* FindMerge(int32_t left, int32_t right) const;
  // The word's characters, before any merge.
  std::vector<int32_t> Characters(absl::string_view word) const;

  absl::flat_hash_map<std::string, int32_t> ids_;
  std::vector<std::string> tokens_;
  absl::flat_hash_map<uint64_t, Merge> merges_;  // By left << 32 | right.
  std::optional<int32_t> unknown_;
  bool fuse_unknown_ = false;
  bool ignore_merges_ = false;  // A word that is a token is that token.
  // [256] "<0x00>" ...; -1: not in the vocabulary. Empty: no byte fallback.
  std::vector<int32_t> byte_tokens_;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_BPE_H_
