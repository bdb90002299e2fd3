#include "kernels/cpu/matmul.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels/cpu/flushed_subnormals.h"

// SSSE3 machines without SSE4 are served by the baseline.
#define HWY_DISABLED_TARGETS HWY_SSSE3
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // must precede highway.h
#include "hwy/highway.h"
#include "kernels/cpu/for_target.h"

HWY_BEFORE_NAMESPACE();
namespace eduba::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
// Rows that share the loads of a panel: 24 accumulators of AVX-512's 32 registers, 12 of AVX2's 16.
constexpr int kMaxTile = kLanes >= 16 ? 12 : 6;
// How far beyond the loads to prefetch, in bytes: the hardware's own prefetching does not reach so far at the
// start of every 4 KiB.
constexpr int kPrefetchBytes = 4096;

// Loads of kStep inputs' weights: of outputs [first, first + lanes) for each; and X, of which one holds
// kXStep inputs of a row.
struct F32 {
  using T = float;
  using X = float;
  static constexpr int kStep = 1;
  static HWY_INLINE void Load(const T* HWY_RESTRICT at, int first, VF* HWY_RESTRICT w) {
    w[0] = hn::LoadU(DF(), at + first);
  }
};
struct F16 {
  using T = hwy::float16_t;
  using X = float;
  static constexpr int kStep = 1;
  static HWY_INLINE void Load(const T* HWY_RESTRICT at, int first, VF* HWY_RESTRICT w) {
    const hn::Rebind<hwy::float16_t, DF> dh;
    w[0] = hn::PromoteTo(DF(), hn::LoadU(dh, at + first));
  }
};
struct Bf16 {
  using T = uint16_t;
  using X = float;
  static constexpr int kStep = 2;
  static HWY_INLINE void Load(const T* HWY_RESTRICT at, int first, VF* HWY_RESTRICT w) {
    const hn::RebindToUnsigned<DF> du;
    const auto pair = hn::LoadU(du, reinterpret_cast<const uint32_t*>(at) + first);
    w[0] = hn::BitCast(DF(), hn::ShiftLeft<16>(pair));
    w[1] = hn::BitCast(DF(), hn::And(pair, hn::Set(du, 0xffff0000U)));
  }
};

struct Bf16Pairs : Bf16 {
  using X = Bf16Pair;
};

// Adds what `inputs` inputs from `weights` on contribute to kRows rows and kVectors vectors of outputs from
// `first`; the first block begins the sums instead.
template <class Type, int kRows, int kVectors>
HWY_INLINE void Tile(const typename Type::T* HWY_RESTRICT weights, int first, int inputs, bool prefetch,
                     const typename Type::X* HWY_RESTRICT x, int64_t x_row, bool begin, float* HWY_RESTRICT y,
                     int64_t y_row) {
  const DF d;
  constexpr bool kPairs = std::is_same_v<typename Type::X, Bf16Pair>;
  VF sum[kRows][kVectors];
  HWY_UNROLL(kMaxTile)
  for (auto& row : sum) {
    HWY_UNROLL(4)
    for (auto& vector : row) vector = hn::Zero(d);
  }
  const typename Type::T* HWY_RESTRICT at = weights;
  const int whole = kPairs ? (inputs + 1) / 2 * 2 : inputs;  // Pairs are filled up with zeros.
  int i = 0;
  for (; i + Type::kStep <= whole; i += Type::kStep, at += kPanelOutputs * Type::kStep) {
    if (prefetch) {
      const char* line = reinterpret_cast<const char*>(at) + kPrefetchBytes;
      HWY_UNROLL(2)
      for (int byte = 0; byte < kPanelOutputs * Type::kStep * static_cast<int>(sizeof(*at)); byte += 64) {
        hwy::Prefetch(line + byte);
      }
    }
    VF w[kVectors][Type::kStep];
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) Type::Load(at, first + v * kLanes, w[v]);
    if constexpr (kPairs) {
      HWY_UNROLL(2)
      for (int s = 1; s >= 0; --s) {
        HWY_UNROLL(kMaxTile)
        for (int r = 0; r < kRows; ++r) {
          const Bf16Pair pair = x[r * x_row + i / 2];
          const VF value = hn::Set(d, std::bit_cast<float>(s == 0 ? pair << 16 : pair & 0xffff0000U));
          HWY_UNROLL(4)
          for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(value, w[v][s], sum[r][v]);
        }
      }
      continue;
    }
    HWY_UNROLL(2)
    for (int s = 0; s < Type::kStep; ++s) {
      HWY_UNROLL(kMaxTile)
      for (int r = 0; r < kRows; ++r) {
        const VF value = hn::Set(d, x[r * x_row + i + s]);
        HWY_UNROLL(4)
        for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(value, w[v][s], sum[r][v]);
      }
    }
  }
  if (!kPairs && Type::kStep > 1 && i < inputs) {  // The odd last input.
    VF w[kVectors][Type::kStep];
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) Type::Load(at, first + v * kLanes, w[v]);
    HWY_UNROLL(kMaxTile)
    for (int r = 0; r < kRows; ++r) {
      const VF value = hn::Set(d, x[r * x_row + i]);
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(value, w[v][0], sum[r][v]);
    }
  }
  HWY_UNROLL(kMaxTile)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      float* HWY_RESTRICT to = y + r * y_row + first + v * kLanes;
      hn::StoreU(begin ? sum[r][v] : hn::Add(hn::LoadU(d, to), sum[r][v]), d, to);
    }
  }
}

