#include "benchmarks/onednn_rates.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <oneapi/dnnl/dnnl.hpp>

#include "benchmarks/measure/timing.h"

namespace eduba {
namespace {

class Matmul {
 public:
  explicit Matmul(dnnl::memory::data_type type) {
    using dnnl::memory;
    const memory::desc in({kSize, kSize}, type, memory::format_tag::ab);
    // The right-hand side in the order the library likes best, as weights are in use.
    const memory::desc weights({kSize, kSize}, type, memory::format_tag::any);
    const memory::desc out({kSize, kSize}, memory::data_type::f32, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc desc(dnnl::matmul::desc(in, weights, out), engine_);
    a_ = memory(in, engine_);
    b_ = memory(desc.weights_desc(), engine_);
    c_ = memory(out, engine_);
    for (const memory& m : {a_, b_, c_}) {
      std::fill_n(static_cast<char*>(m.get_data_handle()), m.get_desc().get_size(), 0);
    }
    matmul_ = dnnl::matmul(desc);
  }
  double Gflops() {
    const double seconds = Seconds([&] {
      matmul_.execute(stream_, {{DNNL_ARG_SRC, a_}, {DNNL_ARG_WEIGHTS, b_}, {DNNL_ARG_DST, c_}});
      stream_.wait();
    });
    return 2e-9 * kSize * kSize * kSize / seconds;
  }

 private:
  static constexpr int64_t kSize = 1024;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  dnnl::memory a_;
  dnnl::memory b_;
  dnnl::memory c_;
  dnnl::matmul matmul_;
};

}  // namespace

MatrixRates OneDnnMatrixRates() {
  MatrixRates rates;
  const auto f32 = std::make_shared<Matmul>(dnnl::memory::data_type::f32);
  rates.f32 = [f32] { return f32->Gflops(); };
  try {
    const auto bf16 = std::make_shared<Matmul>(dnnl::memory::data_type::bf16);
    rates.bf16 = [bf16] { return bf16->Gflops(); };
  } catch (const dnnl::error&) {  // This chip has none, and the library no stand-in.
  }
  return rates;
}

}  // namespace eduba
