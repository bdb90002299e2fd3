#include "client/pieces.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "rpc/limits.h"
#include "rpc/spec.h"

namespace eduba {

DType WireType(DType source, const v1::SessionSpec& spec) {
  if (source != DType::kF32) return source;
  switch (spec.dtype()) {
    case v1::DTYPE_BF16:
      return DType::kBf16;
    case v1::DTYPE_F16:
      return DType::kF16;
    default:
      return DType::kF32;
  }
}

RowBytes WireRowBytes(const v1::SessionSpec& spec, DType wire) {
  return RowBytesOf(wire, spec.kv_heads(), spec.head_dim(), spec.value_dim());
}

int64_t PieceRows(const v1::SessionSpec& spec, DType wire) {
  return std::max<int64_t>(1, kPayloadBytesMax / WireRowBytes(spec, wire).total());
}

std::vector<Piece> CutIntoPieces(const std::vector<PositionRange>& ranges, int layers, int64_t piece_rows) {
  std::vector<Piece> pieces;
  for (int layer = 0; layer < layers; ++layer) {
    for (const PositionRange& range : ranges) {
      for (int64_t first = range.begin; first < range.end; first += piece_rows) {
        pieces.push_back({layer, first, std::min(piece_rows, range.end - first)});
      }
    }
  }
  return pieces;
}

absl::StatusOr<std::vector<std::vector<PositionRange>>> RangesByWorker(const v1::AppendPlan& plan) {
  const PositionRange replicated = {plan.at(), std::min(plan.replicate_below(), plan.at() + plan.count())};
  std::vector<std::vector<PositionRange>> ranges(plan.workers_size());
  int64_t next = plan.at();
  for (const v1::Extent& extent : plan.extents()) {
    if (extent.first_position() != next || extent.count() < 1 || extent.worker() < 0 ||
        extent.worker() >= plan.workers_size()) {
      return absl::InternalError(absl::StrCat("the server's plan is not usable at position ", next,
                                              ": its extents do not tile the append"));
    }
    next += extent.count();
    const PositionRange own = {extent.first_position(), next};
    for (int worker = 0; worker < plan.workers_size(); ++worker) {
      const PositionRange part = worker == extent.worker() ? own : own.Intersect(replicated);
      if (!part.empty()) ranges[worker].push_back(part);
    }
  }
  if (next != plan.at() + plan.count()) {
    return absl::InternalError(absl::StrCat("the server's plan ends at position ", next, ", the append at ",
                                            plan.at() + plan.count()));
  }
  return ranges;
}

PieceReader::PieceReader(const v1::SessionSpec& spec, const RowSource& source, int64_t at)
    : spec_(spec), source_(source), at_(at), wire_(WireType(source.dtype(), spec)) {}

absl::Status PieceReader::Read(const Piece& piece, v1::UploadRequest* request) {
  request->set_layer(piece.layer);
  request->set_first_position(piece.first);
  request->set_count(static_cast<int32_t>(piece.count));
  request->set_dtype(DTypeToProto(wire_));
  const RowBytes row_bytes = WireRowBytes(spec_, wire_);
  request->mutable_keys()->resize(piece.count * row_bytes.keys);
  request->mutable_values()->resize(piece.count * row_bytes.values);
  if (source_.dtype() == wire_) {
    return source_.Read(piece.layer, piece.first - at_, piece.count, request->mutable_keys()->data(),
                        request->mutable_values()->data());
  }
  const int64_t keys = piece.count * spec_.kv_heads() * spec_.head_dim();
  const int64_t values = piece.count * spec_.kv_heads() * spec_.value_dim();
  keys_.resize(keys);
  values_.resize(values);
  EDUBA_RETURN_IF_ERROR(
      source_.Read(piece.layer, piece.first - at_, piece.count, keys_.data(), values_.data()));
  ConvertElements(keys_.data(), DType::kF32, request->mutable_keys()->data(), wire_, keys);
  ConvertElements(values_.data(), DType::kF32, request->mutable_values()->data(), wire_, values);
  return absl::OkStatus();
}

}  // namespace eduba
