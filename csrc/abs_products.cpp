// A product of our own, because a library's would write each sample's gradient to memory, to be read twice more for |·|
// and the sum: here both happen in the registers and the first-level cache that the product leaves its tile in. X is
// packed once, widened to fp32 (fp64 if either factor is), into panels as wide as a register tile; each task packs its rows
// of dYᵀ. Every entry of the result is computed by one thread in one order, so the bits do not depend on how many there are.

#include "abs_products.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "aligned.h"

namespace pkt {
namespace {

// A task's rows of dYᵀ stay in a core's second-level cache while every panel of X passes by.
constexpr int64_t kTaskBytes = 256 << 10, kLeastTiles = 2, kMostTiles = 16;
constexpr int64_t kPackedRows = 64;  // of X, by one task

// f(the entries, typed).
template <class F>
void typed(const Strided& m, const F& f) {
  switch (m.dtype) {
    case Dtype::bf16: return f(static_cast<const Bf16*>(m.data));
    case Dtype::fp16: return f(static_cast<const Fp16*>(m.data));
    case Dtype::fp32: return f(static_cast<const float*>(m.data));
    case Dtype::fp64: return f(static_cast<const double*>(m.data));
  }
}

// to [panels, all rows, width] = columns [left, left + cols) of rows[begin … end); zero beyond `cols`.
template <class T>
void pack(const Strided& m, const std::vector<int64_t>& rows, int64_t begin, int64_t end, int64_t left, int64_t cols,
          int64_t width, T* to) {
  const int64_t depth = static_cast<int64_t>(rows.size());
  typed(m, [&](const auto* data) {
    for (int64_t k = begin; k < end; ++k) {
      const auto* from = data + rows[k] * m.row_stride + left * m.col_stride;
      for (int64_t col = 0; col < cols; col += width) {
        T* out = to + col * depth + k * width;
        const int64_t count = std::min(width, cols - col);
        if (m.col_stride == 1) {
          for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(widened(from[col + i]));
        } else {
          for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(widened(from[(col + i) * m.col_stride]));
        }
        for (int64_t i = count; i < width; ++i) out[i] = 0;
      }
    }
  });
}

// The scores of [top, top + rows) x [left, left + cols) += |W| ⊙ total, whose rows are `width` apart.
template <class A, class T>
void add_weighted(const Scored& s, int64_t top, int64_t left, int64_t rows, int64_t cols, const T* total, int64_t width) {
  typed(s.w, [&](const auto* data) {
    for (int64_t i = 0; i < rows; ++i) {
      const auto* w = data + (top + i) * s.w.row_stride + left * s.w.col_stride;
      A* acc = static_cast<A*>(s.acc) + (top + i) * s.acc_row + left * s.acc_col;
      for (int64_t c = 0; c < cols; ++c) {
        const A size = static_cast<A>(std::fabs(widened(w[c * s.w.col_stride])));
        acc[c * s.acc_col] += size * static_cast<A>(total[i * width + c]);
      }
    }
  });
}

auto product_of(const CpuKernels& kernels, float) { return kernels.abs_products; }
auto product_of(const CpuKernels& kernels, double) { return kernels.abs_products_fp64; }

// rows: of x and dy, sample after sample; ends: where each sample ends among them.
template <class T>
void accumulate(const Scored& s, const std::vector<int64_t>& rows, const std::vector<int64_t>& ends,
                const Threads& threads, const CpuKernels& kernels) {
  const int64_t height = kernels.tile_rows, width = kernels.tile_bytes / static_cast<int64_t>(sizeof(T));
  const int64_t depth = static_cast<int64_t>(rows.size()), n = s.dy.cols, m = s.x.cols;
  const int64_t columns = (m + width - 1) / width;
  const Aligned<T> right(columns * depth, width, false);
  threads.run((depth + kPackedRows - 1) / kPackedRows, [&](int64_t task) {
    pack(s.x, rows, task * kPackedRows, std::min((task + 1) * kPackedRows, depth), 0, m, width, right.row(0));
  });
  const int64_t tile_bytes = depth * height * static_cast<int64_t>(sizeof(T));
  const int64_t block = height * std::clamp(kTaskBytes / tile_bytes, kLeastTiles, kMostTiles);
  threads.run((n + block - 1) / block, [&](int64_t task) {
    const int64_t top = task * block, count = std::min(block, n - top), panels = (count + height - 1) / height;
    const Aligned<T> left(panels * depth, height, false), total(panels * height, width, false);
    pack(s.dy, rows, 0, depth, top, count, height, left.row(0));
    for (int64_t p = 0; p < columns; ++p) {
      product_of(kernels, T{})(panels, static_cast<int64_t>(ends.size()), ends.data(), left.row(0), right.row(p * depth),
                               total.row(0));
      const int64_t cols = std::min(width, m - p * width);
      const auto add = s.acc_is_fp64 ? add_weighted<double, T> : add_weighted<float, T>;
      add(s, top, p * width, count, cols, total.row(0), width);
    }
  });
}

}  // namespace

void add_abs_products(const Scored& s, const Threads& threads, const CpuKernels& kernels) {
  std::vector<int64_t> rows, ends;
  for (int64_t j = 0; j < s.samples; ++j) {
    for (int64_t k = 0; k < s.lens[j]; ++k) rows.push_back(s.starts[j] + k);
    if (s.lens[j] > 0) ends.push_back(static_cast<int64_t>(rows.size()));
  }
  if (rows.empty() || s.x.cols == 0 || s.dy.cols == 0) return;
  const bool wide = s.x.dtype == Dtype::fp64 || s.dy.dtype == Dtype::fp64;
  return wide ? accumulate<double>(s, rows, ends, threads, kernels) : accumulate<float>(s, rows, ends, threads, kernels);
}

}  // namespace pkt
