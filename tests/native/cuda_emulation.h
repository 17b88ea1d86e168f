// Enough of CUDA to run rsvd_kernels.cuh on the CPU, so that the tests execute the kernels where there is no GPU: the
// threads of a block are fibers that take turns and meet at barriers, shared memory starts as NaN, blocks follow
// blocks.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__ static
#define __launch_bounds__(...)
#define PKT_DEVICE static inline
#define PKT_DEVICE_MEMBER
#define PKT_HOST_DEVICE static inline
#define PKT_GRID_CONSTANT
#define PKT_STATIC_SHARED(type, name) static type name
#define PKT_STATIC_SHARED_ARRAY(type, name, size) static type name[size]
#define PKT_SHARED(type, name) type* name = reinterpret_cast<type*>(pkt::emulation::shared.data())

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pkt::emulation {

struct Barrier {
  int members = 0, arrived = 0, generation = 0;
  void release_if_full() {
    if (arrived == members && members > 0) arrived = 0, ++generation;
  }
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it goes on: unlike swapcontext, a jump asks nothing of the kernel
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
};

inline std::vector<unsigned char> shared;
inline std::vector<Fiber> fibers;
inline std::vector<Barrier> warp_barriers;
inline Barrier block_barrier;
inline std::vector<double> warp_a, warp_b, warp_c, warp_d;  // what the lanes of a warp show each other
inline bool reversed = false;               // the order in which fibers take turns
inline ucontext_t unused;
inline jmp_buf scheduler;
inline const std::function<void()>* body;

inline void yield() {
  if (_setjmp(fibers[threadIdx.x].place) == 0) _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_full();
  while (barrier.generation == generation) yield();
}

inline void enter() {
  (*body)();
  fibers[threadIdx.x].done = true;
  --block_barrier.members;
  --warp_barriers[threadIdx.x / 32].members;
  block_barrier.release_if_full();
  warp_barriers[threadIdx.x / 32].release_if_full();
  yield();
}

inline void run_block(int threads, const std::function<void()>& f) {
  body = &f;
  fibers.resize(threads);
  warp_a.assign(threads, NAN);
  warp_b.assign(threads, NAN);
  warp_c.assign(threads, NAN);
  warp_d.assign(threads, NAN);
  warp_barriers.assign((threads + 31) / 32, Barrier{});
  block_barrier = Barrier{threads};
  for (int t = 0; t < threads; ++t) {
    ++warp_barriers[t / 32].members;
    Fiber& fiber = fibers[t];
    constexpr size_t stack_bytes = 64 * 1024;
    if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
    fiber.started = fiber.done = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = stack_bytes;
    fiber.start.uc_link = &unused;
    makecontext(&fiber.start, enter, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (int turn = 0; turn < threads; ++turn) {
      const int t = reversed ? threads - 1 - turn : turn;
      if (fibers[t].done) continue;
      alive = true;
      threadIdx.x = static_cast<unsigned>(t);
      resume(fibers[t]);
    }
  }
}

}  // namespace pkt::emulation

inline void __syncthreads() { pkt::emulation::wait(pkt::emulation::block_barrier); }
inline void __syncwarp() { pkt::emulation::wait(pkt::emulation::warp_barriers[threadIdx.x / 32]); }
inline void __threadfence() {}
inline int atomicAdd(int* at, int x) { return (*at += x) - x; }

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  using namespace pkt::emulation;
  warp_a[threadIdx.x] = x;
  __syncwarp();
  const T other = static_cast<T>(warp_a[threadIdx.x ^ static_cast<unsigned>(mask)]);
  __syncwarp();
  return other;
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

namespace pkt {

inline double from_lane(double x, int lane) {
  using namespace emulation;
  std::vector<double>& shown = warp_barriers[threadIdx.x / 32].generation % 2 ? warp_c : warp_d;  // so that one barrier does
  shown[threadIdx.x] = x;
  __syncwarp();
  return shown[threadIdx.x / 32 * 32 + static_cast<unsigned>(lane)];
}
inline double reciprocal(double x) { return 1 / x; }

inline uint16_t narrowed_fp16(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

inline void multiply_8x8x4(double (&d)[2], double a, double b) {
  using namespace emulation;
  const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
  warp_a[threadIdx.x] = a;
  warp_b[threadIdx.x] = b;
  __syncwarp();
  for (unsigned c = 0; c < 2; ++c) {
    for (unsigned k = 0; k < 4; ++k) {
      d[c] += warp_a[first + lane / 4 * 4 + k] * warp_b[first + (lane % 4 * 2 + c) * 4 + k];
    }
  }
  __syncwarp();
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t bytes, cudaStream_t,
                   const Arguments&... arguments) {
  blockDim = dim3(static_cast<unsigned>(threads));
  gridDim = grid;
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      emulation::shared.assign(bytes, 0xFF);
      emulation::run_block(threads, body);
    }
  }
  return cudaSuccess;
}

}  // namespace pkt
