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

// In front of numbers that a host looks at: what LayerKernels::FlagNonFinite says of them, so that one copy
// brings both. As many as keep what follows aligned.
constexpr int64_t kHeader = 64;

using Use = LayerFloats::Use;

}  // namespace

Transformer::Transformer(const ModelConfig& config, const ModelWeights& weights, LayerKernels* kernels)
    : config_(config),
      embeddings_(weights.embeddings),
      kernels_(kernels),
      embedding_scale_(RoundedEmbeddingScale(config, weights.embeddings.dtype)),
      constants_(kernels, Use::kShared),
      angles_(kernels),
      normed_(kernels, Use::kKernels),
      qkv_(kernels, Use::kKernels),
      mapped_(kernels, Use::kKernels),
      up_(kernels, Use::kKernels),
      activated_(kernels, Use::kKernels),
      projected_(kernels, Use::kShared),
      attended_(kernels, Use::kShared),
      states_(kernels, Use::kShared),
      logits_(kernels, Use::kShared) {}

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Create(const ModelConfig& config,
                                                                 const ModelWeights& weights,
                                                                 LayerKernels* kernels) {
  EDUBA_CHECK_EQ(config.layers.size(), weights.layers.size());
  std::unique_ptr<Transformer> model(new Transformer(config, weights, kernels));
  model->weight_dtype_ = weights.embeddings.dtype;
  model->layers_.resize(config.layers.size());
  std::vector<Rope> ropes;
  std::vector<float> constants;
  for (size_t i = 0; i < config.layers.size(); ++i) {
    Layer& layer = model->layers_[i];
    EDUBA_RETURN_IF_ERROR(
        Annotate(model->PackLayer(weights.layers[i], layer, constants), absl::StrCat("layer ", i)));
    const Rope& rope = config.layers[i].rope;
    const auto known = std::find(ropes.begin(), ropes.end(), rope);
    layer.rope = static_cast<int>(known - ropes.begin());
    if (known == ropes.end()) {
      ropes.push_back(rope);
      model->ropes_.push_back(InverseFrequencies(rope));
    }
  }
  model->final_norm_ = Keep(weights.final_norm, constants);
  model->hidden_exponents_ = model->HiddenExponents(weights.final_norm);
  EDUBA_ASSIGN_OR_RETURN(model->head_.weights, kernels->Pack({All(weights.head)}));
  EDUBA_RETURN_IF_ERROR(model->SendConstants(constants));
  EDUBA_RETURN_IF_ERROR(model->Reserve(kReservedRows));
  EDUBA_RETURN_IF_ERROR(model->ReserveLogits(kReservedLogitRows));
  return model;
}

Transformer::Constant Transformer::Keep(const std::vector<float>& floats, std::vector<float>& constants) {
  if (floats.empty()) return -1;
  const auto at = static_cast<Constant>(constants.size());
  constants.insert(constants.end(), floats.begin(), floats.end());
  return at;
}

Transformer::Norm Transformer::Keep(const NormWeights& weights, std::vector<float>& constants) {
  Norm norm;
  norm.weight = Keep(Floats(weights.weight), constants);
  norm.bias = Keep(Floats(weights.bias), constants);
  return norm;
}

absl::Status Transformer::SendConstants(const std::vector<float>& constants) {
  const auto count = static_cast<int64_t>(constants.size());
  EDUBA_RETURN_IF_ERROR(constants_.Reserve(count));
  std::copy(constants.begin(), constants.end(), constants_.host());
  constants_.Send(0, count);
  return kernels_->Wait();
}

absl::Status Transformer::Reserve(int64_t rows) {
  const int64_t width = config_.hidden_size;
  const int64_t queries = int64_t{config_.query_heads} * config_.head_dim;
  const int64_t keys = int64_t{config_.kv_heads} * config_.head_dim;
  EDUBA_RETURN_IF_ERROR(normed_.Reserve(rows * width));
  EDUBA_RETURN_IF_ERROR(qkv_.Reserve(rows * (queries + 2 * keys)));
  EDUBA_RETURN_IF_ERROR(projected_.Reserve(kHeader + rows * 2 * (queries + keys)));
  EDUBA_RETURN_IF_ERROR(attended_.Reserve(rows * queries));
  EDUBA_RETURN_IF_ERROR(mapped_.Reserve(rows * width));
  EDUBA_RETURN_IF_ERROR(up_.Reserve(rows * (config_.gated_mlp ? 2 : 1) * config_.intermediate_size));
  return activated_.Reserve(rows * config_.intermediate_size);
}

