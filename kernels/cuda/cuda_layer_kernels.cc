#include "kernels/cuda/cuda_layer_kernels.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/fixed_numbers.h"

namespace eduba {
namespace {

using cuda::CublasLtAlgorithm;
using cuda::CublasLtApi;
using cuda::CublasLtHeuristic;
using cuda::Device;
using cuda::Element;
using cuda::Memory;
using cuda::Stream;

// Rows of one product: where its arithmetic takes about as long as reading its weights, so that one row costs
// what reading costs and many rows read the weights seldom.
constexpr int kProductRows16 = 128;
constexpr int kProductRowsF32 = 32;
// A matrix's rows in memory begin at multiples of so many elements: cuBLASLt's fast kernels want 16 bytes.
constexpr int64_t kPitch = 16;
// The bytes of weights that go to the device at a time.
constexpr int64_t kStagedBytes = int64_t{32} << 20;
constexpr int kAlgorithmsAsked = 16;

int64_t PitchOf(int64_t count) { return (count + kPitch - 1) / kPitch * kPitch; }

class CudaMemory final : public LayerMemory {
 public:
  CudaMemory(std::shared_ptr<Device> device, void* data, void* host)
      : LayerMemory(data, host), device_(std::move(device)) {}
  ~CudaMemory() override {
    device_->Attach().IgnoreError();
    device_->FreeDevice(data());
    if (host() != nullptr) device_->FreeHost(host());
  }

 private:
  const std::shared_ptr<Device> device_;
};

// What describes a product to cuBLASLt: columns of its weights and of its rows, columns of results.
class Shape {
 public:
  explicit Shape(const CublasLtApi& api) : api_(api) {}
  ~Shape() {
    for (void* const layout : {weights, rows, results}) {
      if (layout != nullptr) api_.layout_destroy(layout);
    }
    if (description != nullptr) api_.description_destroy(description);
  }
  Shape(const Shape&) = delete;
  Shape& operator=(const Shape&) = delete;

  bool Init(DType dtype, int64_t outputs, int64_t inputs, int64_t product_rows) {
    const int type = dtype == DType::kF32    ? cuda::kCublasLtF32
                     : dtype == DType::kBf16 ? cuda::kCublasLtBf16
                                             : cuda::kCublasLtF16;
    const int compute = dtype == DType::kF32 ? cuda::kCublasLtComputeF32Pedantic : cuda::kCublasLtComputeF32;
    const int transposed = cuda::kCublasLtTransposed;
    return Worked(api_.description_create(&description, compute, cuda::kCublasLtF32)) &&
           Worked(
               api_.description_set(description, cuda::kCublasLtTransA, &transposed, sizeof(transposed))) &&
           Worked(api_.layout_create(&weights, type, inputs, outputs, inputs)) &&
           Worked(api_.layout_create(&rows, type, inputs, product_rows, inputs)) &&
           Worked(api_.layout_create(&results, cuda::kCublasLtF32, outputs, product_rows, outputs));
  }
  static bool Worked(int result) { return result == cuda::kCublasLtSuccess; }

  void* description = nullptr;
  void* weights = nullptr;
  void* rows = nullptr;
  void* results = nullptr;

 private:
  const CublasLtApi& api_;
};

class CudaMatrix final : public PackedMatrix {
 public:
  CudaMatrix(const CublasLtApi& api, Device& device, DType dtype, Activations activations, int64_t outputs,
             int64_t inputs)
      : PackedMatrix(outputs, inputs,
                     std::max<int64_t>(PitchOf(outputs) * PitchOf(inputs), 1) *
                         static_cast<int64_t>(DTypeBytes(dtype))),
        dtype_(dtype),
        device_(device),
        terms_(dtype == DType::kF32 || (dtype == DType::kBf16 && activations == Activations::kBf16) ? 1 : 3),
        memory_(device, Memory::Kind::kDevice),
        shape_(api) {}

  ~CudaMatrix() override { device_.Attach().IgnoreError(); }

