#include "base/placement.h"

#include <algorithm>
#include <functional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace eduba {

Placement Placement::OfRanks(int count, int64_t stripe_pages, int64_t first) {
  Placement placement;
  for (int i = 0; i < count; ++i) placement.nodes.push_back(absl::StrFormat("node-%04d", i));
  placement.stripe_pages = stripe_pages;
  placement.first = first;
  return placement;
}

std::vector<int> Placement::OwnersOf(int64_t page) const {
  std::vector<int> owners(replicas);
  for (int i = 0; i < replicas; ++i) owners[i] = (OwnerOf(page) + i) % size();
  return owners;
}

int Placement::IndexOf(const std::string& node) const {
  const auto found = std::lower_bound(nodes.begin(), nodes.end(), node);
  return found != nodes.end() && *found == node ? static_cast<int>(found - nodes.begin()) : -1;
}

absl::Status Placement::Validate() const {
  if (nodes.empty() || size() > kMaxGroupSize) {
    return absl::InvalidArgumentError(
        absl::StrCat("placement has ", size(), " nodes, wanted 1 to ", kMaxGroupSize));
  }
  if (std::adjacent_find(nodes.begin(), nodes.end(), std::greater_equal<>()) != nodes.end()) {
    return absl::InvalidArgumentError("placement's nodes are not ascending and distinct");
  }
  if (replicas < 1 || replicas > size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("placement has ", replicas, " replicas, wanted 1 to ", size(), ", its nodes"));
  }
  if (stripe_pages < 1 || stripe_pages > kMaxPositions / kPageRows) {
    return absl::InvalidArgumentError(absl::StrCat("placement's stripe has ", stripe_pages,
                                                   " pages, wanted 1 to ", kMaxPositions / kPageRows));
  }
  if (first < 0 || first >= size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("placement's first node is ", first, ", wanted 0 to ", size() - 1));
  }
  return absl::OkStatus();
}

std::vector<OwnedRange> OwnersOfRange(const Placement& placement, PositionRange range) {
  const int64_t stripe_rows = placement.stripe_pages * kPageRows;
  std::vector<OwnedRange> parts;
  for (int64_t begin = range.begin; begin < range.end;) {
    const int64_t stripe = StripeOf(begin, placement.stripe_pages);
    const int64_t end = std::min(range.end, (stripe + 1) * stripe_rows);
    const int owner = placement.OwnerOfStripe(stripe);
    if (!parts.empty() && parts.back().owner == owner) {
      parts.back().range.end = end;
    } else {
      parts.push_back({{begin, end}, owner});
    }
    begin = end;
  }
  return parts;
}

int64_t OwnersOfRangeBound(const Placement& placement, PositionRange range) {
  if (range.empty()) return 0;
  if (placement.size() == 1) return 1;
  return StripeOf(range.end - 1, placement.stripe_pages) - StripeOf(range.begin, placement.stripe_pages) + 1;
}

int64_t PagesOfBusiestOwner(const Placement& placement, int64_t length) {
  const int64_t pages = PageCount(length);
  const int64_t stripes = (pages + placement.stripe_pages - 1) / placement.stripe_pages;
  return std::min(pages, (stripes + placement.size() - 1) / placement.size() * placement.stripe_pages);
}

std::vector<int64_t> StripesOwnedBy(const Placement& placement, int index, int64_t length) {
  const int64_t stripes = (PageCount(length) + placement.stripe_pages - 1) / placement.stripe_pages;
  const int64_t n = placement.size();
  std::vector<int64_t> owned;
  for (int64_t stripe = (index - placement.first + n) % n; stripe < stripes; stripe += n)
    owned.push_back(stripe);
  return owned;
}

}  // namespace eduba
