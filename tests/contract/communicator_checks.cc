#include "tests/contract/communicator_checks.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace eduba {

absl::Time Far() { return absl::Now() + absl::Seconds(60); }

int64_t Word(int rank, int64_t call, int64_t i) {
  uint64_t x =
      (static_cast<uint64_t>(rank) << 56) ^ (static_cast<uint64_t>(call) << 40) ^ static_cast<uint64_t>(i);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return static_cast<int64_t>(x ^ (x >> 31));
}

namespace {

// What all ranks' words add up to.
int64_t WordsSum(int ranks, int64_t call, int64_t i) {
  uint64_t sum = 0;
  for (int r = 0; r < ranks; ++r) sum += static_cast<uint64_t>(Word(r, call, i));
  return static_cast<int64_t>(sum);
}
float Real(int rank, int64_t call, int64_t i) { return static_cast<float>(Word(rank, call, i)); }

}  // namespace

absl::Status SumAndCheck(Communicator& c, int64_t count, int64_t call, absl::Time deadline) {
  std::vector<int64_t> data(count);
  for (int64_t i = 0; i < count; ++i) data[i] = Word(c.rank(), call, i);
  absl::Status status = c.SumI64(absl::MakeSpan(data), deadline);
  if (!status.ok()) return status;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t want = WordsSum(c.size(), call, i);
    if (data[i] == want) continue;
    return absl::DataLossError(
        absl::StrCat("sum ", call, " of ", count, ", word ", i, ": ", data[i], ", want ", want));
  }
  return status;
}

std::vector<int64_t> UnevenParts(int ranks, int64_t words) {
  const auto until = [&](int64_t rank) { return words * rank * rank / (int64_t{ranks} * ranks); };
  std::vector<int64_t> counts(ranks);
  for (int rank = 0; rank < ranks; ++rank) counts[rank] = until(rank + 1) - until(rank);
  if (ranks > 1) {
    counts[1] += counts[0];
    counts[0] = 0;
  }
  return counts;
}

absl::Status ScatterAndCheck(Communicator& c, const std::vector<int64_t>& counts, int64_t call,
                             absl::Time deadline) {
  std::vector<int64_t> data(std::accumulate(counts.begin(), counts.end(), int64_t{0}));
  const auto words = static_cast<int64_t>(data.size());
  for (int64_t i = 0; i < words; ++i) data[i] = Word(c.rank(), call, i);
  absl::Status status = c.ReduceScatterI64(absl::MakeSpan(data), counts, deadline);
  if (!status.ok()) return status;
  const int64_t begin = std::accumulate(counts.begin(), counts.begin() + c.rank(), int64_t{0});
  for (int64_t i = begin; i < begin + counts[c.rank()]; ++i) {
    const int64_t want = WordsSum(c.size(), call, i);
    if (data[i] == want) continue;
    return absl::DataLossError(absl::StrCat("reduce-scatter ", call, " of ", words, ", word ", i, " of rank ",
                                            c.rank(), ": ", data[i], ", want ", want));
  }
  return status;
}

absl::Status MaxAndCheck(Communicator& c, int64_t count, int64_t call, absl::Time deadline) {
  std::vector<float> data(count);
  for (int64_t i = 0; i < count; ++i) data[i] = Real(c.rank(), call, i);
  absl::Status status = c.MaxF32(absl::MakeSpan(data), deadline);
  if (!status.ok()) return status;
  for (int64_t i = 0; i < count; ++i) {
    float want = Real(0, call, i);
    for (int r = 1; r < c.size(); ++r) want = std::max(want, Real(r, call, i));
    if (data[i] == want) continue;
    return absl::DataLossError(
        absl::StrCat("max ", call, " of ", count, ", float ", i, ": ", data[i], ", want ", want));
  }
  return status;
}

