#include "model/transformer.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "attention/sequence.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "model/rope.h"

namespace eduba {
namespace {

MatrixView Rows(const WeightView& weight, int64_t first, int64_t count) {
  const int64_t inputs = weight.shape[1];
  return {
      static_cast<const char*>(weight.data) + first * inputs * static_cast<int64_t>(DTypeBytes(weight.dtype)),
      weight.dtype, count, inputs};
}
MatrixView All(const WeightView& weight) { return Rows(weight, 0, weight.shape[0]); }

// Appends `count` elements from `first` on, or zeros where the weight is absent.
void AppendFloats(const WeightView& view, int64_t first, int64_t count, std::vector<float>& floats) {
  for (int64_t i = first; i < first + count; ++i) {
    floats.push_back(view.present() ? LoadElement(view.data, view.dtype, i) : 0);
  }
}
std::vector<float> Floats(const WeightView& view) {
  std::vector<float> floats;
  if (view.present()) AppendFloats(view, 0, view.shape[0], floats);
  return floats;
}

// The rows of a layer's queries, keys and values in the order of Transformer::Layer::qkv. GPT-NeoX keeps them
// head by head.
struct QkvPart {
  const LinearWeights* linear;
  int64_t first;
  int64_t count;
};
std::vector<QkvPart> QkvParts(const ModelConfig& config, const LayerWeights& layer) {
  const int64_t dim = config.head_dim;
  std::vector<QkvPart> parts;
  if (!layer.fused_qkv.weight.present()) {
    parts = {{&layer.q, 0, config.query_heads * dim},
             {&layer.k, 0, config.kv_heads * dim},
             {&layer.v, 0, config.kv_heads * dim}};
    return parts;
  }
  for (int64_t which = 0; which < 3; ++which) {
    for (int64_t head = 0; head < config.query_heads; ++head) {
      parts.push_back({&layer.fused_qkv, (head * 3 + which) * dim, dim});
    }
  }
  return parts;
}

void Add(const std::vector<float>& from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

bool AllFinite(absl::Span<const float> numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [](float x) { return std::isfinite(x); });
}

}  // namespace

Transformer::Transformer(const ModelConfig& config, const ModelWeights& weights, LayerKernels* kernels)
    : config_(config),
      embeddings_(weights.embeddings),
      kernels_(kernels),
      embedding_scale_(RoundedEmbeddingScale(config, weights.embeddings.dtype)) {}

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Create(const ModelConfig& config,
                                                                 const ModelWeights& weights,
                                                                 LayerKernels* kernels) {
  EDUBA_CHECK_EQ(config.layers.size(), weights.layers.size());
  std::unique_ptr<Transformer> model(new Transformer(config, weights, kernels));
  model->weight_dtype_ = weights.embeddings.dtype;
  model->layers_.resize(config.layers.size());
  std::vector<Rope> ropes;
  for (size_t i = 0; i < config.layers.size(); ++i) {
    Layer& layer = model->layers_[i];
    EDUBA_RETURN_IF_ERROR(Annotate(model->PackLayer(weights.layers[i], layer), absl::StrCat("layer ", i)));
    const Rope& rope = config.layers[i].rope;
    const auto known = std::find(ropes.begin(), ropes.end(), rope);
    layer.rope = static_cast<int>(known - ropes.begin());
    if (known == ropes.end()) {
      ropes.push_back(rope);
      model->ropes_.push_back(InverseFrequencies(rope));
    }
  }
  model->final_norm_ = {Floats(weights.final_norm.weight), Floats(weights.final_norm.bias)};
  model->hidden_exponents_ = model->HiddenExponents();
  EDUBA_ASSIGN_OR_RETURN(model->head_.weights, kernels->Pack({All(weights.head)}));
  return model;
}

absl::Status Transformer::PackLayer(const LayerWeights& from, Layer& to) {
  const auto norm = [](const NormWeights& weights) {
    return Norm{Floats(weights.weight), Floats(weights.bias)};
  };
  to.attention_in = norm(from.attention_in);
  to.attention_out = norm(from.attention_out);
  to.mlp_in = norm(from.mlp_in);
  to.mlp_out = norm(from.mlp_out);
  to.q_norm = norm(from.q_norm);
  to.k_norm = norm(from.k_norm);

  std::vector<MatrixView> parts;
  bool bias = false;
  for (const QkvPart& part : QkvParts(config_, from)) {
    parts.push_back(Rows(part.linear->weight, part.first, part.count));
    bias |= part.linear->bias.present();
    if (part.linear->weight.dtype == DType::kF32) weight_dtype_ = DType::kF32;
  }
  for (const QkvPart& part : QkvParts(config_, from)) {
    if (bias) AppendFloats(part.linear->bias, part.first, part.count, to.qkv.bias);
  }
  const auto pack = [&](const std::vector<MatrixView>& views, Linear& linear) {
    for (const MatrixView& view : views) {
      if (view.dtype != views[0].dtype) {
        return absl::UnimplementedError(absl::StrCat("weights of one product have types ",
                                                     DTypeName(views[0].dtype), " and ",
                                                     DTypeName(view.dtype), "; convert the model to one"));
      }
    }
    EDUBA_ASSIGN_OR_RETURN(linear.weights, kernels_->Pack(views));
    return absl::OkStatus();
  };
  EDUBA_RETURN_IF_ERROR(pack(parts, to.qkv));
  EDUBA_RETURN_IF_ERROR(pack({All(from.attention_map.weight)}, to.attention_map));
  to.attention_map.bias = Floats(from.attention_map.bias);
  if (config_.gated_mlp) {
    EDUBA_RETURN_IF_ERROR(pack({All(from.gate.weight), All(from.up.weight)}, to.up));
    if (from.up.bias.present()) {
      to.up.bias = Floats(from.gate.bias);
      AppendFloats(from.up.bias, 0, config_.intermediate_size, to.up.bias);
    }
  } else {
    EDUBA_RETURN_IF_ERROR(pack({All(from.up.weight)}, to.up));
    to.up.bias = Floats(from.up.bias);
  }
  EDUBA_RETURN_IF_ERROR(pack({All(from.down.weight)}, to.down));
  to.down.bias = Floats(from.down.bias);
  to.value_exponents = ValueExponents(from);
  return absl::OkStatus();
}

std::vector<int16_t> Transformer::ValueExponents(const LayerWeights& from) const {
  const Norm norm{Floats(from.attention_in.weight), Floats(from.attention_in.bias)};
  const double offset = config_.norm_plus_one ? 1 : 0;
  const int64_t hidden = config_.hidden_size;
  const int64_t values = int64_t{config_.kv_heads} * config_.head_dim;
  std::vector<int16_t> exponents;
  int64_t skip = (int64_t{config_.query_heads} + config_.kv_heads) * config_.head_dim;  // Queries and keys.
  for (const QkvPart& part : QkvParts(config_, from)) {
    if (skip > 0) {
      skip -= part.count;
      continue;
    }
    const WeightView& weight = part.linear->weight;
    for (int64_t c = part.first; c < part.first + part.count; ++c) {
      double squares = 0;
      double constant =
          part.linear->bias.present() ? LoadElement(part.linear->bias.data, part.linear->bias.dtype, c) : 0;
      for (int64_t k = 0; k < hidden; ++k) {
        const double w = LoadElement(weight.data, weight.dtype, c * hidden + k);
        const double scaled = w * (offset + norm.weight[k]);
        squares += scaled * scaled;
        if (!norm.bias.empty()) constant += w * norm.bias[k];
      }
      // One per cent for every rounding on the way, of the stored value too.
      const double bound = 1.01 * (std::sqrt(static_cast<double>(hidden) * squares) + std::abs(constant));
      exponents.push_back(bound > 0 ? static_cast<int16_t>(std::ilogb(bound) + 1) : kNoExponent);
    }
  }
  EDUBA_CHECK_EQ(static_cast<int64_t>(exponents.size()), values);
  return exponents;
}

std::vector<int16_t> Transformer::HiddenExponents() const {
  const double longest = std::sqrt(static_cast<double>(config_.hidden_size));
  const double offset = config_.norm_plus_one ? 1 : 0;
  std::vector<int16_t> exponents;
  for (int64_t c = 0; c < config_.hidden_size; ++c) {
    const double bias = final_norm_.bias.empty() ? 0 : final_norm_.bias[c];
    const double bound = 1.01 * (longest * std::abs(offset + final_norm_.weight[c]) + std::abs(bias));
    exponents.push_back(bound > 0 ? static_cast<int16_t>(std::ilogb(bound) + 1) : int16_t{0});
  }
  return exponents;
}

int64_t Transformer::weight_bytes() const {
  int64_t bytes = head_.weights->bytes();
  for (const Layer& layer : layers_) {
    for (const Linear* linear : {&layer.qkv, &layer.attention_map, &layer.up, &layer.down}) {
      bytes += linear->weights->bytes();
    }
  }
  return bytes;
}

absl::Status Transformer::Embed(absl::Span<const int32_t> ids, float* hidden) const {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= config_.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("token ", i, " has id ", ids[i], ", wanted 0 to ",
                                                     config_.vocab_size - 1, ", the model's vocabulary"));
    }
  }
  const int64_t dim = config_.hidden_size;
  for (const int32_t id : ids) {
    for (int64_t c = 0; c < dim; ++c) {
      *hidden++ = LoadElement(embeddings_.data, embeddings_.dtype, id * dim + c) * embedding_scale_;
    }
  }
  return absl::OkStatus();
}

