#ifndef EDUBA_KERNELS_CUDA_FINALISE_H_
#define EDUBA_KERNELS_CUDA_FINALISE_H_

#include <cstdint>

#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/page_attention.h"
#include "kernels/cuda/page_layout.h"
#include "kernels/portable_math.h"

// From reduced sums to answers: the choice of path (docs/numerics.md section 4), then the sinks' part and the
// division, in double and in the order of kernels/merging_step.cc, so to the same bits. One block takes one
// row and head. See page_attention.h for what a Block is.
namespace eduba::cuda {

inline constexpr int kFinaliseThreads = 128;
inline constexpr int kNormLanes = 8;  // kernels/merging_step.cc's.

// What became of a row and head.
enum Outcome : uint8_t {
  kFinalised = 0,     // It has its answer.
  kNeedsMaximum = 1,  // It takes the maximum path.
  kHasFault = 2,      // Some rank met arithmetic that was not finite.
};

// What the step's kernels note beside their results.
struct StepState {
  uint64_t fault;  // Means what AttendArgs::fault means.
  uint32_t has_bad_sinks;
  uint32_t padding;
};

struct FinaliseArgs {
  PageLayout layout;
  int query_heads;
  int group;
  int64_t targets;
  const int64_t* row_head;      // [targets]; null: target i is row head i
  const uint64_t* words;        // Reduced: [targets, value_dim + 2], as SumArgs::words.
  const double* key_reference;  // [targets]: what the words' weights are relative to
  const double* unit;           // Means what SumArgs::unit means.
  double one;                   // Units of L for a weight of 1: a power of two.

  // The sinks: as SinkArgs, or 0 and nulls.
  int64_t tokens;
  const int32_t* visible_sinks;
  const float* learned;
  const PageEntry* page;
  const double* logits;
  const double* reference;  // [row heads]

  // The choice, where row_head is null: whether the words serve.
  const PositionRange* visible;  // [rows]
  uint64_t total_min;            // L has to be in here.
  uint64_t total_max;
  const double* rounding;  // [kv_heads]: sum of the squares of all channels' units
  double share;            // rounding * pages <= share * (square of the output's norm)
  uint8_t* outcome;        // [row heads]
  const StepState* state;  // Copied by the first block.
  StepState* state_out;

  float* outputs;    // [row heads, value_dim]
  float* lse;        // [row heads]
  float* sink_mass;  // [row heads]

