#ifndef EDUBA_KERNELS_CUDA_LAYER_ROWS_H_
#define EDUBA_KERNELS_CUDA_LAYER_ROWS_H_

#include <bit>
#include <cstdint>
#include <variant>

#include "kernels/activation.h"
#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/page_attention.h"
#include "kernels/layer_kernels.h"
#include "kernels/norm.h"
#include "kernels/rope.h"

// What a transformer's layers do besides products (kernels/layer_kernels.h), and what a product's rows need
// before and after it. An element, or a vector, is one thread's or one group of threads', whose number is
// the vector's length's: so nothing depends on what else is in the batch. See page_attention.h for what a
// Block is.
namespace eduba::cuda {

inline constexpr int kLayerThreads = 256;
inline constexpr int kFindElements = 8;  // The elements that one thread looks at.
inline constexpr int kNormPiece =
    16;  // Elements of a thread that are summed in fp32 before they join a double.

constexpr int64_t BlocksFor(int64_t threads) { return (threads + kLayerThreads - 1) / kLayerThreads; }

struct LayerShared {
  double sum[kLayerThreads];
};

// ---- Norms

// Threads of a vector: a power of two.
constexpr int NormWidth(int dim) {
  int width = 32;
  while (width < kLayerThreads && width * 8 < dim) width *= 2;
  return width;
}
constexpr int64_t LayerBlocks(const NormArgs& args) {
  return BlocksFor(args.rows * args.heads * NormWidth(args.dim));
}

// The sums of of(thread) over each vector's threads, to the first of them in shared memory: a fixed tree.
template <class Block, class Of>
EDUBA_DEVICE void SumOverThreads(const Block& block, int width, const Of& of) {
  auto& shared = *reinterpret_cast<LayerShared*>(block.shared());
  block.Threads([&](int t) { shared.sum[t] = of(t); });
  for (int step = width / 2; step > 0; step /= 2) {
    block.Threads([&](int t) {
      if (t % width < step) shared.sum[t] = Add(shared.sum[t], shared.sum[t + step]);
    });
  }
}

struct NormRegisters {
  float mean;
  float factor;
};

template <class Block>
EDUBA_DEVICE void RunLayer(const Block& block, const NormArgs& args) {
  auto& shared = *reinterpret_cast<LayerShared*>(block.shared());
  typename Block::template Registers<NormRegisters> registers(block);
  const int width = NormWidth(args.dim);
  const int64_t first = block.index() * (kLayerThreads / width);
  const auto vector_of = [&](int t) { return first + t / width; };
  const auto is_there = [&](int t) { return vector_of(t) < args.rows * args.heads; };
  const auto offset_of = [&](int t, int64_t stride) {
    return vector_of(t) / args.heads * stride + vector_of(t) % args.heads * args.dim;
  };
  // term(sum, x) of a thread's elements, in fp32 pieces and double.
  const auto sum_of = [&](int t, const auto& term) {
    double total = 0;
    if (!is_there(t)) return total;
    const float* const x = args.x + offset_of(t, args.x_stride);
    for (int i = t % width; i < args.dim;) {
      float piece = 0;
      for (int end = kNormPiece; end > 0 && i < args.dim; --end, i += width) piece = term(piece, x[i]);
      total = Add(total, static_cast<double>(piece));
    }
    return total;
  };
  const auto mean_of = [&](int t) {
    return Div(shared.sum[t / width * width], static_cast<double>(args.dim));
  };

  block.Threads([&](int t) { registers[t].mean = 0; });
  if (args.kind == NormKind::kLayer) {
    SumOverThreads(block, width,
                   [&](int t) { return sum_of(t, [](float sum, float x) { return Add(sum, x); }); });
    block.Threads([&](int t) { registers[t].mean = static_cast<float>(mean_of(t)); });
  }
  SumOverThreads(block, width, [&](int t) {
    const float mean = registers[t].mean;
    return sum_of(t, [mean](float sum, float x) {
      const float a = Sub(x, mean);
      return Fma(a, a, sum);
    });
  });
  block.Threads([&](int t) {
    const double root = Sqrt(Add(mean_of(t), static_cast<double>(args.epsilon)));
    registers[t].factor = static_cast<float>(Div(1.0, root));
    if (!is_there(t)) return;
    const float* const x = args.x + offset_of(t, args.x_stride);
    float* const y = args.y + offset_of(t, args.y_stride);
    for (int i = t % width; i < args.dim; i += width) {
      float value = Mul(Sub(x[i], registers[t].mean), registers[t].factor);
      value = Mul(value, Add(args.weight[i], args.weight_offset));
      y[i] = args.bias == nullptr ? value : Add(value, args.bias[i]);
    }
  });
}

// ---- Rotations: a thread for each pair, or for each number after rotary_dim.

constexpr int64_t LayerBlocks(const RopeArgs& args) {
  return BlocksFor(args.rows * args.heads * (args.dim - args.rotary_dim / 2));
}

template <class Block>
EDUBA_DEVICE void RunLayer(const Block& block, const RopeArgs& args) {
  block.Threads([&](int t) {
    const int half = args.rotary_dim / 2;
    const int width = args.dim - half;
    const int64_t at = block.index() * kLayerThreads + t;
    const int64_t row = at / width / args.heads;
    if (row >= args.rows) return;
    const int64_t head = at / width % args.heads;
    const auto i = static_cast<int>(at % width);
    const float* const x = args.x + row * args.x_stride + head * args.dim;
    float* const y = args.y + row * args.y_stride + head * args.dim;
    if (i >= half) {
      y[half + i] = x[half + i];
      return;
    }
    const float c = args.cosines[row * half + i];
    const float s = args.sines[row * half + i];
    const float a = x[i];
    const float b = x[half + i];
    y[i] = Sub(Mul(a, c), Mul(b, s));
    y[half + i] = Add(Mul(b, c), Mul(a, s));
  });
}

// ---- Activations, as kernels/cpu/activation.cc has them.

// 1 / (1 + exp(-x)): exp of -|x| cannot overflow.
EDUBA_DEVICE float Sigmoid(float x) {
  const float e = Exp(std::bit_cast<float>(std::bit_cast<uint32_t>(x) | 0x80000000U));
  return Div(x >= 0 ? 1.0F : e, Add(1.0F, e));
}

EDUBA_DEVICE float GeluErf(float x) {
  const float a = std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0x7fffffffU);
  const float t = Div(1.0F, Fma(a, 0.4F, 1.0F));
  float r = Fma(t, -0.03980620577931404F, 0.20143544673919678F);
  r = Fma(r, t, -0.3750983774662018F);
  r = Fma(r, t, 0.25227615237236023F);
  r = Fma(r, t, -0.013094664551317692F);
  r = Fma(r, t, 0.1586492508649826F);
  r = Fma(r, t, 0.15574172139167786F);
  r = Fma(r, t, 0.15990883111953735F);
  r = Fma(r, t, -1.2186067579023074e-05F);
  const float tail = Mul(r, Exp(Mul(Mul(a, a), -0.5F)));
  return Mul(x, x >= 0 ? Sub(1.0F, tail) : tail);
}

