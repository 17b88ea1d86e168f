// AVX-512 kernels: 12 rows by 2 vectors of 16 floats fill 24 of the 32 registers.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define PKT_NAME "AVX-512"
#define PKT_KERNELS kernels_avx512
#define PKT_VECTOR 64
#define PKT_ROWS 12
#define PKT_VECTORS 2
#include "cpu_kernels.inc"
#endif