// All outputs of the panel. Few rows take more vectors at once, so that there are chains enough to hide the
// latency of the sums.
template <class Type, int kRows>
void TileRows(const void* weights, int inputs, bool prefetch, const typename Type::X* x, int64_t x_row,
              bool begin, float* y, int64_t y_row) {
  constexpr int kPanelVectors = kPanelOutputs / kLanes;
  constexpr int kVectors = kPanelVectors >= 4 && kRows * 4 <= 2 * kMaxTile ? 4 : 2;
  static_assert(kPanelVectors % kVectors == 0);
  HWY_UNROLL(1)
  for (int pass = 0; pass < kPanelVectors / kVectors; ++pass) {
    Tile<Type, kRows, kVectors>(static_cast<const typename Type::T*>(weights), pass * kVectors * kLanes,
                                inputs, prefetch && pass == 0, x, x_row, begin, y, y_row);
  }
}

template <class X>
using TileFunction = void (*)(const void*, int, bool, const X*, int64_t, bool, float*, int64_t);
template <class Type, int... kCounts>
TileFunction<typename Type::X> TileFor(int64_t rows, std::integer_sequence<int, kCounts...> /*counts*/) {
  static constexpr TileFunction<typename Type::X> kTable[] = {TileRows<Type, kCounts + 1>...};
  return kTable[rows - 1];
}

template <class Type>
void MultiplyPanelTyped(const PanelCall& call, const typename Type::X* x) {
  const int64_t tiles = (call.rows + kMaxTile - 1) / kMaxTile;
  const auto* weights = static_cast<const typename Type::T*>(call.panel);
  for (int64_t at = 0, block = 0; at < call.inputs; at += kMatmulBlock, ++block) {
    const int inputs = static_cast<int>(std::min<int64_t>(kMatmulBlock, call.inputs - at));
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = call.rows * t / tiles;
      const int64_t count = call.rows * (t + 1) / tiles - row;
      TileFor<Type>(count, std::make_integer_sequence<int, kMaxTile>())(
          weights + at * kPanelOutputs, inputs, t == 0, x + row * call.x_row + block * call.x_block,
          call.x_row, at == 0, call.y + row * call.y_row, call.y_row);
    }
  }
  if (call.inputs == 0) {
    for (int64_t r = 0; r < call.rows; ++r) std::fill_n(call.y + r * call.y_row, kPanelOutputs, 0.0F);
  }
  if (call.bias == nullptr) return;
  const DF d;
  for (int64_t r = 0; r < call.rows; ++r) {
    float* to = call.y + r * call.y_row;
    for (int n = 0; n < kPanelOutputs; n += kLanes) {
      hn::StoreU(hn::Add(hn::LoadU(d, to + n), hn::LoadU(d, call.bias + n)), d, to + n);
    }
  }
}