EDUBA_DEVICE float Activated(Activation kind, float x) {
  if (kind == Activation::kSilu) return Mul(x, Sigmoid(x));
  if (kind == Activation::kGeluErf) return GeluErf(x);
  const float cube = Fma(Mul(x, x), 0.044715F, 1.0F);
  return Mul(x, Sigmoid(Mul(Mul(x, 1.5957691216F), cube)));
}

constexpr int64_t LayerBlocks(const ActivationArgs& args) { return BlocksFor(args.rows * args.dim); }

template <class Block>
EDUBA_DEVICE void RunLayer(const Block& block, const ActivationArgs& args) {
  block.Threads([&](int t) {
    const int64_t at = block.index() * kLayerThreads + t;
    if (at >= args.rows * args.dim) return;
    const int64_t from = at / args.dim * args.x_stride + at % args.dim;
    float value = Activated(args.kind, args.x[from]);
    if (args.gate != nullptr) value = Mul(value, args.gate[from]);
    args.y[at] = value;
  });
}

constexpr int64_t LayerBlocks(const SoftcapArgs& args) { return BlocksFor(args.count); }

template <class Block>
EDUBA_DEVICE void RunLayer(const Block& block, const SoftcapArgs& args) {
  block.Threads([&](int t) {
    const int64_t at = block.index() * kLayerThreads + t;
    if (at < args.count) args.x[at] = Capped(args.x[at], 1, args.cap);
  });
}

