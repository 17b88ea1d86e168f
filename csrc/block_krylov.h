// The randomized SVD on the CPU, without torch: pkt/ops/rsvd_reference.py says what it computes.
#pragma once

#include <cstdint>

#include "cpu_kernels.h"
#include "shares.h"

namespace pkt {

struct Options {
  int64_t rank, oversample, iters, seed;
};

// u [n, rank], s [rank], v [m, rank], stats [4], all contiguous.
struct Factors {
  float *u, *s, *v, *stats;
};

void block_krylov_svd(const Matrix& a, const Options& options, const Factors& out, const Threads& threads,
                      const CpuKernels& kernels = cpu_kernels());

}  // namespace pkt
