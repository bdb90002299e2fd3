#include "coordinator/settlement.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/placement.h"

namespace eduba {
namespace {

static_assert(std::endian::native == std::endian::little, "exponents travel as little-endian int16");

LostStripes ShareOf(const SessionRecord& record, int node) {
  LostStripes share{record.placement.nodes[node], 0, 0};
  const int64_t stripe_rows = record.placement.stripe_pages * kPageRows;
  for (const int64_t stripe : StripesOwnedBy(record.placement, node, record.length())) {
    ++share.stripes;
    share.positions += std::min(record.length(), (stripe + 1) * stripe_rows) - stripe * stripe_rows;
  }
  return share;
}

// All stripes that `nodes`, indices of the placement, own. `how` completes "node N ...".
Settlement Lost(const SessionRecord& record, const std::vector<int>& nodes, const std::string& how) {
  Settlement settlement;
  settlement.length = record.length();
  const int64_t stripe_rows = record.placement.stripe_pages * kPageRows;
  const int64_t stripes = (record.length() + stripe_rows - 1) / stripe_rows;
  std::vector<std::string> texts;
  for (const int node : nodes) {
    const LostStripes share = ShareOf(record, node);
    texts.push_back(absl::StrCat("node ", share.node, " ", how, ", with ", share.stripes, " of ", stripes,
                                 " stripes (", share.positions, " positions)"));
    settlement.lost.push_back(share);
  }
  settlement.why_lost = absl::StrJoin(texts, "; ");
  return settlement;
}

Settlement LostAltogether(const SessionRecord& record, const std::string& why) {
  std::vector<int> all(record.placement.size());
  for (int node = 0; node < record.placement.size(); ++node) all[node] = node;
  Settlement settlement = Lost(record, all, "");
  settlement.why_lost = why;
  return settlement;
}

Settlement SettleTensor(const SessionRecord& record, const std::vector<v1::SessionContent>& contents) {
  const int64_t length = record.length();
  Digest recorded;
  for (const AppendRecord& append : record.appends) recorded += append.digest;
  Digest held;
  bool publishes = false;
  std::vector<int> missing;
  for (size_t rank = 0; rank < contents.size(); ++rank) {
    const v1::SessionContent& content = contents[rank];
    if (content.length() == length) {
      held += Digest{content.digest_low(), content.digest_high()};
    } else if (content.sealed_count() > 0 && content.length() + content.sealed_count() == length) {
      held += Digest{content.sealed().digest_low(), content.sealed().digest_high()};
      publishes = true;
    } else {
      missing.push_back(static_cast<int>(rank));
    }
  }
  if (!missing.empty()) return Lost(record, missing, "does not hold its part");
  if (!(held == recorded)) return LostAltogether(record, "the workers hold other rows than those on record");
  Settlement settlement;
  settlement.length = length;
  if (!publishes) return settlement;
  settlement.exponents = contents[0].sealed().exponents();
  for (const v1::SessionContent& content : contents) {
    if (settlement.exponents.size() != ExponentBytes(record.spec) ||
        !MergeExponents(content.sealed().exponents(), &settlement.exponents)) {
      return LostAltogether(
          record, "its last append was published by some workers only, and the others cannot follow");
    }
  }
  return settlement;
}

Settlement SettleModel(const SessionRecord& record, const std::vector<v1::SessionContent>& contents) {
  const int64_t length = record.length();
  std::vector<int> missing;
  bool equal = true;
  bool unread = false;
  for (size_t rank = 0; rank < contents.size(); ++rank) {
    if (contents[rank].length() < length) missing.push_back(static_cast<int>(rank));
    unread = unread || contents[rank].unread();
    equal = equal && contents[rank].length() == contents[0].length() &&
            contents[rank].digest_low() == contents[0].digest_low() &&
            contents[rank].digest_high() == contents[0].digest_high();
  }
  if (!missing.empty()) return Lost(record, missing, "does not hold its part");
  Settlement settlement;
  settlement.length = equal ? contents[0].length() : length;
  settlement.read_again = !equal || unread;
  return settlement;
}

}  // namespace

Settlement Settle(const SessionRecord& record, const std::vector<v1::SessionContent>& contents) {
  return record.spec.has_model() ? SettleModel(record, contents) : SettleTensor(record, contents);
}

Settlement SettleWithout(const SessionRecord& record, const std::vector<std::string>& absent) {
  if (record.placement.nodes.empty()) {
    Settlement settlement;
    settlement.length = record.length();
    settlement.why_lost = "it is of an earlier release, whose workers' content is not kept";
    return settlement;
  }
  std::vector<int> indices;
  for (const std::string& node : absent) indices.push_back(record.placement.IndexOf(node));
  if (!indices.empty()) return Lost(record, indices, "is not in the group");
  Settlement settlement;
  settlement.length = record.length();
  settlement.why_lost = absl::StrCat("it is kept by nodes ", absl::StrJoin(record.placement.nodes, ", "),
                                     " alone, and the group has others beside them");
  return settlement;
}

bool MergeExponents(const std::string& from, std::string* into) {
  if (from.size() != into->size()) return false;
  for (size_t i = 0; i + 1 < from.size(); i += 2) {
    int16_t a = 0;
    int16_t b = 0;
    std::memcpy(&a, from.data() + i, 2);
    std::memcpy(&b, into->data() + i, 2);
    if (a > b) std::memcpy(into->data() + i, &a, 2);
  }
  return true;
}

size_t ExponentBytes(const v1::SessionSpec& spec) {
  return size_t{2} * spec.layers() * spec.kv_heads() * spec.value_dim();
}

}  // namespace eduba
