#include "benchmarks/measure/merge.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "collective/gloo/gloo_communicator.h"
#include "collective/local/local_communicator.h"
#include "collective/map_rendezvous.h"
#include "collective/nccl/nccl_communicator.h"

namespace eduba {
namespace {

// Far above any healthy round; it only keeps a broken transport from hanging the command.
constexpr absl::Duration kRoundLimit = absl::Seconds(30);

absl::Time Limit() { return absl::Now() + kRoundLimit; }

// The call that is timed. `parts`: none, or the counts of a reduce-scatter.
absl::Status Reduce(Communicator& group, std::vector<int64_t>& data, absl::Span<const int64_t> parts) {
  return parts.empty() ? group.SumI64(absl::MakeSpan(data), Limit())
                       : group.ReduceScatterI64(absl::MakeSpan(data), parts, Limit());
}

absl::Status Check(Communicator& group, std::vector<int64_t>& data, absl::Span<const int64_t> parts) {
  const auto value = [](int64_t i, int rank) { return (i + 1) * (rank + 1); };
  for (size_t i = 0; i < data.size(); ++i) data[i] = value(static_cast<int64_t>(i), group.rank());
  EDUBA_RETURN_IF_ERROR(Reduce(group, data, parts));
  size_t begin = 0;
  size_t end = data.size();
  if (!parts.empty()) {
    begin = std::accumulate(parts.begin(), parts.begin() + group.rank(), int64_t{0});
    end = begin + parts[group.rank()];
  }
  for (size_t i = begin; i < end; ++i) {
    int64_t want = 0;
    for (int r = 0; r < group.size(); ++r) want += value(static_cast<int64_t>(i), r);
    if (data[i] == want) continue;
    return absl::InternalError(absl::StrCat("bench merge: word ", i, " is ", data[i], ", want ", want));
  }
  return absl::OkStatus();
}

absl::Status RunRank(Communicator& group, const MergeBenchOptions& options, std::vector<double>& times_us) {
  std::vector<int64_t> data(options.bytes / sizeof(int64_t));
  std::vector<int64_t> parts;
  for (int64_t r = 0; options.scatters && r < options.ranks; ++r) {
    const auto words = static_cast<int64_t>(data.size());
    parts.push_back((r + 1) * words / options.ranks - r * words / options.ranks);
  }
  EDUBA_RETURN_IF_ERROR(Check(group, data, parts));
  std::fill(data.begin(), data.end(), 0);
  for (double& time : times_us) {
    const auto start = std::chrono::steady_clock::now();
    EDUBA_RETURN_IF_ERROR(Reduce(group, data, parts));
    time = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
  }
  return group.Barrier(Limit());
}

}  // namespace

absl::StatusOr<MergeBenchResult> BenchMerge(const MergeBenchOptions& options) {
  if (options.transport != "local" && options.transport != "gloo" && options.transport != "nccl") {
    return absl::InvalidArgumentError(
        absl::StrCat("bench merge: transport is \"", options.transport, "\", must be local, gloo or nccl"));
  }
  if (options.ranks < 1 || options.ranks > 64 || options.bytes < 8 || options.bytes % 8 != 0 ||
      options.rounds < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("bench merge: want 1 to 64 ranks, a positive multiple of 8 bytes and 1 or ",
                     "more rounds; found ", options.ranks, ", ", options.bytes, " and ", options.rounds));
  }
  LocalHub hub;
  MapRendezvous rendezvous;
  std::vector<absl::Status> outcomes(options.ranks);
  std::vector<std::vector<double>> times_us(options.ranks, std::vector<double>(options.rounds));
  std::vector<std::thread> threads;
  threads.reserve(options.ranks);
  for (int rank = 0; rank < options.ranks; ++rank) {
    threads.emplace_back([&, rank] {
      auto group = options.transport == "local" ? hub.Join(0, 0, rank, options.ranks, Limit())
                   : options.transport == "gloo"
                       ? ConnectGloo(rank, options.ranks, rendezvous, {}, Limit())
                       : ConnectNccl(rank, options.ranks, rendezvous, {rank}, Limit());
      outcomes[rank] = group.ok() ? RunRank(**group, options, times_us[rank]) : group.status();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& outcome : outcomes) EDUBA_RETURN_IF_ERROR(outcome);

  std::vector<double>& sorted = times_us[0];
  std::sort(sorted.begin(), sorted.end());
  const auto quantile = [&](double q) {
    return sorted[static_cast<size_t>(q * static_cast<double>(sorted.size() - 1))];
  };
  return MergeBenchResult{.median_us = quantile(0.5), .low_us = quantile(0.1), .high_us = quantile(0.9)};
}

}  // namespace eduba