absl::Status Transformer::Forward(const RowPositions& at, LayerAttention& attention, float* hidden) {
  const auto rows = static_cast<int64_t>(at.positions.size());
  const RowAngles angles = Angles(at);
  for (int layer = 0; layer < static_cast<int>(layers_.size()); ++layer) {
    EDUBA_ASSIGN_OR_RETURN(const LayerRows call, BeforeAttention(layer, angles, 0, rows, hidden));
    attended_.resize(rows * config_.query_heads * config_.head_dim);
    EDUBA_RETURN_IF_ERROR(Annotate(attention.Attend(call, attended_.data()), absl::StrCat("layer ", layer)));
    AfterAttention(layer, rows, attended_.data(), hidden);
  }
  return FinalNorm(rows, hidden);
}

absl::StatusOr<LayerRows> Transformer::BeforeAttention(int index, const RowAngles& angles, int64_t first,
                                                       int64_t rows, const float* hidden) {
  const Layer& layer = layers_[index];
  const int64_t dim = config_.head_dim;
  const int64_t width = config_.hidden_size;
  const int64_t stride = (config_.query_heads + 2 * int64_t{config_.kv_heads}) * dim;
  normed_.resize(rows * width);

  Normalise(layer.attention_in, config_.norm, rows, hidden, normed_.data());
  Multiply(layer.qkv, rows, normed_.data(), qkv_);
  float* keys = qkv_.data() + config_.query_heads * dim;
  const float* values = keys + config_.kv_heads * dim;
  if (config_.qk_norm) {
    NormaliseHeads(layer.q_norm, rows, config_.query_heads, qkv_.data(), stride);
    NormaliseHeads(layer.k_norm, rows, config_.kv_heads, keys, stride);
  }
  const RowAngles::Kind& turn = angles.kinds[layer.rope];
  const int64_t angle = first * static_cast<int64_t>(ropes_[layer.rope].size());
  const float* const cosines = turn.cosines.data() + angle;
  const float* const sines = turn.sines.data() + angle;
  Rotate(layer.rope, cosines, sines, rows, config_.query_heads, qkv_.data(), stride, queries_);
  Rotate(layer.rope, cosines, sines, rows, config_.kv_heads, keys, stride, keys_);
  LayerRows call{index, rows, queries_.data(), queries_.data(), keys_.data(), nullptr};
  if (!turn.sink_cosines.empty()) {
    Rotate(layer.rope, turn.sink_cosines.data() + angle, turn.sink_sines.data() + angle, rows,
           config_.query_heads, qkv_.data(), stride, sink_queries_);
    call.sink_queries = sink_queries_.data();
  }
  values_.resize(rows * config_.kv_heads * dim);
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(values + row * stride, config_.kv_heads * dim, &values_[row * config_.kv_heads * dim]);
  }
  call.values = values_.data();
  // What attention is given must be finite; what overflowed is an error here, and never becomes a number.
  if (!AllFinite(queries_) || !AllFinite(keys_) || !AllFinite(values_)) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", index, ": a query, key or value is not finite; are the weights whole?"));
  }
  return call;
}

