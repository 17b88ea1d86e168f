// AVX2 kernels: 6 rows by 2 vectors of 8 floats fill 12 of the 16 registers.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define PKT_NAME "AVX2"
#define PKT_KERNELS kernels_avx2
#define PKT_VECTOR 32
#define PKT_ROWS 6
#define PKT_VECTORS 2
#include "cpu_kernels.inc"
#endif
