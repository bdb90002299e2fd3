#ifndef EDUBA_MODEL_TRANSFORMER_H_
#define EDUBA_MODEL_TRANSFORMER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/dtype.h"
#include "kernels/layer_kernels.h"
#include "model/config.h"
#include "model/layer_attention.h"
#include "model/weights.h"

namespace eduba {

// Where the rows of a step stand.
struct RowPositions {
  absl::Span<const int64_t> positions;  // [rows]: keys and queries are turned to these.
  // [rows]: the token sinks are scored with queries turned to these; empty: to `positions` too.
  absl::Span<const int64_t> sink_positions;
};

// By how much to turn the queries and keys of some rows, for each kind of rotary embedding that a model has.
struct RowAngles {
  struct Kind {
    std::vector<float> cosines, sines;            // [rows, frequencies]
    std::vector<float> sink_cosines, sink_sines;  // The same at sink_positions; empty without.
  };
  std::vector<Kind> kinds;
};

// The forward pass of one model, for rows of any number of sequences: a pure function of its weights, the
// rows and what LayerAttention answers. A row's bits do not depend on the other rows of its step
// (docs/adr/0007). One call at a time.
class Transformer {
 public:
  // Packs the weights for `kernels`, which must outlive the transformer. `config` and `weights` as LoadModel
  // gives them; `weights` must live as long as the transformer, because embeddings are read where they lie.
  static absl::StatusOr<std::unique_ptr<Transformer>> Create(const ModelConfig& config,
                                                             const ModelWeights& weights,
                                                             LayerKernels* kernels);

  const ModelConfig& config() const { return config_; }
  // Of the packed weights: what a decoded token has to read, besides keys and values.
  int64_t weight_bytes() const;
  // The widest type among the weights of keys and values: what to keep them in without losing more than the
  // weights have lost already. (f32 where any is f32, else f16 or bf16.)
  DType weight_dtype() const { return weight_dtype_; }
  // [kv_heads, head_dim]: |v[., c]| <= 2^e[c] for every input, rounding included. A norm's output has at most
  // the length sqrt(hidden_size) before its weights, so by Cauchy and Schwarz
  //   |v[c]| <= sqrt(hidden_size) |W[c, :] * norm weight| + |W[c, :] norm bias + b[c]|.
  // A function of the weights alone: values can be merged (docs/numerics.md) without agreeing on anything.
  absl::Span<const int16_t> value_exponents(int layer) const { return layers_[layer].value_exponents; }
  // [hidden_size]: |h[c]| <= 2^e[c] for what Forward makes of any input, as above from the final norm:
  //   |h[c]| <= sqrt(hidden_size) |norm weight[c]| + |norm bias[c]|.
  const std::vector<int16_t>& hidden_exponents() const { return hidden_exponents_; }

  // hidden [ids, hidden_size] from token ids. INVALID_ARGUMENT names the first id outside the vocabulary.
  absl::Status Embed(absl::Span<const int32_t> ids, float* hidden) const;
  // Rows through all layers and the final norm, in place: transformers' last_hidden_state.
  absl::Status Forward(const RowPositions& at, LayerAttention& attention, float* hidden);
  // Its parts, for callers that take a long prompt layer by layer.
  RowAngles Angles(const RowPositions& at) const;
  // Of Angles, for each row; twice as many with sink positions.
  int64_t angle_bytes() const;
  // What attention gets of `rows` rows, whose angles are those of `angles` from the row `first` on; in memory
  // that the next call uses again. INVALID_ARGUMENT where it is not finite.
  absl::StatusOr<LayerRows> BeforeAttention(int layer, const RowAngles& angles, int64_t first, int64_t rows,
                                            const float* hidden);
  // The rest of the layer: attended [rows, query_heads, head_dim] for the `hidden` that was given before.
  void AfterAttention(int layer, int64_t rows, const float* attended, float* hidden);
  // INVALID_ARGUMENT where the result is not finite.
  absl::Status FinalNorm(int64_t rows, float* hidden);
  // logits [rows, vocab_size] of rows that Forward made. INVALID_ARGUMENT where one is not finite, before the
  // softcap, which would make a number of it.
  absl::Status Logits(const float* hidden, int64_t rows, float* logits);

 private:
  struct Linear {
    std::unique_ptr<PackedMatrix> weights;
    std::vector<float> bias;  // Empty without.
  };
  struct Norm {
    std::vector<float> weight;  // Empty: the model has no such norm.
    std::vector<float> bias;    // Empty without.
  };
  struct Layer {
    Norm attention_in, attention_out, mlp_in, mlp_out, q_norm, k_norm;
    Linear qkv;            // Queries, keys, values, one after another.
    Linear attention_map;  // [hidden, query_heads * head_dim]
    Linear up;             // gated_mlp: gate, then up
    Linear down;
    std::vector<int16_t> value_exponents;
    int rope = 0;  // Index into ropes_.
  };
  Transformer(const ModelConfig& config, const ModelWeights& weights, LayerKernels* kernels);
  absl::Status PackLayer(const LayerWeights& from, Layer& to);
  std::vector<int16_t> ValueExponents(const LayerWeights& from) const;
  std::vector<int16_t> HiddenExponents() const;
  void Multiply(const Linear& linear, int64_t rows, const float* x, std::vector<float>& y);
  void Normalise(const Norm& norm, NormKind kind, int64_t rows, const float* x, float* y);
  void NormaliseHeads(const Norm& norm, int64_t rows, int heads, float* x, int64_t stride);
  // cosines and sines [rows, frequencies]
  void Rotate(int rope, const float* cosines, const float* sines, int64_t rows, int heads, const float* x,
              int64_t stride, std::vector<float>& y);

  const ModelConfig config_;
  const WeightView embeddings_;
  LayerKernels* const kernels_;
  float embedding_scale_ = 1;
  DType weight_dtype_ = DType::kBf16;
  std::vector<Layer> layers_;
  Norm final_norm_;
  std::vector<int16_t> hidden_exponents_;
  Linear head_;

  std::vector<std::vector<double>> ropes_;  // Frequencies of each kind of rotary embedding.

  // Of the step under way.
  std::vector<float> normed_, qkv_, queries_, sink_queries_, keys_, values_, attended_, mapped_, up_,
      activated_;
};

}  // namespace eduba

#endif  // EDUBA_MODEL_TRANSFORMER_H_