void Transformer::AfterAttention(int index, int64_t rows, const float* attended, float* hidden) {
  const Layer& layer = layers_[index];
  const int64_t width = config_.hidden_size;
  normed_.resize(rows * width);
  Multiply(layer.attention_map, rows, attended, mapped_);
  if (config_.post_norms) {
    Normalise(layer.attention_out, config_.norm, rows, mapped_.data(), mapped_.data());
  }
  if (config_.parallel_residual) {
    Normalise(layer.mlp_in, config_.norm, rows, hidden, normed_.data());
    Add(mapped_, rows * width, hidden);
  } else {
    Add(mapped_, rows * width, hidden);
    Normalise(layer.mlp_in, config_.norm, rows, hidden, normed_.data());
  }

  Multiply(layer.up, rows, normed_.data(), up_);
  const int64_t inner = config_.intermediate_size;
  activated_.resize(rows * inner);
  kernels_->Activate({config_.activation, rows, inner, up_.data(), config_.gated_mlp ? 2 * inner : inner,
                      config_.gated_mlp ? up_.data() + inner : nullptr, activated_.data()});
  Multiply(layer.down, rows, activated_.data(), mapped_);
  if (config_.post_norms) Normalise(layer.mlp_out, config_.norm, rows, mapped_.data(), mapped_.data());
  Add(mapped_, rows * width, hidden);
}

