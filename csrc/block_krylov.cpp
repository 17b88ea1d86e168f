// A reading of A does both products on row blocks that stay in cache (cpu_kernels.inc); rows are shared out to the threads,
// each with its own aᵀ y, added up in a fixed order. Orthogonalization is CholeskyQR with fp64 Gram matrices, repeated until
// nothing is left to mend; a dependent column becomes a random one. Small matrices stay on one thread.

#include "block_krylov.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "aligned.h"
#include "philox.h"

namespace pkt {
namespace {

using Floats = Aligned<float>;
using Doubles = Aligned<double>;

constexpr double kDependent = 1e-7;  // a column that keeps less than this of its reference is rounding noise
constexpr double kNothing = 1e-60;    // the square of a column too short for fp32 to normalize
constexpr int kMaxAttempts = 8;
constexpr int64_t kRowsPerThread = 256;
constexpr double kSafe = 0x1p60;  // ‖A‖²_F between 1/kSafe and kSafe: no product leaves fp32's range

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

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
    width_ = std::min(padded(options.rank + options.oversample), a.m);
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
  // Rows in contiguous shares, one a thread, none much smaller than kRowsPerThread.
  template <class F>
  void share_rows(int64_t rows, const F& f) const {
    const int64_t count = shares(rows);
    if (count == 1) return f(0, 0, rows);
    const auto begin = [&](int64_t i) {
      return i == count ? rows : rows * i / count / kRowBlockByColumns * kRowBlockByColumns;
    };
    threads_.run(count, [&](int64_t i) { f(i, begin(i), begin(i + 1)); });
  }
  int64_t shares(int64_t rows) const { return std::clamp<int64_t>(rows / kRowsPerThread, 1, threads_.count); }

  template <class T>
  std::vector<Aligned<T>> one_a_share(int64_t share_count, int64_t rows, int64_t width) const {
    std::vector<Aligned<T>> parts;
    for (int64_t i = 0; i < share_count; ++i) parts.emplace_back(rows, width);
    return parts;
  }

  template <class T>
  static void add_up(const std::vector<Aligned<T>>& parts, int64_t begin, int64_t end) {
    for (size_t part = 1; part < parts.size(); ++part) {
      for (int64_t i = begin; i < end; ++i) parts[0].storage[i] += parts[part].storage[i];
    }
  }

  // y = A q (its rows `ld_y` apart), and z_[0] = Aᵀ y if `both`. The first reading measures ‖A‖²_F.
  void read(const float* q, int64_t ld_q, int64_t width, float* y, int64_t ld_y, bool both) {
    const int64_t count = shares(a_.n), m_padded = (a_.m + kColBlock - 1) / kColBlock * kColBlock;
    if (panels_.empty()) {
      panels_ = one_a_share<float>(count, 1, panel_floats(a_.m));
      blocks_ = one_a_share<float>(count, kRowBlockByColumns, width);
    }
    if (z_.empty() && both) z_ = one_a_share<float>(count, m_padded, width);
    const bool first = energy_ < 0;
    std::vector<double> energy(count);
    share_rows(a_.n, [&](int64_t i, int64_t begin, int64_t end) {
      if (both) z_[i].clear();
      Pass pass{a_.a, a_.dtype, begin, end, a_.m, a_.row_stride, a_.col_stride, scale_, q, ld_q, width, y, ld_y,
                both ? z_[i].row(0) : nullptr, panels_[i].row(0), blocks_[i].row(0), first, 0};
      kernels_.pass(pass);
      energy[i] = pass.energy;
    });
    if (both) share_rows(a_.m, [&](int64_t, int64_t begin, int64_t end) { add_up(z_, begin * width, end * width); });
    if (first) energy_ = std::accumulate(energy.begin(), energy.end(), 0.0);
  }
  bool comfortable() const { return exact_ || (energy_ >= 1 / kSafe && energy_ <= kSafe); }

  // K is the identity: Y is A itself, read with the identity as q.
  bool read_whole() {
    const int64_t width = padded(a_.m);
    k_ = Floats(a_.m, width);
    y_ = Floats(a_.n, width);
    for (int64_t i = 0; i < a_.m; ++i) k_(i, i) = 1;
    read(k_.row(0), width, width, y_.row(0), width, false);
    return comfortable();
  }

