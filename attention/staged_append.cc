#include "attention/staged_append.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/rows.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace eduba {
namespace {

// Ascending, disjoint ranges with neighbours that touch made one.
std::vector<PositionRange> MergeTouching(std::vector<PositionRange> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const PositionRange& a, const PositionRange& b) { return a.begin < b.begin; });
  std::vector<PositionRange> merged;
  for (const PositionRange& range : ranges) {
    if (range.empty()) continue;
    if (!merged.empty() && range.begin <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, range.end);
    } else {
      merged.push_back(range);
    }
  }
  return merged;
}

std::string RangeText(PositionRange range) { return absl::StrCat("[", range.begin, ", ", range.end, ")"); }

// Array of `bytes` for `count` stored rows: `source` itself when it has the type already, else rounded into
// `buffer`.
const char* StoredRows(absl::Span<const char> source, DType from, DType to, int64_t elements,
                       std::unique_ptr<char[]>& buffer) {
  if (from == to) return source.data();
  buffer = std::make_unique_for_overwrite<char[]>(elements * DTypeBytes(to));
  ConvertElements(source.data(), from, buffer.get(), to, elements);
  return buffer.get();
}

}  // namespace

absl::StatusOr<std::shared_ptr<StagedAppend>> StagedAppend::Begin(Backend* backend, PageStore* store,
                                                                  Sequence* sequence, AppendShare share) {
  auto append = std::shared_ptr<StagedAppend>(new StagedAppend(backend, sequence, std::move(share)));
  EDUBA_RETURN_IF_ERROR(append->CheckShare());
  append->PlanRuns();
  if (!append->share_.compare_only) EDUBA_RETURN_IF_ERROR(append->StagePages(store));
  append->claimed_ = std::vector<std::atomic<uint64_t>>(append->sequence_->spec().layers * append->Words());
  return append;
}

StagedAppend::StagedAppend(Backend* backend, Sequence* sequence, AppendShare share)
    : backend_(backend),
      sequence_(sequence),
      share_(std::move(share)),
      key_bytes_(static_cast<int64_t>(DTypeBytes(sequence_->spec().shape.key_dtype)) *
                 sequence_->spec().shape.kv_heads * sequence_->spec().shape.head_dim),
      value_bytes_(static_cast<int64_t>(DTypeBytes(sequence_->spec().shape.value_dtype)) *
                   sequence_->spec().shape.kv_heads * sequence_->spec().shape.value_dim),
      magnitudes_(sequence_->spec().exponents()) {}

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
                                                     " is empty, out of order or cuts a page"));
    }
    previous = range.end;
  }
  return absl::OkStatus();
}

void StagedAppend::PlanRuns() {
  const SequenceSpec& spec = sequence_->spec();
  const PositionRange sinks =
      PositionRange{share_.at, share_.at + share_.count}.Intersect({0, spec.sink_tokens});

  for (const PositionRange& range : MergeTouching(share_.owned)) {
    extents_.push_back({range, slots_});
    slots_ += PageCount(range.end) - PageOf(range.begin);
  }
  if (!sinks.empty()) {
    sinks_ = {sinks, slots_};
    slots_ += PageCount(sinks.end) - PageOf(sinks.begin);
  }

  std::vector<PositionRange> wanted = share_.owned;
  wanted.push_back(sinks);
  for (const PositionRange& range : MergeTouching(std::move(wanted))) {
    runs_.push_back({range, rows_});
    rows_ += range.size();
  }
}

absl::Status StagedAppend::StagePages(PageStore* store) {
  const SequenceSpec& spec = sequence_->spec();
  EDUBA_ASSIGN_OR_RETURN(pages_, store->Reserve(backend_->PageBytes(spec.shape), spec.layers * slots_));
  // Pages that the append continues start as copies; the sequence's own stay as they are for its readers.
  for (int layer = 0; layer < spec.layers; ++layer) {
    const int64_t page = PageOf(share_.at);
    if (!extents_.empty() && extents_.front().range.begin % kPageRows != 0) {
      const void* tail = sequence_->pages(layer).Tail(page);
      if (tail == nullptr) {
        return absl::InvalidArgumentError(absl::StrCat("position ", share_.at, " continues page ", page,
                                                       ", which this worker does not own"));
      }
      EDUBA_RETURN_IF_ERROR(
          backend_->CopyPage(spec.shape, tail, pages_[StagedSlot(layer, extents_.front(), page)].data()));
    }
    if (!sinks_.range.empty() && sinks_.range.begin % kPageRows != 0) {
      const void* tail = sequence_->sink_pages(layer).Tail(page);
      EDUBA_CHECK(tail != nullptr);
      EDUBA_RETURN_IF_ERROR(
          backend_->CopyPage(spec.shape, tail, pages_[StagedSlot(layer, sinks_, page)].data()));
    }
  }
  return absl::OkStatus();
}

