// The CUDA implementation run by cuda_emulation.h, and the CPU implementations without torch: for the tests, by ctypes.

#include <thread>

#include "abs_products.h"
#include "block_krylov.h"
#include "rsvd_pipeline.h"

namespace {

template <class T>
int emulated(const pkt::Matrix* matrices, const pkt::Factors* factors, int count, const pkt::Options& options,
             int64_t shared_limit) {
  using namespace pkt;
  Launches launches{{}, count, nullptr, static_cast<size_t>(shared_limit)};
  std::vector<std::vector<float>> floats;
  std::vector<std::vector<double>> doubles;
  std::vector<std::vector<T>> operands;
  std::vector<int> counters(count);
  const auto new_floats = [&](int64_t n) { return floats.emplace_back(n, NAN).data(); };
  const auto new_doubles = [&](int64_t n) { return doubles.emplace_back(n, NAN).data(); };
  for (int i = 0; i < count; ++i) {
    const Matrix& a = matrices[i];
    Problem& p = launches.batch.problem[i];
    const int64_t columns = (options.rank + options.oversample + 15) / 16 * 16;
    const int64_t l = std::min(columns, a.m), parts = Type<T>::parts;
    const int64_t l8 = rounded_up(static_cast<int>(l), 8);
    p.a = a.a, p.row_stride = a.row_stride, p.col_stride = a.col_stride;
    p.n = static_cast<int>(a.n), p.m = static_cast<int>(a.m), p.l = static_cast<int>(l);
    p.rank = static_cast<int>(options.rank), p.seed = options.seed;
    p.product = new_floats(a.n * parts * l);
    p.operand_m = operands.emplace_back(a.m * parts * l).data();
    p.operand_n = operands.emplace_back(a.n * parts * l).data();
    p.q = new_floats(a.m * l), p.y = new_floats(a.n * l);
    p.partial = new_doubles(std::max<int64_t>(kGramBlocks * l8 * l8, kEnergyBlocks));
    p.small = small_may_be_global(columns, launches.shared_limit) ? new_doubles(small_doubles(l)) : nullptr;
    p.total = new_doubles(2 * l * l);
    p.apply = new_floats(l * l), p.apply_v = new_floats(l * l);
    p.counter = &counters[i], p.scale = new_floats(2), p.energy = new_doubles(1);
    p.u = factors[i].u, p.s = factors[i].s, p.v = factors[i].v, p.stats = factors[i].stats;
  }
  return subspace_iteration<T>(launches, options.iters, [&](int i, bool transposed) {
    const Problem& p = launches.batch.problem[i];
    const int64_t width = p.l * Type<T>::parts, rows = transposed ? p.m : p.n, depth = transposed ? p.n : p.m;
    const T* a = static_cast<const T*>(p.a);
    const T* right = static_cast<const T*>(transposed ? p.operand_n : p.operand_m);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < width; ++j) {
        float sum = 0;
        for (int64_t k = 0; k < depth; ++k) {
          const int64_t at = transposed ? k * p.row_stride + row * p.col_stride : row * p.row_stride + k * p.col_stride;
          sum += pkt::widened(a[at]) * pkt::widened(right[k * width + j]);
        }
        p.product[row * width + j] = sum;
      }
    }
  });
}

}  // namespace

#define PKT_EXPORT extern "C" __attribute__((visibility("default")))

// `reversed` lets the threads of a block take turns backwards: a missing barrier then shows as another result.
PKT_EXPORT int pkt_emulated_cuda(const pkt::Matrix* a, const pkt::Factors* out, int count, const pkt::Options* options,
                                 int64_t shared_limit, int reversed) {
  pkt::emulation::reversed = reversed != 0;
  const pkt::Dtype dtype = a[0].dtype;
  return dtype == pkt::Dtype::bf16   ? emulated<pkt::Bf16>(a, out, count, *options, shared_limit)
         : dtype == pkt::Dtype::fp16 ? emulated<pkt::Fp16>(a, out, count, *options, shared_limit)
                                     : emulated<float>(a, out, count, *options, shared_limit);
}

static void run_threads(int64_t count, const std::function<void(int64_t)>& f) {
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < count; ++i) pool.emplace_back(f, i);
  for (std::thread& thread : pool) thread.join();
}

// `level` as for cpu_kernels; returns the kernels' name.
PKT_EXPORT const char* pkt_cpu(const pkt::Matrix* a, const pkt::Factors* out, const pkt::Options* options,
                               int64_t threads, int level) {
  const pkt::CpuKernels& kernels = pkt::cpu_kernels(level);
  pkt::block_krylov_svd(*a, *options, *out, {threads, run_threads}, kernels);
  return kernels.name;
}

PKT_EXPORT void pkt_abs_products(const pkt::Scored* scored, int64_t threads, int level) {
  pkt::add_abs_products(*scored, {threads, run_threads}, pkt::cpu_kernels(level));
}