  DType dtype() const { return dtype_; }
  int terms() const { return terms_; }
  int product_rows() const { return dtype_ == DType::kF32 ? kProductRowsF32 : kProductRows16; }
  // Rows of activations that go through one product.
  int block_rows() const { return product_rows() / terms_; }
  int64_t input_pitch() const { return PitchOf(inputs()); }
  int64_t output_pitch() const { return PitchOf(outputs()); }
  int64_t element() const { return static_cast<int64_t>(DTypeBytes(dtype_)); }
  int64_t operand_bytes() const { return product_rows() * input_pitch() * element(); }
  int64_t result_bytes() const {
    return product_rows() * output_pitch() * static_cast<int64_t>(sizeof(float));
  }

  Memory& memory() { return memory_; }
  const Memory& memory() const { return memory_; }
  Shape& shape() { return shape_; }
  const Shape& shape() const { return shape_; }
  const CublasLtAlgorithm& algorithm() const { return algorithm_; }
  void set_algorithm(const CublasLtAlgorithm& algorithm) { algorithm_ = algorithm; }

 private:
  const DType dtype_;
  Device& device_;
  const int terms_;
  Memory memory_;  // [output_pitch, input_pitch]
  Shape shape_;
  CublasLtAlgorithm algorithm_ = {};
};

class CudaLayerKernels final : public LayerKernels {
 public:
  CudaLayerKernels(std::shared_ptr<Device> device, const CublasLtApi& api, Activations activations)
      : device_(std::move(device)),
        api_(api),
        activations_(activations),
        staged_(*device_, Memory::Kind::kHost),
        operand_(*device_, Memory::Kind::kDevice),
        result_(*device_, Memory::Kind::kDevice),
        scale_(*device_, Memory::Kind::kDevice) {}

  ~CudaLayerKernels() override {
    device_->Attach().IgnoreError();
    if (stream_ != nullptr) device_->DestroyStream(stream_);
    if (preference_ != nullptr) api_.preference_destroy(preference_);
    if (handle_ != nullptr) api_.destroy(handle_);
  }

  absl::Status Init() {
    EDUBA_RETURN_IF_ERROR(device_->Attach());
    EDUBA_ASSIGN_OR_RETURN(stream_, device_->CreateStream());
    EDUBA_RETURN_IF_ERROR(scale_.ReserveExactly(kProductRows16 * static_cast<int64_t>(sizeof(float))));
    // No workspace, and no sums of parts: whoever begins an output ends it.
    const uint64_t workspace = 0;
    const uint32_t schemes = 0;
    if (!Shape::Worked(api_.create(&handle_)) || !Shape::Worked(api_.preference_create(&preference_)) ||
        !Shape::Worked(api_.preference_set(preference_, cuda::kCublasLtWorkspaceBytesMax, &workspace,
                                           sizeof(workspace))) ||
        !Shape::Worked(
            api_.preference_set(preference_, cuda::kCublasLtReductionSchemes, &schemes, sizeof(schemes)))) {
      return absl::FailedPreconditionError(absl::StrCat("cuBLASLt ", api_.get_version(),
                                                        " does not start on ", device_->name(),
                                                        "; update the driver, or use --device cpu"));
    }
    return absl::OkStatus();
  }

  std::string name() const override {
    return absl::StrCat(device_->kind(), activations_ == Activations::kBf16 ? "/bf16" : "");
  }
  std::string library() const override {
    return absl::StrCat("cuBLASLt ", api_.get_version(), " on ", device_->model());
  }

