// Kernels for whatever the compiler targets by default (SSE2, NEON), and the choice among all of them.
#define PKT_NAME "baseline"
#define PKT_KERNELS kernels_baseline
#define PKT_VECTOR 16
#define PKT_ROWS 2
#define PKT_VECTORS 4
#include "cpu_kernels.inc"

namespace pkt {

#if defined(__x86_64__)
extern const CpuKernels kernels_avx2, kernels_avx512;
#endif

const CpuKernels& cpu_kernels(int level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return kernels_avx512;
  }
  if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2;
#else
  static_cast<void>(level);
#endif
  return kernels_baseline;
}

}  // namespace pkt
