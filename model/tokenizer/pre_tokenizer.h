#ifndef EDUBA_MODEL_TOKENIZER_PRE_TOKENIZER_H_
#define EDUBA_MODEL_TOKENIZER_PRE_TOKENIZER_H_

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/tokenizer/regex.h"

namespace eduba {

// The "pre_tokenizer" of a tokenizer.json: null, ByteLevel, Split (Isolated or MergedWithPrevious),
// Metaspace, or a Sequence of them. Cuts text into the words that the model merges within.
class PreTokenizer {
 public:
  static absl::StatusOr<PreTokenizer> Parse(const nlohmann::json& component, const std::string& name);

  // Calls `word` for every word of `text`, in order; none is empty. `at_start`: `text` is where the whole
  // input begins. The first error of a call, or of the expression, ends it.
  absl::Status Run(absl::string_view text, bool at_start,
                   absl::FunctionRef<void(absl::string_view)> word) const;

 private:
  enum class Behavior { kIsolated, kMergedWithPrevious, kMergedWithNext };
  enum class Prepend { kNever, kFirst, kAlways };
  struct Step {
    // In this order:
    bool space_first = false;  // ByteLevel's add_prefix_space
    bool metaspace = false;    // Every ' ' becomes `replacement`, one more in front as `prepend` says.
    std::string replacement;
    Prepend prepend = Prepend::kNever;
    std::optional<Regex> split;
    std::string split_at;  // A fixed text instead of an expression; empty: none.
    Behavior behavior = Behavior::kIsolated;
    bool byte_level = false;  // Bytes to characters.
  };
  absl::Status Add(const nlohmann::json& component, const std::string& name, int depth);
  absl::Status RunFrom(size_t step, absl::string_view text, bool at_start,
                       absl::FunctionRef<void(absl::string_view)> word) const;

  std::vector<Step> steps_;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_PRE_TOKENIZER_H_