  absl::StatusOr<std::unique_ptr<LayerMemory>> Allocate(int64_t bytes, bool is_shared) override {
    EDUBA_RETURN_IF_ERROR(device_->Attach());
    EDUBA_ASSIGN_OR_RETURN(void* const data, device_->AllocateDevice(bytes));
    void* host = nullptr;
    if (is_shared) {
      absl::StatusOr<void*> allocated = device_->AllocateHost(bytes);
      if (!allocated.ok()) {
        device_->FreeDevice(data);
        return allocated.status();
      }
      host = *allocated;
    }
    return std::make_unique<CudaMemory>(device_, data, host);
  }
  void Send(const LayerMemory& memory, int64_t offset, int64_t bytes) override {
    Queue([&] {
      return device_->CopyIn(stream_, static_cast<char*>(memory.data()) + offset,
                             static_cast<const char*>(memory.host()) + offset, bytes);
    });
  }
  void Fetch(const LayerMemory& memory, int64_t offset, int64_t bytes) override {
    Queue([&] {
      return device_->CopyOut(stream_, static_cast<char*>(memory.host()) + offset,
                              static_cast<const char*>(memory.data()) + offset, bytes);
    });
  }
  absl::Status Wait() override {
    Queue([&] { return device_->Synchronize(stream_); });
    if (status_.ok() || !device_->health().ok()) return status_;
    // There was no memory for one of the operations, so those after it were left out. The next one may find
    // some.
    absl::Status status = device_->Synchronize(stream_);
    status_.Update(status);
    return std::exchange(status_, status);
  }

  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(absl::Span<const MatrixView> parts) override {
    EDUBA_CHECK(!parts.empty());
    EDUBA_RETURN_IF_ERROR(device_->Attach());
    int64_t outputs = 0;
    for (const MatrixView& part : parts) {
      EDUBA_CHECK_EQ(part.inputs, parts[0].inputs);
      EDUBA_CHECK(part.dtype == parts[0].dtype && part.outputs >= 0);
      outputs += part.outputs;
    }
    auto matrix =
        std::make_unique<CudaMatrix>(api_, *device_, parts[0].dtype, activations_, outputs, parts[0].inputs);
    if (outputs == 0) return matrix;
    EDUBA_RETURN_IF_ERROR(matrix->memory().ReserveExactly(matrix->bytes()));
    if (matrix->operand_bytes() > operand_.bytes()) {
      EDUBA_RETURN_IF_ERROR(operand_.ReserveExactly(matrix->operand_bytes()));
    }
    if (matrix->result_bytes() > result_.bytes()) {
      EDUBA_RETURN_IF_ERROR(result_.ReserveExactly(matrix->result_bytes()));
    }
    EDUBA_RETURN_IF_ERROR(SendWeights(parts, *matrix));
    EDUBA_RETURN_IF_ERROR(ChooseAlgorithm(*matrix));
    return matrix;
  }

  // Block by block, each a product of the matrix's one shape, by its one algorithm.
  void Multiply(const MatmulArgs& args) override {
    const auto& matrix = static_cast<const CudaMatrix&>(*args.weights);
    if (matrix.outputs() == 0) return;
    for (int64_t row = 0; row < args.rows; row += matrix.block_rows()) {
      const auto rows = static_cast<int>(std::min<int64_t>(matrix.block_rows(), args.rows - row));
      MultiplyBlock(matrix, args.x + row * matrix.inputs(), matrix.inputs(), rows);
      cuda::JoinArgs join = {};
      join.terms = matrix.terms();
      join.rows = rows;
      join.block_rows = matrix.block_rows();
      join.outputs = matrix.outputs();
      join.pitch = matrix.output_pitch();
      join.product = Floats(result_);
      join.scale = matrix.dtype() == DType::kF16 ? Floats(scale_) : nullptr;
      join.bias = args.bias;
      join.y = args.y + row * matrix.outputs();
      Layer(join);
    }
  }
  void Normalise(const NormArgs& args) override { Layer(args); }
  void Rotate(const RopeArgs& args) override {
    EDUBA_CHECK(args.rotary_dim % 2 == 0 && args.rotary_dim <= args.dim);
    Layer(args);
  }
  void Activate(const ActivationArgs& args) override { Layer(args); }
  void Softcap(const SoftcapArgs& args) override { Layer(args); }
  void Add(const AddArgs& args) override { Layer(args); }
  void FlagNonFinite(const NonFiniteArgs& args) override {
    Queue([&] { return device_->Zero(stream_, args.found, sizeof(float)); });
    Layer(args);
  }