absl::Status Transformer::ReserveLogits(int64_t rows) {
  EDUBA_RETURN_IF_ERROR(states_.Reserve(rows * config_.hidden_size));
  return logits_.Reserve(kHeader + rows * config_.vocab_size);
}

absl::Status Transformer::PackLayer(const LayerWeights& from, Layer& to, std::vector<float>& constants) {
  const auto norm = [&](const NormWeights& weights) { return Keep(weights, constants); };
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
  std::vector<float> biases;
  for (const QkvPart& part : QkvParts(config_, from)) {
    if (bias) AppendFloats(part.linear->bias, part.first, part.count, biases);
  }
  to.qkv.bias = Keep(biases, constants);
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
  EDUBA_RETURN_IF_ERROR(pack({All(from.o_proj.weight)}, to.o_proj));
  to.o_proj.bias = Keep(Floats(from.o_proj.bias), constants);
  if (config_.gated_mlp) {
    EDUBA_RETURN_IF_ERROR(pack({All(from.gate.weight), All(from.up.weight)}, to.up));
    if (from.up.bias.present()) {
      biases = Floats(from.gate.bias);
      AppendFloats(from.up.bias, 0, config_.intermediate_size, biases);
      to.up.bias = Keep(biases, constants);
    }
  } else {
    EDUBA_RETURN_IF_ERROR(pack({All(from.up.weight)}, to.up));
    to.up.bias = Keep(Floats(from.up.bias), constants);
  }
  EDUBA_RETURN_IF_ERROR(pack({All(from.down.weight)}, to.down));
  to.down.bias = Keep(Floats(from.down.bias), constants);
  to.value_exponents = ValueExponents(from);
  return absl::OkStatus();
}

std::vector<int16_t> Transformer::ValueExponents(const LayerWeights& from) const {
  const std::vector<float> norm_weight = Floats(from.attention_in.weight);
  const std::vector<float> norm_bias = Floats(from.attention_in.bias);
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
        const double scaled = w * (offset + norm_weight[k]);
        squares += scaled * scaled;
        if (!norm_bias.empty()) constant += w * norm_bias[k];
      }
      // One per cent for every rounding on the way, of the stored value too.
      const double bound = 1.01 * (std::sqrt(static_cast<double>(hidden) * squares) + std::abs(constant));
      exponents.push_back(bound > 0 ? static_cast<int16_t>(std::ilogb(bound) + 1) : kNoExponent);
    }
  }
  EDUBA_CHECK_EQ(static_cast<int64_t>(exponents.size()), values);
  return exponents;
}

std::vector<int16_t> Transformer::HiddenExponents(const NormWeights& norm) const {
  const std::vector<float> weight = Floats(norm.weight);
  const std::vector<float> biases = Floats(norm.bias);
  const double longest = std::sqrt(static_cast<double>(config_.hidden_size));
  const double offset = config_.norm_plus_one ? 1 : 0;
  std::vector<int16_t> exponents;
  for (int64_t c = 0; c < config_.hidden_size; ++c) {
    const double bias = biases.empty() ? 0 : biases[c];
    const double bound = 1.01 * (longest * std::abs(offset + weight[c]) + std::abs(bias));
    exponents.push_back(bound > 0 ? static_cast<int16_t>(std::ilogb(bound) + 1) : int16_t{0});
  }
  return exponents;
}

