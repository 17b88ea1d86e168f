// Work shared out to threads: contiguous rows each, so that results depend on the number of threads and nothing else.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "aligned.h"

namespace pkt {

// How many threads there are, and a way to call f(0) … f(count − 1) on them.
struct Threads {
  int64_t count;
  std::function<void(int64_t count, const std::function<void(int64_t)>& f)> run;
};

class Shares {
 public:
  // One share a thread, none much smaller than 256 rows.
  Shares(const Threads& threads, int64_t rows)
      : threads_(threads), rows_(rows), count_(std::clamp<int64_t>(rows / 256, 1, threads.count)) {}

  int64_t count() const { return count_; }

  // f(share, begin, end) for every share.
  template <class F>
  void run(const F& f) const {
    if (count_ == 1) return f(0, 0, rows_);
    threads_.run(count_, [&](int64_t share) { f(share, begin(share), begin(share + 1)); });
  }

  // A matrix for each share.
  template <class T>
  std::vector<Aligned<T>> matrices(int64_t rows, int64_t width) const {
    std::vector<Aligned<T>> result;
    for (int64_t i = 0; i < count_; ++i) result.emplace_back(rows, width);
    return result;
  }

 private:
  int64_t begin(int64_t share) const { return share == count_ ? rows_ : rows_ * share / count_ / kUnit * kUnit; }

  static constexpr int64_t kUnit = 96;  // a multiple of the passes' row blocks
  const Threads& threads_;
  int64_t rows_, count_;
};

// parts[0] += the others, entries [begin, end), in order.
template <class T>
void add_up(const std::vector<Aligned<T>>& parts, int64_t begin, int64_t end) {
  for (size_t part = 1; part < parts.size(); ++part) {
    for (int64_t i = begin; i < end; ++i) parts[0].storage[i] += parts[part].storage[i];
  }
}

}  // namespace pkt
