#include "kernels/cpu/cpu_layer_kernels.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/parallel.h"
#include "hwy/targets.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/huge_memory.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/row_kernels.h"

namespace eduba {
namespace {

// Rows of activations that go over a panel together: they stay in the second-level cache.
constexpr int64_t kRowBlock = 96;
// From this many rows on, activations are copied into the kernel's order first.
constexpr int64_t kCopyRows = 7;
// Work that is worth waking a thread for: some 10 us. Multiply-adds of products, elements of the rest.
constexpr int64_t kParallelMultiplyAdds = 400'000;
constexpr int64_t kParallelElements = 40'000;

class CpuMatrix final : public PackedMatrix {
 public:
  CpuMatrix(DType dtype, int64_t outputs, int64_t inputs, int64_t bytes, char* memory)
      : PackedMatrix(outputs, inputs, bytes), dtype_(dtype), memory_(memory) {}
  ~CpuMatrix() override { FreeHuge(memory_, bytes()); }

  DType dtype() const { return dtype_; }
  int64_t panels() const { return (outputs() + kPanelOutputs - 1) / kPanelOutputs; }
  char* panel(int64_t index) const { return memory_ + index * PanelBytes(dtype_, inputs()); }

 private:
  const DType dtype_;
  char* const memory_;
};

int64_t TargetId(const std::string& name) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    if (name == hwy::TargetName(target)) return target;
  }
  internal::CheckFailed(__FILE__, __LINE__, absl::StrCat("this machine does not run target ", name));
}

class CpuLayerKernels final : public LayerKernels {
 public:
  CpuLayerKernels(int threads, const std::string& target, Activations activations, bool dot_products)
      : target_(target),
        activations_(activations),
        multiply_(MultiplyPanelFor(TargetId(target))),
        multiply_pairs_(dot_products && MultiplyPanelByDotProducts() != nullptr ? MultiplyPanelByDotProducts()
                                                                                : multiply_),
        round_(RoundToPairsFor(TargetId(target))),
        normalise_(NormaliseFor(TargetId(target))),
        rotate_(RotateFor(TargetId(target))),
        activation_(ActivationFor(TargetId(target))),
        pool_(threads) {}

  std::string name() const override {
    return absl::StrCat("cpu/", target_, activations_ == Activations::kBf16 ? "/bf16" : "");
  }

  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(absl::Span<const MatrixView> parts) override {
    EDUBA_CHECK(!parts.empty());
    int64_t outputs = 0;
    for (const MatrixView& part : parts) {
      EDUBA_CHECK_EQ(part.inputs, parts[0].inputs);
      EDUBA_CHECK(part.dtype == parts[0].dtype && part.outputs >= 0);
      outputs += part.outputs;
    }
    const int64_t panels = (outputs + kPanelOutputs - 1) / kPanelOutputs;
    const int64_t bytes = panels * PanelBytes(parts[0].dtype, parts[0].inputs);
    auto* memory = static_cast<char*>(AllocateHuge(std::max<int64_t>(bytes, 1)));
    if (memory == nullptr) {
      return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes of packed weights ([",
                                                       outputs, ", ", parts[0].inputs, "] ",
                                                       DTypeName(parts[0].dtype), ")"));
    }
    auto matrix = std::make_unique<CpuMatrix>(parts[0].dtype, outputs, parts[0].inputs,
                                              std::max<int64_t>(bytes, 1), memory);
    pool_.ParallelFor(panels, [&](int64_t panel, int) {
      PackPanel(parts.data(), static_cast<int>(parts.size()), panel, matrix->panel(panel));
    });
    return matrix;
  }