// ---- Sums, and what is not finite

constexpr int64_t LayerBlocks(const AddArgs& args) { return BlocksFor(args.count); }

template <class Block>
EDUBA_DEVICE void RunLayer(const Block& block, const AddArgs& args) {
  block.Threads([&](int t) {
    const int64_t at = block.index() * kLayerThreads + t;
    if (at < args.count) args.to[at] = Add(args.to[at], args.from[at]);
  });
}

// REQUIRES: *found is 0 before it.
constexpr int64_t LayerBlocks(const NonFiniteArgs& args) {
  return BlocksFor((args.count + kFindElements - 1) / kFindElements);
}

template <class Block>
EDUBA_DEVICE void RunLayer(const Block& block, const NonFiniteArgs& args) {
  block.Threads([&](int t) {
    const int64_t first = block.index() * kLayerThreads * kFindElements + t;
    bool is_found = false;
    EDUBA_UNROLL
    for (int i = 0; i < kFindElements; ++i) {
      const int64_t at = first + int64_t{i} * kLayerThreads;
      is_found = is_found || (at < args.count && !IsFinite(args.x[at]));
    }
    if (is_found) *args.found = 1;  // Whoever writes it writes the same.
  });
}

// ---- Rows of a product (docs/adr/0005-gpu.md, "Products")

// The power of two that brings the largest number of a row of x into [2^14, 2^15): f16 has not a float's
// range.
struct ScaleArgs {
  int rows;
  int64_t inputs;
  const float* x;
  int64_t x_stride;
  float* scale;  // [rows]
};
constexpr int64_t LayerBlocks(const ScaleArgs& args) { return args.rows; }

template <class Block>
EDUBA_DEVICE void RunLayer(const Block& block, const ScaleArgs& args) {
  auto* const largest = reinterpret_cast<uint32_t*>(block.shared());
  const float* const x = args.x + block.index() * args.x_stride;
  block.Threads([&](int t) {
    uint32_t mine = 0;  // Sizes order as their bits do.
    for (int64_t i = t; i < args.inputs; i += kLayerThreads) {
      const uint32_t size = std::bit_cast<uint32_t>(x[i]) & 0x7fffffffU;
      mine = size > mine ? size : mine;
    }
    largest[t] = mine;
  });
  for (int step = kLayerThreads / 2; step > 0; step /= 2) {
    block.Threads([&](int t) {
      if (t < step && largest[t + step] > largest[t]) largest[t] = largest[t + step];
    });
  }
  block.Threads([&](int t) {
    if (t != 0) return;
    const auto exponent = static_cast<int>(largest[0] >> 23);  // 127 more than the number's.
    // Within what a float and its inverse can be; of what is not finite nothing has to be kept but that.
    int shift = 127 + 14 - exponent;
    shift = exponent == 255 ? 0 : shift > 120 ? 120 : shift;
    args.scale[block.index()] = std::bit_cast<float>(static_cast<uint32_t>(127 + shift) << 23);
  });
}

// x [rows, inputs] to a product's rows [matrix_rows, pitch]: term i of row r is row i * block_rows + r, and
// all else zeros. The terms of a number add up to it (three, exactly but for what is below their range) or
// are it, rounded (one).
struct SplitArgs {
  Element element;
  int terms;        // 1 or 3; f32: 1.
  int rows;         // At most block_rows.
  int block_rows;   // Rows of a term.
  int matrix_rows;  // At least terms * block_rows.
  int64_t inputs;
  int64_t pitch;  // Even, at least `inputs`.
  const float* x;
  int64_t x_stride;    // 0: the same for all rows.
  const float* scale;  // [rows]: ScaleArgs', or null.
  void* to;
};
constexpr int64_t LayerBlocks(const SplitArgs& args) {
  return BlocksFor(args.matrix_rows * (args.pitch / 2));
}

// Three bf16 terms are cut off, not rounded: what is left over then is exact, and nothing overflows. f16's,
// whose numbers are scaled, are rounded.
template <class Type>
EDUBA_DEVICE float Term(int terms, int term, float x) {
  if (terms == 1) return x;
  for (; term > 0; --term) {
    if constexpr (Type::kHasFloatRange) {
      x = Sub(x, std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffff0000U));
    } else {
      x = Sub(x, Type::Low(Type::Pack(x, 0)));
    }
  }
  return Type::kHasFloatRange ? std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffff0000U) : x;
}

