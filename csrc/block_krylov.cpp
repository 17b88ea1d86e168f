// A reading of A does both products on row blocks that stay in cache (cpu_kernels.inc); rows are shared out to the
// threads, each with its own Aᵀy, added up in a fixed order. Small matrices stay on one thread.

#include "block_krylov.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "aligned.h"
#include "orthonormalize.h"
#include "philox.h"

namespace pkt {
namespace {

using Floats = Aligned<float>;
using Doubles = Aligned<double>;

constexpr double kSafe = 0x1p60;  // ‖A‖²_F between 1/kSafe and kSafe: no product leaves fp32's range

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t n) { return ceil_divide(n, kLanes) * kLanes; }

template <class T>
double exact_energy(const Matrix& a) {
  double sum = 0;
  for (int64_t i = 0; i < a.n; ++i) {
    for (int64_t k = 0; k < a.m; ++k) {
      const double x = widened(static_cast<const T*>(a.a)[i * a.row_stride + k * a.col_stride]);
      sum += x * x;
    }
  }
  return sum;
}

double exact_energy(const Matrix& a) {
  return a.dtype == Dtype::bf16   ? exact_energy<Bf16>(a)
         : a.dtype == Dtype::fp16 ? exact_energy<Fp16>(a)
                                  : exact_energy<float>(a);
}

class Svd {
 public:
  Svd(const Matrix& a, const Options& options, const Threads& threads, const CpuKernels& kernels)
      : a_(a), options_(options), threads_(threads), kernels_(kernels) {
    width_ = std::min(padded(std::max(options.rank, ceil_divide(options.rank + options.oversample, options.iters + 1))),
                      a.m);
  }

  void run(const Factors& out) {
    const bool whole = a_.m <= width_ * (options_.iters + 1);
    bool done = whole ? read_whole() : krylov();
    if (!done) {
      // The energy left fp32's comfortable range: again, with ‖A‖_F brought to [1, 2) by a power of two.
      energy_ = exact_energy(a_);
      exact_ = true;
      if (!std::isfinite(energy_)) return none(out);
      if (energy_ > 0) scale_ = std::ldexp(1.0f, static_cast<int>(-std::clamp(std::ilogb(energy_) / 2, -120, 120)));
      whole ? read_whole() : krylov();
    }
    best_directions(out);
  }

 private:
  Shares shares(int64_t rows) const { return {threads_, rows}; }

  // y = A q (its rows `ld_y` apart), and z_[0] = Aᵀ y if `both`. The first reading measures ‖A‖²_F.
  void read(const Floats& q, float* y, int64_t ld_y, bool both) {
    const int64_t width = q.width;
    const Shares rows = shares(a_.n);
    if (panels_.empty()) {
      panels_ = rows.matrices<float>(1, panel_floats(a_.m));
      blocks_ = rows.matrices<float>(kRowBlockByColumns, width);
    }
    if (z_.empty() && both) z_ = rows.matrices<float>((a_.m + kColBlock - 1) / kColBlock * kColBlock, width);
    const bool first = energy_ < 0;
    std::vector<double> energy(rows.count());
    rows.run([&](int64_t i, int64_t begin, int64_t end) {
      if (both) z_[i].clear();
      float* z = both ? z_[i].row(0) : nullptr;
      Pass pass{a_, begin, end, scale_, q.row(0), width, y, ld_y, z, panels_[i].row(0), blocks_[i].row(0), first};
      kernels_.pass(pass);
      energy[i] = pass.energy;
    });
    if (both) {
      shares(a_.m).run([&](int64_t, int64_t begin, int64_t end) { add_up(z_, begin * width, end * width); });
    }
    if (first) energy_ = std::accumulate(energy.begin(), energy.end(), 0.0);
  }
  bool comfortable() const { return exact_ || (energy_ >= 1 / kSafe && energy_ <= kSafe); }

  // K is the identity: Y is A itself, read with the identity as q.
  bool read_whole() {
    const int64_t width = padded(a_.m);
    k_ = Floats(a_.m, width);
    y_ = Floats(a_.n, width);
    for (int64_t i = 0; i < a_.m; ++i) k_(i, i) = 1;
    read(k_, y_.row(0), width, false);
    return comfortable();
  }

  bool krylov() {
    const int64_t basis = width_ * (options_.iters + 1);
    k_ = Floats(a_.m, basis);
    y_ = Floats(a_.n, basis);
    const Floats q(a_.m, width_);  // the newest block by itself, for rows far apart share cache sets
    for (int64_t step = 0; step <= options_.iters; ++step) {
      shares(a_.m).run([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if (step == 0) {
            philox_signs(options_.seed, i, 0, width_, q.row(i));
          } else {
            std::copy_n(z_[0].row(i), width_, q.row(i));
          }
        }
      });
      const Columns earlier{k_.row(0), basis, a_.m, step * width_, step * width_};
      orthonormalize({q.row(0), width_, a_.m, width_, width_}, earlier, Dependent::of_block, options_.seed,
                     static_cast<uint32_t>(step + 1), nullptr, threads_, kernels_);
      for (int64_t i = 0; i < a_.m; ++i) std::copy_n(q.row(i), width_, k_.row(i) + step * width_);
      read(q, y_.row(0) + step * width_, basis, step < options_.iters);
      if (step == 0 && !comfortable()) return false;
    }
    return true;
  }