int64_t Transformer::weight_bytes() const {
  int64_t bytes = head_.weights->bytes();
  for (const Layer& layer : layers_) {
    for (const Linear* linear : {&layer.qkv, &layer.o_proj, &layer.up, &layer.down}) {
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

absl::Status Transformer::Forward(const RowPositions& at, LayerAttention& attention,
                                  const LayerFloats& hidden) {
  const auto rows = static_cast<int64_t>(at.positions.size());
  EDUBA_RETURN_IF_ERROR(Angles(at, angles_));
  hidden.Send(0, rows * config_.hidden_size);
  for (int layer = 0; layer < static_cast<int>(layers_.size()); ++layer) {
    EDUBA_ASSIGN_OR_RETURN(const LayerRows call, BeforeAttention(layer, angles_, 0, rows, hidden));
    EDUBA_ASSIGN_OR_RETURN(float* const attended, Attended(rows));
    EDUBA_RETURN_IF_ERROR(Annotate(attention.Attend(call, attended), absl::StrCat("layer ", layer)));
    AfterAttention(layer, 0, rows, hidden);
  }
  return FinalNorm(0, rows, hidden);
}

absl::StatusOr<LayerRows> Transformer::BeforeAttention(int index, const RowAngles& angles, int64_t first,
                                                       int64_t rows, const LayerFloats& hidden) {
  const Layer& layer = layers_[index];
  const int64_t dim = config_.head_dim;
  const int64_t width = config_.hidden_size;
  const int64_t query_row = config_.query_heads * dim;
  const int64_t key_row = config_.kv_heads * dim;
  const int64_t stride = query_row + 2 * key_row;
  EDUBA_RETURN_IF_ERROR(Reserve(rows));

  Normalise(layer.attention_in, config_.norm, rows, hidden.data() + first * width, normed_.data());
  Multiply(layer.qkv, rows, normed_.data(), qkv_.data());
  float* const queries = qkv_.data();
  float* const keys = queries + query_row;
  const float* const values = keys + key_row;
  if (config_.qk_norm) {
    NormaliseHeads(layer.q_norm, rows, config_.query_heads, queries, stride);
    NormaliseHeads(layer.k_norm, rows, config_.kv_heads, keys, stride);
  }
  const RowAngles::Kind& turn = angles.kinds[layer.rope];
  const auto frequencies = static_cast<int64_t>(ropes_[layer.rope].size());
  const float* const angle = angles.floats.data() + first * frequencies;
  const int64_t to_keys = kHeader + rows * query_row;
  const int64_t to_values = to_keys + rows * key_row;
  const int64_t to_sink_queries = to_values + rows * key_row;
  float* const to = projected_.data();
  Rotate(frequencies, angle + turn.cosines, angle + turn.sines, rows, config_.query_heads, queries, stride,
         to + kHeader);
  Rotate(frequencies, angle + turn.cosines, angle + turn.sines, rows, config_.kv_heads, keys, stride,
         to + to_keys);
  Rotate(0, nullptr, nullptr, rows, config_.kv_heads, values, stride, to + to_values);
  int64_t end = to_sink_queries;
  if (angles.has_sinks) {
    Rotate(frequencies, angle + turn.sink_cosines, angle + turn.sink_sines, rows, config_.query_heads,
           queries, stride, to + to_sink_queries);
    end += rows * query_row;
  }
  // What attention is given must be finite; what overflowed is an error here, and never becomes a number.
  kernels_->FlagNonFinite({end - kHeader, to + kHeader, to});
  projected_.Fetch(0, end);
  EDUBA_RETURN_IF_ERROR(kernels_->Wait());
  is_attended_queued_ = false;
  const float* const made = projected_.host();
  if (made[0] != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", index, ": a query, key or value is not finite; are the weights whole?"));
  }
  return LayerRows{index,          rows,
                   made + kHeader, made + (angles.has_sinks ? to_sink_queries : kHeader),
                   made + to_keys, made + to_values};
}

absl::StatusOr<float*> Transformer::Attended(int64_t rows) {
  if (is_attended_queued_) EDUBA_RETURN_IF_ERROR(kernels_->Wait());
  is_attended_queued_ = false;
  EDUBA_RETURN_IF_ERROR(Reserve(rows));
  return attended_.host();
}

void Transformer::AfterAttention(int index, int64_t first, int64_t rows, const LayerFloats& hidden) {
  const Layer& layer = layers_[index];
  const int64_t width = config_.hidden_size;
  float* const states = hidden.data() + first * width;
  attended_.Send(0, rows * config_.query_heads * config_.head_dim);
  is_attended_queued_ = true;
  Multiply(layer.o_proj, rows, attended_.data(), mapped_.data());
  if (config_.post_norms) {
    Normalise(layer.attention_out, config_.norm, rows, mapped_.data(), mapped_.data());
  }
  if (config_.parallel_residual) {
    Normalise(layer.mlp_in, config_.norm, rows, states, normed_.data());
    kernels_->Add({rows * width, mapped_.data(), states});
  } else {
    kernels_->Add({rows * width, mapped_.data(), states});
    Normalise(layer.mlp_in, config_.norm, rows, states, normed_.data());
  }

  Multiply(layer.up, rows, normed_.data(), up_.data());
  const int64_t inner = config_.intermediate_size;
  kernels_->Activate({config_.activation, rows, inner, up_.data(), config_.gated_mlp ? 2 * inner : inner,
                      config_.gated_mlp ? up_.data() + inner : nullptr, activated_.data()});
  Multiply(layer.down, rows, activated_.data(), mapped_.data());
  if (config_.post_norms) Normalise(layer.mlp_out, config_.norm, rows, mapped_.data(), mapped_.data());
  kernels_->Add({rows * width, mapped_.data(), states});
}

absl::Status Transformer::FinalNorm(int64_t first, int64_t rows, const LayerFloats& hidden) {
  const int64_t width = config_.hidden_size;
  float* const states = hidden.data() + first * width;
  Normalise(final_norm_, config_.norm, rows, states, states);
  kernels_->FlagNonFinite({rows * width, states, projected_.data()});
  hidden.Fetch(first * width, rows * width);
  projected_.Fetch(0, 1);
  EDUBA_RETURN_IF_ERROR(kernels_->Wait());
  if (projected_.host()[0] == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      "after the last layer: a hidden state is not finite; are the weights whole?");
}

absl::StatusOr<absl::Span<const float>> Transformer::Logits(const float* hidden, int64_t rows) {
  const int64_t width = config_.hidden_size;
  const int64_t count = rows * config_.vocab_size;
  EDUBA_RETURN_IF_ERROR(ReserveLogits(rows));
  std::copy_n(hidden, rows * width, states_.host());
  states_.Send(0, rows * width);
  float* const logits = logits_.data() + kHeader;
  Multiply(head_, rows, states_.data(), logits);
  kernels_->FlagNonFinite({count, logits, logits_.data()});
  if (config_.logit_softcap > 0) kernels_->Softcap({count, logits, config_.logit_softcap});
  logits_.Fetch(0, kHeader + count);
  EDUBA_RETURN_IF_ERROR(kernels_->Wait());
  if (logits_.host()[0] != 0) {
    return absl::InvalidArgumentError("the last product: a logit is not finite; are the weights whole?");
  }
  return absl::MakeConstSpan(logits_.host() + kHeader, count);
}

void Transformer::Multiply(const Linear& linear, int64_t rows, const float* x, float* y) {
  kernels_->Multiply({linear.weights.get(), rows, x, At(linear.bias), y});
}

void Transformer::Normalise(const Norm& norm, NormKind kind, int64_t rows, const float* x, float* y) {
  NormArgs args;
  args.kind = kind;
  args.rows = rows;
  args.dim = static_cast<int>(config_.hidden_size);
  args.x = x;
  args.x_stride = args.y_stride = config_.hidden_size;
  args.y = y;
  args.weight = At(norm.weight);
  args.weight_offset = config_.norm_plus_one ? 1.0F : 0.0F;
  args.bias = At(norm.bias);
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
  args.weight = At(norm.weight);
  args.weight_offset = config_.norm_plus_one ? 1.0F : 0.0F;
  args.epsilon = config_.norm_eps;
  kernels_->Normalise(args);
}

int64_t Transformer::angle_bytes() const {
  size_t frequencies = 0;
  for (const std::vector<double>& rope : ropes_) frequencies += rope.size();
  return static_cast<int64_t>(2 * frequencies * sizeof(float));
}

absl::Status Transformer::Angles(const RowPositions& at, RowAngles& angles) const {
  angles.has_sinks = !at.sink_positions.empty();
  angles.kinds.clear();
  int64_t count = 0;
  const auto place = [&](absl::Span<const int64_t> positions, const std::vector<double>& frequencies) {
    const int64_t begin = count;
    count += static_cast<int64_t>(positions.size() * frequencies.size());
    return begin;
  };
  for (const std::vector<double>& frequencies : ropes_) {
    RowAngles::Kind& kind = angles.kinds.emplace_back();
    kind.cosines = place(at.positions, frequencies);
    kind.sines = place(at.positions, frequencies);
    kind.sink_cosines = place(at.sink_positions, frequencies);
    kind.sink_sines = place(at.sink_positions, frequencies);
  }
  EDUBA_RETURN_IF_ERROR(angles.floats.Reserve(count));
  float* const floats = angles.floats.host();
  for (size_t i = 0; i < ropes_.size(); ++i) {
    const RowAngles::Kind& kind = angles.kinds[i];
    RopeAngles(ropes_[i], at.positions, floats + kind.cosines, floats + kind.sines);
    RopeAngles(ropes_[i], at.sink_positions, floats + kind.sink_cosines, floats + kind.sink_sines);
  }
  angles.floats.Send(0, count);
  return absl::OkStatus();
}

void Transformer::Rotate(int64_t frequencies, const float* cosines, const float* sines, int64_t rows,
                         int heads, const float* x, int64_t stride, float* y) {
  RopeArgs args;
  args.rows = rows;
  args.heads = heads;
  args.dim = config_.head_dim;
  args.rotary_dim = static_cast<int>(2 * frequencies);
  args.cosines = cosines;
  args.sines = sines;
  args.x = x;
  args.x_stride = stride;
  args.y = y;
  args.y_stride = int64_t{heads} * config_.head_dim;
  kernels_->Rotate(args);
}

}  // namespace eduba
