#include "atlas/atlas.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "base/check.h"
#include "nlohmann/json.hpp"

namespace eduba {
namespace {

// The grid of sigma: m * 2^(j/4).
constexpr int kGridFirst = -16;
constexpr int kGridLast = 4;
constexpr int kGridDefault = -5;  // 0.42 m: best on the PBMC atlas.
// The part of the probability that is spread evenly over the labels when a width is judged.
constexpr double kSpread = 0.01;
constexpr double kSinkQuantile = 0.95;
// sigma may be this much smaller than the largest norm.
constexpr double kNormOverSigmaMax = 1024;

constexpr char kFormat[] = "eduba-atlas";
constexpr int kVersion = 1;

float Rounded(DType dtype, float value) {
  alignas(float) uint8_t stored[sizeof(float)];
  StoreElement(stored, dtype, 0, value);
  return LoadElement(stored, dtype, 0);
}

// The cell as stored: centred, rounded to the dtype.
void StoredCell(const Atlas& atlas, const float* cell, float* out) {
  for (size_t i = 0; i < atlas.centre.size(); ++i) {
    out[i] = Rounded(atlas.dtype, static_cast<float>(double{cell[i]} - double{atlas.centre[i]}));
  }
}

double SquaredNorm(const float* vector, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += double{vector[i]} * double{vector[i]};
  return sum;
}

double SquaredDistance(const float* a, const float* b, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double difference = double{a[i]} - double{b[i]};
    sum += difference * difference;
  }
  return sum;
}

// The value below which a share `q` of `values` lies. REQUIRES: values is not empty.
double Quantile(std::vector<double> values, double q) {
  const auto rank = static_cast<size_t>(q * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(rank), values.end());
  return values[rank];
}

// Mean over cells of log P(own label | the other cells) for kernel width `sigma`.
double LeaveOneOutLikelihood(const std::vector<double>& squared, const std::vector<double>& nearest,
                             absl::Span<const int32_t> codes, int64_t labels, double sigma) {
  const size_t cells = codes.size();
  double sum = 0;
  for (size_t i = 0; i < cells; ++i) {
    double own = 0;
    double all = 0;
    for (size_t j = 0; j < cells; ++j) {
      if (j == i) continue;
      // Against the nearest cell's weight, so that there is always one that counts.
      const double weight = std::exp((nearest[i] - squared[i * cells + j]) / (2 * sigma * sigma));
      all += weight;
      if (codes[j] == codes[i]) own += weight;
    }
    sum += std::log((1 - kSpread) * own / all + kSpread / static_cast<double>(labels));
  }
  return sum / static_cast<double>(cells);
}

// Whether queries and the sink's logit can be written in f32.
bool HasUsableNumbers(const Atlas& atlas) {
  const auto precision = static_cast<float>(1 / (atlas.sigma * atlas.sigma));
  return atlas.sigma > 0 && std::isnormal(precision) && atlas.sink_distance >= 0 &&
         std::isfinite(atlas.sink_logit());
}

std::string CsvField(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  return absl::StrCat("\"", absl::StrReplaceAll(text, {{"\"", "\"\""}}), "\"");
}

}  // namespace

float Atlas::sink_logit() const {
  return static_cast<float>(-sink_distance * sink_distance / (2 * sigma * sigma));
}

