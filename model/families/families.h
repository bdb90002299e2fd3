#ifndef EDUBA_MODEL_FAMILIES_FAMILIES_H_
#define EDUBA_MODEL_FAMILIES_FAMILIES_H_

#include "model/config.h"
#include "model/families/tensor_finder.h"
#include "model/json_fields.h"
#include "model/weights.h"

namespace eduba {

// One pair of functions for each way in which transformers writes models down. The facts are those of
// transformers' configuration_*.py and modeling_*.py, releases 4.46 to 5.24; defaults are theirs.

// Fill `config` (whose family is set) from the fields of its own; the fields that all families share are read
// by ParseModelConfig. Errors stay in `fields`.
void ParseLlama(JsonFields& fields, ModelConfig& config);  // Llama, Mistral, Qwen2, Qwen3
void ParseGemma(JsonFields& fields, ModelConfig& config);  // Gemma2, Gemma3 (text)
void ParseGptNeoX(JsonFields& fields, ModelConfig& config);

// Find the tensors by the family's names. Errors stay in `find`.
void FindLlama(TensorFinder& find, const ModelConfig& config, ModelWeights& weights);  // All but GPT-NeoX
void FindGptNeoX(TensorFinder& find, const ModelConfig& config, ModelWeights& weights);

}  // namespace eduba

#endif  // EDUBA_MODEL_FAMILIES_FAMILIES_H_
