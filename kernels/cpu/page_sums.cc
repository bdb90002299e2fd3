#include "kernels/cpu/page_sums.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "kernels/backend.h"
#include "kernels/portable_exp.h"

namespace eduba {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

PageSums::PageSums(const PageKernels& kernels, int threads, int64_t row_heads,
                   absl::Span<const MergingStep::Target> targets, MergingStep::Quantum quantum,
                   std::vector<double> units, int64_t value_pitch)
    : kernels_(kernels),
      targets_(targets.begin(), targets.end()),
      quantum_(quantum),
      units_(std::move(units)),
      pitch_(value_pitch),
      stride_(value_pitch + 2),
      target_of_(row_heads, -1),
      sums_(threads) {
  for (size_t i = 0; i < targets_.size(); ++i) target_of_[targets_[i].row_head] = static_cast<int32_t>(i);
}

bool PageSums::Add(int thread, int64_t row_head, int64_t kv_head, float m, float l, const float* o) {
  const int32_t index = target_of_[row_head];
  if (index < 0) return true;
  std::vector<int64_t>& own = sums_[thread];
  if (own.empty()) own.resize(targets_.size() * stride_);
  int64_t* sum = &own[index * stride_];
  int64_t& flag = sum[pitch_ + 1];
  const double reference = targets_[index].reference;
  if (flag != 0 || m == -kInfinity || reference == -kInfinity) return true;
  if (m == kInfinity || reference == kInfinity) {
    flag = kFaultFlag;
    return true;
  }
  const double weight = PortableExp(std::min(m - reference, 700.0));  // exp(700) is out of every range.
  const double scaled = l * weight * PowerOfTwo(quantum_.fraction_bits);
  if (scaled > static_cast<double>(quantum_.limit)) {
    flag = 1;
    return true;
  }
  if (scaled < 0.25) return true;  // Every word rounds to 0.
  sum[pitch_] += std::llrint(scaled);
  if (sum[pitch_] > quantum_.limit) {
    flag = 1;
    return true;
  }
  // |o| <= l 2^e, but for rounding, or a value is beyond its channel's exponent.
  if (kernels_.add_quantised(o, static_cast<int>(pitch_), weight, &units_[kv_head * pitch_],
                             1.001 * scaled + 1, sum)) {
    return true;
  }
  flag = kFaultFlag;
  return false;
}

void PageSums::Collect(int64_t value_dim, int64_t* words) const {
  for (size_t i = 0; i < targets_.size(); ++i, words += value_dim + 2) {
    int64_t flag = 0;
    for (const std::vector<int64_t>& own : sums_) {
      if (own.empty()) continue;
      const int64_t* sum = &own[i * stride_];
      flag = std::max(flag, sum[pitch_ + 1]);
      for (int64_t c = 0; c < value_dim; ++c) words[c] += sum[c];
      words[value_dim] += sum[pitch_];
      if (words[value_dim] > quantum_.limit) flag = std::max<int64_t>(flag, 1);
      if (flag != 0) break;
    }
    if (flag != 0) std::fill_n(words, value_dim + 1, 0);
    words[value_dim + 1] = flag;
  }
}

}  // namespace eduba