absl::StatusOr<AtlasLabels> ReferenceLabels(absl::Span<const std::string> given,
                                            absl::Span<const int32_t> codes, absl::Span<const int64_t> rows) {
  // The missing label, if it occurs, comes after all others, unless the file has a label of its name.
  std::vector<std::string> names(given.begin(), given.end());
  const auto found = std::find(names.begin(), names.end(), kUnlabelled);
  const auto unlabelled = static_cast<int32_t>(found - names.begin());
  if (found == names.end()) names.emplace_back(kUnlabelled);

  std::vector<int32_t> chosen;
  chosen.reserve(rows.size());
  const auto is_missing = [&](int64_t row) { return codes[static_cast<size_t>(row)] < 0; };
  if (!rows.empty() && std::all_of(rows.begin(), rows.end(), is_missing)) {
    return absl::InvalidArgumentError(
        absl::StrCat("found no label on any of the ", rows.size(),
                     " cells, wanted some; choose another label column or other rows"));
  }
  std::vector<bool> used(names.size(), false);
  for (const int64_t row : rows) {
    const int32_t code = codes[static_cast<size_t>(row)];
    chosen.push_back(code < 0 ? unlabelled : code);
    used[static_cast<size_t>(chosen.back())] = true;
  }
  AtlasLabels out;
  std::vector<int32_t> compact(names.size(), 0);
  for (size_t i = 0; i < names.size(); ++i) {
    if (!used[i]) continue;
    compact[i] = static_cast<int32_t>(out.names.size());
    out.names.push_back(names[i]);
  }
  if (static_cast<int64_t>(out.names.size()) > kAtlasLabelsMax) {
    return absl::InvalidArgumentError(absl::StrCat("found ", out.names.size(),
                                                   " different labels, wanted at most ", kAtlasLabelsMax,
                                                   "; choose a coarser label column"));
  }
  out.codes.reserve(chosen.size());
  for (const int32_t code : chosen) out.codes.push_back(compact[static_cast<size_t>(code)]);
  return out;
}

std::vector<int64_t> SampleIndices(int64_t count) {
  const int64_t size = std::min(count, kAtlasSampleMax);
  std::vector<int64_t> out(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) out[static_cast<size_t>(i)] = i * count / size;
  return out;
}

absl::StatusOr<Atlas> FitAtlas(Atlas atlas, absl::Span<const float> cells, absl::Span<const int32_t> codes) {
  const size_t count = codes.size();
  if (count < 2) {
    return absl::InvalidArgumentError(absl::StrCat("found ", count, " reference cells, wanted 2 or more"));
  }
  EDUBA_CHECK_EQ(cells.size() % count, 0u);
  const auto dims = static_cast<int64_t>(cells.size() / count);
  if (dims < 1 || dims > kAtlasDimsMax) {
    return absl::InvalidArgumentError(absl::StrCat("found cells of ", dims, " numbers, wanted 1 to ",
                                                   kAtlasDimsMax, "; use an embedding such as obsm/X_pca"));
  }

  std::vector<double> mean(static_cast<size_t>(dims), 0);
  for (size_t i = 0; i < cells.size(); ++i) mean[i % static_cast<size_t>(dims)] += double{cells[i]};
  atlas.centre.clear();
  for (const double sum : mean) atlas.centre.push_back(static_cast<float>(sum / static_cast<double>(count)));

  std::vector<float> stored(cells.size());
  double norm = 0;
  for (size_t i = 0; i < count; ++i) {
    float* cell = &stored[i * static_cast<size_t>(dims)];
    StoredCell(atlas, &cells[i * static_cast<size_t>(dims)], cell);
    norm = std::max(norm, std::sqrt(SquaredNorm(cell, dims)));
  }
  std::vector<double> squared(count * count, 0);
  std::vector<double> nearest(count, std::numeric_limits<double>::infinity());
  for (size_t i = 0; i < count; ++i) {
    for (size_t j = 0; j < i; ++j) {
      const double distance = SquaredDistance(&stored[i * static_cast<size_t>(dims)],
                                              &stored[j * static_cast<size_t>(dims)], dims);
      squared[i * count + j] = squared[j * count + i] = distance;
      nearest[i] = std::min(nearest[i], distance);
      nearest[j] = std::min(nearest[j], distance);
    }
  }
  // Cells that are there twice say nothing about distances.
  std::vector<double> distances;
  for (const double distance : nearest) {
    if (distance > 0) distances.push_back(std::sqrt(distance));
  }
  if (distances.empty()) {
    const double widest = std::sqrt(*std::max_element(squared.begin(), squared.end()));
    if (widest == 0) {
      return absl::InvalidArgumentError(
          "found reference cells that are all the same, wanted 2 different ones");
    }
    distances.push_back(widest);
  }
  if (!std::isfinite(norm) || !std::isfinite(distances.back())) {
    return absl::InvalidArgumentError(
        "found cells too large for the session's dtype; use --dtype f32 or scale the embedding");
  }

  const double median = Quantile(distances, 0.5);
  const auto labels = static_cast<int64_t>(atlas.labels.size());
  int best = kGridDefault;
  const auto width = [&](int j) { return median * std::exp2(j / 4.0); };
  double best_likelihood = LeaveOneOutLikelihood(squared, nearest, codes, labels, width(best));
  for (int j = kGridFirst; j <= kGridLast; ++j) {
    const double likelihood = LeaveOneOutLikelihood(squared, nearest, codes, labels, width(j));
    if (likelihood > best_likelihood + 1e-9) {
      best = j;
      best_likelihood = likelihood;
    }
  }
  atlas.sigma = std::max(width(best), norm / kNormOverSigmaMax);
  atlas.sink_distance = Quantile(distances, kSinkQuantile);
  if (!HasUsableNumbers(atlas)) {
    return absl::InvalidArgumentError(absl::StrCat("found cells about ", median,
                                                   " from their neighbours, beyond what f32 can "
                                                   "weigh; scale the embedding"));
  }
  return atlas;
}

