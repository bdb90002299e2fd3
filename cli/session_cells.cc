#include "cli/session_cells.h"

#include <algorithm>
#include <iostream>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "cli/output.h"
#include "cli/tokens.h"
#include "ingest/npy.h"
#include "rpc/limits.h"
#include "rpc/spec.h"

namespace eduba {
namespace {

// Tokens of one call: a second of a small model's work, so that progress is seen.
constexpr int64_t kPieceTokens = 16384;
static_assert(kPieceTokens <= kTokenIdsMax);

// Collects tokens and appends them, a piece at a time.
class TokenAppender {
 public:
  TokenAppender(Client& client, std::string session, int64_t at)
      : client_(client), session_(std::move(session)), start_(at), sent_(at) {}

  int64_t end() const { return sent_ + static_cast<int64_t>(waiting_.size()); }
  const v1::AppendTokensReceipt& receipt() const { return receipt_; }

  absl::Status Add(absl::Span<const int32_t> ids) {
    waiting_.insert(waiting_.end(), ids.begin(), ids.end());
    while (static_cast<int64_t>(waiting_.size()) >= kPieceTokens) EDUBA_RETURN_IF_ERROR(Send(kPieceTokens));
    return absl::OkStatus();
  }
  absl::Status Finish() { return waiting_.empty() ? absl::OkStatus() : Send(end() - sent_); }

 private:
  absl::Status Send(int64_t count) {
    AppendOptions options;
    options.at = sent_;
    const auto some = client_.AppendTokens(session_, absl::MakeConstSpan(waiting_).first(count), options);
    if (!some.ok()) {
      return absl::Status(some.status().code(),
                          absl::StrCat(std::string(some.status().message()), "; the same with --at ", start_,
                                       " goes on from what is there"));
    }
    receipt_.set_at(start_);
    receipt_.set_count(receipt_.count() + some->count());
    receipt_.set_already_stored(receipt_.already_stored() + some->already_stored());
    receipt_.set_length(some->length());
    waiting_.erase(waiting_.begin(), waiting_.begin() + count);
    sent_ += count;
    return absl::OkStatus();
  }

  Client& client_;
  const std::string session_;
  const int64_t start_;
  int64_t sent_;  // The first position that the server does not have.
  std::vector<int32_t> waiting_;
  v1::AppendTokensReceipt receipt_;
};

}  // namespace

absl::Status AppendCells(Client& client, const std::string& name, const CellFlags& flags,
                         const std::string& tokenizer_folder, std::optional<int64_t> given_at, bool json) {
  EDUBA_ASSIGN_OR_RETURN(const v1::Session session, client.GetSession(name));
  EDUBA_ASSIGN_OR_RETURN(auto tokenizer, LoadModelTokenizer(client, tokenizer_folder));
  const int64_t sinks = DedicatedSinks(session.spec());
  const int64_t at = given_at.value_or(std::max(session.length(), sinks));
  EDUBA_ASSIGN_OR_RETURN(const auto cells, CellTokens::Open(flags, std::move(tokenizer), at <= sinks));
  std::unique_ptr<NpyWriter> ranges;
  if (!flags.ranges_out.empty()) {
    EDUBA_ASSIGN_OR_RETURN(ranges, NpyWriter::Create(flags.ranges_out, NpyType::kI64, {cells->cells(), 2}));
  }

  TokenAppender appender(client, name, at);
  const absl::Time started = absl::Now();
  {
    ProgressReport progress("append");
    int64_t done = 0;
    while (done < cells->cells()) {
      EDUBA_ASSIGN_OR_RETURN(const std::vector<std::vector<int32_t>> block, cells->Next());
      for (const std::vector<int32_t>& cell : block) {
        const int64_t range[] = {appender.end(), appender.end() + static_cast<int64_t>(cell.size())};
        if (ranges != nullptr) EDUBA_RETURN_IF_ERROR(ranges->Append(absl::MakeConstSpan(range)));
        EDUBA_RETURN_IF_ERROR(appender.Add(cell));
        progress.Rows(++done, cells->cells());
      }
    }
    EDUBA_RETURN_IF_ERROR(appender.Finish());
  }
  if (ranges != nullptr) EDUBA_RETURN_IF_ERROR(ranges->Finish());

  const double seconds = absl::ToDoubleSeconds(absl::Now() - started);
  const v1::AppendTokensReceipt& receipt = appender.receipt();
  if (json) {
    PrintJson({{"at", receipt.at()},
               {"count", receipt.count()},
               {"length", receipt.length()},
               {"already_stored", receipt.already_stored()},
               {"cells", cells->cells()},
               {"genes", cells->genes()},
               {"genes_without_token", cells->unknown_genes()},
               {"expressed_left_out", cells->left_out()},
               {"seconds", seconds}});
    return absl::OkStatus();
  }
  std::cout << absl::StrFormat(
                   "appended %d cells, %d tokens at %d in %.3f s, %d of which were there; length %d\n"
                   "%d of %d genes have no token; the cells express them %d times, which was left out",
                   cells->cells(), receipt.count(), receipt.at(), seconds, receipt.already_stored(),
                   receipt.length(), cells->unknown_genes(), cells->genes(), cells->left_out())
            << std::endl;
  return absl::OkStatus();
}

}  // namespace eduba
