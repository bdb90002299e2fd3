#ifndef EDUBA_MODEL_TOKENIZER_ADDED_TOKENS_H_
#define EDUBA_MODEL_TOKENIZER_ADDED_TOKENS_H_

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"

namespace eduba {

// One of the "added_tokens" of a tokenizer.json.
struct AddedToken {
  int32_t id = 0;
  std::string content;
  std::string written;       // How it appears in text, and is decoded: `content`, normalized if `normalized`.
  bool left_strip = false;   // Takes the white space before it along.
  bool right_strip = false;  // Takes the white space after it along.
  bool normalized = false;   // Is looked for in the normalized text, in its own normalized form.
  bool special = false;      // Left out of decoded text on request.
};

// Finds tokens in text: at every place from left to right the longest that begins there.
class AddedTokenFinder {
 public:
  // A token, or (id < 0) the text between two.
  struct Section {
    int32_t id = -1;
    int64_t begin = 0;
    int64_t end = 0;
  };

  // Where two tokens are written alike the first counts.
  void Add(const AddedToken& token);
  // `text` cut up, in order; no section is empty, unless a token stripped what another one had taken.
  std::vector<Section> Cut(absl::string_view text) const;
  bool empty() const { return tokens_.empty(); }

 private:
  struct Found {
    const AddedToken* token = nullptr;
    size_t bytes = 0;
  };
  Found LongestAt(absl::string_view text) const;

  std::vector<AddedToken> tokens_;
  // A tree of bytes: (node << 8 | byte) -> node; node 0 is the root.
  absl::flat_hash_map<uint64_t, int32_t> edges_;
  std::vector<int32_t> ends_ = {-1};  // By node: the token that ends there.
  std::array<bool, 256> starts_{};    // Bytes with which a token starts.
};

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_ADDED_TOKENS_H_
