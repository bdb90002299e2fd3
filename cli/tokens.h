#ifndef EDUBA_CLI_TOKENS_H_
#define EDUBA_CLI_TOKENS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/client.h"
#include "model/tokenizer/tokenizer.h"

namespace eduba {

// Token ids as a command line gives them: in an .npy file, in a text file, or as text. At most one is set.
struct TokenFlags {
  std::string ids_path;
  std::string text_path;
  std::string text;
  // Folder whose tokenizer turns text into ids; empty: the model's, which this machine must see as the
  // workers do.
  std::string tokenizer;

  bool any() const { return !ids_path.empty() || !text_path.empty() || !text.empty(); }
};

// One-dimensional, of any integer type. INVALID_ARGUMENT for what is no int32.
absl::StatusOr<std::vector<int32_t>> ReadTokenIds(const std::string& path);

// The tokenizer in `folder`, or the model's where that is empty. FAILED_PRECONDITION when the model has none.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadModelTokenizer(Client& client, std::string folder);

// What the flags say. Special tokens of the tokenizer (a <bos> in front) come only at the beginning of a
// session. REQUIRES: flags.any().
absl::StatusOr<std::vector<int32_t>> ReadTokens(Client& client, const TokenFlags& flags, bool at_beginning);

}  // namespace eduba

#endif  // EDUBA_CLI_TOKENS_H_