void MultiplyPanel(const PanelCall& call) {
  if (call.x_pairs != nullptr) {
    const FlushedSubnormals flushed;
    return MultiplyPanelTyped<Bf16Pairs>(call, call.x_pairs);
  }
  switch (call.dtype) {
    case DType::kF32:
      return MultiplyPanelTyped<F32>(call, call.x);
    case DType::kBf16:
      return MultiplyPanelTyped<Bf16>(call, call.x);
    case DType::kF16:
      return MultiplyPanelTyped<F16>(call, call.x);
  }
}

void RoundToPairs(const float* from, int64_t count, Bf16Pair* to) {
  const hn::RebindToUnsigned<DF> du;
  const auto round = [&](auto bits) {
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
    const auto nearest = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff)));
    const auto is_nan = hn::RebindMask(du, hn::IsNaN(hn::BitCast(DF(), bits)));
    return hn::IfThenElse(is_nan, hn::Or(bits, hn::Set(du, 0x400000)), nearest);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    auto first = hn::Undefined(du);
    auto second = hn::Undefined(du);
    hn::LoadInterleaved2(du, reinterpret_cast<const uint32_t*>(from + i), first, second);
    const auto pair =
        hn::Or(hn::ShiftRight<16>(round(first)), hn::And(round(second), hn::Set(du, 0xffff0000U)));
    hn::StoreU(pair, du, to + i / 2);
  }
  for (; i < count; i += 2) {
    const Bf16Pair second = i + 1 < count ? Bf16FromF32(from[i + 1]) : 0;
    to[i / 2] = Bf16FromF32(from[i]) | second << 16;
  }
}

MultiplyPanelFunction Function() { return MultiplyPanel; }
RoundToPairsFunction RoundFunction() { return RoundToPairs; }

}  // namespace
}  // namespace eduba::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace eduba {
namespace {

HWY_EXPORT(Function);
HWY_EXPORT(RoundFunction);

// Rows [first, first + count) of a part, into outputs from `slot` on.
template <class T>
void PackRows(const MatrixView& part, int64_t first, int64_t count, int slot, bool pairs, T* to) {
  const auto* from = static_cast<const char*>(part.data);
  for (int64_t n = 0; n < count; ++n, ++slot) {
    const char* row = from + (first + n) * part.inputs * static_cast<int64_t>(sizeof(T));
    for (int64_t k = 0; k < part.inputs; ++k) {
      const int64_t at = pairs ? (k / 2 * kPanelOutputs + slot) * 2 + k % 2 : k * kPanelOutputs + slot;
      std::memcpy(to + at, row + k * static_cast<int64_t>(sizeof(T)), sizeof(T));
    }
  }
}

}  // namespace

MultiplyPanelFunction MultiplyPanelFor(int64_t target) {
  return ForTarget(target, [] { return HWY_DYNAMIC_DISPATCH(Function)(); });
}

RoundToPairsFunction RoundToPairsFor(int64_t target) {
  return ForTarget(target, [] { return HWY_DYNAMIC_DISPATCH(RoundFunction)(); });
}

void PackPanel(const MatrixView* parts, int count, int64_t panel, void* to) {
  std::memset(to, 0, PanelBytes(parts->dtype, parts->inputs));
  const int64_t begin = panel * kPanelOutputs;
  const int64_t end = begin + kPanelOutputs;
  int64_t first = 0;  // The part's first output, among all outputs.
  for (int p = 0; p < count; ++p) {
    const MatrixView& part = parts[p];
    const int64_t from = std::max(begin, first);
    const int64_t rows = std::min(end, first + part.outputs) - from;
    if (rows > 0) {
      const int slot = static_cast<int>(from - begin);
      if (part.dtype == DType::kF32) {
        PackRows(part, from - first, rows, slot, false, static_cast<uint32_t*>(to));
      } else {
        PackRows(part, from - first, rows, slot, part.dtype == DType::kBf16, static_cast<uint16_t*>(to));
      }
    }
    first += part.outputs;
  }
}

}  // namespace eduba
#endif  // HWY_ONCE