  void Multiply(const MatmulArgs& args) override {
    const auto& weights = static_cast<const CpuMatrix&>(*args.weights);
    const int64_t row_blocks = (args.rows + kRowBlock - 1) / kRowBlock;
    if (row_blocks == 0 || weights.panels() == 0) return;
    Rows x;
    x.floats = args.x;
    x.row = weights.inputs();
    x.block = kMatmulBlock;
    if (weights.dtype() == DType::kBf16 && activations_ == Activations::kBf16) {
      Round(args, weights.inputs(), x);
    } else if (args.rows >= kCopyRows) {
      Copy(args, weights.inputs(), x);
    }

    // Few tasks cost few wake-ups; some more than threads even out their speeds.
    const int64_t work = args.rows * weights.inputs() * weights.outputs();
    const int64_t wanted = work < kParallelMultiplyAdds ? 1 : int64_t{8} * pool_.threads();
    const int64_t groups =
        std::min(weights.panels(), std::max<int64_t>(1, (wanted + row_blocks - 1) / row_blocks));
    const int64_t tasks = groups * row_blocks;
    const auto run = [&](int64_t task, int) {
      const int64_t block = task / groups;
      const int64_t group = task % groups;
      const int64_t row = block * kRowBlock;
      const int64_t rows = std::min(kRowBlock, args.rows - row);
      for (int64_t panel = weights.panels() * group / groups; panel < weights.panels() * (group + 1) / groups;
           ++panel) {
        MultiplyOne(args, weights, x, panel, row, rows);
      }
    };
    if (wanted == 1) {
      for (int64_t task = 0; task < tasks; ++task) run(task, 0);
    } else {
      pool_.ParallelFor(tasks, run);
    }
  }

  void Normalise(const NormArgs& args) override {
    ForRows(args.rows, int64_t{args.heads} * args.dim, [&](int64_t begin, int64_t end) {
      NormArgs part = args;
      part.rows = end - begin;
      part.x += begin * args.x_stride;
      part.y += begin * args.y_stride;
      normalise_(part);
    });
  }

  void Rotate(const RopeArgs& args) override {
    EDUBA_CHECK(args.rotary_dim % 2 == 0 && args.rotary_dim <= args.dim);
    ForRows(args.rows, int64_t{args.heads} * args.dim, [&](int64_t begin, int64_t end) {
      RopeArgs part = args;
      part.rows = end - begin;
      part.cosines += begin * (args.rotary_dim / 2);
      part.sines += begin * (args.rotary_dim / 2);
      part.x += begin * args.x_stride;
      part.y += begin * args.y_stride;
      rotate_(part);
    });
  }

  void Activate(const ActivationArgs& args) override {
    ForRows(args.rows, 4 * args.dim, [&](int64_t begin, int64_t end) {
      ActivationArgs part = args;
      part.rows = end - begin;
      part.x += begin * args.x_stride;
      if (args.gate != nullptr) part.gate += begin * args.x_stride;
      part.y += begin * args.dim;
      activation_.activate(part);
    });
  }

  void Softcap(const SoftcapArgs& args) override {
    constexpr int64_t kPiece = 1024;
    ForRows((args.count + kPiece - 1) / kPiece, 4 * kPiece, [&](int64_t begin, int64_t end) {
      SoftcapArgs part = args;
      part.x += begin * kPiece;
      part.count = std::min(args.count, end * kPiece) - begin * kPiece;
      activation_.softcap(part);
    });
  }

 private:
  // The activations of one product as PanelCall wants them.
  struct Rows {
    const float* floats = nullptr;
    const Bf16Pair* pairs = nullptr;
    int64_t row = 0;
    int64_t block = 0;
  };

