// Prints what `eduba bench stream` and `eduba bench attend` measure (measure/attend.h) as a table, with
// batches beside oneDNN's matrix products and not our own: for work on the kernels.
//   build/release/bin/attend_bench [GiB of keys and values, default 1] [rounds, default 9]

#include "benchmarks/measure/attend.h"

#include <cstdio>
#include <cstdlib>

#include "benchmarks/onednn_rates.h"

int main(int argc, char** argv) {
  eduba::BenchOptions options;
  if (argc > 1) options.bytes = static_cast<int64_t>(std::atof(argv[1]) * (1 << 30));
  if (argc > 2) options.rounds = std::atoi(argv[2]);
  const auto stream = eduba::RunStreamBench(options);
  if (!stream.ok()) {
    std::fprintf(stderr, "%s\n", stream.status().ToString().c_str());
    return 1;
  }
  std::printf("stream %.2f GB/s (%s, %d threads)\n", stream->gb_per_s, stream->pattern.c_str(),
              stream->threads);
  const auto results = eduba::RunAttendBench(options, eduba::OneDnnMatrixRates());
  if (!results.ok()) {
    std::fprintf(stderr, "%s\n", results.status().ToString().c_str());
    return 1;
  }
  for (const eduba::AttendResult& r : *results) {
    std::printf(
        "%s head_dim=%-3d group=%d rows=%-2d %s  %8.3f ms (spread %3.0f %%)  %6.2f GB/s = %.2f of stream "
        "%.2f",
        r.backend.c_str(), r.head_dim, r.queries_per_kv_head, r.query_rows, eduba::DTypeName(r.dtype),
        1e3 * r.seconds, 100 * r.spread, r.gb_per_s, r.share, r.stream_gb_per_s);
    if (r.query_rows > 1) {
      std::printf("  %6.1f GFLOP/s = %.2f of %s matmul (f32 %.1f, bf16 %.1f)", r.gflops, r.matrix_share,
                  r.matrix_dtype.c_str(), r.matrix_f32_gflops, r.matrix_bf16_gflops);
    }
    std::printf("\n");
  }
  return 0;
}
