#include "kernels/cpu/page_sums.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "kernels/backend.h"
#include "kernels/portable_math.h"

namespace eduba {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

PageSums::PageSums(const PageKernels& kernels, int threads, int64_t row_heads,
                   const MergingStep::SumPlan& plan, int64_t value_dim, int64_t value_pitch)
    : kernels_(kernels),
      targets_(plan.targets),
      limit_(plan.limit),
      one_(PowerOfTwo(plan.fraction_bits)),
      value_limit_(plan.value_limit),
      value_dim_(value_dim),
      pitch_(value_pitch),
      stride_(value_pitch + 2),
      target_of_(row_heads, -1),
      sums_(threads) {
  const auto rows = static_cast<int64_t>(plan.units.size()) / value_dim;
  units_.resize(rows * pitch_, 1.0);
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(&plan.units[row * value_dim], value_dim, &units_[row * pitch_]);
  }
  for (size_t i = 0; i < targets_.size(); ++i) target_of_[targets_[i].row_head] = static_cast<int32_t>(i);
}

bool PageSums::Add(int thread, int64_t row_head, float m, float l, const float* o) {
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
  const double scaled = l * weight * one_;
  if (scaled > static_cast<double>(limit_)) {
    flag = 1;
    return true;
  }
  double most = value_limit_;
  if (most == 0) {
    if (scaled < 0.25) return true;  // Every word rounds to 0.
    most = 1.001 * scaled + 1;       // |o| <= l 2^e, but for rounding.
  }
  sum[pitch_] += std::llrint(scaled);
  if (sum[pitch_] > limit_) {
    flag = 1;
    return true;
  }
  const double* units = &units_[targets_[index].unit_row * pitch_];
  if (kernels_.add_quantised(o, static_cast<int>(pitch_), weight, units, most, sum)) return true;
  flag = kFaultFlag;
  return false;
}

void PageSums::Collect(int64_t* words) const {
  for (size_t i = 0; i < targets_.size(); ++i, words += value_dim_ + 2) {
    int64_t flag = 0;
    for (const std::vector<int64_t>& own : sums_) {
      if (own.empty()) continue;
      const int64_t* sum = &own[i * stride_];
      flag = std::max(flag, sum[pitch_ + 1]);
      for (int64_t c = 0; c < value_dim_; ++c) words[c] += sum[c];
      words[value_dim_] += sum[pitch_];
      if (words[value_dim_] > limit_) flag = std::max<int64_t>(flag, 1);
      if (flag != 0) break;
    }
    if (flag != 0) std::fill_n(words, value_dim_ + 1, 0);
    words[value_dim_ + 1] = flag;
  }
}

}  // namespace eduba