  // copy_block(row, first input, inputs, to) for all blocks of all rows.
  template <class CopyBlock>
  void ForBlocks(int64_t rows, int64_t inputs, int64_t pitch, const CopyBlock& copy_block) {
    const int64_t blocks = (inputs + kMatmulBlock - 1) / kMatmulBlock;
    ForRows(rows, inputs, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t at = block * kMatmulBlock;
          copy_block(row * inputs + at, std::min<int64_t>(kMatmulBlock, inputs - at),
                     (block * rows + row) * pitch);
        }
      }
    });
  }

  // To [inputs / kMatmulBlock, rows, kMatmulBlockPitch]. Without memory the rows are read in place.
  void Copy(const MatmulArgs& args, int64_t inputs, Rows& x) {
    const int64_t blocks = (inputs + kMatmulBlock - 1) / kMatmulBlock;
    auto* copy = static_cast<float*>(
        copies_.Reserve(blocks * args.rows * kMatmulBlockPitch * static_cast<int64_t>(sizeof(float))));
    if (copy == nullptr) return;
    ForBlocks(args.rows, inputs, kMatmulBlockPitch,
              [&](int64_t from, int64_t count, int64_t to) { std::copy_n(args.x + from, count, copy + to); });
    x.floats = copy;
    x.row = kMatmulBlockPitch;
    x.block = args.rows * kMatmulBlockPitch;
  }

  // Likewise, rounded.
  void Round(const MatmulArgs& args, int64_t inputs, Rows& x) {
    constexpr int64_t kPitch = kMatmulBlockPitch / 2;
    const int64_t blocks = (inputs + kMatmulBlock - 1) / kMatmulBlock;
    pairs_.resize(std::max<int64_t>(1, blocks * args.rows * kPitch));
    ForBlocks(args.rows, inputs, kPitch, [&](int64_t from, int64_t count, int64_t to) {
      round_(args.x + from, count, pairs_.data() + to);
    });
    x.pairs = pairs_.data();
    x.row = kPitch;
    x.block = args.rows * kPitch;
  }

  void MultiplyOne(const MatmulArgs& args, const CpuMatrix& weights, const Rows& x, int64_t panel,
                   int64_t row, int64_t rows) const {
    PanelCall call;
    call.dtype = weights.dtype();
    call.panel = weights.panel(panel);
    call.inputs = weights.inputs();
    call.rows = rows;
    if (x.pairs != nullptr) {
      call.x_pairs = x.pairs + row * x.row;
    } else {
      call.x = x.floats + row * x.row;
    }
    call.x_row = x.row;
    call.x_block = x.block;
    const MultiplyPanelFunction multiply = x.pairs != nullptr ? multiply_pairs_ : multiply_;
    const int64_t output = panel * kPanelOutputs;
    const int64_t left = weights.outputs() - output;
    float* y = args.y + row * weights.outputs() + output;
    if (left >= kPanelOutputs) {
      call.bias = args.bias == nullptr ? nullptr : args.bias + output;
      call.y = y;
      call.y_row = weights.outputs();
      multiply(call);
      return;
    }
    // The last panel is wider than what is left of `y`.
    float bias[kPanelOutputs] = {};
    if (args.bias != nullptr) {
      std::copy_n(args.bias + output, left, bias);
      call.bias = bias;
    }
    float results[kRowBlock * kPanelOutputs];
    call.y = results;
    call.y_row = kPanelOutputs;
    multiply(call);
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(results + r * kPanelOutputs, left, y + r * weights.outputs());
    }
  }

  // body(begin, end) over all rows, in as many pieces as are worth it.
  template <class Body>
  void ForRows(int64_t rows, int64_t elements_per_row, const Body& body) {
    if (rows <= 0) return;
    if (rows * elements_per_row < kParallelElements || pool_.threads() == 1) return body(0, rows);
    const int64_t pieces = std::min<int64_t>(rows, int64_t{4} * pool_.threads());
    pool_.ParallelFor(pieces,
                      [&](int64_t piece, int) { body(rows * piece / pieces, rows * (piece + 1) / pieces); });
  }

  const std::string target_;
  const Activations activations_;
  const MultiplyPanelFunction multiply_;
  const MultiplyPanelFunction multiply_pairs_;
  const RoundToPairsFunction round_;
  const NormaliseFunction normalise_;
  const RotateFunction rotate_;
  const ActivationFunctions activation_;
  ThreadPool pool_;
  ScratchMemory copies_;
  std::vector<Bf16Pair> pairs_;
};

}  // namespace

std::unique_ptr<LayerKernels> MakeCpuLayerKernels(int threads, Activations activations) {
  EDUBA_CHECK(threads >= 1);
  return std::make_unique<CpuLayerKernels>(threads, CpuTargets().front(), activations, true);
}

std::unique_ptr<LayerKernels> MakeCpuLayerKernelsForTest(int threads, const std::string& target,
                                                         Activations activations) {
  EDUBA_CHECK(threads >= 1);
  return std::make_unique<CpuLayerKernels>(threads, target, activations, false);
}

}  // namespace eduba
