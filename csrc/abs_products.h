// acc += |W| ⊙ Σ_j |dY_jᵀ X_j|, or what another measure makes of them, or its tile sums, on the CPU, without torch.
#pragma once

#include <cstdint>

#include "cpu_kernels.h"
#include "shares.h"
#include "strided.h"

namespace pkt {

// A batch whose sample j is rows starts[j] … starts[j] + lens[j] of x and dy; the scores are fp64 or fp32, one for each
// tile × tile entries of W where `tile` is not 0.
struct Scored {
  void* acc;
  bool acc_is_fp64;
  int64_t acc_row, acc_col;  // strides
  Strided w, x, dy;
  const int64_t *starts, *lens;
  int64_t samples, tile;
  Measure measure;
};

void add_abs_products(const Scored& scored, const Threads& threads, const CpuKernels& kernels = cpu_kernels());

}  // namespace pkt
