// The CPU implementations without torch, on threads of our own: for the tests, by ctypes. `level` as for cpu_kernels.

#include <functional>
#include <thread>
#include <vector>

#include "abs_accumulate.h"
#include "abs_products.h"
#include "block_krylov.h"
#include "embedding_sums.h"
#include "export.h"

static void run_threads(int64_t count, const std::function<void(int64_t)>& f) {
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < count; ++i) pool.emplace_back(f, i);
  for (std::thread& thread : pool) thread.join();
}

// Returns the kernels' name.
PKT_EXPORT const char* pkt_cpu(const pkt::Matrix* a, const pkt::Factors* out, const pkt::Options* options,
                               int64_t threads, int level) {
  const pkt::CpuKernels& kernels = pkt::cpu_kernels(level);
  pkt::block_krylov_svd(*a, *options, *out, {threads, run_threads}, kernels);
  return kernels.name;
}

PKT_EXPORT void pkt_abs_products(const pkt::Scored* scored, int64_t threads, int level) {
  pkt::add_abs_products(*scored, {threads, run_threads}, pkt::cpu_kernels(level));
}

PKT_EXPORT void pkt_abs_accumulate(const pkt::Measure* measure, const pkt::Accumulation* all, int64_t count,
                                   int64_t threads, int level) {
  pkt::accumulate_abs(*measure, all, count, {threads, run_threads}, pkt::cpu_kernels(level));
}

PKT_EXPORT void pkt_abs_embedding(const pkt::Embedded* embedded, int64_t threads, int level) {
  pkt::add_abs_embedding(*embedded, {threads, run_threads}, pkt::cpu_kernels(level));
}
