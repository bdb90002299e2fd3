#ifndef EDUBA_CLIENT_PIECES_H_
#define EDUBA_CLIENT_PIECES_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/dtype.h"
#include "base/elements.h"
#include "base/pages.h"
#include "client/client.h"
#include "eduba/v1/eduba.pb.h"

namespace eduba {

// One upload message: positions [first, first + count) of one layer.
struct Piece {
  int layer = 0;
  int64_t first = 0;
  int64_t count = 0;

  bool operator==(const Piece&) const = default;
};

// Element type in which rows of `source` are sent: the smaller of the source's and the session's, so that
// what the server would round anyway is rounded before it travels. The rounding is the same on both sides.
DType WireType(DType source, const v1::SessionSpec& spec);

// Bytes of one position of one layer as it is sent.
RowBytes WireRowBytes(const v1::SessionSpec& spec, DType wire);

// Positions that fit into one message.
int64_t PieceRows(const v1::SessionSpec& spec, DType wire);

// The pieces of `ranges`, each of at most `piece_rows` positions, for every layer of the session.
std::vector<Piece> CutIntoPieces(const std::vector<PositionRange>& ranges, int layers, int64_t piece_rows);

// For each worker of the plan, what it must be sent: the extents it owns and the part of the append that is
// replicated. INTERNAL when the extents do not tile the append.
absl::StatusOr<std::vector<std::vector<PositionRange>>> RangesByWorker(const v1::AppendPlan& plan);

// Fills upload messages. Not thread-safe: one for each stream.
class PieceReader {
 public:
  // `at`: position of the source's first row. All must outlive the reader.
  PieceReader(const v1::SessionSpec& spec, const RowSource& source, int64_t at);

  // Reads `piece` into `request`, whose memory is used again. Leaves append_id alone.
  absl::Status Read(const Piece& piece, v1::UploadRequest* request);

 private:
  const v1::SessionSpec& spec_;
  const RowSource& source_;
  const int64_t at_;
  const DType wire_;
  std::vector<float> keys_;  // Rows before they are rounded.
  std::vector<float> values_;
};

}  // namespace eduba

#endif  // EDUBA_CLIENT_PIECES_H_
