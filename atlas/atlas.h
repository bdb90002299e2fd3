#ifndef EDUBA_ATLAS_ATLAS_H_
#define EDUBA_ATLAS_ATLAS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/dtype.h"

// A cell atlas as attention: a Gaussian kernel regression over every reference cell, exactly.
//
// Reference cell k (an embedding, centred) weighs exp(-||q - k||^2 / (2 sigma^2)) for query cell q. With one
// key per cell
//   key   = [k,            -||k||^2 / 2 in three columns,  1                        ]
//   query = [q / sigma^2,  1 / sigma^2 three times,        -||q||^2 / (2 sigma^2)   ]
// the dot product is that exponent, so the session's scale is 1. The value of a cell is its label, one-hot,
// so an output is the weight of each label. The learned sink is one virtual reference cell without a label at
// distance D of every query, of logit -D^2 / (2 sigma^2): its share of the weight, the `novelty`, is near 1
// where nothing in the atlas is like the query, 1/2 where the atlas holds as much as one cell at distance D.
//
// Digits. k is rounded to the session's dtype first and ||k||^2 is taken of the rounded k, in double; its
// three columns are each exact in bf16 and f16, and hold 24 bits or more together. Likewise ||q||^2 is taken
// of the query as rounded to f32. So the exponent is the distance between the stored cell and the query to
// within f32 arithmetic on terms of up to R^2 / sigma^2, where R is the largest norm of a centred cell: an
// absolute error of about 2^-22 (R / sigma)^2, 3e-5 for the PBMC atlas (R = 36, sigma = 3.2). Centring keeps
// R small.
namespace eduba {

// Columns of a key besides the embedding.
inline constexpr int kAtlasExtraColumns = 4;
// Limits of a session (proto/eduba/v1/eduba.proto: head_dim and value_dim up to 1024).
inline constexpr int64_t kAtlasDimsMax = 1024 - kAtlasExtraColumns;
inline constexpr int64_t kAtlasLabelsMax = 1024;
// Reference cells that sigma and D are chosen from.
inline constexpr int64_t kAtlasSampleMax = 2000;
// The name of the label of reference cells that have none.
inline constexpr char kUnlabelled[] = "(unlabelled)";

// All that a query needs to know of an atlas, besides its cells. Kept with the session, as JSON.
struct Atlas {
  std::string key;                  // Where the embedding is: "obsm/X_pca".
  std::string label_column;         // Where the labels were: "obs/bulk_labels".
  std::vector<std::string> labels;  // [value_dim]
  std::vector<float> centre;        // [dims] Subtracted from every cell, reference and query.
  DType dtype = DType::kBf16;       // The stored keys' type.
  double sigma = 1;                 // Kernel width, in the embedding's units.
  double sink_distance = 1;         // D, in the embedding's units.

  int64_t dims() const { return static_cast<int64_t>(centre.size()); }
  int64_t head_dim() const { return dims() + kAtlasExtraColumns; }
  int64_t value_dim() const { return static_cast<int64_t>(labels.size()); }
  float sink_logit() const;
};

// The labels of an atlas, and one code per reference cell: an index into `names`.
struct AtlasLabels {
  std::vector<std::string> names;
  std::vector<int32_t> codes;
};

// The labels of the chosen reference cells, and nothing else: categories that no chosen cell has are left
// out, so the number of labels is what the values need. Cells without a label carry kUnlabelled.
// kInvalidArgument with more than kAtlasLabelsMax labels.
//   names  of all labels
//   codes  of all cells: an index into `names`, or -1 where a cell has no label
//   rows   of the chosen cells: indices into `codes`
absl::StatusOr<AtlasLabels> ReferenceLabels(absl::Span<const std::string> names,
                                            absl::Span<const int32_t> codes, absl::Span<const int64_t> rows);

// At most kAtlasSampleMax of `count` indices, evenly spaced: the cells FitAtlas should see.
std::vector<int64_t> SampleIndices(int64_t count);

// Chooses what the data decides, from a sample of the reference: always the same for the same sample.
//   centre         the sample's mean.
//   sigma          Of m * 2^(j/4), j = -16 ... 4, with m the median distance from a cell to its nearest
//                  other: the one under which the sample's labels are likeliest when each cell is called from
//                  the others (leave one out; one per cent of the probability is spread evenly, so that one
//                  odd cell does not decide). Where several are equally likely, as with one label, the
//                  nearest to 0.42 m. Never below the largest norm / 1024, where f32 runs out of digits.
//   sink_distance  The 95th percentile of the distances from a cell to its nearest other: about one reference
//                  cell in twenty would get a novelty above 1/2 if only its nearest neighbour counted.
// `cells` is [codes.size(), dims]; `atlas` brings key, label_column, labels and dtype. kInvalidArgument when
// there are fewer than two different cells, or too many dims. A sample of a large atlas is sparser than the
// atlas, so both come out on the wide side.
absl::StatusOr<Atlas> FitAtlas(Atlas atlas, absl::Span<const float> cells, absl::Span<const int32_t> codes);

// cells [n, dims] -> keys [n, head_dim], each value exact in atlas.dtype. kInvalidArgument when a cell does
// not fit the dtype's range (the message counts from `first`).
absl::Status EncodeKeys(const Atlas& atlas, absl::Span<const float> cells, int64_t first,
                        absl::Span<float> keys);
// codes [n] -> values [n, value_dim], one-hot.
void EncodeValues(const Atlas& atlas, absl::Span<const int32_t> codes, absl::Span<float> values);
// cells [n, dims] -> queries [n, head_dim].
void EncodeQueries(const Atlas& atlas, absl::Span<const float> cells, absl::Span<float> queries);

// Root mean square of the distance that rounding to atlas.dtype moves the cells [n, dims], in units of sigma.
// Above a tenth or so a wider dtype gives better answers.
double RoundingInSigmas(const Atlas& atlas, absl::Span<const float> cells);

// The atlas as it is kept in the session's notes, and back. kInvalidArgument when the text is no atlas of
// ours.
std::string AtlasToJson(const Atlas& atlas);
absl::StatusOr<Atlas> AtlasFromJson(const std::string& json);

// What a query's answer says about its cell.
struct CellCall {
  int label = -1;  // The likeliest label, the first of equals; -1 when no cell of the atlas weighs anything.
  double probability = 0;  // Its share of the weight of all reference cells (the sink left out).
  int second = -1;         // The next, or -1 when there is only one label, or no weight.
  double second_probability = 0;
  double novelty = 1;  // The sink's share of all weight, 0 to 1.
};
// `output` [value_dim] and `sink_mass` as the session answers them.
CellCall CallCell(absl::Span<const float> output, float sink_mass);

// The table of calls: CSV with a header line, quoted where needed (RFC 4180), numbers with nine digits so
// that equal text is equal floats. A call of -1 is an empty field.
std::string CallsHeader();
std::string CallsLine(const Atlas& atlas, const std::string& cell, const CellCall& call);

}  // namespace eduba

#endif  // EDUBA_ATLAS_ATLAS_H_