 private:
  static float* Floats(const Memory& memory) { return reinterpret_cast<float*>(memory.data()); }

  // What fails is said by Wait, and ends all work until then.
  template <class Work>
  void Queue(const Work& work) {
    if (status_.ok()) status_ = device_->Attach();
    if (status_.ok()) status_ = work();
  }
  void Layer(const cuda::LayerOperation& operation) {
    Queue([&] { return device_->Layer(stream_, operation); });
  }

  // Rows of x to results, by `matrix`'s algorithm.
  void MultiplyBlock(const CudaMatrix& matrix, const float* x, int64_t x_stride, int rows) {
    const bool is_scaled = matrix.dtype() == DType::kF16;
    if (is_scaled) Layer(cuda::ScaleArgs{rows, matrix.inputs(), x, x_stride, Floats(scale_)});
    cuda::SplitArgs split = {};
    split.element = static_cast<Element>(matrix.dtype());
    split.terms = matrix.terms();
    split.rows = rows;
    split.block_rows = matrix.block_rows();
    split.matrix_rows = matrix.product_rows();
    split.inputs = matrix.inputs();
    split.pitch = matrix.input_pitch();
    split.x = x;
    split.x_stride = x_stride;
    split.scale = is_scaled ? Floats(scale_) : nullptr;
    split.to = operand_.data();
    Layer(split);
    Queue([&] {
      const float one = 1;
      const float zero = 0;
      const Shape& shape = matrix.shape();
      const int result =
          api_.multiply(handle_, shape.description, &one, matrix.memory().data(), shape.weights,
                        operand_.data(), shape.rows, &zero, result_.data(), shape.results, result_.data(),
                        shape.results, &matrix.algorithm(), nullptr, 0, stream_);
      if (Shape::Worked(result)) return absl::OkStatus();
      return device_->Fail(absl::StrCat("cuBLASLt answers ", result, " to a product"));
    });
  }

  // Through page-locked memory, as many rows at a time as fit; what pads them is zeros.
  absl::Status SendWeights(absl::Span<const MatrixView> parts, CudaMatrix& matrix) {
    const int64_t pitch = matrix.input_pitch() * matrix.element();
    const int64_t row_bytes = matrix.inputs() * matrix.element();
    const int64_t rows_max = std::max<int64_t>(1, kStagedBytes / pitch);
    EDUBA_RETURN_IF_ERROR(staged_.Reserve(pitch));
    if (staged_.bytes() < rows_max * pitch) EDUBA_RETURN_IF_ERROR(staged_.ReserveExactly(rows_max * pitch));
    EDUBA_RETURN_IF_ERROR(device_->Zero(stream_, matrix.memory().data(), matrix.bytes()));
    char* to = matrix.memory().data();
    for (const MatrixView& part : parts) {
      const auto* from = static_cast<const char*>(part.data);
      for (int64_t row = 0; row < part.outputs; row += rows_max) {
        const int64_t rows = std::min(rows_max, part.outputs - row);
        for (int64_t i = 0; i < rows; ++i) {
          char* const at = staged_.data() + i * pitch;
          std::memcpy(at, from, row_bytes);
          std::memset(at + row_bytes, 0, pitch - row_bytes);
          from += row_bytes;
        }
        EDUBA_RETURN_IF_ERROR(device_->CopyIn(stream_, to, staged_.data(), rows * pitch));
        EDUBA_RETURN_IF_ERROR(device_->Synchronize(stream_));
        to += rows * pitch;
      }
    }
    return absl::OkStatus();
  }

