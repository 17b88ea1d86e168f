// The clustered sensitivity kernel, but for what only a Hopper can do: acc += |w|^p Σ_j |dY_jᵀ X_j|^p for 16-bit rows.
//
// Two blocks are a cluster and have 128 × 192 of the weight each, one below the other, so that both want the same columns of x:
// each fetches half of them into both blocks' shared memory. In a block one thread fetches, `stages` steps of 64 rows ahead
// and over the ends of samples and tiles; two warpgroups multiply, 64 × 192 each. A thread has 96 entries of the product and of
// the running sum. A sample's first product overwrites, and the copies write zeros past its end.
//
// Gpu is what the machine offers: clustered_cuda.cu has the real one, tests/native/clustered_emulated.cpp one for the CPU.
#pragma once

#include "cuda_portable.h"

namespace pkt::clustered {

constexpr int step = 64, height = 128, width = 192, band = 8, stages = 5, cluster = 2;
constexpr int group = 128;            // threads of a warpgroup: the first fetches, two multiply
constexpr int threads = 3 * group;
constexpr int panel = 64;             // columns that the swizzled layout of shared memory holds side by side
constexpr int panel_bytes = step * panel * 2;
constexpr int dy_panels = height / panel, x_panels = width / panel;
constexpr int stage_bytes = (dy_panels + x_panels) * panel_bytes;
constexpr int values = width / 2;     // a thread's share of 64 × 192
constexpr int bound = 1 << 30;        // the copies' bound, which moves with the sample (linear_sensitivity.py: ragged)
constexpr int releases = cluster * 2;  // warpgroups that read what is fetched into a stage

struct Batch {
  const int64_t *starts, *lens;
  int samples, rows;
};

struct Scores {
  float* acc;
  int64_t acc_stride, w_stride;
  int n, m;
};

struct Span {
  int start, length;
};

PKT_DEVICE int least(int a, int b) { return a < b ? a : b; }
PKT_DEVICE int most(int a, int b) { return a > b ? a : b; }

// The rows of a sample, kept inside those there are.
PKT_DEVICE Span span(const Batch& batch, int sample) {
  const int64_t given = batch.starts[sample], all = batch.rows, length = batch.lens[sample];
  const int64_t start = given < 0 ? 0 : given > all ? all : given;
  return {static_cast<int>(start), static_cast<int>(length < all - start ? length : all - start)};
}

PKT_DEVICE int tiles_down(int n) { return (n + cluster * height - 1) / (cluster * height); }
PKT_DEVICE int tiles_across(int m) { return (m + width - 1) / width; }

struct Place {
  int n, m;
};

// Where a block's part of a cluster's tile begins; tiles are visited in bands, so that clusters running together share rows in L2.
PKT_DEVICE Place place(int tile, const Scores& s, int rank) {
  const int across = tiles_across(s.m), first = tile / (band * across) * band, inside = tile % (band * across);
  const int down = least(tiles_down(s.n) - first, band);
  return {(first + inside % down) * cluster * height + rank * height, inside / down * width};
}

// One thread of each block.
template <class Gpu>
PKT_DEVICE void fetch(Gpu& gpu, const Batch& batch, const Scores& s) {
  int stage = 0;
  uint32_t phase = 1;  // nothing was fetched yet, so nothing need be released
  const int tiles = tiles_down(s.n) * tiles_across(s.m);
#pragma unroll 1
  for (int tile = gpu.first_tile(); tile < tiles; tile += gpu.tiles_apart()) {
    const Place at = place(tile, s, gpu.rank());
#pragma unroll 1
    for (int j = 0; j < batch.samples; ++j) {
      const Span rows = span(batch, j);
      const int end = rows.start + rows.length;
#pragma unroll 1
      for (int t = 0; t < most(rows.length, 1); t += step) {
        gpu.wait_released(stage, phase);
        gpu.expect(stage);
        const int row = bound - rows.length + t;
#pragma unroll
        for (int p = 0; p < dy_panels; ++p) gpu.load_dy(stage, p, at.n + p * panel, row, end);
#pragma unroll
        for (int p = 0; p < x_panels; ++p) {
          gpu.load_x_for_both(stage, p, at.m + p * panel, row + gpu.rank() * (step / cluster), end);
        }
        if (++stage == stages) stage = 0, phase ^= 1;
      }
    }
  }
}

PKT_DEVICE float magnitude(float x) { return __builtin_fabsf(x); }

// Neighbours, read and written as one.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <int power, class Element>
PKT_DEVICE float scaled(float total, Element w) {
  const float weight = magnitude(widened(w));
  return (power == 2 ? weight * weight : weight) * total;
}

// sum += |w|^power · total for a pair of neighbours, and its place.
template <int power, class Element>
PKT_DEVICE Pair<float> added(Pair<float> sum, Pair<Element> w, float first, float second) {
  return {sum.first + scaled<power>(first, w.first), sum.second + scaled<power>(second, w.second)};
}

// acc += |w|^power · total for a thread's entries of a warpgroup's rows, in the layout of wgmma's results: pair i is at row i % 2 · 8
// and column i / 2 · 8 from the thread's first. m and the strides are even.
template <int power, bool weighted, class Element>
PKT_DEVICE void add_scaled(const Scores& s, const Element* w, const float (&total)[values], Place at, int lane) {
  constexpr int pairs = values / 2, together = 16;  // those whose loads are under way at once
  const int row = at.n + lane / 32 * 16 + lane % 32 / 4, column = at.m + lane % 4 * 2;
  Pair<float>* to[2];
  const Pair<Element>* from[2];
  for (int below = 0; below < 2; ++below) {
    to[below] = reinterpret_cast<Pair<float>*>(s.acc + (row + below * 8) * s.acc_stride + column);
    from[below] = reinterpret_cast<const Pair<Element>*>(w + (weighted ? (row + below * 8) * s.w_stride + column : 0));
  }
  const bool whole = at.n + panel <= s.n && at.m + width <= s.m;
#pragma unroll
  for (int begin = 0; begin < pairs; begin += together) {
    if (whole) {
      Pair<float> sums[together];
      Pair<Element> weights[together];
#pragma unroll
      for (int k = 0; k < together; ++k) {
        const int i = begin + k;
        sums[k] = to[i % 2][i / 2 * 4];
        if constexpr (weighted) weights[k] = from[i % 2][i / 2 * 4];
      }
#pragma unroll
      for (int k = 0; k < together; ++k) {
        const int i = begin + k;
        if constexpr (weighted) {
          to[i % 2][i / 2 * 4] = added<power>(sums[k], weights[k], total[2 * i], total[2 * i + 1]);
        } else {
          to[i % 2][i / 2 * 4] = {sums[k].first + total[2 * i], sums[k].second + total[2 * i + 1]};
        }
      }
      continue;
    }
#pragma unroll
    for (int i = begin; i < begin + together; ++i) {
      if (row + i % 2 * 8 >= s.n || column + i / 2 * 8 >= s.m) continue;
      Pair<float>& sum = to[i % 2][i / 2 * 4];
      if constexpr (weighted) {
        sum = added<power>(sum, from[i % 2][i / 2 * 4], total[2 * i], total[2 * i + 1]);
      } else {
        sum = {sum.first + total[2 * i], sum.second + total[2 * i + 1]};
      }
    }
  }
}

// A warpgroup: rows which · 64 .. of its block's part. w is null where it is not asked for.
template <int power, class Gpu, class Element>
PKT_DEVICE void multiply(Gpu& gpu, const Batch& batch, const Scores& s, const Element* w, int which, int lane) {
  int stage = 0;
  uint32_t phase = 0;
  const int tiles = tiles_down(s.n) * tiles_across(s.m);
#pragma unroll 1
  for (int tile = gpu.first_tile(); tile < tiles; tile += gpu.tiles_apart()) {
    float d[values], total[values];  // d anew for each tile, so that its registers are free where the scores are added
#pragma unroll
    for (int i = 0; i < values; ++i) d[i] = total[i] = 0.0f;
    int next = batch.samples > 0 ? span(batch, 0).length : 0;
#pragma unroll 1
    for (int j = 0; j < batch.samples; ++j) {
      const int length = next;
      if (j + 1 < batch.samples) next = span(batch, j + 1).length;
      int previous = -1;
#pragma unroll 1
      for (int t = 0; t < most(length, 1); t += step) {
        gpu.wait_fetched(stage, phase);
        gpu.begin_products();
#pragma unroll
        for (int k = 0; k < step / 16; ++k) gpu.product(d, stage, which, k, t + k > 0);
        gpu.end_products();
        gpu.template wait_products<1>(d);
        // The step before this one is done, so both blocks may fetch into its stage again.
        if (previous >= 0 && lane < cluster) gpu.release(previous, lane);
        previous = stage;
        if (++stage == stages) stage = 0, phase ^= 1;
      }
      gpu.template wait_products<0>(d);
      if (lane < cluster) gpu.release(previous, lane);
#pragma unroll
      for (int i = 0; i < values; ++i) total[i] += power == 2 ? d[i] * d[i] : magnitude(d[i]);
    }
    Place at = place(tile, s, gpu.rank());
    at.n += which * panel;
    if (w != nullptr) {
      add_scaled<power, true>(s, w, total, at, lane);
    } else {
      add_scaled<power, false>(s, w, total, at, lane);
    }
  }
}

template <int power, class Gpu, class Element>
PKT_DEVICE void run(Gpu& gpu, const Batch& batch, const Scores& s, const Element* w) {
  gpu.begin();
  const int which = gpu.thread() / group - 1, lane = gpu.thread() % group;
  if (which < 0) {
    gpu.fewer_registers();
    if (lane == 0) fetch(gpu, batch, s);
  } else {
    gpu.more_registers();
    multiply<power>(gpu, batch, s, w, which, lane);
  }
  gpu.end();  // nobody leaves while the other block may still write into its memory
}

}  // namespace pkt::clustered
