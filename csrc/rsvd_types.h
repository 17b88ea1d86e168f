// What every implementation of pkt::rsvd is given.
#pragma once

#include <cstdint>

#include "widen.h"

namespace pkt {

// A matrix [n, m], strides in entries.
struct Matrix {
  const void* a;
  Dtype dtype;
  int64_t n, m, row_stride, col_stride;
};

inline Matrix transposed(const Matrix& a) { return {a.a, a.dtype, a.m, a.n, a.col_stride, a.row_stride}; }

struct Options {
  int64_t rank, oversample, iters, seed;
};

// u [n, rank], s [rank], v [m, rank], stats [4], all contiguous.
struct Factors {
  float *u, *s, *v, *stats;
};

}  // namespace pkt
