// The CPU implementation's inner loops: compiled once per instruction set from cpu_kernels.inc, chosen at run time.
#pragma once

#include <cstdint>

#include "rsvd_types.h"
#include "strided.h"

namespace pkt {

// Rows of A widened at a time, where its rows are contiguous and where its columns are (whole cache lines, then), and
// columns of a panel: multiples of every register tile's height.
constexpr int64_t kRowBlock = 48, kRowBlockByColumns = 96, kColBlock = 240;
constexpr int64_t kLanes = 16;  // every skinny matrix is a multiple of this wide, padded with zero columns

// One reading of rows [begin, end) of A: y = A q, and z += Aᵀ y where z is given.
struct Pass {
  Matrix a;
  int64_t begin, end;
  float scale;     // A's entries are multiplied by it
  const float* q;  // [m, width]
  int64_t width;
  float* y;  // row r of A goes to y + r · ld_y
  int64_t ld_y;
  float* z;       // [m rounded up to kColBlock, width] or null
  float* panels;  // scratch of panel_floats(m)
  float* block;   // scratch [kRowBlockByColumns, width]
  bool want_energy;
  double energy = 0;  // out: Σ of the widened entries' squares, if wanted
};

constexpr int64_t panel_floats(int64_t m) { return (m + kColBlock - 1) / kColBlock * kColBlock * kRowBlockByColumns; }

struct CpuKernels {
  const char* name;
  void (*pass)(Pass& pass);
  // c [m, width] = (accumulate ? c : 0) + sign · op(a) b, with op(a)[i, k] = a[i · a_i + k · a_k] and b [k, width].
  void (*product)(int64_t m, int64_t width, int64_t k, const float* a, int64_t a_i, int64_t a_k, const float* b,
                  int64_t ld_b, float* c, int64_t ld_c, bool accumulate, float sign);
  // g [width, width] += yᵀ y over `rows` rows, in fp64, upper triangle; `scratch` holds 64 · width doubles.
  void (*gram)(int64_t rows, int64_t width, const float* y, int64_t ld_y, double* g, double* scratch);
  // dense.h's and tridiagonal.h's, on one thread
  void (*cholesky)(double* g, double* x, int n, const double* floor);
  // `scratch` holds n (2 n + 1) doubles
  void (*small_svd)(const double* r, int n, double* left, double* right, double* s, double* scratch, int* order,
                    int64_t seed);
  void (*leading_eigenvectors)(double* a, int n, int count, double* vectors, double* work, int* order);
  // abs_products.cpp's, in fp32 and fp64: a register tile is `tile_rows` rows by `tile_bytes` of columns.
  int64_t tile_rows, tile_bytes;
  // total [panels · tile_rows, columns of a tile] = Σ_j |a_jᵀ b_j|^power, sample j being rows ends[j − 1] … ends[j] of each panel
  // of a [panels, depth, tile_rows] and of b [depth, columns].
  void (*abs_products)(int64_t power, int64_t panels, int64_t samples, const int64_t* ends, const float* a,
                       const float* b, float* total);
  void (*abs_products_fp64)(int64_t power, int64_t panels, int64_t samples, const int64_t* ends, const double* a,
                            const double* b, double* total);
  // acc [count] += what the measure makes of theta and grad, both of a half type or fp32.
  void (*abs_accumulate)(const Measure& measure, int64_t count, float* acc, const void* theta, Dtype theta_dtype,
                         const void* grad, Dtype grad_dtype);
};

// The best kernels that this processor can run; `level` 0, 1, 2 asks for baseline, AVX2, AVX-512 or what is below it.
const CpuKernels& cpu_kernels(int level = 2);

}  // namespace pkt
