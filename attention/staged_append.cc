#include "attention/staged_append.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/rows.h"
#include "base/check.h"
#include "base/position_ranges.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

// `source` itself when it has the type already, else its elements rounded into `buffer`.
const char* Rounded(absl::Span<const char> source, DType from, DType to, int64_t elements,
                    std::unique_ptr<char[]>& buffer) {
  if (from == to) return source.data();
  buffer = std::make_unique_for_overwrite<char[]>(elements * DTypeBytes(to));
  ConvertElements(source.data(), from, buffer.get(), to, elements);
  return buffer.get();
}

}  // namespace

absl::StatusOr<std::shared_ptr<StagedAppend>> StagedAppend::Begin(Backend* backend, PageStore* store,
                                                                  Sequence* sequence, AppendShare share,
                                                                  AppendLog* log) {
  std::sort(share.owned.begin(), share.owned.end(),
            [](const PositionRange& a, const PositionRange& b) { return a.begin < b.begin; });
  auto append = std::shared_ptr<StagedAppend>(new StagedAppend(backend, sequence, std::move(share), log));
  EDUBA_RETURN_IF_ERROR(append->CheckShare());
  append->PlanRuns();
  if (!append->share_.compare_only) EDUBA_RETURN_IF_ERROR(append->StagePages(store));
  append->claimed_ = std::vector<std::atomic<uint64_t>>(append->sequence_->spec().layers * append->Words());
  if (append->log_ != nullptr) EDUBA_RETURN_IF_ERROR(append->log_->Begin(append->share_));
  return append;
}

StagedAppend::StagedAppend(Backend* backend, Sequence* sequence, AppendShare share, AppendLog* log)
    : writer_(backend, sequence->spec().shape),
      sequence_(sequence),
      share_(std::move(share)),
      log_(share_.compare_only ? nullptr : log),
      magnitudes_(sequence->spec().exponents()) {}

absl::Status StagedAppend::CheckShare() const {
  const int64_t length = sequence_->length();
  if (share_.at < 0 || share_.count < 1 || share_.count > kMaxPositions - share_.at) {
    return absl::InvalidArgumentError(absl::StrCat("append of ", share_.count, " positions at ", share_.at,
                                                   ", wanted at least 1, within ", kMaxPositions));
  }
  const int64_t end = share_.at + share_.count;
  if (share_.compare_only ? end > length : share_.at != length) {
    return absl::FailedPreconditionError(absl::StrCat(share_.compare_only ? "compared" : "new", " append is ",
                                                      RangeText({share_.at, end}), ", but the sequence has ",
                                                      length, " positions"));
  }
  int64_t previous = share_.at;
  for (const PositionRange& range : share_.owned) {
    const bool whole_pages = (range.begin == share_.at || range.begin % kPageRows == 0) &&
                             (range.end == end || range.end % kPageRows == 0);
    if (range.empty() || range.begin < previous || range.end > end || !whole_pages) {
      return absl::InvalidArgumentError(absl::StrCat("owned range ", RangeText(range), " of the append ",
                                                     RangeText({share_.at, end}),
                                                     " is empty, overlaps another or cuts a page"));
    }
    previous = range.end;
  }
  return absl::OkStatus();
}

void StagedAppend::PlanRuns() {
  owned_ = Union(share_.owned);
  sinks_ = PositionRange{share_.at, share_.at + share_.count}.Intersect({0, sequence_->spec().sink_tokens});
  std::vector<PositionRange> wanted = owned_;
  wanted.push_back(sinks_);
  for (const PositionRange& range : Union(std::move(wanted))) {
    runs_.push_back({range, rows_});
    rows_ += range.size();
  }
}

absl::Status StagedAppend::StagePages(PageStore* store) {
  const int layers = sequence_->spec().layers;
  const auto pages_of = [](PositionRange range) {
    return range.empty() ? 0 : PageCount(range.end) - PageOf(range.begin);
  };
  int64_t pages = pages_of(sinks_);
  for (const PositionRange& range : owned_) pages += pages_of(range);
  EDUBA_ASSIGN_OR_RETURN(std::vector<std::shared_ptr<KvPage>> fresh, writer_.Reserve(store, layers * pages));
  auto next = fresh.begin();
  // A page that the append continues starts as a copy; the sequence's own stays as it is for its readers.
  const auto stage = [&](PositionRange range, const PageTable& committed, PageTable& staged) {
    return ForEachPage(range, [&](int64_t page, PositionRange part) {
      if (part.begin != PageBegin(page)) {
        const KvPage* const tail = committed.At(page);
        if (tail == nullptr) {
          return absl::InvalidArgumentError(absl::StrCat("position ", part.begin, " continues page ", page,
                                                         ", which this worker does not own"));
        }
        EDUBA_RETURN_IF_ERROR(writer_.Copy(*tail, **next));
      }
      staged.Put(page, std::move(*next++));
      return absl::OkStatus();
    });
  };
  const WriterLock lock(state_mutex_);
  staged_.resize(layers);
  for (int layer = 0; layer < layers; ++layer) {
    for (const PositionRange& range : owned_) {
      EDUBA_RETURN_IF_ERROR(stage(range, sequence_->pages(layer), staged_[layer].owned));
    }
    EDUBA_RETURN_IF_ERROR(stage(sinks_, sequence_->sink_pages(layer), staged_[layer].sinks));
  }
  return absl::OkStatus();
}

