// Views of memory that torch owns, and what is made of them.
#pragma once

#include <cstdint>

#include "widen.h"

namespace pkt {

struct Strided {  // [rows, cols], strides in entries
  const void* data;
  Dtype dtype;
  int64_t rows, cols, row_stride, col_stride;
};

struct Entries {
  const void* data;
  Dtype dtype;
  int64_t stride;
};

struct Scores {  // fp32 or fp64
  void* data;
  Dtype dtype;
  int64_t stride;
};

// What is summed: |θ^weighted · g|^power, power 1 or 2. Unweighted, θ is not read.
struct Measure {
  int64_t power = 1;
  bool weighted = true;
};

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::fp64 ? 8 : dtype == Dtype::fp32 ? 4 : 2; }

// `count` entries further.
inline const void* further(const void* data, Dtype dtype, int64_t count) {
  return static_cast<const char*>(data) + count * bytes_of(dtype);
}
inline void* further(void* data, Dtype dtype, int64_t count) { return static_cast<char*>(data) + count * bytes_of(dtype); }

inline Entries row_of(const Strided& m, int64_t row) {
  return {further(m.data, m.dtype, row * m.row_stride), m.dtype, m.col_stride};
}

// f(the entries, typed).
template <class F>
void typed(const void* data, Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::bf16: return f(static_cast<const Bf16*>(data));
    case Dtype::fp16: return f(static_cast<const Fp16*>(data));
    case Dtype::fp32: return f(static_cast<const float*>(data));
    case Dtype::fp64: return f(static_cast<const double*>(data));
  }
}

}  // namespace pkt
