#ifndef EDUBA_BENCHMARKS_MEASURE_TIMING_H_
#define EDUBA_BENCHMARKS_MEASURE_TIMING_H_

#include <algorithm>
#include <chrono>
#include <functional>
#include <string>
#include <vector>

namespace eduba {

// Called before each part with what is measured next, and which of how many it is.
using BenchProgress = std::function<void(const std::string& what, int done, int total)>;

// Wall time of `body`.
template <class Body>
double Seconds(const Body& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// REQUIRES: at least one value.
inline double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace eduba

#endif  // EDUBA_BENCHMARKS_MEASURE_TIMING_H_