  // The best directions of A inside span(K), from YᵀY = (A K)ᵀ A K, then settled on Y itself, unsquared.
  void best_directions(const Factors& out) const {
    const int64_t rank = options_.rank, count = width_, width = padded(width_);
    const Floats chosen = leading_eigenvectors(count, width);
    Floats v(a_.m, width), u(a_.n, width);
    multiply(k_, chosen, v);
    multiply(y_, chosen, u);
    Doubles r(width, width);
    orthonormalize({u.row(0), width, a_.n, count, width}, {}, Dependent::of_itself, options_.seed, 0, r.row(0),
                   threads_, kernels_);

    Doubles compact(count, count), left(count, count), right(count, count), scratch(2 * count + 1, count);
    for (int64_t i = 0; i < count; ++i) std::copy_n(r.row(i), count, compact.row(i));
    std::vector<double> s(count);
    std::vector<int> order(count);
    kernels_.small_svd(compact.row(0), static_cast<int>(count), left.row(0), right.row(0), s.data(), scratch.row(0),
                       order.data(), options_.seed);
    Floats rotate_u(width, width), rotate_v(width, width);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i < count; ++i) {
        rotate_u(i, j) = static_cast<float>(left(order[j], i));
        rotate_v(i, j) = static_cast<float>(right(order[j], i));
      }
    }
    write(u, rotate_u, out.u);
    write(v, rotate_v, out.v);
    double captured = 0;
    for (int64_t j = 0; j < rank; ++j) {
      const double value = s[order[j]] / scale_;
      out.s[j] = static_cast<float>(value);
      captured += value * value;
    }
    out.stats[0] = static_cast<float>(energy_);
    out.stats[1] = static_cast<float>(captured);
    out.stats[2] = energy_ > 0 ? static_cast<float>(std::sqrt(std::max(0.0, 1 - captured / energy_))) : 0.0f;
    out.stats[3] = 1;
  }

  // The `count` leading eigenvectors of YᵀY as columns [basis, width].
  Floats leading_eigenvectors(int64_t count, int64_t width) const {
    const int64_t basis = std::min(y_.width, a_.m);  // of an identity K, the rest is padding
    const Shares rows = shares(a_.n);
    const std::vector<Doubles> grams = rows.matrices<double>(y_.width, y_.width);
    const std::vector<Doubles> scratch = rows.matrices<double>(64, y_.width);
    rows.run([&](int64_t i, int64_t begin, int64_t end) {
      kernels_.gram(end - begin, y_.width, y_.row(begin), y_.width, grams[i].row(0), scratch[i].row(0));
    });
    add_up(grams, 0, y_.width * y_.width);
    Doubles full(basis, basis), vectors(count, basis), work(2 * basis + 3, basis);
    for (int64_t i = 0; i < basis; ++i) {
      for (int64_t j = 0; j < basis; ++j) full(i, j) = grams[0](std::min(i, j), std::max(i, j));
    }
    std::vector<int> order(basis);
    kernels_.leading_eigenvectors(full.row(0), static_cast<int>(basis), static_cast<int>(count), vectors.row(0),
                                  work.row(0), order.data());
    Floats chosen(y_.width, width);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i < basis; ++i) chosen(i, j) = static_cast<float>(vectors(j, i));
    }
    return chosen;
  }

  // c = a b, b's rows and c's width being b's.
  void multiply(const Floats& a, const Floats& b, const Floats& c) const {
    shares(a.rows).run([&](int64_t, int64_t begin, int64_t end) {
      kernels_.product(end - begin, b.width, b.rows, a.row(begin), a.width, 1, b.row(0), b.width, c.row(begin), c.width,
                       false, 1);
    });
  }

  // to [rows, rank] = (a b)[:, :rank]
  void write(const Floats& a, const Floats& b, float* to) const {
    Floats product(a.rows, b.width);
    multiply(a, b, product);
    for (int64_t i = 0; i < a.rows; ++i) std::copy_n(product.row(i), options_.rank, to + i * options_.rank);
  }

  void none(const Factors& out) const {
    std::fill_n(out.u, a_.n * options_.rank, 0.0f);
    std::fill_n(out.s, options_.rank, 0.0f);
    std::fill_n(out.v, a_.m * options_.rank, 0.0f);
    std::fill_n(out.stats, 4, 0.0f);
  }

  Matrix a_;
  Options options_;
  const Threads& threads_;
  const CpuKernels& kernels_;
  int64_t width_;
  float scale_ = 1;
  double energy_ = -1;  // ‖A‖²_F, once it is measured
  bool exact_ = false;  // in fp64
  Floats k_, y_;
  std::vector<Floats> panels_, blocks_, z_;
};

}  // namespace

void block_krylov_svd(const Matrix& a, const Options& options, const Factors& out, const Threads& threads,
                      const CpuKernels& kernels) {
  Svd(a, options, threads, kernels).run(out);
}

}  // namespace pkt
