#ifndef EDUBA_MODEL_TOKENIZER_NORMALIZER_H_
#define EDUBA_MODEL_TOKENIZER_NORMALIZER_H_

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace eduba {

inline constexpr int64_t kNormalizedBytesMax = int64_t{1} << 30;

// The "normalizer" of a tokenizer.json: null, NFC, Prepend, Replace (of a fixed text), or a Sequence of them.
class Normalizer {
 public:
  static absl::StatusOr<Normalizer> Parse(const nlohmann::json& component, const std::string& name);

  // `text` is valid UTF-8, and so is the result. kResourceExhausted when it grows beyond kNormalizedBytesMax.
  absl::StatusOr<std::string> Normalize(absl::string_view text) const;

 private:
  struct Step {
    enum class Kind { kNfc, kPrepend, kReplace } kind = Kind::kNfc;
    std::string what;     // kReplace: the text that is replaced.
    std::string content;  // kPrepend, kReplace
  };
  absl::Status Add(const nlohmann::json& component, const std::string& name, int depth);

  std::vector<Step> steps_;
};

// Unicode's normalization form C with the tables of Unicode 9, which Hugging Face's tokenizers carry:
// characters that came later stay as they are and divide the text.
std::string Nfc(absl::string_view text);

}  // namespace eduba

#endif  // EDUBA_MODEL_TOKENIZER_NORMALIZER_H_