  constexpr int64_t blocks() const { return targets; }
};

// 1 / x for a power of two.
EDUBA_DEVICE double InverseOfPower(double x) {
  return std::bit_cast<double>((uint64_t{2046} << 52) - std::bit_cast<uint64_t>(x));
}

struct FinaliseShared {
  double square[kNormLanes];
  double weight[kFinaliseThreads];  // The token sinks' weights.
  double common;                    // All weights are relative to it.
  double key_weight;
  double key_total;
  double learned;
  int outcome;
  int is_empty;  // Neither key nor sink.
};

struct FinaliseRegisters {
  double sum;    // One channel's sum.
  double sinks;  // Their weights; the same in all threads.
};

template <class Type, class Block>
EDUBA_DEVICE void FinaliseRowHead(const Block& block, const FinaliseArgs& args) {
  using Stored = typename Type::Stored;
  auto& shared = *reinterpret_cast<FinaliseShared*>(block.shared());
  typename Block::template Registers<FinaliseRegisters> registers(block);
  const PageLayout& layout = args.layout;
  const int value_dim = layout.value_dim;
  const int64_t target = block.index();
  const bool chooses = args.row_head == nullptr;
  const int64_t row_head = chooses ? target : args.row_head[target];
  const int64_t row = row_head / args.query_heads;
  const int head = static_cast<int>(row_head % args.query_heads);
  const int kv_head = head / args.group;
  const uint64_t* const words = args.words + target * (value_dim + 2);
  const double* const unit = args.unit + (chooses ? int64_t{kv_head} : target) * value_dim;
  const auto value_of = [&](int c) {
    return Mul(static_cast<double>(static_cast<int64_t>(words[c])), InverseOfPower(unit[c]));
  };
  const double minus_infinity = -static_cast<double>(Infinity());

  block.Threads([&](int t) {
    if (!chooses || t >= kNormLanes) return;
    double square = 0;
    for (int c = t; c < value_dim; c += kNormLanes) square = Add(square, Mul(value_of(c), value_of(c)));
    shared.square[t] = square;
  });
  block.Threads([&](int t) {
    if (t != 0) return;
    shared.outcome = kFinalised;
    if (chooses) {
      const PositionRange keys = args.visible[row];
      for (int width = kNormLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) shared.square[i] = Add(shared.square[i], shared.square[i + width]);
      }
      const int64_t pages = (keys.end - 1) / kPageRows - keys.begin / kPageRows + 1;
      const bool is_precise =
          Mul(args.rounding[kv_head], static_cast<double>(pages)) <= Mul(shared.square[0], args.share);
      const uint64_t total = words[value_dim];
      const uint64_t flags = words[value_dim + 1];
      const bool fits = flags == 0 && total >= args.total_min && total <= args.total_max && is_precise;
      if (keys.begin < keys.end && !fits) shared.outcome = kNeedsMaximum;
      if (flags >= kFault) shared.outcome = kHasFault;
      args.outcome[row_head] = static_cast<uint8_t>(shared.outcome);
      if (target == 0) *args.state_out = *args.state;
    }
    const double key_reference = args.key_reference[target];
    const double sink_reference = args.reference == nullptr ? minus_infinity : args.reference[row_head];
    shared.common = key_reference > sink_reference ? key_reference : sink_reference;
    shared.is_empty = shared.common == minus_infinity ? 1 : 0;
    shared.key_weight = PortableExp(Sub(key_reference, shared.common));
    const double keys =
        Mul(static_cast<double>(static_cast<int64_t>(words[value_dim])), InverseOfPower(args.one));
    shared.key_total = Mul(shared.key_weight, keys);
    shared.learned = args.learned == nullptr
                         ? 0
                         : PortableExp(Sub(static_cast<double>(args.learned[head]), shared.common));
  });
  if (shared.outcome != kFinalised) return;

  float* const output = args.outputs + row_head * value_dim;
  const int64_t seen = args.tokens == 0 ? 0 : args.visible_sinks[row];
  for (int first = 0; first < value_dim; first += kFinaliseThreads) {
    block.Threads([&](int t) {
      const int c = first + t;
      registers[t].sum = c < value_dim ? Mul(shared.key_weight, value_of(c)) : 0;
      registers[t].sinks = shared.learned;
    });
    for (int64_t begin = 0; begin < seen; begin += kFinaliseThreads) {
      const int count = static_cast<int>(seen - begin < kFinaliseThreads ? seen - begin : kFinaliseThreads);
      block.Threads([&](int t) {
        if (t >= count) return;
        shared.weight[t] = PortableExp(Sub(args.logits[row_head * args.tokens + begin + t], shared.common));
      });
      block.Threads([&](int t) {
        FinaliseRegisters& r = registers[t];
        const int c = first + t;
        for (int i = 0; i < count; ++i) {
          const int64_t token = begin + i;
          r.sinks = Add(r.sinks, shared.weight[i]);
          if (c >= value_dim) continue;
          const auto* const page = static_cast<const Stored*>(args.page[token / kPageRows].data);
          const float value =
              Type::Value(page[layout.value(kv_head, static_cast<int>(token % kPageRows), c)]);
          r.sum = Add(r.sum, Mul(shared.weight[i], static_cast<double>(value)));
        }
      });
    }
    block.Threads([&](int t) {
      const FinaliseRegisters& r = registers[t];
      const int c = first + t;
      const double total = Add(shared.key_total, r.sinks);
      const bool is_empty = shared.is_empty != 0;
      if (c < value_dim) output[c] = is_empty ? 0 : static_cast<float>(Div(r.sum, total));
      if (c != 0) return;
      args.lse[row_head] =
          is_empty ? -Infinity() : static_cast<float>(Add(shared.common, PortableLog(total)));
      args.sink_mass[row_head] = is_empty ? 0 : static_cast<float>(Div(r.sinks, total));
    });
  }
}

}  // namespace eduba::cuda

#endif  // EDUBA_KERNELS_CUDA_FINALISE_H_
