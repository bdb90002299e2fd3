// Any bytes as a tokenizer.json: refused, or a tokenizer that encodes to ids of its own and decodes to valid
// UTF-8, the same whether at once or as a stream.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "base/check.h"
#include "model/tokenizer/json_tokenizer.h"
#include "model/tokenizer/utf8.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto tokenizer =
      eduba::JsonTokenizer::Parse({reinterpret_cast<const char*>(data), size}, "tokenizer.json");
  if (!tokenizer.ok()) {
    EDUBA_CHECK(tokenizer.status().message().find('\n') == absl::string_view::npos);
    return 0;
  }
  const int64_t vocab_size = (*tokenizer)->vocab_size();
  for (const char* text :
       {"", "abc ab  c\n", "<s>a'LL 12345 \xC3\xA9 e\xCC\x81 \xF0\x9F\x99\x82 \xE2\x96\x81<s> "}) {
    const auto ids = (*tokenizer)->Encode(text, {});
    if (!ids.ok()) continue;  // A hostile expression ran into its limit.
    for (const int32_t id : *ids) EDUBA_CHECK(id >= 0 && id < vocab_size);
  }
  // All tokens in a row, then backwards.
  std::vector<int32_t> ids;
  for (int64_t id = -1; id <= std::min<int64_t>(vocab_size, 300); ++id) {
    ids.push_back(static_cast<int32_t>(id));
  }
  const std::vector<int32_t> backwards(ids.rbegin(), ids.rend());
  ids.insert(ids.end(), backwards.begin(), backwards.end());
  const auto stream = (*tokenizer)->NewTextStream({false});
  std::string joined;
  for (const int32_t id : ids) {
    const std::string piece = stream->Push(id);
    EDUBA_CHECK(eduba::CheckUtf8(piece).ok());
    joined += piece;
  }
  joined += stream->Finish();
  EDUBA_CHECK_EQ(joined, (*tokenizer)->Decode(ids, {false}));
  return 0;
}