absl::Status StagedAppend::AddRows(int layer, int64_t first, int64_t count, DType dtype,
                                   absl::Span<const char> keys, absl::Span<const char> values) {
  const ReaderLock open(state_mutex_);
  {
    const MutexLock lock(mutex_);
    if (!failure_.ok()) return failure_;
  }
  if (sealed_) return absl::FailedPreconditionError("the append is sealed: it takes no more rows");
  absl::Status status = Receive(layer, first, count, dtype, keys, values);
  if (!status.ok()) {
    const MutexLock lock(mutex_);
    if (failure_.ok()) failure_ = status;
  }
  return status;
}

absl::Status StagedAppend::Receive(int layer, int64_t first, int64_t count, DType dtype,
                                   absl::Span<const char> keys, absl::Span<const char> values) {
  const SequenceSpec& spec = sequence_->spec();
  const AttentionShape& shape = spec.shape;
  if (layer < 0 || layer >= spec.layers) {
    return absl::InvalidArgumentError(absl::StrCat("layer is ", layer, ", wanted 0 to ", spec.layers - 1));
  }
  EDUBA_ASSIGN_OR_RETURN(const Run* run, FindRun(first, count));
  EDUBA_RETURN_IF_ERROR(CheckSizes(count, dtype, keys, values));
  EDUBA_RETURN_IF_ERROR(Claim(layer, *run, first, count));

  const int64_t key_elements = count * shape.kv_heads * shape.head_dim;
  const int64_t value_elements = count * shape.kv_heads * shape.value_dim;
  std::unique_ptr<char[]> key_buffer;
  std::unique_ptr<char[]> value_buffer;
  const TypedRows rows = {first, Rounded(keys, dtype, shape.key_dtype, key_elements, key_buffer),
                          Rounded(values, dtype, shape.value_dtype, value_elements, value_buffer)};
  // Rounding keeps NaN and Inf, so the rounded elements tell about the given ones too.
  EDUBA_RETURN_IF_ERROR(CheckFinite("keys", shape.key_dtype, layer, first, shape.head_dim, key_elements,
                                    dtype, keys.data(), rows.keys));
  EDUBA_RETURN_IF_ERROR(CheckFinite("values", shape.value_dtype, layer, first, shape.value_dim,
                                    value_elements, dtype, values.data(), rows.values));

  if (log_ != nullptr) {
    EDUBA_RETURN_IF_ERROR(log_->AddRows(
        layer, first, count, absl::MakeConstSpan(rows.keys, static_cast<size_t>(count * writer_.key_bytes())),
        absl::MakeConstSpan(rows.values, static_cast<size_t>(count * writer_.value_bytes()))));
  }
  const PositionRange all{first, first + count};
  const SequenceLayer* const staged = share_.compare_only ? nullptr : &staged_[layer];
  if (staged != nullptr) {
    EDUBA_RETURN_IF_ERROR(Write(layer, all.Intersect(sinks_), rows, &staged->sinks).status());
  }
  auto range = std::upper_bound(owned_.begin(), owned_.end(), first,
                                [](int64_t position, const PositionRange& r) { return position < r.end; });
  for (; range != owned_.end() && range->begin < all.end; ++range) {
    const PositionRange part = all.Intersect(*range);
    EDUBA_ASSIGN_OR_RETURN(const Digest digest,
                           Write(layer, part, rows, staged == nullptr ? nullptr : &staged->owned));
    Record(layer, part, rows, digest);
  }
  return absl::OkStatus();
}

