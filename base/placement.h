#ifndef EDUBA_BASE_PLACEMENT_H_
#define EDUBA_BASE_PLACEMENT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/pages.h"

namespace eduba {

// Which nodes keep which pages of one sequence: a value, the same on the coordinator and on every worker.
// Stripe s is kept by nodes (s + first) mod n, and the replicas - 1 nodes after that one. Answers do not
// depend on it (docs/numerics.md), so another version may be agreed at any time.
//
// A node is named by its lasting identity, not by its rank. While a group of exactly `nodes` reduces
// together, a node's index here is its rank, because ranks follow the order of node ids (RanksOf).
struct Placement {
  int64_t version = 1;             // One more whenever anything below changes.
  std::vector<std::string> nodes;  // Ascending, distinct, 1 to kMaxGroupSize.
  int replicas = 1;                // Nodes that keep each stripe: 1 to the number of nodes.
  int64_t stripe_pages = 64;       // Neighbouring pages that are placed together.
  int64_t first = 0;  // Index of the node that keeps stripe 0: sessions begin on different nodes.

  // A placement over `count` nodes that need no names of their own: tests, and groups of one process.
  static Placement OfRanks(int count, int64_t stripe_pages = 64, int64_t first = 0);

  int size() const { return static_cast<int>(nodes.size()); }
  // The index of the node whose copy of the page counts.
  int OwnerOf(int64_t page) const { return OwnerOfStripe(page / stripe_pages); }
  int OwnerOfStripe(int64_t stripe) const { return static_cast<int>((stripe + first) % size()); }
  bool Owns(int node, int64_t page) const { return OwnerOf(page) == node; }
  // Indices of all nodes that keep the page, the owner first.
  std::vector<int> OwnersOf(int64_t page) const;
  // The index of a node, or -1 when it keeps nothing.
  int IndexOf(const std::string& node) const;

  // What is wrong with it, naming the field, or OK.
  absl::Status Validate() const;

  bool operator==(const Placement&) const = default;
};

// Positions that one node owns.
struct OwnedRange {
  PositionRange range;
  int owner = 0;  // Index of the node.
  bool operator==(const OwnedRange&) const = default;
};

// The parts of `range` by owner, in order; neighbours with one owner are one part.
std::vector<OwnedRange> OwnersOfRange(const Placement& placement, PositionRange range);

// The most parts that OwnersOfRange can return, without building them.
int64_t OwnersOfRangeBound(const Placement& placement, PositionRange range);

// The most pages that one node owns of `length` positions.
int64_t PagesOfBusiestOwner(const Placement& placement, int64_t length);

// The stripes of [0, length) that node `index` owns, ascending.
std::vector<int64_t> StripesOwnedBy(const Placement& placement, int index, int64_t length);

}  // namespace eduba

#endif  // EDUBA_BASE_PLACEMENT_H_
