// Positions are sorted by token, and a token's rows are one thread's, sample after sample: no two threads meet in a row of
// the scores, and the bits do not depend on how many there are.

#include "embedding_sums.h"

#include <algorithm>
#include <vector>

#include "abs_accumulate.h"
#include "aligned.h"

namespace pkt {
namespace {

struct Position {
  int64_t id, sample, row;
};

constexpr int64_t kLeastPositions = 64;  // of a share

std::vector<Position> sorted_positions(const Embedded& e) {
  std::vector<Position> positions;
  for (int64_t j = 0; j < e.samples; ++j) {
    for (int64_t row = e.starts[j]; row < e.starts[j] + e.lens[j]; ++row) positions.push_back({e.ids[row], j, row});
  }
  std::stable_sort(positions.begin(), positions.end(), [](const Position& x, const Position& y) { return x.id < y.id; });
  return positions;
}

template <class T>
class Tokens {
 public:
  Tokens(const Embedded& e, const CpuKernels& kernels) : e_(e), kernels_(kernels), sum_(1, e.dy.cols, false) {}

  // Positions of one token in one sample.
  void add(const Position* begin, const Position* end) const {
    Entries gradient = row_of(e_.dy, begin->row);
    if (end - begin > 1) {
      sum_.clear();
      for (const Position* p = begin; p < end; ++p) {
        const Entries row = row_of(e_.dy, p->row);
        typed(row.data, row.dtype, [&](const auto* data) {
          for (int64_t i = 0; i < e_.dy.cols; ++i) sum_(0, i) += static_cast<T>(widened(data[i * row.stride]));
        });
      }
      gradient = {sum_.row(0), sizeof(T) == 8 ? Dtype::fp64 : Dtype::fp32, 1};
    }
    const Dtype dtype = e_.acc_is_fp64 ? Dtype::fp64 : Dtype::fp32;
    add_abs(e_.measure, e_.dy.cols, {further(e_.acc, dtype, begin->id * e_.acc_row), dtype, e_.acc_col},
            row_of(e_.w, begin->id), gradient, kernels_);
  }

 private:
  const Embedded& e_;
  const CpuKernels& kernels_;
  Aligned<T> sum_;
};

template <class T>
void add_range(const Embedded& e, const Position* begin, const Position* end, const CpuKernels& kernels) {
  const Tokens<T> tokens(e, kernels);
  while (begin < end) {
    const Position* next = begin;
    while (next < end && next->id == begin->id && next->sample == begin->sample) ++next;
    tokens.add(begin, next);
    begin = next;
  }
}

}  // namespace

void add_abs_embedding(const Embedded& e, const Threads& threads, const CpuKernels& kernels) {
  const std::vector<Position> positions = sorted_positions(e);
  const auto count = static_cast<int64_t>(positions.size());
  const int64_t shares = std::clamp<int64_t>(count / kLeastPositions, 1, threads.count);
  // Where a share begins: never within a token.
  const auto begin_of = [&](int64_t share) {
    int64_t at = count * share / shares;
    while (0 < at && at < count && positions[at].id == positions[at - 1].id) ++at;
    return positions.data() + at;
  };
  threads.run(shares, [&](int64_t share) {
    const auto add = e.dy.dtype == Dtype::fp64 ? add_range<double> : add_range<float>;
    add(e, begin_of(share), begin_of(share + 1), kernels);
  });
}

}  // namespace pkt
