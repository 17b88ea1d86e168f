// What the kernels of rsvd_kernels.cuh need of CUDA, so that the tests can also run them on the CPU
// (tests/native/cuda_emulation.h).
#pragma once

#include <cstdint>

#include "team.h"
#include "widen.h"

#if defined(__CUDACC__)

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define PKT_DEVICE static __device__ __forceinline__
#define PKT_DEVICE_MEMBER __device__
#define PKT_HOST_DEVICE static inline __host__ __device__
#define PKT_GRID_CONSTANT __grid_constant__
#define PKT_STATIC_SHARED(type, name) __shared__ type name
#define PKT_STATIC_SHARED_ARRAY(type, name, size) __shared__ type name[size]
#define PKT_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char all_shared[]; \
  type* name = reinterpret_cast<type*>(all_shared)

namespace pkt {

// Runs kernel(args...) on the grid; the dynamic shared memory beyond 48 KiB is asked for.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                          const Arguments&... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next check of torch's would find it
      return error;
    }
  }
  kernel<<<grid, threads, shared, stream>>>(arguments...);
  return cudaGetLastError();
}

PKT_DEVICE uint16_t narrowed_fp16(float x) { return __half_as_ushort(__float2half_rn(x)); }

// d += a b for an 8×4 a and a 4×8 b in fp64, one entry of each a lane: lane i holds a[i / 4, i % 4], b[i % 4, i / 4]
// and d[i / 4, i % 4 · 2 + {0, 1}].
PKT_DEVICE void multiply_8x8x4(double (&d)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(d[0]), "+d"(d[1])
      : "d"(a), "d"(b));
}

PKT_DEVICE double from_lane(double x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }

// 1 / x for a normal x, to an ulp or two, without a division's branch.
PKT_DEVICE double reciprocal(double x) {
  double y;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  y = fma(y, fma(-x, y, 1.0), y);
  return fma(y, fma(-x, y, 1.0), y);
}

}  // namespace pkt

#else
#include "cuda_emulation.h"
#endif

namespace pkt {

// The team of a thread block: its workers are warps.
struct Block {
  static constexpr int lanes = 32;
  PKT_MEMBER int thread() const { return threadIdx.x; }
  PKT_MEMBER int threads() const { return blockDim.x; }
  PKT_MEMBER int worker() const { return threadIdx.x / 32; }
  PKT_MEMBER int workers() const { return blockDim.x / 32; }
  PKT_MEMBER int lane() const { return threadIdx.x % 32; }
  PKT_MEMBER void sync() const { __syncthreads(); }
  PKT_MEMBER void sync_worker() const { __syncwarp(); }
  template <class T>
  PKT_MEMBER T sum(T x) const {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
    return x;
  }
  PKT_MEMBER void raise(int* flag) const { *flag = 1; }
};

}  // namespace pkt