template <class Block>
EDUBA_DEVICE void RunLayer(const Block& block, const SplitArgs& args) {
  block.Threads([&](int t) {
    const int64_t pairs = args.pitch / 2;
    const int64_t at = block.index() * kLayerThreads + t;
    const auto row = static_cast<int>(at / pairs);
    if (row >= args.matrix_rows) return;
    const int64_t column = at % pairs * 2;
    const int term = row / args.block_rows;
    const int from = row % args.block_rows;
    float x[2] = {0, 0};
    if (term < args.terms && from < args.rows) {
      const float* const row_x = args.x + from * args.x_stride;
      const float scale = args.scale == nullptr ? 1.0F : args.scale[from];
      EDUBA_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (column + i < args.inputs) x[i] = Mul(row_x[column + i], scale);
      }
    }
    if (args.element == Element::kF32) {
      StorePair(static_cast<float*>(args.to) + row * args.pitch + column, x[0], x[1]);
      return;
    }
    static_cast<uint32_t*>(args.to)[row * pairs + column / 2] =
        args.element == Element::kBf16
            ? Bf16::Pack(Term<Bf16>(args.terms, term, x[0]), Term<Bf16>(args.terms, term, x[1]))
            : F16::Pack(Term<F16>(args.terms, term, x[0]), Term<F16>(args.terms, term, x[1]));
  });
}

// The other way: y [rows, outputs] from a product's rows [matrix_rows, pitch]; the low terms first.
struct JoinArgs {
  int terms;
  int rows;
  int block_rows;
  int64_t outputs;
  int64_t pitch;
  const float* product;
  const float* scale;  // [rows]: what the rows were multiplied by, or null.
  const float* bias;   // [outputs], or null.
  float* y;
};
constexpr int64_t LayerBlocks(const JoinArgs& args) { return BlocksFor(args.rows * args.outputs); }

template <class Block>
EDUBA_DEVICE void RunLayer(const Block& block, const JoinArgs& args) {
  block.Threads([&](int t) {
    const int64_t at = block.index() * kLayerThreads + t;
    const int64_t row = at / args.outputs;
    if (row >= args.rows) return;
    const int64_t output = at % args.outputs;
    float sum = 0;
    for (int term = args.terms - 1; term >= 0; --term) {
      sum = Add(sum, args.product[(int64_t{term} * args.block_rows + row) * args.pitch + output]);
    }
    if (args.scale != nullptr) {
      const uint32_t inverse = (uint32_t{254} << 23) - std::bit_cast<uint32_t>(args.scale[row]);
      sum = Mul(sum, std::bit_cast<float>(inverse));
    }
    args.y[at] = args.bias == nullptr ? sum : Add(sum, args.bias[output]);
  });
}

// *differ = 1 where rows of a term have other bits than its first. REQUIRES: *differ is 0 before it.
struct CompareArgs {
  int terms;
  int block_rows;
  int64_t pitch;
  const float* product;
  float* differ;
};
constexpr int64_t LayerBlocks(const CompareArgs& args) {
  return BlocksFor(int64_t{args.terms} * args.block_rows * args.pitch);
}

template <class Block>
EDUBA_DEVICE void RunLayer(const Block& block, const CompareArgs& args) {
  block.Threads([&](int t) {
    const int64_t at = block.index() * kLayerThreads + t;
    const int64_t row = at / args.pitch;
    if (row >= int64_t{args.terms} * args.block_rows) return;
    const int64_t first = row / args.block_rows * args.block_rows;
    const float one = args.product[at];
    const float other = args.product[first * args.pitch + at % args.pitch];
    if (std::bit_cast<uint32_t>(one) != std::bit_cast<uint32_t>(other)) *args.differ = 1;
  });
}

// One of the kernels above.
using LayerOperation = std::variant<NormArgs, RopeArgs, ActivationArgs, SoftcapArgs, AddArgs, NonFiniteArgs,
                                    ScaleArgs, SplitArgs, JoinArgs, CompareArgs>;

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_LAYER_ROWS_H_
