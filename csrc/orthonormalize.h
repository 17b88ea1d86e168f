// Orthogonalization of tall skinny matrices on the CPU.
#pragma once

#include "aligned.h"
#include "cpu_kernels.h"
#include "shares.h"

namespace pkt {

struct Columns {  // [rows, width] on a 64-byte boundary, of which the first `count` are meant; the rest are zero
  float* at = nullptr;
  int64_t ld = 0, rows = 0, count = 0, width = 0;
};

enum class Dependent {
  of_block,   // a column that keeps too little of the block's longest depends on the others
  of_itself,  // one that keeps too little of itself
};

// z ← an orthonormal basis of its columns, orthogonal to k's, and r [width, width] (if given) such that old z = z r.
// A dependent column becomes a random one, drawn from (seed, stream), and its row of r zero. CholeskyQR with fp64
// Gram matrices, repeated until nothing is left to mend.
void orthonormalize(const Columns& z, const Columns& k, Dependent dependent, int64_t seed, uint32_t stream, double* r,
                    const Threads& threads, const CpuKernels& kernels);

}  // namespace pkt