  bool krylov() {
    const int64_t basis = width_ * (options_.iters + 1);
    k_ = Floats(a_.m, basis);
    y_ = Floats(a_.n, basis);
    for (int64_t step = 0; step <= options_.iters; ++step) {
      float* q = k_.row(0) + step * width_;
      share_rows(a_.m, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if (step == 0) {
            philox_signs(options_.seed, i, 0, width_, q + i * basis);
          } else {
            std::copy_n(z_[0].row(i), width_, q + i * basis);
          }
        }
      });
      const Columns earlier{k_.row(0), basis, a_.m, step * width_, step * width_};
      orthonormalize({q, basis, a_.m, width_, width_}, earlier, false, step + 1, nullptr);
      read(q, basis, width_, y_.row(0) + step * width_, basis, step < options_.iters);
      if (step == 0 && !comfortable()) return false;
    }
    return true;
  }

  struct Columns {  // [rows, width], of which the first `count` are meant; the rest are zero
    float* at;
    int64_t ld, rows, count, width;
  };

  // z ← an orthonormal basis of its columns, orthogonal to k's, and r (if given) such that the old z = z r. A column that
  // keeps too little of the block's largest (or of itself, if `each_for_itself`) becomes a random one, its row of r zero.
  void orthonormalize(const Columns& z, const Columns& k, bool each_for_itself, int64_t stream, Doubles* r) const {
    const int64_t count = shares(z.rows), width = z.width;
    auto overlaps = one_a_share<float>(count, k.width, width);
    auto grams = one_a_share<double>(count, width, width);
    auto scratch = one_a_share<double>(count, 64, width);
    auto rows = one_a_share<float>(count, kRowBlockByColumns, width);
    Doubles inverse(width, width), floor(1, width);
    Floats inverse_float(width, width);

    for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
      float largest_overlap = 0;
      if (k.width > 0) {
        share_rows(z.rows, [&](int64_t i, int64_t begin, int64_t end) {
          kernels_.product(k.width, width, end - begin, k.at + begin * k.ld, 1, k.ld, z.at + begin * z.ld, z.ld,
                           overlaps[i].row(0), width, false, 1);
        });
        add_up(overlaps, 0, k.width * width);
      }
      share_rows(z.rows, [&](int64_t i, int64_t begin, int64_t end) {
        if (k.width > 0) {
          kernels_.product(end - begin, width, k.width, k.at + begin * k.ld, k.ld, 1, overlaps[0].row(0), width,
                           z.at + begin * z.ld, z.ld, true, -1);
        }
        grams[i].clear();
        kernels_.gram(end - begin, width, z.at + begin * z.ld, z.ld, grams[i].row(0), scratch[i].row(0));
      });
      add_up(grams, 0, width * width);

      Doubles& gram = grams[0];
      double largest = 0, deviation = 0;
      for (int64_t j = 0; j < z.count; ++j) {
        double square = gram(j, j);
        for (int64_t i = 0; i < k.count; ++i) {
          square += double(overlaps[0](i, j)) * overlaps[0](i, j);
          largest_overlap = std::max(largest_overlap, std::abs(overlaps[0](i, j)));
        }
        largest = std::max(largest, square);
        for (int64_t i = 0; i <= j; ++i) deviation = std::max(deviation, std::abs(gram(i, j) - (i == j)));
      }
      for (int64_t j = 0; j < width; ++j) {
        floor(0, j) = std::max(kNothing, kDependent * kDependent * (each_for_itself || attempt > 0 ? gram(j, j) : largest));
      }
      kernels_.cholesky(gram.row(0), inverse.row(0), static_cast<int>(width), floor.row(0));
      bool replaced = false;
      for (int64_t j = 0; j < width; ++j) {
        replaced |= j < z.count && gram(j, j) == 0;
        for (int64_t i = 0; i < width; ++i) inverse_float(i, j) = static_cast<float>(inverse(j, i));
      }
      share_rows(z.rows, [&](int64_t i, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += kRowBlockByColumns) {
          const int64_t height = std::min(end - row, kRowBlockByColumns);
          for (int64_t y = 0; y < height; ++y) std::copy_n(z.at + (row + y) * z.ld, width, rows[i].row(y));
          kernels_.product(height, width, width, rows[i].row(0), width, 1, inverse_float.row(0), width,
                           z.at + row * z.ld, z.ld, false, 1);
        }
        if (replaced) replace_dependent(z, gram, begin, end, stream * kMaxAttempts + attempt);
      });
      if (r != nullptr) accumulate(gram, r, attempt == 0);
      if (!replaced && deviation < 0.1 && largest_overlap < 0.1f) return;
    }
  }

  void replace_dependent(const Columns& z, const Doubles& r, int64_t begin, int64_t end, int64_t stream) const {
    const float scale = std::sqrt(3.0f / static_cast<float>(z.rows));
    for (int64_t j = 0; j < z.count; ++j) {
      if (r(j, j) != 0) continue;
      for (int64_t i = begin; i < end; ++i) {
        z.at[i * z.ld + j] = scale * philox_uniform(options_.seed, i, static_cast<uint32_t>(stream), static_cast<uint32_t>(j));
      }
    }
  }

  // total ← r · total, both upper.
  static void accumulate(const Doubles& r, Doubles* total, bool first) {
    if (first) {
      std::copy_n(r.row(0), r.rows * r.width, total->row(0));
      return;
    }
    for (int64_t i = 0; i < r.rows; ++i) {
      for (int64_t j = r.width - 1; j >= i; --j) {
        double sum = 0;
        for (int64_t k = i; k <= j; ++k) sum += r(i, k) * (*total)(k, j);
        (*total)(i, j) = sum;
      }
    }
  }

  // The best directions of A inside span(K), from YᵀY = (A K)ᵀ A K, then settled on Y itself, whose values are not squared.
  void best_directions(const Factors& out) const {
    const int64_t rank = options_.rank, count = width_, width = padded(width_);
    const Floats chosen = leading_eigenvectors(count, width);
    Floats v(a_.m, width), u(a_.n, width);
    multiply(k_, chosen, v);
    multiply(y_, chosen, u);
    Doubles r(width, width);
    orthonormalize({u.row(0), width, a_.n, count, width}, {}, true, -1, &r);

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
    auto grams = one_a_share<double>(shares(a_.n), y_.width, y_.width);
    auto scratch = one_a_share<double>(shares(a_.n), 64, y_.width);
    share_rows(a_.n, [&](int64_t i, int64_t begin, int64_t end) {
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
    share_rows(a.rows, [&](int64_t, int64_t begin, int64_t end) {
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
