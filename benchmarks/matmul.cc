// Linear layers beside oneDNN's matmul and the speed of reading memory: the numbers of
// docs/adr/0006-matmul.md.
//   build/release/bin/matmul_bench [threads, default 2] [outputs, default 4096] [inputs, default 2048]
// Every line is checked against the reference first. "read" is (bytes of weights) / time, as a share of what
// `attend_bench` calls stream; "oneDNN" is its fastest for the same sizes: f32 for f32 weights, and for bf16
// weights bf16 with the activations rounded to bf16, which is less work than f32 activations are.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <oneapi/dnnl/dnnl.hpp>
#include <vector>

#include "base/dtype.h"
#include "benchmarks/measure/stream.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "kernels/reference/reference_layer_kernels.h"

namespace eduba {
namespace {

double MedianSeconds(const std::function<void()>& body) {
  std::vector<double> seconds;
  for (double total = 0; seconds.size() < 5 || (total < 0.3 && seconds.size() < 200);) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    total += seconds.back();
  }
  std::nth_element(seconds.begin(), seconds.begin() + static_cast<int64_t>(seconds.size() / 2),
                   seconds.end());
  return seconds[seconds.size() / 2];
}

// Seconds of oneDNN's product, or 0 where it has none on this machine.
double OneDnnSeconds(int64_t rows, int64_t outputs, int64_t inputs, DType dtype) {
  using dnnl::memory;
  try {
    const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
    dnnl::stream stream(engine);
    const auto type = dtype == DType::kF32 ? memory::data_type::f32 : memory::data_type::bf16;
    const memory::desc x({rows, inputs}, type, memory::format_tag::ab);
    const memory::desc w({inputs, outputs}, type, memory::format_tag::any);
    const memory::desc y({rows, outputs}, memory::data_type::f32, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc description({x, w, y}, engine);
    memory x_memory(x, engine);
    memory w_memory(description.weights_desc(), engine);
    memory y_memory(y, engine);
    const dnnl::matmul product(description);
    return MedianSeconds([&] {
      product.execute(stream,
                      {{DNNL_ARG_SRC, x_memory}, {DNNL_ARG_WEIGHTS, w_memory}, {DNNL_ARG_DST, y_memory}});
      stream.wait();
    });
  } catch (const dnnl::error&) {
    return 0;
  }
}

int Run(int threads, int64_t outputs, int64_t inputs) {
  BenchOptions options;
  options.threads = threads;
  options.rounds = 5;
  const auto stream = RunStreamBench(options);
  if (!stream.ok()) return 1;
  std::printf("%d threads, [%lld, %lld], stream %.1f GB/s\n", threads, static_cast<long long>(outputs),
              static_cast<long long>(inputs), stream->gb_per_s);
  struct Kind {
    DType dtype;
    Activations activations;
    const char* name;
  };
  for (const auto& [dtype, activations, name] :
       {Kind{DType::kBf16, Activations::kBf16, "bf16, rounded x"},
        Kind{DType::kBf16, Activations::kF32, "bf16"}, Kind{DType::kF16, Activations::kF32, "f16"},
        Kind{DType::kF32, Activations::kF32, "f32"}}) {
    const auto kernels = MakeCpuLayerKernels(threads, activations);
    const auto judge = MakeReferenceLayerKernels(activations);
    std::vector<char> weights(outputs * inputs * DTypeBytes(dtype));
    uint64_t state = 1;
    const auto next = [&] {
      state = state * 6364136223846793005U + 1442695040888963407U;
      return static_cast<float>(static_cast<int32_t>(state >> 33) - (1 << 30)) * 0x1p-30F;
    };
    for (int64_t i = 0; i < outputs * inputs; ++i) StoreElement(weights.data(), dtype, i, next());
    // More than the caches hold, as a model has: one copy after another.
    const MatrixView view{weights.data(), dtype, outputs, inputs};
    const auto copies = 1 + static_cast<size_t>((int64_t{256} << 20) / static_cast<int64_t>(weights.size()));
    std::vector<std::unique_ptr<PackedMatrix>> packed;
    for (size_t i = 0; i < copies; ++i) packed.push_back(kernels->Pack({view}).value());
    const auto exact = judge->Pack({{weights.data(), dtype, 64, inputs}}).value();

    for (const int64_t rows : {1, 2, 4, 8, 16, 64, 256, 512}) {
      std::vector<float> x(rows * inputs);
      for (float& value : x) value = next();
      std::vector<float> y(rows * outputs);
      std::vector<float> wanted(rows * 64);
      kernels->Multiply({packed[0].get(), rows, x.data(), nullptr, y.data()});
      if (rows <= 8) {
        judge->Multiply({exact.get(), rows, x.data(), nullptr, wanted.data()});
        for (int64_t i = 0; i < rows * 64; ++i) {
          if (std::abs(y[i / 64 * outputs + i % 64] - wanted[i]) > 1e-3) {
            std::fprintf(stderr, "wrong answer\n");
            return 1;
          }
        }
      }
      size_t turn = 0;
      const double seconds = MedianSeconds([&] {
        turn = (turn + 1) % copies;
        kernels->Multiply({packed[turn].get(), rows, x.data(), nullptr, y.data()});
      });
      const double onednn = dtype == DType::kF16 ? 0 : OneDnnSeconds(rows, outputs, inputs, dtype);
      const double gflops = 2e-9 * static_cast<double>(rows * outputs * inputs);
      const double bytes = static_cast<double>(packed[0]->bytes());
      std::printf("%-15s rows %3lld  %8.3f ms  read %5.1f GB/s = %.2f of stream  %6.1f GFLOP/s", name,
                  static_cast<long long>(rows), 1e3 * seconds, 1e-9 * bytes / seconds,
                  1e-9 * bytes / seconds / stream->gb_per_s, gflops / seconds);
      if (onednn > 0) {
        std::printf("  oneDNN %6.1f (weights in cache), ratio %.2f", gflops / onednn, onednn / seconds);
      }
      std::printf("\n");
    }
  }
  return 0;
}

}  // namespace
}  // namespace eduba

int main(int argc, char** argv) {
  return eduba::Run(argc > 1 ? std::atoi(argv[1]) : 2, argc > 2 ? std::atoll(argv[2]) : 4096,
                    argc > 3 ? std::atoll(argv[3]) : 2048);
}