int64_t StagedAppend::StagedSlot(int layer, const Extent& extent, int64_t page) const {
  return layer * slots_ + extent.slot + page - PageOf(extent.range.begin);
}

absl::Status StagedAppend::AddRows(int layer, int64_t first, int64_t count, DType dtype,
                                   absl::Span<const char> keys, absl::Span<const char> values) {
  const std::shared_lock open(state_mutex_);
  {
    const std::scoped_lock lock(mutex_);
    if (!failure_.ok()) return failure_;
  }
  if (sealed_) return absl::FailedPreconditionError("the append is sealed: it takes no more rows");
  absl::Status status = Receive(layer, first, count, dtype, keys, values);
  if (!status.ok()) {
    const std::scoped_lock lock(mutex_);
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
  const char* stored_keys = StoredRows(keys, dtype, shape.key_dtype, key_elements, key_buffer);
  const char* stored_values = StoredRows(values, dtype, shape.value_dtype, value_elements, value_buffer);
  // Rounding keeps NaN and Inf, so what is stored tells about what was given too.
  if (const int64_t bad = FirstNonFinite(stored_keys, shape.key_dtype, key_elements); bad >= 0) {
    return NonFinite("keys", shape.key_dtype, layer, first, shape.head_dim, bad,
                     LoadElement(keys.data(), dtype, bad));
  }
  if (const int64_t bad = FirstNonFinite(stored_values, shape.value_dtype, value_elements); bad >= 0) {
    return NonFinite("values", shape.value_dtype, layer, first, shape.value_dim, bad,
                     LoadElement(values.data(), dtype, bad));
  }

  const PositionRange rows{first, first + count};
  const auto write = [&](const Extent& extent) {
    const PositionRange part = rows.Intersect(extent.range);
    if (part.empty() || share_.compare_only) return absl::OkStatus();
    return Write(layer, extent, part.begin, part.size(), stored_keys + (part.begin - first) * key_bytes_,
                 stored_values + (part.begin - first) * value_bytes_);
  };
  EDUBA_RETURN_IF_ERROR(write(sinks_));
  // The first extent that ends behind the rows' begin, and on.
  auto extent = std::upper_bound(extents_.begin(), extents_.end(), first,
                                 [](int64_t position, const Extent& e) { return position < e.range.end; });
  for (; extent != extents_.end() && extent->range.begin < rows.end; ++extent) {
    EDUBA_RETURN_IF_ERROR(write(*extent));
    Record(layer, rows.Intersect(extent->range), first, stored_keys, stored_values);
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

absl::Status StagedAppend::NonFinite(const char* array, DType stored, int layer, int64_t first, int64_t dim,
                                     int64_t index, float given) const {
  const AttentionShape& shape = sequence_->spec().shape;
  const std::string place =
      absl::StrCat(array, " at position ", first + index / (shape.kv_heads * dim), ", layer ", layer,
                   ", KV head ", index / dim % shape.kv_heads, ", channel ", index % dim);
  if (std::isfinite(given)) {
    return absl::InvalidArgumentError(absl::StrCat(place, ": ", given, " is beyond the range of ",
                                                   DTypeName(stored), "; use another dtype or scale"));
  }
  return absl::InvalidArgumentError(
      absl::StrCat(place, ": found ", std::isnan(given) ? "NaN" : "Inf",
                   ", wanted finite numbers; nothing was stored, replace it and append again"));
}

absl::Status StagedAppend::Write(int layer, const Extent& extent, int64_t first, int64_t count,
                                 const char* keys, const char* values) {
  const AttentionShape& shape = sequence_->spec().shape;
  for (int64_t position = first; position < first + count;) {
    const int64_t page = PageOf(position);
    const int64_t n = std::min(PageBegin(page + 1), first + count) - position;
    const int64_t slot = StagedSlot(layer, extent, page);
    {
      const std::scoped_lock lock(page_mutexes_[static_cast<size_t>(slot) % page_mutexes_.size()]);
      EDUBA_RETURN_IF_ERROR(backend_->WriteRows(
          shape, pages_[slot].data(), static_cast<int>(position - PageBegin(page)), static_cast<int>(n),
          keys + (position - first) * key_bytes_, values + (position - first) * value_bytes_));
    }
    position += n;
  }
  return absl::OkStatus();
}

void StagedAppend::Record(int layer, PositionRange rows, int64_t first, const char* keys,
                          const char* values) {
  const SequenceSpec& spec = sequence_->spec();
  const char* key = keys + (rows.begin - first) * key_bytes_;
  const char* const own_values = values + (rows.begin - first) * value_bytes_;
  const char* value = own_values;

  constexpr int64_t kHead = 2 * sizeof(int64_t);
  const auto row = std::make_unique_for_overwrite<char[]>(kHead + key_bytes_ + value_bytes_);
  Digest sum;
  for (int64_t position = rows.begin; position < rows.end; ++position) {
    const int64_t head[2] = {position, layer};
    std::memcpy(row.get(), head, kHead);
    std::memcpy(row.get() + kHead, key, key_bytes_);
    std::memcpy(row.get() + kHead + key_bytes_, value, value_bytes_);
    const XXH128_hash_t hash = XXH3_128bits(row.get(), kHead + key_bytes_ + value_bytes_);
    sum += Digest{hash.low64, hash.high64};
    key += key_bytes_;
    value += value_bytes_;
  }

  const int64_t columns = spec.exponents_per_layer();
  std::vector<uint32_t> magnitudes(columns);
  RaiseMagnitudes(own_values, spec.shape.value_dtype, rows.size(), columns, magnitudes.data());

  const std::scoped_lock lock(mutex_);
  digest_ += sum;
  uint32_t* all = magnitudes_.data() + layer * columns;
  for (int64_t c = 0; c < columns; ++c) all[c] = std::max(all[c], magnitudes[c]);
}

absl::StatusOr<AppendSeal> StagedAppend::Seal() {
  const std::unique_lock closed(state_mutex_);
  const std::scoped_lock lock(mutex_);
  if (!failure_.ok()) return failure_;
  if (sealed_) return seal_;
  EDUBA_RETURN_IF_ERROR(FirstMissing());
  sealed_ = true;
  AppendSeal& seal = seal_;
  seal.digest = digest_;
  seal.exponents = sequence_->owned_exponents();
  if (!share_.compare_only) {
    const DType dtype = sequence_->spec().shape.value_dtype;
    for (size_t i = 0; i < magnitudes_.size(); ++i) {
      seal.exponents[i] = std::max(seal.exponents[i], ExponentOfMagnitude(magnitudes_[i], dtype));
    }
  }
  return seal;
}

bool StagedAppend::sealed() const {
  const std::shared_lock open(state_mutex_);
  return sealed_;
}

AppendSeal StagedAppend::seal() const {
  const std::shared_lock open(state_mutex_);
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
  EDUBA_ASSIGN_OR_RETURN(AppendSeal seal, Seal());
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
  for (int layer = 0; layer < spec.layers; ++layer) {
    Page* const pages = pages_.data() + layer * slots_;
    for (const Extent& extent : extents_) {
      int64_t slot = extent.slot;
      for (int64_t page = PageOf(extent.range.begin); page < PageCount(extent.range.end); ++page) {
        sequence_->PutOwned(layer, page, std::move(pages[slot++]));
      }
    }
    if (sinks_.range.empty()) continue;
    int64_t slot = sinks_.slot;
    for (int64_t page = PageOf(sinks_.range.begin); page < PageCount(sinks_.range.end); ++page) {
      sequence_->PutSink(layer, page, std::move(pages[slot++]));
    }
  }
  sequence_->Extend(share_.at + share_.count, std::move(exponents), std::move(seal.exponents), seal.digest);
  return absl::OkStatus();
}

void StagedAppend::Abort() {
  const std::unique_lock closed(state_mutex_);
  const std::scoped_lock lock(mutex_);
  if (failure_.ok()) failure_ = absl::AbortedError("the append was aborted");
  pages_.clear();
}

}  // namespace eduba
