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

// By how much to turn the queries and keys of some rows, for each kind of rotary embedding that a model has,
// where the model's kernels work.
struct RowAngles {
  explicit RowAngles(LayerKernels* kernels) : floats(kernels, LayerFloats::Use::kShared) {}

  struct Kind {
    int64_t cosines = 0, sines = 0;            // Where in `floats`: [rows, frequencies] each.
    int64_t sink_cosines = 0, sink_sines = 0;  // The same at sink_positions.
  };
  std::vector<Kind> kinds;
  bool has_sinks = false;  // Whether there are sink_positions.
  LayerFloats floats;
};

// The forward pass of one model, for rows of any number of sequences: a pure function of its weights, the
// rows and what LayerAttention answers. A row's bits do not depend on the other rows of its step
// (docs/adr/0007). One call at a time.
//
// Hidden states are where its kernels work, with a host's side that Forward and the parts read and write
// where they say so. On a CPU the two are one.
class Transformer {
 public:
  // Packs the weights for `kernels`, which must outlive the transformer. `config` and `weights` as LoadModel
  // gives them; `weights` must live as long as the transformer, because embeddings are read where they lie.
  static absl::StatusOr<std::unique_ptr<Transformer>> Create(const ModelConfig& config,
                                                             const ModelWeights& weights,
                                                             LayerKernels* kernels);

  const ModelConfig& config() const { return config_; }
  // The bytes of the packed weights: what a decoded token has to read, besides keys and values.
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

  // For hidden states: rows of hidden_size, shared.
  LayerFloats NewHidden() const { return {kernels_, LayerFloats::Use::kShared}; }
  RowAngles NewAngles() const { return RowAngles(kernels_); }

  // hidden [ids, hidden_size] from token ids, in a host's memory. INVALID_ARGUMENT names the first id outside
  // the vocabulary.
  absl::Status Embed(absl::Span<const int32_t> ids, float* hidden) const;
  // Rows through all layers and the final norm, in place: transformers' last_hidden_state. From the host's
  // side of `hidden`, which is set, and back to it. Errors as those of the parts, and as attention's.
  absl::Status Forward(const RowPositions& at, LayerAttention& attention, const LayerFloats& hidden);

  // Its parts, for callers that take a long prompt layer by layer. Rows [first, first + rows) of `hidden` and
  // of `angles` are meant. RESOURCE_EXHAUSTED, where there are more rows than Create has reserved memory
  // for, and UNAVAILABLE are the kernels'.
  // The rows of a step: an append's chunk, and generations.
  static constexpr int64_t kReservedRows = 512;
  static constexpr int64_t kReservedLogitRows = 32;  // The rows of one call of Logits.
  absl::Status Angles(const RowPositions& at, RowAngles& angles) const;
  // The bytes that Angles takes for each row; twice as many with sink positions.
  int64_t angle_bytes() const;
  // What attention gets; in a host's memory, which the next call uses again. INVALID_ARGUMENT where it is not
  // finite.
  absl::StatusOr<LayerRows> BeforeAttention(int layer, const RowAngles& angles, int64_t first, int64_t rows,
                                            const LayerFloats& hidden);
  // Where the host is to put what attention made of `rows` rows: [rows, query_heads, head_dim].
  absl::StatusOr<float*> Attended(int64_t rows);
  // The rest of the layer, for rows whose answers are in Attended().
  void AfterAttention(int layer, int64_t first, int64_t rows, const LayerFloats& hidden);
  // Back to the host's side. INVALID_ARGUMENT where the result is not finite.
  absl::Status FinalNorm(int64_t first, int64_t rows, const LayerFloats& hidden);
  // logits [rows, vocab_size] of rows that Forward made, both in a host's memory; that of the logits is used
  // again by the next call. INVALID_ARGUMENT where one is not finite, before the softcap, which would make a
  // number of it.
  absl::StatusOr<absl::Span<const float>> Logits(const float* hidden, int64_t rows);

 private:
  // Where in constants_; none: -1.
  using Constant = int64_t;
  struct Linear {
    std::unique_ptr<PackedMatrix> weights;
    Constant bias = -1;
  };
  struct Norm {
    Constant weight = -1;
    Constant bias = -1;
  };
  struct Layer {
    Norm attention_in, attention_out, mlp_in, mlp_out, q_norm, k_norm;
    Linear qkv;     // Queries, keys, values, one after another.
    Linear o_proj;  // [hidden, query_heads * head_dim]
    Linear up;      // gated_mlp: gate, then up
    Linear down;
    std::vector<int16_t> value_exponents;
    int rope = 0;  // Index into ropes_.
  };
  Transformer(const ModelConfig& config, const ModelWeights& weights, LayerKernels* kernels);
  // Appends to `constants`, of which SendConstants makes constants_.
  static Constant Keep(const std::vector<float>& floats, std::vector<float>& constants);
  static Norm Keep(const NormWeights& weights, std::vector<float>& constants);
  absl::Status SendConstants(const std::vector<float>& constants);
  const float* At(Constant at) const { return at < 0 ? nullptr : constants_.data() + at; }
  absl::Status PackLayer(const LayerWeights& from, Layer& to, std::vector<float>& constants);
  std::vector<int16_t> ValueExponents(const LayerWeights& from) const;
  std::vector<int16_t> HiddenExponents(const NormWeights& norm) const;
  // Takes the memory that a step's rows need.
  absl::Status Reserve(int64_t rows);
  absl::Status ReserveLogits(int64_t rows);
  void Multiply(const Linear& linear, int64_t rows, const float* x, float* y);
  void Normalise(const Norm& norm, NormKind kind, int64_t rows, const float* x, float* y);
  void NormaliseHeads(const Norm& norm, int64_t rows, int heads, float* x, int64_t stride);
  // To [rows, heads, head_dim], by cosines and sines [rows, frequencies].
  void Rotate(int64_t frequencies, const float* cosines, const float* sines, int64_t rows, int heads,
              const float* x, int64_t stride, float* y);

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
  LayerFloats constants_;                   // Weights of norms, biases.

  // What the step under way uses.
  RowAngles angles_;
  LayerFloats normed_, qkv_, mapped_, up_, activated_;
  // kHeader floats, of which the first is FlagNonFinite's; queries, keys, values, sink queries.
  LayerFloats projected_;
  LayerFloats attended_;
  bool is_attended_queued_ = false;  // Its copy may be under way.
  LayerFloats states_;               // The hidden states whose logits are asked for.
  LayerFloats logits_;               // kHeader floats, as above; logits.
};

}  // namespace eduba

#endif  // EDUBA_MODEL_TRANSFORMER_H_