absl::Status StagedAppend::CheckSizes(int64_t count, DType dtype, absl::Span<const char> keys,
                                      absl::Span<const char> values) const {
  const AttentionShape& shape = sequence_->spec().shape;
  const auto check = [&](const char* array, size_t found, int64_t dim) {
    const int64_t wanted = count * shape.kv_heads * dim * static_cast<int64_t>(DTypeBytes(dtype));
    if (static_cast<int64_t>(found) == wanted) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(array, " of ", count, " positions have ", found,
                                                   " bytes, wanted ", wanted, " ([", count, ", ",
                                                   shape.kv_heads, ", ", dim, "] ", DTypeName(dtype), ")"));
  };
  EDUBA_RETURN_IF_ERROR(check("keys", keys.size(), shape.head_dim));
  return check("values", values.size(), shape.value_dim);
}

absl::StatusOr<const StagedAppend::Run*> StagedAppend::FindRun(int64_t first, int64_t count) const {
  if (count < 1 || count > kMaxPositions) {
    return absl::InvalidArgumentError(
        absl::StrCat("piece has ", count, " positions, wanted 1 to ", kMaxPositions));
  }
  const auto run = std::upper_bound(runs_.begin(), runs_.end(), first,
                                    [](int64_t position, const Run& r) { return position < r.range.end; });
  const bool begins = run != runs_.end() && run->range.begin <= first;
  if (begins && count <= run->range.end - first) return &*run;
  return absl::InvalidArgumentError(
      absl::StrCat("position ", begins ? run->range.end : first, " is not this worker's: of the append ",
                   RangeText({share_.at, share_.at + share_.count}), " it takes ", rows_, " positions in ",
                   runs_.size(), " ranges; follow the plan's extents"));
}

absl::Status StagedAppend::Claim(int layer, const Run& run, int64_t first, int64_t count) {
  std::atomic<uint64_t>* bits = claimed_.data() + layer * Words();
  const int64_t begin = run.offset + first - run.range.begin;
  for (int64_t bit = begin; bit < begin + count;) {
    const int64_t low = bit % 64;
    const int64_t n = std::min<int64_t>(64 - low, begin + count - bit);
    const uint64_t mask = (n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1) << low;
    const uint64_t twice = bits[bit / 64].fetch_or(mask, std::memory_order_relaxed) & mask;
    if (twice != 0) {
      const int64_t position = first + (bit - low + std::countr_zero(twice)) - begin;
      return absl::InvalidArgumentError(
          absl::StrCat("position ", position, " of layer ", layer, " was sent twice; send each once"));
    }
    bit += n;
  }
  return absl::OkStatus();
}

absl::Status StagedAppend::CheckFinite(const char* array, DType dtype, int layer, int64_t first, int64_t dim,
                                       int64_t elements, DType given_dtype, const char* given,
                                       const char* typed) const {
  const AttentionShape& shape = sequence_->spec().shape;
  const int64_t bad = FirstNonFinite(typed, dtype, elements);
  if (bad < 0) return absl::OkStatus();
  const std::string place =
      absl::StrCat(array, " at position ", first + bad / (shape.kv_heads * dim), ", layer ", layer,
                   ", KV head ", bad / dim % shape.kv_heads, ", channel ", bad % dim);
  const float element = LoadElement(given, given_dtype, bad);
  if (std::isfinite(element)) {
    return absl::InvalidArgumentError(absl::StrCat(place, ": ", element, " is beyond the range of ",
                                                   DTypeName(dtype), "; use another dtype or scale"));
  }
  return absl::InvalidArgumentError(
      absl::StrCat(place, ": found ", std::isnan(element) ? "NaN" : "Inf",
                   ", wanted finite numbers; nothing was stored, replace it and append again"));
}

absl::StatusOr<Digest> StagedAppend::Write(int layer, PositionRange part, const TypedRows& rows,
                                           const PageTable* table) {
  Digest sum;
  EDUBA_RETURN_IF_ERROR(ForEachPage(part, [&](int64_t page, PositionRange in_page) {
    const char* const keys = rows.keys + (in_page.begin - rows.first) * writer_.key_bytes();
    const char* const values = rows.values + (in_page.begin - rows.first) * writer_.value_bytes();
    const Digest digest = writer_.DigestOf(layer, in_page.begin, in_page.size(), keys, values);
    sum += digest;
    if (table == nullptr) return absl::OkStatus();
    const MutexLock lock(page_mutexes_[static_cast<size_t>(layer + page) % page_mutexes_.size()]);
    return writer_.Write(*table->At(page), in_page.begin - PageBegin(page), in_page.size(), keys, values,
                         digest);
  }));
  return sum;
}

