#include "orthonormalize.h"

#include <algorithm>
#include <cmath>

#include "philox.h"

namespace pkt {
namespace {

constexpr double kDependent = 1e-7;  // a column that keeps less than this of its reference is rounding noise
constexpr double kNothing = 1e-60;   // the square of a column too short for fp32 to normalize
constexpr uint32_t kMaxAttempts = 8;
constexpr int64_t kRowBlock = 96;

// total ← r · total for upper [n, n] matrices.
void accumulate(const double* r, double* total, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = n - 1; j >= i; --j) {
      double sum = 0;
      for (int64_t k = i; k <= j; ++k) sum += r[i * n + k] * total[k * n + j];
      total[i * n + j] = sum;
    }
  }
}

class Round {
 public:
  Round(const Columns& z, const Columns& k, const Threads& threads, const CpuKernels& kernels)
      : z_(z),
        k_(k),
        kernels_(kernels),
        shares_(threads, z.rows),
        inverse_(z.width, z.width),
        floor_(1, z.width),
        inverse_float_(z.width, z.width) {
    overlaps_ = shares_.matrices<float>(k.width, z.width);
    grams_ = shares_.matrices<double>(z.width, z.width);
    scratch_ = shares_.matrices<double>(64, z.width);
    rows_ = shares_.matrices<float>(kRowBlock, z.width);
  }

  // z ← z − k kᵀz, and its Gram matrix.
  void project() {
    if (k_.width > 0) {
      shares_.run([&](int64_t i, int64_t begin, int64_t end) {
        kernels_.product(k_.width, z_.width, end - begin, k_.at + begin * k_.ld, 1, k_.ld, z_.at + begin * z_.ld, z_.ld,
                         overlaps_[i].row(0), z_.width, false, 1);
      });
      add_up(overlaps_, 0, k_.width * z_.width);
    }
    shares_.run([&](int64_t i, int64_t begin, int64_t end) {
      float* z = z_.at + begin * z_.ld;
      if (k_.width > 0) {
        kernels_.product(end - begin, z_.width, k_.width, k_.at + begin * k_.ld, k_.ld, 1, overlaps_[0].row(0),
                         z_.width, z, z_.ld, true, -1);
      }
      grams_[i].clear();
      kernels_.gram(end - begin, z_.width, z, z_.ld, grams_[i].row(0), scratch_[i].row(0));
    });
    add_up(grams_, 0, z_.width * z_.width);
  }

  // Whether `project` found z nearly orthonormal and orthogonal to k: dividing by R then leaves only rounding.
  bool nearly_done() const {
    double most = 0;
    for (int64_t j = 0; j < z_.count; ++j) {
      for (int64_t i = 0; i <= j; ++i) most = std::max(most, std::abs(grams_[0](i, j) - (i == j)));
      for (int64_t i = 0; i < k_.count; ++i) most = std::max<double>(most, std::abs(overlaps_[0](i, j)));
    }
    return most < 0.1;
  }

  // The Gram matrix becomes R. True if a column is dependent, by R's zero on the diagonal.
  bool factorize(Dependent dependent) {
    double longest = 0;
    for (int64_t j = 0; j < z_.count; ++j) {
      double square = grams_[0](j, j);
      for (int64_t i = 0; i < k_.count; ++i) square += static_cast<double>(overlaps_[0](i, j)) * overlaps_[0](i, j);
      longest = std::max(longest, square);
    }
    for (int64_t j = 0; j < z_.width; ++j) {
      const double reference = dependent == Dependent::of_block ? longest : grams_[0](j, j);
      floor_(0, j) = std::max(kNothing, kDependent * kDependent * reference);
    }
    kernels_.cholesky(grams_[0].row(0), inverse_.row(0), static_cast<int>(z_.width), floor_.row(0));
    bool found = false;
    for (int64_t j = 0; j < z_.width; ++j) {
      found |= j < z_.count && r()[j * (z_.width + 1)] == 0;
      for (int64_t i = 0; i < z_.width; ++i) inverse_float_(i, j) = static_cast<float>(inverse_(j, i));
    }
    return found;
  }
  const double* r() const { return grams_[0].row(0); }

  // z ← z R⁻¹, with random columns for dependent ones.
  void divide(int64_t seed, uint32_t stream) {
    shares_.run([&](int64_t i, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row += kRowBlock) {
        const int64_t height = std::min(end - row, kRowBlock);
        for (int64_t y = 0; y < height; ++y) std::copy_n(z_.at + (row + y) * z_.ld, z_.width, rows_[i].row(y));
        kernels_.product(height, z_.width, z_.width, rows_[i].row(0), z_.width, 1, inverse_float_.row(0), z_.width,
                         z_.at + row * z_.ld, z_.ld, false, 1);
      }
      const float size = std::sqrt(3.0f / static_cast<float>(z_.rows));
      for (int64_t j = 0; j < z_.count; ++j) {
        if (r()[j * (z_.width + 1)] != 0) continue;
        for (int64_t row = begin; row < end; ++row) {
          z_.at[row * z_.ld + j] = size * philox_uniform(seed, row, stream, static_cast<uint32_t>(j));
        }
      }
    });
  }

 private:
  Columns z_, k_;
  const CpuKernels& kernels_;
  Shares shares_;
  Aligned<double> inverse_, floor_;
  Aligned<float> inverse_float_;
  std::vector<Aligned<float>> overlaps_, rows_;
  std::vector<Aligned<double>> grams_, scratch_;
};

}  // namespace

void orthonormalize(const Columns& z, const Columns& k, Dependent dependent, int64_t seed, uint32_t stream, double* r,
                    const Threads& threads, const CpuKernels& kernels) {
  Round round(z, k, threads, kernels);
  for (uint32_t attempt = 0; attempt < kMaxAttempts; ++attempt) {
    round.project();
    const bool last = round.nearly_done();
    const bool replaced = round.factorize(attempt == 0 ? dependent : Dependent::of_itself);
    round.divide(seed, stream * kMaxAttempts + attempt);
    if (r != nullptr && attempt == 0) std::copy_n(round.r(), z.width * z.width, r);
    if (r != nullptr && attempt > 0) accumulate(round.r(), r, z.width);
    if (last && !replaced) return;
  }
}

}  // namespace pkt
