#ifndef EDUBA_MODEL_FAMILIES_PARTS_H_
#define EDUBA_MODEL_FAMILIES_PARTS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/json_fields.h"

namespace eduba {

// Parts of a config.json that several families share.

// Limits of what is read; above them a number is a mistake or an attack. They keep every product of two
// within int64.
inline constexpr int64_t kVocabMax = int64_t{1} << 24;
inline constexpr int64_t kChannelsMax = int64_t{1} << 20;
inline constexpr int64_t kLayersMax = 4096;
inline constexpr int64_t kHeadsMax = int64_t{1} << 14;
inline constexpr int64_t kHeadDimMax = int64_t{1} << 14;
inline constexpr int64_t kPositionsMax = int64_t{1} << 40;

// What transformers takes for a field that is left out.
struct SizeDefaults {
  int64_t vocab = 0;
  int64_t hidden = 0;
  int64_t intermediate = 0;
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t positions = 0;
};
// vocab_size, hidden_size, intermediate_size, num_hidden_layers (layers of default LayerConfig),
// num_attention_heads, max_position_embeddings.
void ParseSizes(JsonFields& fields, const SizeDefaults& defaults, ModelConfig& config);

// num_key_value_heads, where null means as many as query heads, and absent `fallback` (or the same).
void ParseKvHeads(JsonFields& fields, std::optional<int64_t> fallback, ModelConfig& config);
// head_dim, or hidden_size / heads where it is not given.
void ParseHeadDim(JsonFields& fields, std::optional<int64_t> fallback, ModelConfig& config);

// transformers' name of an activation function.
Activation ParseActivation(JsonFields& fields, const std::string& field, const std::string& fallback);

// The rotary embedding from rope_theta and rope_scaling (transformers 4) or rope_parameters (5).
Rope ParseRope(JsonFields& fields, double default_theta, int head_dim);
// One such object. Null: Rope::kDefault. `theta`: where the object has none.
Rope ParseRopeObject(JsonFields& fields, const std::string& field, const nlohmann::json& object, double theta,
                     double default_rotary_share, int head_dim);

// layer_types, as true for "sliding_attention"; empty where it is absent or null.
std::vector<bool> ParseLayerTypes(JsonFields& fields, const ModelConfig& config);
// Gives the layers that slide the window. `window` absent while a layer slides is an error.
void SetWindows(JsonFields& fields, const std::vector<bool>& slides, std::optional<int64_t> window,
                ModelConfig& config);

}  // namespace eduba

#endif  // EDUBA_MODEL_FAMILIES_PARTS_H_
