// Small dense linear algebra, one source for host and device: the tests on the CPU cover what the GPU runs.
// Matrices are row-major; every function is called by a whole team and ends synchronised.
#pragma once

#include <math.h>

#include "philox.h"
#include "team.h"

namespace pkt {

constexpr int kMaxSweeps = 30;

PKT_INLINE float root(float x) { return sqrtf(x); }
PKT_INLINE double root(double x) { return sqrt(x); }

// g [n, n] ← upper R with RᵀR = g, and x [n, n] ← R⁻ᵀ, lower. A pivot that does not exceed floor[j] means that column j
// depends on those before it: row j of R and of x becomes zero. Only g's upper triangle is read.
template <class Team, class T>
PKT_INLINE void cholesky(const Team& team, T* g, T* x, int n, const T* floor) {
  for (int i = team.thread(); i < n * n; i += team.threads()) x[i] = i % (n + 1) == 0 ? 1 : 0;
  for (int j = 0; j < n; ++j) {
    team.sync();
    const T* pivot_row = g + j * n;
    const T pivot = pivot_row[j], inverse = pivot > floor[j] ? 1 / pivot : 0;
    for (int i = j + 1 + team.worker(); i < n; i += team.workers()) {
      const T factor = pivot_row[i] * inverse;
      T* row = g + i * n;
      T* x_row = x + i * n;
#pragma omp simd
      for (int k = i + team.lane(); k < n; k += Team::lanes) row[k] -= factor * pivot_row[k];
#pragma omp simd
      for (int k = team.lane(); k <= j; k += Team::lanes) x_row[k] -= factor * x[j * n + k];
    }
  }
  team.sync();
  for (int j = team.worker(); j < n; j += team.workers()) {
    const T pivot = g[j * n + j], scale = pivot > floor[j] ? 1 / root(pivot) : 0;
    team.sync_worker();
    for (int k = team.lane(); k < n; k += Team::lanes) {
      g[j * n + k] = k < j ? 0 : g[j * n + k] * scale;
      x[j * n + k] = k > j ? 0 : x[j * n + k] * scale;
    }
  }
  team.sync();
}

// Makes every zero row of x [count, length] (count ≤ length, the other rows orthonormal) a random one orthonormal to
// all others. `overlap` [count] is the team's scratch.
template <class Team, class T>
PKT_INLINE void complete_rows(const Team& team, T* x, int count, int length, const T* norm, T* overlap, int64_t seed) {
  for (int j = 0; j < count; ++j) {
    team.sync();
    if (norm[j] > 0) continue;
    T* xj = x + j * length;
    for (int i = team.thread(); i < length; i += team.threads()) xj[i] = philox_uniform(seed, i, 0xFFFFFFFFu, j);
    for (int round = 0; round < 3; ++round) {
      team.sync();
      for (int k = team.worker(); k < count; k += team.workers()) {
        T sum = 0;
        for (int i = team.lane(); i < length; i += Team::lanes) sum += x[k * length + i] * xj[i];
        sum = team.sum(sum);
        if (team.lane() == 0) overlap[k] = sum;
      }
      team.sync();
      const T shrink = 1 / root(overlap[j]);
      for (int i = team.thread(); i < length; i += team.threads()) {
        T value = xj[i];
        for (int k = 0; k < count; ++k) value -= k == j ? 0 : overlap[k] * x[k * length + i];
        xj[i] = value * shrink;
      }
    }
    team.sync();
  }
}

// One-sided Jacobi: rotates the `count` vectors x_j (rows of x, `length` long) until they are orthogonal, and the rows
// of v (`v_length` long, or 0) alike. If X's rows are the columns of M, then V's rows become the right singular vectors
// of M and |x_j| its singular values. Every sweep meets all pairs once, in rounds of disjoint pairs (a round-robin
// tournament). Vectors whose square does not exceed `floor` are noise, and left alone. `rotated` [max_sweeps] is the
// team's scratch. Returns the number of sweeps.
template <class Team, class T>
PKT_INLINE int jacobi(const Team& team, T* x, int count, int length, T* v, int v_length, T tolerance, T floor,
                      int max_sweeps, int* rotated) {
  const int players = count + (count & 1);
  for (int s = team.thread(); s < max_sweeps; s += team.threads()) rotated[s] = 0;
  for (int sweep = 0; sweep < max_sweeps; ++sweep) {
    for (int round = 0; round < players - 1; ++round) {
      team.sync();
      for (int pair = team.worker(); pair < players / 2; pair += team.workers()) {
        const int a = pair == 0 ? players - 1 : (round + pair) % (players - 1);
        const int b = (round + players - 1 - pair) % (players - 1);
        const int p = a < b ? a : b, q = a < b ? b : a;
        if (q >= count) continue;
        T* xp = x + p * length;
        T* xq = x + q * length;
        T pp = 0, qq = 0, pq = 0;
#pragma omp simd reduction(+ : pp, qq, pq)
        for (int i = team.lane(); i < length; i += Team::lanes) {
          pp += xp[i] * xp[i];
          qq += xq[i] * xq[i];
          pq += xp[i] * xq[i];
        }
        pp = team.sum(pp), qq = team.sum(qq), pq = team.sum(pq);
        if (pp <= floor || qq <= floor || fabs(pq) <= tolerance * root(pp) * root(qq)) continue;
        const T zeta = (qq - pp) / (2 * pq);
        const T t = (zeta >= 0 ? 1 : -1) / (T(fabs(zeta)) + root(1 + zeta * zeta));
        const T c = 1 / root(1 + t * t), s = c * t;
        if (team.lane() == 0) team.raise(rotated + sweep);
#pragma omp simd
        for (int i = team.lane(); i < length; i += Team::lanes) {
          const T u = xp[i], w = xq[i];
          xp[i] = c * u - s * w;
          xq[i] = s * u + c * w;
        }
        T* vp = v + p * v_length;
        T* vq = v + q * v_length;
#pragma omp simd
        for (int i = team.lane(); i < v_length; i += Team::lanes) {
          const T u = vp[i], w = vq[i];
          vp[i] = c * u - s * w;
          vq[i] = s * u + c * w;
        }
      }
    }
    team.sync();
    if (rotated[sweep] == 0) return sweep + 1;
  }
  return max_sweeps;
}

// Turns the vectors x_j [count, length] of a finished `jacobi` into unit vectors and norm[j], zero (and x_j too) where
// the square does not exceed `floor`; order[i] ← the vector with the i-th largest norm (the lower index first among
// equals).
template <class Team, class T>
PKT_INLINE void normalize(const Team& team, T* x, int count, int length, T floor, T* norm, int* order) {
  team.sync();
  for (int j = team.worker(); j < count; j += team.workers()) {
    T square = 0;
#pragma omp simd reduction(+ : square)
    for (int i = team.lane(); i < length; i += Team::lanes) square += x[j * length + i] * x[j * length + i];
    square = team.sum(square);
    const T size = square > floor ? root(square) : 0;
    for (int i = team.lane(); i < length; i += Team::lanes) x[j * length + i] = size > 0 ? x[j * length + i] / size : 0;
    if (team.lane() == 0) norm[j] = size;
  }
  team.sync();
  for (int j = team.thread(); j < count; j += team.threads()) {
    int before = 0;
    for (int i = 0; i < count; ++i) before += norm[i] > norm[j] || (norm[i] == norm[j] && i < j);
    order[before] = j;
  }
  team.sync();
}

// Rows of x [n, n] that are orthonormal but for a small error e become so but for one of order e²:
// x ← 1.5 x − 0.5 x xᵀ x. `scratch` holds 2 n² entries.
template <class Team, class T>
PKT_INLINE void polish(const Team& team, T* x, int n, T* scratch) {
  T* gram = scratch;
  T* next = scratch + n * n;
  team.sync();
  for (int e = team.thread(); e < n * n; e += team.threads()) {
    T sum = 0;
    for (int k = 0; k < n; ++k) sum += x[e / n * n + k] * x[e % n * n + k];
    gram[e] = sum;
  }
  team.sync();
  for (int e = team.thread(); e < n * n; e += team.threads()) {
    T sum = 0;
    for (int k = 0; k < n; ++k) sum += gram[e / n * n + k] * x[k * n + e % n];
    next[e] = T(1.5) * x[e] - T(0.5) * sum;
  }
  team.sync();
  for (int e = team.thread(); e < n * n; e += team.threads()) x[e] = next[e];
  team.sync();
}

// The singular values and vectors of an upper R [n, n]: R = Σ_i s_i left_i right_iᵀ with the rows of left and right, in
// the order `order`. `s` [n], `overlap` [n], `order` [n], `rotated` [kMaxSweeps] and `scratch` [2 n²] are the caller's.
template <class Team, class T>
PKT_INLINE void small_svd(const Team& team, const double* r, int n, T* left, T* right, T* s, T* overlap, int* order,
                          int* rotated, T* scratch, T epsilon, int64_t seed) {
  team.sync();
  for (int e = team.thread(); e < n * n; e += team.threads()) {
    const int j = e / n, i = e % n;
    left[e] = i <= j ? static_cast<T>(r[i * n + j]) : 0;  // Jacobi's vectors are R's columns
    right[e] = i == j ? 1 : 0;
  }
  team.sync();
  T largest = 0;
  for (int j = 0; j < n; ++j) {
    T square = 0;
    for (int i = team.lane(); i <= j; i += Team::lanes) square += left[j * n + i] * left[j * n + i];
    square = team.sum(square);
    largest = square > largest ? square : largest;
  }
  const T floor = largest * (4 * epsilon) * (4 * epsilon);
  jacobi(team, left, n, n, right, n, 2 * epsilon * root(static_cast<T>(n)), floor, kMaxSweeps, rotated);
  // Many rotations leave their rounding in `left` and `right`: `right` is mended, and `left` is R `right` once more.
  polish(team, right, n, scratch);
  for (int e = team.thread(); e < n * n; e += team.threads()) {
    const int j = e / n, i = e % n;
    double sum = 0;
    for (int k = i; k < n; ++k) sum += r[i * n + k] * right[j * n + k];
    left[e] = static_cast<T>(sum);
  }
  normalize(team, left, n, n, floor, s, order);
  complete_rows(team, left, n, n, s, overlap, seed);
}

}  // namespace pkt
