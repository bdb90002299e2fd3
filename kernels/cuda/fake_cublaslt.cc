#include "kernels/cuda/fake_cublaslt.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "base/dtype.h"
#include "base/testing/emulated_queue.h"

namespace eduba::cuda {
namespace {

constexpr int kNotSupported = 15;
constexpr int kLanes = 16;

struct Handle {};
struct Description {
  int compute;
  int scale_type;
  int transposed_a = 0;
};
struct Layout {
  int type;
  int64_t rows;
  int64_t columns;
  int64_t leading;
};
struct Preference {
  uint64_t workspace_bytes = ~uint64_t{0};
  uint32_t schemes = 7;
};
// What an algorithm's words say.
enum Word { kId, kSplits, kReduction, kWords };
constexpr uint64_t kTheAlgorithm = 42;

DType DTypeOf(int type) {
  return type == kCublasLtF32 ? DType::kF32 : type == kCublasLtBf16 ? DType::kBf16 : DType::kF16;
}

// The product that the descriptions mean, or false.
bool IsKnown(const Description& description, const Layout& a, const Layout& b, const Layout& d) {
  const bool is_f32 = a.type == kCublasLtF32;
  return description.transposed_a == kCublasLtTransposed && description.scale_type == kCublasLtF32 &&
         description.compute == (is_f32 ? kCublasLtComputeF32Pedantic : kCublasLtComputeF32) &&
         b.type == a.type && d.type == kCublasLtF32 && a.rows == b.rows && a.columns == d.rows &&
         b.columns == d.columns && a.leading >= a.rows && b.leading >= b.rows && d.leading >= d.rows;
}

// Columns as floats, each as long as a multiple of kLanes.
std::vector<float> Floats(const void* from, const Layout& layout, int64_t pitch) {
  std::vector<float> floats(layout.columns * pitch, 0);
  for (int64_t c = 0; c < layout.columns; ++c) {
    for (int64_t i = 0; i < layout.rows; ++i) {
      floats[c * pitch + i] = LoadElement(from, DTypeOf(layout.type), c * layout.leading + i);
    }
  }
  return floats;
}

void Compute(const Layout& a_layout, const void* a, const Layout& b_layout, const void* b,
             const Layout& d_layout, float* d, bool depends_on_place) {
  const int64_t pitch = (a_layout.rows + kLanes - 1) / kLanes * kLanes;
  const std::vector<float> weights = Floats(a, a_layout, pitch);
  const std::vector<float> rows = Floats(b, b_layout, pitch);
  for (int64_t row = 0; row < d_layout.columns; ++row) {
    const float* const x = &rows[row * pitch];
    float* const y = d + row * d_layout.leading;
    // Padding makes up most of what small products have.
    if (std::all_of(x, x + pitch, [](float value) { return value == 0; })) {
      std::fill_n(y, d_layout.rows, 0.0F);
      continue;
    }
    for (int64_t output = 0; output < d_layout.rows; ++output) {
      const float* const w = &weights[output * pitch];
      float lanes[kLanes] = {};
      for (int64_t i = 0; i < pitch; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * w[i + lane];
      }
      if (depends_on_place && row >= d_layout.columns / 2) std::reverse(lanes, lanes + kLanes);
      float sum = 0;
      for (const float lane : lanes) sum += lane;
      y[output] = sum;
    }
  }
}

size_t GetVersion() { return 999900; }
int Create(void** handle) {
  *handle = new Handle();
  return kCublasLtSuccess;
}
int Destroy(void* handle) {
  delete static_cast<Handle*>(handle);
  return kCublasLtSuccess;
}
int DescriptionCreate(void** description, int compute, int scale_type) {
  *description = new Description{compute, scale_type};
  return kCublasLtSuccess;
}
int DescriptionDestroy(void* description) {
  delete static_cast<Description*>(description);
  return kCublasLtSuccess;
}
int DescriptionSet(void* description, int attribute, const void* value, size_t bytes) {
  if (attribute != kCublasLtTransA || bytes != sizeof(int)) return kNotSupported;
  std::memcpy(&static_cast<Description*>(description)->transposed_a, value, bytes);
  return kCublasLtSuccess;
}
int LayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
  *layout = new Layout{type, static_cast<int64_t>(rows), static_cast<int64_t>(columns), leading};
  return kCublasLtSuccess;
}
int LayoutDestroy(void* layout) {
  delete static_cast<Layout*>(layout);
  return kCublasLtSuccess;
}
int PreferenceCreate(void** preference) {
  *preference = new Preference();
  return kCublasLtSuccess;
}
int PreferenceDestroy(void* preference) {
  delete static_cast<Preference*>(preference);
  return kCublasLtSuccess;
}
int PreferenceSet(void* preference, int attribute, const void* value, size_t bytes) {
  auto& of = *static_cast<Preference*>(preference);
  if (attribute == kCublasLtWorkspaceBytesMax && bytes == sizeof(of.workspace_bytes)) {
    std::memcpy(&of.workspace_bytes, value, bytes);
    return kCublasLtSuccess;
  }
  if (attribute == kCublasLtReductionSchemes && bytes == sizeof(of.schemes)) {
    std::memcpy(&of.schemes, value, bytes);
    return kCublasLtSuccess;
  }
  return kNotSupported;
}
int GetHeuristic(void* /*handle*/, void* description, void* a, void* b, void* c, void* d, void* preference,
                 int wanted, CublasLtHeuristic* results, int* found) {
  *found = 0;
  const auto& wants = *static_cast<const Preference*>(preference);
  if (c != d || wants.workspace_bytes != 0 || wants.schemes != 0 ||
      !IsKnown(*static_cast<const Description*>(description), *static_cast<const Layout*>(a),
               *static_cast<const Layout*>(b), *static_cast<const Layout*>(d))) {
    return kNotSupported;
  }
  if (TheFakeCublasLt().has_none) return kNotSupported;
  std::vector<CublasLtHeuristic> all(3);
  all[0].workspace_bytes = 1024;
  all[1].algorithm.data[kSplits] = 4;
  all[1].algorithm.data[kReduction] = 2;
  all[2].algorithm.data[kId] = kTheAlgorithm;
  all[2].algorithm.data[kSplits] = 1;
  *found = std::min<int>(wanted, static_cast<int>(all.size()));
  std::copy_n(all.begin(), *found, results);
  return kCublasLtSuccess;
}
int AlgorithmGet(const CublasLtAlgorithm* algorithm, int attribute, void* value, size_t bytes,
                 size_t* written) {
  if (bytes != sizeof(uint32_t)) return kNotSupported;
  const auto word =
      static_cast<uint32_t>(algorithm->data[attribute == kCublasLtSplits ? kSplits : kReduction]);
  std::memcpy(value, &word, sizeof(word));
  *written = sizeof(word);
  return kCublasLtSuccess;
}
int Multiply(void* /*handle*/, void* description, const void* alpha, const void* a, void* a_layout,
             const void* b, void* b_layout, const void* beta, const void* c, void* /*c_layout*/, void* d,
             void* d_layout, const CublasLtAlgorithm* algorithm, void* /*workspace*/,
             size_t /*workspace_bytes*/, void* stream) {
  FakeCublasLt& fake = TheFakeCublasLt();
  if (fake.result != kCublasLtSuccess) return fake.result;
  const Layout of_a = *static_cast<const Layout*>(a_layout);
  const Layout of_b = *static_cast<const Layout*>(b_layout);
  const Layout of_d = *static_cast<const Layout*>(d_layout);
  EDUBA_CHECK(algorithm->data[kId] == kTheAlgorithm);
  if (*static_cast<const float*>(alpha) != 1 || *static_cast<const float*>(beta) != 0 || c != d ||
      !IsKnown(*static_cast<const Description*>(description), of_a, of_b, of_d)) {
    return kNotSupported;
  }
  ++fake.products;
  const bool depends_on_place = fake.depends_on_place;
  static_cast<EmulatedQueue*>(stream)->Push([=] {
    Compute(of_a, a, of_b, b, of_d, static_cast<float*>(d), depends_on_place);
    return true;
  });
  return kCublasLtSuccess;
}

}  // namespace

void FakeCublasLt::Reset() {
  depends_on_place = false;
  has_none = false;
  result = kCublasLtSuccess;
  products = 0;
}

FakeCublasLt& TheFakeCublasLt() {
  static FakeCublasLt fake;
  return fake;
}

const CublasLtApi& FakeCublasLtApi() {
  static const CublasLtApi api = {
      GetVersion,     Create,       Destroy,       DescriptionCreate, DescriptionDestroy,
      DescriptionSet, LayoutCreate, LayoutDestroy, PreferenceCreate,  PreferenceDestroy,
      PreferenceSet,  GetHeuristic, AlgorithmGet,  Multiply,
  };
  return api;
}

}  // namespace eduba::cuda
