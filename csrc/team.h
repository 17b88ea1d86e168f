// A team is the threads that share one small dense problem: a CUDA thread block, or one host thread. It is made of
// workers (warps), and a worker of lanes.
//
// Everything here and in the headers that use it is `static inline`: one copy a translation unit, because the CPU
// kernels are compiled once per instruction set and the linker must not merge them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PKT_INLINE static inline __device__
#define PKT_MEMBER __device__
#else
#define PKT_INLINE static inline
#define PKT_MEMBER
#endif

namespace pkt {

struct OneThread {
  PKT_MEMBER int thread() const { return 0; }  // of the team
  PKT_MEMBER int threads() const { return 1; }
  PKT_MEMBER int worker() const { return 0; }
  PKT_MEMBER int workers() const { return 1; }
  PKT_MEMBER int lane() const { return 0; }  // of a worker
  static constexpr int lanes = 1;
  PKT_MEMBER void sync() const {}                      // the whole team
  PKT_MEMBER void sync_worker() const {}               // the lanes of a worker
  PKT_MEMBER double sum(double x) const { return x; }  // over the lanes of a worker
  PKT_MEMBER float sum(float x) const { return x; }
  PKT_MEMBER void raise(int* flag) const { *flag = 1; }  // any thread, any number of times between two syncs
};

}  // namespace pkt
