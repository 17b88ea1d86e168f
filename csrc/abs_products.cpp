// A product of our own, because a library's would write each sample's gradient to memory, to be read twice more for |·|
// and the sum: here both happen in the registers and the first-level cache that the product leaves its tile in. X is
// packed once, widened to fp32 (fp64 if either factor is), into panels as wide as a register tile; each task packs its rows
// of dYᵀ. Every entry of the result is computed by one thread in one order, so the bits do not depend on how many there are.

#include "abs_products.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "aligned.h"

namespace pkt {
namespace {

// A task's rows of dYᵀ stay in a core's second-level cache while every panel of X passes by.
constexpr int64_t kTaskBytes = 256 << 10, kLeastTiles = 2, kMostTiles = 16;
constexpr int64_t kPackedRows = 64;  // of X, by one task

// to [panels, all rows, width] = columns [left, left + cols) of rows[begin … end); zero beyond `cols`.
template <class T>
void pack(const Strided& m, const std::vector<int64_t>& rows, int64_t begin, int64_t end, int64_t left, int64_t cols,
          int64_t width, T* to) {
  const int64_t depth = static_cast<int64_t>(rows.size());
  typed(m.data, m.dtype, [&](const auto* data) {
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

// |w|^power of each entry of a row of W; ones where the measure does not read it.
template <class A, class F>
void with_weights(const Scored& s, int64_t row, int64_t left, const F& f) {
  if (!s.measure.weighted) return f([](int64_t) { return A{1}; });
  const Entries w = row_of(s.w, row);
  typed(further(w.data, w.dtype, left * w.stride), w.dtype, [&](const auto* data) {
    if (s.measure.power == 1) {
      f([&](int64_t c) { return static_cast<A>(std::fabs(widened(data[c * w.stride]))); });
    } else {
      f([&](int64_t c) {
        const auto x = static_cast<A>(widened(data[c * w.stride]));
        return x * x;
      });
    }
  });
}

// The scores of [top, top + rows) x [left, left + cols) += |W|^power ⊙ total, whose rows are `width` apart.
template <class A, class T>
void add_weighted(const Scored& s, int64_t top, int64_t left, int64_t rows, int64_t cols, const T* total, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    A* acc = static_cast<A*>(s.acc) + (top + i) * s.acc_row + left * s.acc_col;
    with_weights<A>(s, top + i, left, [&](const auto& weight) {
      for (int64_t c = 0; c < cols; ++c) acc[c * s.acc_col] += weight(c) * static_cast<A>(total[i * width + c]);
    });
  }
}

// The tile sums of one task's rows [top, top + rows) in fp64. The first and the last row of tiles may be others' too.
template <class T>
class TileSums {
 public:
  TileSums(const Scored& s, int64_t top, int64_t rows)
      : s_(s),
        top_(top),
        bottom_(top + rows),
        first_(top / s.tile),
        sums_((bottom_ - 1) / s.tile + 1 - first_, (s.w.cols + s.tile - 1) / s.tile) {}

  // Takes in |W|^power ⊙ total for columns [left, left + cols), at most `width`.
  void add(int64_t left, int64_t cols, const T* total, int64_t width) const {
    const Aligned<T> line(1, width, false);
    for (int64_t row = top_; row < bottom_;) {
      const int64_t tile_row = row / s_.tile, end = std::min((tile_row + 1) * s_.tile, bottom_);
      line.clear();
      for (; row < end; ++row) {
        const T* from = total + (row - top_) * width;
        with_weights<T>(s_, row, left, [&](const auto& weight) {
          for (int64_t c = 0; c < cols; ++c) line(0, c) += weight(c) * from[c];
        });
      }
      for (int64_t c = 0; c < cols; ++c) sums_(tile_row - first_, (left + c) / s_.tile) += line(0, c);
    }
  }

  // Whether the task holds row i of its tiles whole.
  bool whole(int64_t i) const {
    const int64_t row = (first_ + i) * s_.tile;
    return row >= top_ && std::min(row + s_.tile, s_.w.rows) <= bottom_;
  }
  bool all_whole() const { return whole(0) && whole(sums_.rows - 1); }

  // Into the scores: the rows of tiles that the task holds whole, or those that it does not.
  void write(bool wanted) const {
    for (int64_t i = 0; i < sums_.rows; ++i) {
      if (whole(i) != wanted) continue;
      s_.acc_is_fp64 ? add_row(static_cast<double*>(s_.acc), i) : add_row(static_cast<float*>(s_.acc), i);
    }
  }

 private:
  template <class A>
  void add_row(A* acc, int64_t i) const {
    for (int64_t j = 0; j < sums_.width; ++j) {
      A& to = acc[(first_ + i) * s_.acc_row + j * s_.acc_col];
      to = static_cast<A>(to + sums_(i, j));
    }
  }

  const Scored& s_;
  int64_t top_, bottom_, first_;
  Aligned<double> sums_;
};

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
  const int64_t tasks = (n + block - 1) / block;
  std::vector<std::unique_ptr<TileSums<T>>> edges(tasks);
  threads.run(tasks, [&](int64_t task) {
    const int64_t top = task * block, count = std::min(block, n - top), panels = (count + height - 1) / height;
    const Aligned<T> left(panels * depth, height, false), total(panels * height, width, false);
    auto tiles = s.tile > 0 ? std::make_unique<TileSums<T>>(s, top, count) : nullptr;
    pack(s.dy, rows, 0, depth, top, count, height, left.row(0));
    for (int64_t p = 0; p < columns; ++p) {
      product_of(kernels, T{})(s.measure.power, panels, static_cast<int64_t>(ends.size()), ends.data(), left.row(0),
                               right.row(p * depth), total.row(0));
      const int64_t cols = std::min(width, m - p * width);
      if (tiles) {
        tiles->add(p * width, cols, total.row(0), width);
      } else {
        const auto add = s.acc_is_fp64 ? add_weighted<double, T> : add_weighted<float, T>;
        add(s, top, p * width, count, cols, total.row(0), width);
      }
    }
    if (!tiles) return;
    tiles->write(true);
    if (!tiles->all_whole()) edges[task] = std::move(tiles);
  });
  for (const auto& tiles : edges) {
    if (tiles) tiles->write(false);
  }
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
