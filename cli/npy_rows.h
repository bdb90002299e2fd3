#ifndef EDUBA_CLI_NPY_ROWS_H_
#define EDUBA_CLI_NPY_ROWS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/client.h"
#include "eduba/v1/eduba.pb.h"
#include "ingest/npy.h"

namespace eduba {

// Keys and values in two .npy files, f32 or f16, [tokens, kv_heads, dim], with a leading layer axis when the
// session has more than one layer. Read as they are asked for. A two-dimensional array is refused even with
// one KV head: one spelling of each shape.
class NpyRows : public RowSource {
 public:
  // INVALID_ARGUMENT when the files do not fit the session or each other.
  static absl::StatusOr<std::unique_ptr<NpyRows>> Open(const std::string& keys, const std::string& values,
                                                       const v1::SessionSpec& spec);

  int64_t tokens() const { return tokens_; }
  // f16 when both files are, else f32.
  DType dtype() const override { return dtype_; }
  absl::Status Read(int layer, int64_t first, int64_t count, void* keys, void* values) const override;

 private:
  NpyRows(std::unique_ptr<NpyFile> keys, std::unique_ptr<NpyFile> values, const v1::SessionSpec& spec);

  std::unique_ptr<NpyFile> keys_;
  std::unique_ptr<NpyFile> values_;
  int64_t tokens_;
  int64_t key_elements_;  // The elements of one row's key.
  int64_t value_elements_;
  DType dtype_;
};

}  // namespace eduba

#endif  // EDUBA_CLI_NPY_ROWS_H_
