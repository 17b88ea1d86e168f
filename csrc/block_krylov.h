// The randomized SVD on the CPU, without torch: pkt/ops/rsvd_reference.py says what it computes.
#pragma once

#include "cpu_kernels.h"
#include "rsvd_types.h"
#include "shares.h"

namespace pkt {

// a has at least as many rows as columns: the caller transposes a wider one.
void block_krylov_svd(const Matrix& a, const Options& options, const Factors& out, const Threads& threads,
                      const CpuKernels& kernels = cpu_kernels());

}  // namespace pkt