void StagedAppend::Record(int layer, PositionRange part, const TypedRows& rows, const Digest& digest) {
  const SequenceSpec& spec = sequence_->spec();
  const int64_t columns = spec.exponents_per_layer();
  std::vector<uint32_t> magnitudes(columns);
  RaiseMagnitudes(rows.values + (part.begin - rows.first) * writer_.value_bytes(), spec.shape.value_dtype,
                  part.size(), columns, magnitudes.data());

  const MutexLock lock(mutex_);
  digest_ += digest;
  uint32_t* all = magnitudes_.data() + layer * columns;
  for (int64_t c = 0; c < columns; ++c) all[c] = std::max(all[c], magnitudes[c]);
}

absl::StatusOr<AppendSeal> StagedAppend::Seal() {
  const WriterLock closed(state_mutex_);
  return SealLocked();
}

absl::StatusOr<AppendSeal> StagedAppend::SealLocked() {
  const MutexLock lock(mutex_);
  if (!failure_.ok()) return failure_;
  if (sealed_) return seal_;
  EDUBA_RETURN_IF_ERROR(FirstMissing());
  for (const SequenceLayer& layer : staged_) {
    EDUBA_RETURN_IF_ERROR(layer.owned.SealFull(writer_));
    EDUBA_RETURN_IF_ERROR(layer.sinks.SealFull(writer_));
  }
  seal_.digest = digest_;
  seal_.exponents = sequence_->owned_exponents();
  if (!share_.compare_only) {
    const DType dtype = sequence_->spec().shape.value_dtype;
    for (size_t i = 0; i < magnitudes_.size(); ++i) {
      seal_.exponents[i] = std::max(seal_.exponents[i], ExponentOfMagnitude(magnitudes_[i], dtype));
    }
  }
  if (log_ != nullptr) EDUBA_RETURN_IF_ERROR(log_->Seal(seal_));
  sealed_ = true;
  return seal_;
}

bool StagedAppend::sealed() const {
  const ReaderLock lock(state_mutex_);
  return sealed_;
}

AppendSeal StagedAppend::seal() const {
  const ReaderLock lock(state_mutex_);
  EDUBA_CHECK(sealed_);
  return seal_;
}

absl::Status StagedAppend::FirstMissing() const {
  for (int layer = 0; layer < sequence_->spec().layers; ++layer) {
    const std::atomic<uint64_t>* words = claimed_.data() + layer * Words();
    const auto* gap =
        std::find_if(words, words + Words(), [](const auto& word) { return ~word.load() != 0; });
    const int64_t row = (gap - words) * 64 + (gap == words + Words() ? 0 : std::countr_one(gap->load()));
    if (row >= rows_) continue;
    const auto behind = std::upper_bound(runs_.begin(), runs_.end(), row,
                                         [](int64_t r, const Run& run) { return r < run.offset; });
    const Run& run = *(behind - 1);
    return absl::FailedPreconditionError(
        absl::StrCat("position ", run.range.begin + row - run.offset, " of layer ", layer,
                     " has not been uploaded; upload what is missing and commit again"));
  }
  return absl::OkStatus();
}

absl::Status StagedAppend::Publish(std::vector<int16_t> exponents) {
  const WriterLock closed(state_mutex_);
  EDUBA_ASSIGN_OR_RETURN(AppendSeal seal, SealLocked());
  if (share_.compare_only) return absl::OkStatus();
  const SequenceSpec& spec = sequence_->spec();
  if (sequence_->length() != share_.at) {
    return absl::InternalError(absl::StrCat("commit of an append at ", share_.at, " to a sequence of ",
                                            sequence_->length(), " positions"));
  }
  if (static_cast<int64_t>(exponents.size()) != spec.exponents()) {
    return absl::InternalError(
        absl::StrCat("commit has ", exponents.size(), " exponents, wanted ", spec.exponents()));
  }
  for (size_t i = 0; i < exponents.size(); ++i) {
    if (exponents[i] < seal.exponents[i]) {
      return absl::InternalError(absl::StrCat("commit's exponent ", i, " is ", exponents[i],
                                              ", smaller than this worker's own ", seal.exponents[i]));
    }
  }
  if (log_ != nullptr) EDUBA_RETURN_IF_ERROR(log_->Publish(exponents));
  sequence_->Extend(staged_, share_.at + share_.count, std::move(exponents), std::move(seal.exponents));
  staged_.clear();
  return absl::OkStatus();
}

void StagedAppend::Abort() {
  const WriterLock closed(state_mutex_);
  const MutexLock lock(mutex_);
  if (failure_.ok()) failure_ = absl::AbortedError("the append was aborted");
  staged_.clear();
}

}  // namespace eduba
