// The small dense algebra of up to 32 columns on one thread block: what dense.h computes, with short chains. dense.h's
// column by column Cholesky and one-sided Jacobi wait at a barrier, for a division or for a sum over a warp a hundred times
// and more; on an H200 they were most of the time of a decomposition.
#pragma once

#include "cuda_portable.h"
#include "dense.h"

namespace pkt {

constexpr int kNarrow = 32;             // columns at most
constexpr int kNarrowPitch = kNarrow + 1;
constexpr double kGentle = 1e-5;        // σ_min / σ_max, above which the eigenvectors of RᵀR are R's

// As dense.h's `cholesky`, by warp 0, of rows that are kNarrowPitch apart. Lane i has row i of g, and where an entry is used up, row i of x. The registers turn by
// one entry a step, so that the pivot's column is always entry 0 and the loop stays small.
PKT_DEVICE void narrow_cholesky(const Block& team, double* g, double* x, int n, const double* floor) {
  team.sync();
  if (team.worker() == 0) {
    const int i = team.lane();
    double s[kNarrow];
#pragma unroll
    for (int k = 0; k < kNarrow; ++k) s[k] = i < n && k < n ? g[i < k ? i * kNarrowPitch + k : k * kNarrowPitch + i] : i == k ? 1 : 0;
    const double least = i < n ? floor[i] : 0;
    double pivot = from_lane(s[0], 0), inverse = pivot > from_lane(least, 0) ? reciprocal(pivot) : 0;
#pragma unroll 1
    for (int j = 0; j < kNarrow; ++j) {
      const double first = s[0], factor = i > j ? first * inverse : 0;
      s[0] = s[1] - factor * from_lane(s[1], j);
      const int next = j + 1 < kNarrow ? j + 1 : 0;
      pivot = from_lane(s[0], next), inverse = pivot > from_lane(least, next) ? reciprocal(pivot) : 0;
#pragma unroll
      for (int k = 2; k < kNarrow; ++k) s[k - 1] = s[k] - factor * from_lane(s[k], j);
      s[kNarrow - 1] = i > j ? -factor : first;  // x[i, j], or for this row the pivot, for others g[i, j] no more needed
    }
    if (i < n) {
      double own = 0;
#pragma unroll
      for (int k = 0; k < kNarrow; ++k) own = k == i ? s[k] : own;
      const double scale = own > least ? 1 / sqrt(own) : 0;
#pragma unroll
      for (int k = 0; k < kNarrow; ++k) {
        if (k >= n) break;
        g[i * kNarrowPitch + k] = k < i ? 0 : s[k] * scale;
        x[i * kNarrowPitch + k] = k > i ? 0 : k == i ? scale : s[k] * scale;
      }
    }
  }
  team.sync();
}

struct Rotation {
  double c, s;
};

// What makes a symmetric [[pp, pq], [pq, qq]] diagonal. The angle is good to fp32, which only slows the convergence; the
// rotation is one to fp64.
PKT_DEVICE Rotation rotation(double pp, double qq, double pq, double tolerance, double floor) {
  if (pp <= floor || qq <= floor || pq * pq <= tolerance * tolerance * pp * qq) return {1, 0};
  const float d = static_cast<float>(qq - pp), twice = static_cast<float>(2 * pq);
  const float length = (d < 0 ? -d : d) + sqrtf(d * d + twice * twice);
  if (!(length > 0)) return {1, 0};
  const float t = (d < 0 ? -twice : twice) / length;
  const double square = 1 + static_cast<double>(t) * t, near = rsqrtf(static_cast<float>(square));
  const double c = near * (1.5 - 0.5 * square * near * near);
  return {c, c * t};
}

PKT_HOST_DEVICE constexpr int narrow_svd_doubles() { return 3 * kNarrow * kNarrowPitch; }

// The singular values and vectors of an upper R [n, n], n ≤ 32, as dense.h's `small_svd` gives them: two-sided Jacobi on RᵀR,
// all pairs of a round at once and one barrier a round. False, and nothing is of use, where R is steep: its small values are
// lost in RᵀR. At least 512 threads; `work` holds narrow_svd_doubles().
PKT_DEVICE bool narrow_svd(const Block& team, const double* r, int n, float* left, float* right, float* s, int* order,
                           int* rotated, double* work) {
  constexpr int pitch = kNarrowPitch;
  double *now = work, *next = work + kNarrow * pitch, *v = next + kNarrow * pitch;
  const int players = n + (n & 1), pairs = players / 2, thread = team.thread();
  team.sync();
  for (int e = thread; e < kNarrow * kNarrow; e += team.threads()) {
    const int i = e / kNarrow, j = e % kNarrow, depth = i < j ? i : j;
    double sum = 0;
    if (i < n && j < n) {
      for (int k = 0; k <= depth; ++k) sum += r[k * n + i] * r[k * n + j];
    }
    now[i * pitch + j] = sum;
    v[i * pitch + j] = i == j;
  }
  for (int k = thread; k < kMaxSweeps; k += team.threads()) rotated[k] = 0;
  team.sync();
  double largest = 0;
  for (int j = 0; j < n; ++j) largest = now[j * pitch + j] > largest ? now[j * pitch + j] : largest;
  const double tolerance = 1.2e-7 * sqrt(static_cast<double>(n)), floor = largest * (2.4e-7 * 2.4e-7);
  constexpr int tiles = kNarrow * kNarrow / 4;
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    for (int e = thread; e < kNarrow * kNarrow; e += team.threads()) {
      const int i = e / kNarrow, j = e % kNarrow;
      const double ii = now[i * pitch + i], jj = now[j * pitch + j], ij = now[i * pitch + j];
      if (i < j && ii > floor && jj > floor && ij * ij > tolerance * tolerance * ii * jj) team.raise(rotated + sweep);
    }
    team.sync();
    if (rotated[sweep] == 0) break;
    for (int round = 0; round < players - 1; ++round) {
      // A round-robin tournament: pair k of the round.
      const auto first = [&](int k) { return k == 0 ? players - 1 : (round + k) % (players - 1); };
      const auto second = [&](int k) { return (round + players - 1 - k) % (players - 1); };
      const auto turn = [&](int a, int b) {
        return rotation(now[a * pitch + a], now[b * pitch + b], now[a * pitch + b], tolerance, floor);
      };
      if (thread < tiles) {
        const int p = thread / (kNarrow / 2), q = thread % (kNarrow / 2);
        if (p < pairs && q < pairs) {
          const int a = first(p), b = second(p), c = first(q), d = second(q);
          const Rotation by = turn(a, b), with = turn(c, d);
          const double ac = now[a * pitch + c], ad = now[a * pitch + d], bc = now[b * pitch + c], bd = now[b * pitch + d];
          const double pc = by.c * ac - by.s * bc, pd = by.c * ad - by.s * bd;
          const double qc = by.s * ac + by.c * bc, qd = by.s * ad + by.c * bd;
          next[a * pitch + c] = with.c * pc - with.s * pd, next[a * pitch + d] = with.s * pc + with.c * pd;
          next[b * pitch + c] = with.c * qc - with.s * qd, next[b * pitch + d] = with.s * qc + with.c * qd;
        }
      } else {
        for (int e = thread - tiles; e < pairs * kNarrow; e += team.threads() - tiles) {
          const int p = e / kNarrow, i = e % kNarrow, a = first(p), b = second(p);
          const Rotation by = turn(a, b);
          const double va = v[a * pitch + i], vb = v[b * pitch + i];
          v[a * pitch + i] = by.c * va - by.s * vb, v[b * pitch + i] = by.s * va + by.c * vb;
        }
      }
      team.sync();
      double* swapped = now;
      now = next, next = swapped;
    }
  }
  // R v, in fp64: its lengths are the singular values.
  for (int e = thread; e < n * n; e += team.threads()) {
    const int j = e / n, i = e % n;
    double sum = 0;
    for (int k = i; k < n; ++k) sum += r[i * n + k] * v[j * pitch + k];
    next[j * pitch + i] = sum;
    right[e] = static_cast<float>(v[j * pitch + i]);
  }
  team.sync();
  for (int j = thread; j < n; j += team.threads()) {
    double square = 0;
    for (int i = 0; i < n; ++i) square += next[j * pitch + i] * next[j * pitch + i];
    now[j] = sqrt(square);
  }
  team.sync();
  double most = 0, least = now[0];
  for (int j = 0; j < n; ++j) {
    most = now[j] > most ? now[j] : most;
    least = now[j] < least ? now[j] : least;
  }
  if (!(least > kGentle * most)) return false;
  for (int e = thread; e < n * n; e += team.threads()) {
    left[e] = static_cast<float>(next[e / n * pitch + e % n] / now[e / n]);
  }
  for (int j = thread; j < n; j += team.threads()) {
    int before = 0;
    for (int i = 0; i < n; ++i) before += now[i] > now[j] || (now[i] == now[j] && i < j);
    order[before] = j;
    s[j] = static_cast<float>(now[j]);
  }
  team.sync();
  return true;
}

}  // namespace pkt