absl::Status EncodeKeys(const Atlas& atlas, absl::Span<const float> cells, int64_t first,
                        absl::Span<float> keys) {
  const int64_t dims = atlas.dims();
  const auto count = static_cast<int64_t>(cells.size()) / dims;
  EDUBA_CHECK_EQ(static_cast<int64_t>(cells.size()), count * dims);
  EDUBA_CHECK_EQ(static_cast<int64_t>(keys.size()), count * atlas.head_dim());
  for (int64_t i = 0; i < count; ++i) {
    float* key = &keys[static_cast<size_t>(i * atlas.head_dim())];
    StoredCell(atlas, &cells[static_cast<size_t>(i * dims)], key);
    // What rounding leaves of the squared norm goes into the next column; three columns of bf16 leave 2^-27
    // of it.
    double rest = -SquaredNorm(key, dims) / 2;
    for (int64_t column = dims; column < dims + 3; ++column) {
      key[column] = Rounded(atlas.dtype, static_cast<float>(rest));
      rest -= double{key[column]};
    }
    key[dims + 3] = 1;
    if (!std::isfinite(rest)) {
      return absl::InvalidArgumentError(absl::StrCat("cell ", first + i, " is too large for ",
                                                     DTypeName(atlas.dtype),
                                                     "; use --dtype f32 or scale the embedding"));
    }
  }
  return absl::OkStatus();
}

void EncodeValues(const Atlas& atlas, absl::Span<const int32_t> codes, absl::Span<float> values) {
  EDUBA_CHECK_EQ(static_cast<int64_t>(values.size()), static_cast<int64_t>(codes.size()) * atlas.value_dim());
  std::fill(values.begin(), values.end(), 0.0f);
  for (size_t i = 0; i < codes.size(); ++i) {
    EDUBA_CHECK(codes[i] >= 0 && codes[i] < atlas.value_dim());
    values[i * static_cast<size_t>(atlas.value_dim()) + static_cast<size_t>(codes[i])] = 1;
  }
}

void EncodeQueries(const Atlas& atlas, absl::Span<const float> cells, absl::Span<float> queries) {
  const int64_t dims = atlas.dims();
  const auto count = static_cast<int64_t>(cells.size()) / dims;
  EDUBA_CHECK_EQ(static_cast<int64_t>(queries.size()), count * atlas.head_dim());
  const auto precision = static_cast<float>(1 / (atlas.sigma * atlas.sigma));
  for (int64_t i = 0; i < count; ++i) {
    const float* cell = &cells[static_cast<size_t>(i * dims)];
    float* query = &queries[static_cast<size_t>(i * atlas.head_dim())];
    for (int64_t c = 0; c < dims; ++c) {
      query[c] = static_cast<float>(double{precision} *
                                    (double{cell[c]} - double{atlas.centre[static_cast<size_t>(c)]}));
    }
    std::fill(query + dims, query + dims + 3, precision);
    query[dims + 3] = static_cast<float>(-SquaredNorm(query, dims) / (2 * double{precision}));
  }
}

