// acc += |E| ⊙ Σ_j |scatter_j(dY)|, or what another measure makes of them, on the CPU, without torch: the positions of a
// token are summed within their sample first.
#pragma once

#include "cpu_kernels.h"
#include "shares.h"
#include "strided.h"

namespace pkt {

// ids[i] is the row of w [vocabulary, d] that row i of dy [rows, d] is the gradient of; samples as in abs_products.h. The
// scores are fp64 or fp32.
struct Embedded {
  void* acc;
  bool acc_is_fp64;
  int64_t acc_row, acc_col;  // strides
  Strided w, dy;
  const int64_t *ids, *starts, *lens;
  int64_t samples;
  Measure measure;
};

void add_abs_embedding(const Embedded& embedded, const Threads& threads, const CpuKernels& kernels = cpu_kernels());

}  // namespace pkt
