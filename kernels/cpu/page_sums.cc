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
                   const MergingStep::SumPlan& plan, int64_t value_dim, int64_t value_pitch, int64_t* words)
    : kernels_(kernels),
      plan_(plan),
      one_(PowerOfTwo(plan.fraction_bits)),
      value_dim_(value_dim),
      pitch_(value_pitch),
      stride_(value_pitch + 2),
      units_(plan.units.data()),
      target_of_(row_heads, -1),
      own_(threads),
      words_(words) {
  if (pitch_ > value_dim_) {
    const auto rows = static_cast<int64_t>(plan.units.size()) / value_dim;
    padded_units_.resize(rows * pitch_, 1.0);
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(&plan.units[row * value_dim], value_dim, &padded_units_[row * pitch_]);
    }
    units_ = padded_units_.data();
  }
  for (size_t i = 0; i < plan.targets.size(); ++i) {
    target_of_[plan.targets[i].row_head] = static_cast<int32_t>(i);
  }
}

void PageSums::Begin(int thread, absl::Span<const int64_t> row_heads) {
  Own& own = own_[thread];
  own.targets.clear();
  for (const int64_t row_head : row_heads) own.targets.push_back(target_of_[row_head]);
  own.sums.assign(own.targets.size() * stride_, 0);
}

void PageSums::Weigh(int thread, int64_t first, int64_t count, const float* m, double* weights) const {
  const int32_t* const targets = &own_[thread].targets[first];
  // Chains of dependent operations, of which a core has several under way: so not one by one, between others.
  for (int64_t i = 0; i < count; ++i) {
    const double reference = targets[i] < 0 ? 0 : plan_.targets[targets[i]].reference;
    weights[i] = PortableExp(std::min(m[i] - reference, 700.0));  // exp(700) is out of every range.
  }
}

bool PageSums::AddOne(int thread, int64_t query, float m, float l, const float* o, double weight) {
  Own& own = own_[thread];
  if (own.targets[query] < 0) return true;
  const MergingStep::Target& target = plan_.targets[own.targets[query]];
  int64_t* sum = &own.sums[query * stride_];
  int64_t& flag = sum[pitch_ + 1];
  if (flag != 0 || m == -kInfinity || target.reference == -kInfinity) return true;
  if (m == kInfinity || target.reference == kInfinity) {
    flag = kFaultFlag;
    return true;
  }
  const double scaled = l * weight * one_;
  if (scaled > static_cast<double>(plan_.limit)) {
    flag = 1;
    return true;
  }
  double most = plan_.value_limit;
  if (most == 0) {
    if (scaled < 0.25) return true;  // Every word rounds to 0.
    most = 1.001 * scaled + 1;       // |o| <= l 2^e, but for rounding.
  }
  sum[pitch_] += std::llrint(scaled);
  if (sum[pitch_] > plan_.limit) {
    flag = 1;
    return true;
  }
  const double* units = units_ + target.unit_row * pitch_;
  if (kernels_.add_quantised(o, static_cast<int>(pitch_), weight, units, most, sum)) return true;
  flag = kFaultFlag;
  return false;
}

void PageSums::End(int thread) {
  const Own& own = own_[thread];
  for (size_t query = 0; query < own.targets.size(); ++query) {
    if (own.targets[query] < 0) continue;
    const int64_t* sum = &own.sums[query * stride_];
    int64_t* words = words_ + own.targets[query] * (value_dim_ + 2);
    int64_t& flag = words[value_dim_ + 1];
    flag = std::max(flag, sum[pitch_ + 1]);
    if (flag == 0) {
      for (int64_t c = 0; c < value_dim_; ++c) words[c] += sum[c];
      words[value_dim_] += sum[pitch_];
      if (words[value_dim_] > plan_.limit) flag = 1;
    }
    if (flag != 0) std::fill_n(words, value_dim_ + 1, 0);
  }
}

}  // namespace eduba
