// One worker's transformer: prefill and decode beside their ceilings.
//   build/release/bin/model_bench [threads, default 2] [nano|small, default small] [activations: f32|bf16,
//   default f32]
// Weights are random bf16, so this says nothing about text, and everything about time. Checked first: a
// token's hidden state has the same bits in a step of 64 tokens and in steps of one.
// What it prints:
//   - prefill: tokens/s of chunks of 256; GFLOP/s count products only (attend_bench has oneDNN's rates).
//   - decode 1: tokens/s of one context, and bytes of weights, keys and values over the time, as a share of
//     stream.
//   - decode 8: the same with 8 contexts in a step.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/heap.h"
#include "benchmarks/measure/stream.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_layer_kernels.h"
#include "model/testing/job_driver.h"

namespace eduba {
namespace {

double Seconds(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
}

ModelConfig Shape(bool nano) {
  ModelConfig config;
  config.vocab_size = nano ? 4096 : 32000;
  config.hidden_size = nano ? 256 : 1024;
  config.intermediate_size = nano ? 704 : 2816;
  config.query_heads = nano ? 4 : 16;
  config.kv_heads = nano ? 2 : 4;
  config.head_dim = 64;
  config.layers.resize(nano ? 6 : 16);
  for (LayerConfig& layer : config.layers) layer.rope.rotary_dim = 64;
  config.trained_positions = 4096;
  config.norm_eps = 1e-5F;
  config.attention_scale = 0.125F;
  config.tied_embeddings = true;
  return config;
}

// Every tensor looks at the same random numbers: they are packed into memory of their own.
class RandomWeights {
 public:
  explicit RandomWeights(const ModelConfig& config) {
    const int64_t width = config.hidden_size;
    numbers_.resize(std::max(config.vocab_size, 2 * config.intermediate_size) * width);
    uint64_t state = 1;
    for (uint16_t& x : numbers_) {
      state = state * 6364136223846793005U + 1442695040888963407U;
      x = Bf16FromF32(static_cast<float>(static_cast<int32_t>(state >> 32)) * 0x1p-31F /
                      std::sqrt(static_cast<float>(width)));
    }
    ones_.assign(width, Bf16FromF32(1));
    weights.embeddings = weights.head = View({config.vocab_size, width});
    weights.final_norm.weight = {ones_.data(), DType::kBf16, {width}, "ones"};
    for (size_t i = 0; i < config.layers.size(); ++i) {
      LayerWeights layer;
      layer.attention_in = layer.mlp_in = weights.final_norm;
      layer.q.weight = View({int64_t{config.query_heads} * config.head_dim, width});
      layer.k.weight = layer.v.weight = View({int64_t{config.kv_heads} * config.head_dim, width});
      layer.o_proj.weight = View({width, int64_t{config.query_heads} * config.head_dim});
      layer.gate.weight = layer.up.weight = View({config.intermediate_size, width});
      layer.down.weight = View({width, config.intermediate_size});
      weights.layers.push_back(layer);
    }
  }

  ModelWeights weights;

 private:
  WeightView View(std::vector<int64_t> shape) const {
    return {numbers_.data(), DType::kBf16, std::move(shape), "random"};
  }
  std::vector<uint16_t> numbers_;
  std::vector<uint16_t> ones_;
};

int Run(int threads, bool nano, Activations activations) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const ModelConfig config = Shape(nano);
  const RandomWeights random(config);
  const auto backend = MakeCpuBackend(threads, activations);
  const auto kernels = MakeCpuLayerKernels(threads, activations);
  PageStore store(backend.get(), int64_t{2} << 30);
  const auto model = Transformer::Create(config, random.weights, kernels.get()).value();
  ModelEngine::Options options;
  options.backend = backend.get();
  options.store = &store;
  options.model = model.get();
  options.kv_dtype = DType::kBf16;
  testing::JobDriver jobs(options, /*group=*/nullptr, /*stripe_pages=*/64);
  std::vector<int32_t> ids(4096);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * 7919 % config.vocab_size);

  {
    const auto a = jobs.Open({}).value();
    const auto b = jobs.Open({}).value();
    const std::vector<float> together = jobs.Append(a, absl::MakeConstSpan(ids).first(64)).hidden;
    for (int64_t i = 0; i < 64; ++i) {
      const testing::JobOutcome alone = jobs.Append(b, absl::MakeConstSpan(ids).subspan(i, 1));
      if (!alone.ok() || std::memcmp(alone.hidden.data(), &together[i * config.hidden_size],
                                     config.hidden_size * sizeof(float)) != 0) {
        std::fprintf(stderr, "token %lld has other bits alone\n", static_cast<long long>(i));
        return 1;
      }
    }
  }

  BenchOptions bench;
  bench.threads = threads;
  bench.rounds = 5;
  const auto stream = RunStreamBench(bench);
  if (!stream.ok()) return 1;
  const double weights = static_cast<double>(model->weight_bytes());
  std::printf("%s: %d layers, hidden %lld, %.0f M weights in products, %d threads, stream %.1f GB/s\n",
              nano ? "nano" : "small", static_cast<int>(config.layers.size()),
              static_cast<long long>(config.hidden_size), weights / 2e6, threads, stream->gb_per_s);

  const auto session = jobs.Open({}).value();
  auto begin = std::chrono::steady_clock::now();
  if (!jobs.Append(session, ids).ok()) return 1;
  double seconds = Seconds(begin);
  const double head = 2.0 * static_cast<double>(config.vocab_size * config.hidden_size);
  std::printf("prefill %zu tokens: %.0f tokens/s, %.1f GFLOP/s of products\n", ids.size(),
              static_cast<double>(ids.size()) / seconds,
              1e-9 * static_cast<double>(ids.size()) * (weights - head) / seconds);

  for (const int contexts : {1, 8}) {
    const int steps = nano ? 200 : 24;
    std::vector<testing::JobDriver::Session> forks;
    GenerateJob generate;
    generate.max_tokens = steps;
    for (int c = 0; c < contexts; ++c) {
      forks.push_back(session.Fork());
      jobs.Start(forks.back(), generate);
    }
    std::vector<double> times;
    for (int i = 0; i < steps; ++i) {
      begin = std::chrono::steady_clock::now();
      if (!jobs.Step().ok()) return 1;
      times.push_back(Seconds(begin));
    }
    std::sort(times.begin(), times.end());
    seconds = times[times.size() / 2];
    const double bytes = weights + static_cast<double>(jobs.engine().bytes_read());
    std::printf("decode %d contexts: %.2f ms a step, %.0f tokens/s, %.1f GB/s = %.2f of stream\n", contexts,
                1e3 * seconds, contexts / seconds, 1e-9 * bytes / seconds,
                1e-9 * bytes / seconds / stream->gb_per_s);
  }
  return 0;
}

}  // namespace
}  // namespace eduba

int main(int argc, char** argv) {
  eduba::KeepFreedMemory();  // The program does so too.
  return eduba::Run(
      argc > 1 ? std::atoi(argv[1]) : 2, argc > 2 && std::string(argv[2]) == "nano",
      argc > 3 && std::string(argv[3]) == "bf16" ? eduba::Activations::kBf16 : eduba::Activations::kF32);
}
