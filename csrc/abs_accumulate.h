// acc += |theta ⊙ grad|, or what another measure makes of them, on the CPU, without torch. Every entry is one thread's, so the bits do not depend on how many there
// are.
#pragma once

#include "cpu_kernels.h"
#include "shares.h"
#include "strided.h"

namespace pkt {

// On one thread. The product is in fp64 if either factor is, else in fp32.
void add_abs(const Measure& measure, int64_t count, const Scores& acc, const Entries& theta, const Entries& grad, const CpuKernels& kernels);

// Three tensors of one shape [size[0], …, size[dims − 1]], strides in entries.
struct Accumulation {
  void* acc;
  const void *theta, *grad;
  Dtype acc_dtype, theta_dtype, grad_dtype;
  int64_t dims;
  const int64_t *size, *acc_stride, *theta_stride, *grad_stride;
};

// add_abs of each, all at once.
void accumulate_abs(const Measure& measure, const Accumulation* all, int64_t count, const Threads& threads,
                    const CpuKernels& kernels = cpu_kernels());

}  // namespace pkt