absl::Status Transformer::FinalNorm(int64_t rows, float* hidden) {
  Normalise(final_norm_, config_.norm, rows, hidden, hidden);
  if (AllFinite(absl::MakeConstSpan(hidden, rows * config_.hidden_size))) return absl::OkStatus();
  return absl::InvalidArgumentError(
      "behind the last layer: a hidden state is not finite; are the weights whole?");
}

absl::Status Transformer::Logits(const float* hidden, int64_t rows, float* logits) {
  kernels_->Multiply({head_.weights.get(), rows, hidden, nullptr, logits});
  if (!AllFinite(absl::MakeConstSpan(logits, rows * config_.vocab_size))) {
    return absl::InvalidArgumentError("the last product: a logit is not finite; are the weights whole?");
  }
  if (config_.logit_softcap > 0) {
    kernels_->Softcap({rows * config_.vocab_size, logits, config_.logit_softcap});
  }
  return absl::OkStatus();
}

void Transformer::Multiply(const Linear& linear, int64_t rows, const float* x, std::vector<float>& y) {
  y.resize(rows * linear.weights->outputs());
  kernels_->Multiply(
      {linear.weights.get(), rows, x, linear.bias.empty() ? nullptr : linear.bias.data(), y.data()});
}

void Transformer::Normalise(const Norm& norm, NormKind kind, int64_t rows, const float* x, float* y) {
  NormArgs args;
  args.kind = kind;
  args.rows = rows;
  args.dim = static_cast<int>(config_.hidden_size);
  args.x = x;
  args.x_stride = args.y_stride = config_.hidden_size;
  args.y = y;
  args.weight = norm.weight.data();
  args.weight_offset = config_.norm_plus_one ? 1.0F : 0.0F;
  args.bias = norm.bias.empty() ? nullptr : norm.bias.data();
  args.epsilon = config_.norm_eps;
  kernels_->Normalise(args);
}

void Transformer::NormaliseHeads(const Norm& norm, int64_t rows, int heads, float* x, int64_t stride) {
  NormArgs args;
  args.rows = rows;
  args.heads = heads;
  args.dim = config_.head_dim;
  args.x = args.y = x;
  args.x_stride = args.y_stride = stride;
  args.weight = norm.weight.data();
  args.weight_offset = config_.norm_plus_one ? 1.0F : 0.0F;
  args.epsilon = config_.norm_eps;
  kernels_->Normalise(args);
}

int64_t Transformer::angle_bytes() const {
  size_t frequencies = 0;
  for (const std::vector<double>& rope : ropes_) frequencies += rope.size();
  return static_cast<int64_t>(2 * frequencies * sizeof(float));
}

RowAngles Transformer::Angles(const RowPositions& at) const {
  RowAngles angles;
  for (const std::vector<double>& frequencies : ropes_) {
    RowAngles::Kind& kind = angles.kinds.emplace_back();
    const auto fill = [&](absl::Span<const int64_t> positions, std::vector<float>& cosines,
                          std::vector<float>& sines) {
      cosines.resize(positions.size() * frequencies.size());
      sines.resize(cosines.size());
      RopeAngles(frequencies, positions, cosines.data(), sines.data());
    };
    fill(at.positions, kind.cosines, kind.sines);
    fill(at.sink_positions, kind.sink_cosines, kind.sink_sines);
  }
  return angles;
}

void Transformer::Rotate(int rope, const float* cosines, const float* sines, int64_t rows, int heads,
                         const float* x, int64_t stride, std::vector<float>& y) {
  y.resize(rows * heads * config_.head_dim);
  RopeArgs args;
  args.rows = rows;
  args.heads = heads;
  args.dim = config_.head_dim;
  args.rotary_dim = static_cast<int>(2 * ropes_[rope].size());
  args.cosines = cosines;
  args.sines = sines;
  args.x = x;
  args.x_stride = stride;
  args.y = y.data();
  args.y_stride = int64_t{heads} * config_.head_dim;
  kernels_->Rotate(args);
}

}  // namespace eduba
