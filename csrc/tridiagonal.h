// The leading eigenvectors of a symmetric matrix, on one host thread: Householder tridiagonalization, implicit QL, and
// the reflections undone for the wanted vectors alone (Golub & Van Loan, §8.3).
#pragma once

#include <math.h>

#include "team.h"

namespace pkt {

// a [n, n], symmetric and full → its diagonal d and off-diagonal e (e[n − 1] = 0) in the basis H₀ H₁ … of reflections
// I − v vᵀ, whose v [n] become the rows of `reflectors`; w [n] is scratch.
static inline void tridiagonalize(double* a, int n, double* d, double* e, double* reflectors, double* w) {
  for (int k = 0; k < n; ++k) {
    d[k] = a[k * n + k];
    e[k] = 0;
    double* v = reflectors + k * n;
    for (int i = 0; i < n; ++i) v[i] = i > k ? a[k * n + i] : 0;
    if (k + 1 >= n) break;
    double below = 0;
#pragma omp simd reduction(+ : below)
    for (int i = k + 2; i < n; ++i) below += v[i] * v[i];
    const double head = v[k + 1];
    e[k] = head;
    if (below == 0) {
      v[k + 1] = 0;
      continue;
    }
    e[k] = head > 0 ? -sqrt(head * head + below) : sqrt(head * head + below);
    v[k + 1] = head - e[k];
    const double unit = sqrt(2 / (v[k + 1] * v[k + 1] + below));
    for (int i = k + 1; i < n; ++i) v[i] *= unit;
    double overlap = 0;
    for (int i = k + 1; i < n; ++i) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int j = k + 1; j < n; ++j) sum += a[i * n + j] * v[j];
      w[i] = sum;
      overlap += sum * v[i];
    }
    for (int i = k + 1; i < n; ++i) w[i] -= overlap / 2 * v[i];
    for (int i = k + 1; i < n; ++i) {
#pragma omp simd
      for (int j = k + 1; j < n; ++j) a[i * n + j] -= v[i] * w[j] + w[i] * v[j];
    }
  }
}

// Turns d into the eigenvalues, in no order, and rotates the rows of z [n, n] along.
static inline void implicit_ql(double* d, double* e, double* z, int n) {
  constexpr int max_rounds = 60;
  for (int l = 0; l < n; ++l) {
    for (int round = 0; round < max_rounds; ++round) {
      int m = l;
      while (m + 1 < n && fabs(e[m]) > 2.3e-16 * (fabs(d[m]) + fabs(d[m + 1]))) ++m;
      if (m == l) break;
      double g = (d[l + 1] - d[l]) / (2 * e[l]);
      const double turn = sqrt(g * g + 1);
      g = d[m] - d[l] + e[l] / (g + (g >= 0 ? turn : -turn));
      double s = 1, c = 1, p = 0;
      int i = m - 1;
      for (; i >= l; --i) {
        const double f = s * e[i], b = c * e[i];
        const double r = sqrt(f * f + g * g);
        e[i + 1] = r;
        if (r == 0) {
          d[i + 1] -= p;
          e[m] = 0;
          break;
        }
        s = f / r, c = g / r;
        g = d[i + 1] - p;
        const double t = (d[i] - g) * s + 2 * c * b;
        p = s * t;
        d[i + 1] = g + p;
        g = c * t - b;
        double* z0 = z + i * n;
        double* z1 = z0 + n;
#pragma omp simd
        for (int k = 0; k < n; ++k) {
          const double u = z1[k], v = z0[k];
          z1[k] = s * v + c * u;
          z0[k] = c * v - s * u;
        }
      }
      if (i >= l) continue;
      d[l] -= p;
      e[l] = g;
      e[m] = 0;
    }
  }
}

// The `count` leading eigenvectors of a [n, n], which is overwritten, as rows of `vectors` [count, n], the largest
// eigenvalue first; `work` holds 2 n² + 3 n doubles and `order` n ints.
static inline void leading_eigenvectors(double* a, int n, int count, double* vectors, double* work, int* order) {
  double *z = work, *reflectors = work + n * n, *d = reflectors + n * n, *e = d + n, *w = e + n;
  tridiagonalize(a, n, d, e, reflectors, w);
  for (int i = 0; i < n * n; ++i) z[i] = i % (n + 1) == 0;
  implicit_ql(d, e, z, n);
  for (int j = 0; j < n; ++j) {
    int before = 0;
    for (int i = 0; i < n; ++i) before += d[i] > d[j] || (d[i] == d[j] && i < j);
    order[before] = j;
  }
  for (int j = 0; j < count; ++j) {
    double* x = vectors + j * n;
    for (int i = 0; i < n; ++i) x[i] = z[order[j] * n + i];
    for (int k = n - 1; k >= 0; --k) {
      const double* v = reflectors + k * n;
      double overlap = 0;
#pragma omp simd reduction(+ : overlap)
      for (int i = k + 1; i < n; ++i) overlap += v[i] * x[i];
#pragma omp simd
      for (int i = k + 1; i < n; ++i) x[i] -= overlap * v[i];
    }
  }
}

}  // namespace pkt
