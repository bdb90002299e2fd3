#ifndef EDUBA_KERNELS_CPU_CPU_BACKEND_H_
#define EDUBA_KERNELS_CPU_CPU_BACKEND_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/matmul.h"

namespace eduba {

// Partials that the steps in progress keep, so that the maximum path need not read keys and values again. A
// step for whose partials there is no room left computes them once more for each pass instead: the same bits,
// for up to twice the work.
inline constexpr int64_t kKeptPartialsBytesMax = int64_t{1} << 30;

// SIMD kernels for this machine, on `threads` threads (at least 1) that live as long as the backend. A step's
// results do not depend on their number. Page memory comes from huge pages where the machine grants them.
//
// With Activations::kBf16, queries are rounded to bf16 before they are multiplied with keys in bf16
// (docs/numerics.md section 2.2), for the dot products that some chips have: other bits, and another
// fingerprint.
std::unique_ptr<Backend> MakeCpuBackend(int threads, Activations activations = Activations::kF32);

// "AVX3" (AVX-512), "AVX2", "SSE4", "SCALAR": the instruction sets that this build has and this machine runs,
// best first.
std::vector<std::string> CpuTargets();
// Those this build has, whatever the machine.
std::vector<std::string> BuiltCpuTargets();

// For tests: with one of CpuTargets() instead of the best, without the chip's own dot products, and with
// another bound on kept partials.
std::unique_ptr<Backend> MakeCpuBackendForTest(int threads, const std::string& target,
                                               int64_t kept_partials_bytes = kKeptPartialsBytesMax,
                                               Activations activations = Activations::kF32);

// Whether a target fuses multiplication and addition. Targets that agree on this give the same bits.
bool CpuTargetHasFma(const std::string& target);

}  // namespace eduba

#endif  // EDUBA_KERNELS_CPU_CPU_BACKEND_H_