  // The first that cuBLASLt proposes, needs nothing beside its operands, and treats all rows alike.
  absl::Status ChooseAlgorithm(CudaMatrix& matrix) {
    Shape& shape = matrix.shape();
    std::vector<CublasLtHeuristic> proposed(kAlgorithmsAsked);
    int count = 0;
    if (!shape.Init(matrix.dtype(), matrix.output_pitch(), matrix.input_pitch(), matrix.product_rows()) ||
        !Shape::Worked(api_.get_heuristic(handle_, shape.description, shape.weights, shape.rows,
                                          shape.results, shape.results, preference_, kAlgorithmsAsked,
                                          proposed.data(), &count))) {
      count = 0;
    }
    proposed.resize(count);
    for (const CublasLtHeuristic& one : proposed) {
      if (!Shape::Worked(one.state) || one.workspace_bytes != 0 || !SumsInOnePiece(one.algorithm)) continue;
      matrix.set_algorithm(one.algorithm);
      EDUBA_ASSIGN_OR_RETURN(const bool is_alike, TreatsRowsAlike(matrix));
      if (is_alike) return absl::OkStatus();
    }
    return absl::InternalError(absl::StrCat(library(), " has no algorithm for ", matrix.product_rows(),
                                            " rows of a [", matrix.outputs(), ", ", matrix.inputs(), "] ",
                                            DTypeName(matrix.dtype()),
                                            " product that gives a row the same bits wherever it stands (",
                                            count, " proposed); use another version of it, or --device cpu"));
  }

  bool SumsInOnePiece(const CublasLtAlgorithm& algorithm) const {
    int32_t splits = 0;
    uint32_t reduction = 0;
    size_t written = 0;
    return Shape::Worked(
               api_.algorithm_get(&algorithm, cuda::kCublasLtSplits, &splits, sizeof(splits), &written)) &&
           Shape::Worked(api_.algorithm_get(&algorithm, cuda::kCublasLtReduction, &reduction,
                                            sizeof(reduction), &written)) &&
           splits <= 1 && reduction == 0;
  }

  // One row in all places of a block: its bits must be the same in all of them.
  absl::StatusOr<bool> TreatsRowsAlike(const CudaMatrix& matrix) {
    LayerFloats row(this, LayerFloats::Use::kShared);
    LayerFloats differ(this, LayerFloats::Use::kShared);
    EDUBA_RETURN_IF_ERROR(row.Reserve(matrix.inputs()));
    EDUBA_RETURN_IF_ERROR(differ.Reserve(1));
    FixedNumbers numbers;
    for (int64_t i = 0; i < matrix.inputs(); ++i) row.host()[i] = numbers.Next();
    row.Send(0, matrix.inputs());
    differ.host()[0] = 0;
    differ.Send(0, 1);
    MultiplyBlock(matrix, row.data(), 0, matrix.block_rows());
    Layer(cuda::CompareArgs{matrix.terms(), matrix.block_rows(), matrix.output_pitch(), Floats(result_),
                            differ.data()});
    differ.Fetch(0, 1);
    EDUBA_RETURN_IF_ERROR(Wait());
    return differ.host()[0] == 0;
  }

  const std::shared_ptr<Device> device_;
  const CublasLtApi& api_;
  const Activations activations_;
  Stream stream_ = nullptr;
  void* handle_ = nullptr;
  void* preference_ = nullptr;
  absl::Status status_;
  Memory staged_;   // Weights on their way.
  Memory operand_;  // Rows of the product under way.
  Memory result_;
  Memory scale_;  // [kProductRows16]
};

}  // namespace

absl::StatusOr<std::unique_ptr<LayerKernels>> MakeCudaLayerKernels(std::shared_ptr<Device> device,
                                                                   Activations activations) {
  EDUBA_ASSIGN_OR_RETURN(const CublasLtApi* const api, cuda::LoadCublasLt());
  return MakeCudaLayerKernelsWith(std::move(device), *api, activations);
}

absl::StatusOr<std::unique_ptr<LayerKernels>> MakeCudaLayerKernelsWith(std::shared_ptr<Device> device,
                                                                       const CublasLtApi& api,
                                                                       Activations activations) {
  auto kernels = std::make_unique<CudaLayerKernels>(std::move(device), api, activations);
  EDUBA_RETURN_IF_ERROR(kernels->Init());
  return kernels;
}

}  // namespace eduba
