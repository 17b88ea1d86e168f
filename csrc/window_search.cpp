// pkt::best_window for CPU tensors: the window of a score matrix with the largest sum, in exact integers.
//
// The scores are quantized as pkt/ops says. Sums of `rows` entries of each column follow the window's top down the
// matrix, the sum of `cols` of them follows its left side: each score is read twice, and only one row of sums exists.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "from_torch.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PKT_CLONES __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define PKT_CLONES
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A thread sums the rows above its share of the tops once more, so a share has at least this many.
constexpr int64_t least_tops = 64;

struct Scores {
  const float* data;
  int64_t rows, cols, row_stride, col_stride;
  const float* row(int64_t i) const { return data + i * row_stride; }
};

struct Best {
  int64_t sum = INT64_MIN, row = 0, col = 0;
};

PKT_CLONES float largest(const float* s, int64_t count, int64_t stride, float top) {
  for (int64_t i = 0; i < count; ++i) top = s[i * stride] > top ? s[i * stride] : top;
  return top;
}

inline int64_t quantized(float s, double scale) { return static_cast<int64_t>(std::floor(s * scale + 0.5)); }

PKT_CLONES void add(int64_t* sums, const float* s, int64_t count, int64_t stride, double scale) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) sums[i] += quantized(s[i], scale);
  } else {
    for (int64_t i = 0; i < count; ++i) sums[i] += quantized(s[i * stride], scale);
  }
}

PKT_CLONES void subtract(int64_t* sums, const float* s, int64_t count, int64_t stride, double scale) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) sums[i] -= quantized(s[i], scale);
  } else {
    for (int64_t i = 0; i < count; ++i) sums[i] -= quantized(s[i * stride], scale);
  }
}

// The first of the best windows whose top is in [begin, end).
Best search(const Scores& s, int64_t rows, int64_t cols, int64_t row_step, int64_t col_step, double scale,
            int64_t begin, int64_t end) {
  std::vector<int64_t> sums(s.cols, 0);
  Best best;
  for (int64_t i = begin; i < begin + rows - 1; ++i) add(sums.data(), s.row(i), s.cols, s.col_stride, scale);
  for (int64_t top = begin; top < end; ++top) {
    add(sums.data(), s.row(top + rows - 1), s.cols, s.col_stride, scale);
    if (top % row_step == 0) {
      int64_t sum = 0;
      for (int64_t j = 0; j < cols; ++j) sum += sums[j];
      for (int64_t j = 0;;) {
        if (sum > best.sum && j % col_step == 0) best = {sum, top, j};
        if (++j > s.cols - cols) break;
        sum += sums[j + cols - 1] - sums[j - 1];
      }
    }
    subtract(sums.data(), s.row(top), s.cols, s.col_stride, scale);
  }
  return best;
}

std::tuple<Tensor, Tensor> best_window(const Tensor& score, int64_t rows, int64_t cols, int64_t row_step,
                                       int64_t col_step) {
  STD_TORCH_CHECK(score.dim() == 2 && score.scalar_type() == ScalarType::Float,
                  "pkt::best_window: the scores must be an fp32 matrix");
  const Scores s{static_cast<const float*>(score.const_data_ptr()), score.size(0), score.size(1), score.stride(0),
                 score.stride(1)};
  STD_TORCH_CHECK(0 < rows && rows <= s.rows && 0 < cols && cols <= s.cols && row_step > 0 && col_step > 0,
                  "pkt::best_window: a ", rows, " x ", cols, " window does not fit in ", s.rows, " x ", s.cols);
  float top = s.data[0];
  for (int64_t i = 0; i < s.rows; ++i) top = largest(s.row(i), s.cols, s.col_stride, top);
  int exponent = 0;
  std::frexp(static_cast<double>(top), &exponent);
  // Bits of the largest score that are kept: as many as every window's sum has room for.
  const int bits = std::min(36, 62 - static_cast<int>(std::ceil(std::log2(static_cast<double>(rows) * cols))));
  const double scale = std::ldexp(1.0, bits - exponent);

  const int64_t tops = s.rows - rows + 1;
  const pkt::Threads threads = pkt::torch_threads();
  const int64_t shares = std::max<int64_t>(1, std::min(threads.count, tops / least_tops));
  std::vector<Best> found(shares);
  threads.run(shares, [&](int64_t i) {
    found[i] = search(s, rows, cols, row_step, col_step, scale, tops * i / shares, tops * (i + 1) / shares);
  });
  Best best = found[0];
  for (const Best& one : found)
    if (one.sum > best.sum) best = one;

  Tensor offset = pkt::empty({2}, ScalarType::Long);
  Tensor sum = pkt::empty({}, ScalarType::Long);
  auto* at = static_cast<int64_t*>(offset.mutable_data_ptr());
  at[0] = best.row, at[1] = best.col;
  *static_cast<int64_t*>(sum.mutable_data_ptr()) = best.sum;
  return {offset, sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pkt, CPU, m) { m.impl("best_window", TORCH_BOX(&best_window)); }