absl::Status SendAndCheck(Communicator& c, const Route& route, int64_t call, absl::Time deadline) {
  const auto byte = [call](int sender, int64_t i) { return static_cast<char>(Word(sender, call, i)); };
  const auto [to, count] = route(c.rank());
  std::vector<char> send(count);
  for (int64_t i = 0; i < count; ++i) send[i] = byte(c.rank(), i);
  int from = -1;
  for (int rank = 0; rank < c.size(); ++rank) from = route(rank).first == c.rank() ? rank : from;
  std::vector<char> receive(from < 0 ? 0 : route(from).second);
  absl::Status status = c.SendReceive(send, to, absl::MakeSpan(receive), from, deadline);
  if (!status.ok()) return status;
  for (size_t i = 0; i < receive.size(); ++i) {
    if (receive[i] == byte(from, static_cast<int64_t>(i))) continue;
    return absl::DataLossError(absl::StrCat("call ", call, ", byte ", i, " of ", receive.size(),
                                            " from rank ", from, " to rank ", c.rank(), " is wrong"));
  }
  return status;
}

Route Ring(int ranks, int shift, int64_t count) {
  return [=](int rank) { return std::pair((rank + shift) % ranks, count); };
}

absl::Status SendNothing(Communicator& c) { return c.SendReceive({}, -1, {}, -1, Far()); }

namespace {

std::function<absl::Status(Communicator&)> Sum(int64_t count) {
  return [count](Communicator& c) { return SumAndCheck(c, count, 1, Far()); };
}
std::function<absl::Status(Communicator&)> Max(int64_t count) {
  return [count](Communicator& c) { return MaxAndCheck(c, count, 1, Far()); };
}

// `each` words for every rank but the last, which gets what is left of `words`.
std::function<absl::Status(Communicator&)> Scatter(int64_t each, int64_t words) {
  return [=](Communicator& c) {
    std::vector<int64_t> counts(c.size(), each);
    counts.back() = words - each * (c.size() - 1);
    return ScatterAndCheck(c, counts, 1, Far());
  };
}

// With the next rank, in a group of any size: what it sends, and what it wants from the one before.
std::function<absl::Status(Communicator&)> Send(int64_t count, int64_t wanted) {
  return [=](Communicator& c) {
    const std::vector<char> send(count);
    std::vector<char> receive(wanted);
    return c.SendReceive(send, (c.rank() + 1) % c.size(), absl::MakeSpan(receive),
                         (c.rank() + c.size() - 1) % c.size(), Far());
  };
}

}  // namespace

std::vector<Mismatch> Mismatches() {
  return {{"another operation, as many bytes", Sum(4), Max(8)},
          {"one word more", Sum(4), Sum(5)},
          {"nothing and something", Sum(0), Sum(1)},
          {"barrier and sum of nothing", [](Communicator& c) { return c.Barrier(Far()); }, Sum(0)},
          {"small and large", Sum(10), Sum(200'000)},
          {"large and larger", Max(200'000), Max(200'001)},
          {"a sum and a reduce-scatter", Sum(400), Scatter(100, 400)},
          {"a sum and a reduce-scatter, large", Sum(1'200'000), Scatter(100'000, 1'200'000)},
          {"a reduce-scatter and a maximum", Scatter(100, 400), Max(800)},
          {"one word more to scatter", Scatter(100, 400), Scatter(100, 401)},
          {"other parts", Scatter(100, 400), Scatter(99, 400)},
          {"other parts, large", Scatter(100'000, 1'200'000), Scatter(200'000, 1'200'000)},
          {"a reduce-scatter of nothing and a barrier", Scatter(0, 0),
           [](Communicator& c) { return c.Barrier(Far()); }},
          {"a message and a sum", Send(0, 0), Sum(0)},
          {"a message and none", Send(5, 5), SendNothing},
          {"a message too long", Send(5, 5), Send(6, 5)},
          {"a message too short", Send(2'000'000, 2'000'000), Send(1'000'000, 2'000'000)},
          {"a receiver who wants more", Send(5, 5), Send(5, 6)}};
}

}  // namespace eduba