double RoundingInSigmas(const Atlas& atlas, absl::Span<const float> cells) {
  const int64_t dims = atlas.dims();
  const auto count = static_cast<int64_t>(cells.size()) / dims;
  std::vector<float> stored(static_cast<size_t>(dims));
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float* cell = &cells[static_cast<size_t>(i * dims)];
    StoredCell(atlas, cell, stored.data());
    for (size_t c = 0; c < stored.size(); ++c) {
      const double moved = double{cell[c]} - double{atlas.centre[c]} - double{stored[c]};
      sum += moved * moved;
    }
  }
  return count == 0 ? 0 : std::sqrt(sum / static_cast<double>(count)) / atlas.sigma;
}

std::string AtlasToJson(const Atlas& atlas) {
  const nlohmann::json json = {{"format", kFormat},
                               {"version", kVersion},
                               {"key", atlas.key},
                               {"label_column", atlas.label_column},
                               {"labels", atlas.labels},
                               {"centre", atlas.centre},
                               {"dtype", DTypeName(atlas.dtype)},
                               {"sigma", atlas.sigma},
                               {"sink_distance", atlas.sink_distance}};
  // Labels that are no UTF-8 come out with a replacement character: they are for reading, their index is what
  // counts.
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

absl::StatusOr<Atlas> AtlasFromJson(const std::string& text) {
  const auto broken = [](const std::string& what) {
    return absl::InvalidArgumentError(absl::StrCat("found session notes without ", what,
                                                   ", wanted an atlas; load it with `eduba atlas load`"));
  };
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("format") || json["format"] != kFormat) {
    return broken("the mark of an atlas");
  }
  if (!json.contains("version") || json["version"] != kVersion) {
    return broken(absl::StrCat("version ", kVersion));
  }
  for (const char* name : {"key", "label_column", "dtype"}) {
    if (!json.contains(name) || !json[name].is_string()) return broken(name);
  }
  for (const char* name : {"sigma", "sink_distance"}) {
    if (!json.contains(name) || !json[name].is_number()) return broken(name);
  }
  for (const char* name : {"labels", "centre"}) {
    if (!json.contains(name) || !json[name].is_array()) return broken(name);
  }
  Atlas atlas;
  atlas.key = json["key"];
  atlas.label_column = json["label_column"];
  for (const nlohmann::json& label : json["labels"]) {
    if (!label.is_string()) return broken("labels");
    atlas.labels.push_back(label);
  }
  for (const nlohmann::json& number : json["centre"]) {
    if (!number.is_number() || !(std::abs(number.get<double>()) <= std::numeric_limits<float>::max())) {
      return broken("centre");
    }
    atlas.centre.push_back(number);
  }
  const auto dtype = ParseDType(json["dtype"]);
  if (!dtype.ok()) return broken("dtype");
  atlas.dtype = *dtype;
  atlas.sigma = json["sigma"];
  atlas.sink_distance = json["sink_distance"];
  const bool in_range = HasUsableNumbers(atlas) && atlas.dims() >= 1 && atlas.dims() <= kAtlasDimsMax &&
                        atlas.value_dim() >= 1 && atlas.value_dim() <= kAtlasLabelsMax;
  if (!in_range) return broken("numbers in their range");
  return atlas;
}

CellCall CallCell(absl::Span<const float> output, float sink_mass) {
  CellCall call;
  call.novelty = double{sink_mass};
  double sum = 0;
  for (const float weight : output) sum += double{weight};
  if (sum <= 0) return call;
  for (int i = 0; i < static_cast<int>(output.size()); ++i) {
    const double probability = double{output[static_cast<size_t>(i)]} / sum;
    if (call.label < 0 || probability > call.probability) {
      call.second = std::exchange(call.label, i);
      call.second_probability = std::exchange(call.probability, probability);
    } else if (call.second < 0 || probability > call.second_probability) {
      call.second = i;
      call.second_probability = probability;
    }
  }
  return call;
}

std::string CallsHeader() { return "cell,label,probability,second_label,second_probability,novelty\n"; }

std::string CallsLine(const Atlas& atlas, const std::string& cell, const CellCall& call) {
  const auto name = [&](int label) {
    return label < 0 ? "" : CsvField(atlas.labels[static_cast<size_t>(label)]);
  };
  return absl::StrFormat("%s,%s,%.9g,%s,%.9g,%.9g\n", CsvField(cell), name(call.label), call.probability,
                         name(call.second), call.second_probability, call.novelty);
}

}  // namespace eduba
