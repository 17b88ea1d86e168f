// The kernels of the randomized SVD on CUDA: everything but the products with the big matrix, which are cuBLAS's.
//
// Subspace iteration on a [n, m], n ≥ m, for a basis q [m, l]; rsvd_pipeline.h strings it together. The half types know
// no fp32 product, so a skinny fp32 factor travels as two halves side by side (x = high + low, columns j and l + j of
// an `operand`), and the product's two halves are added where it is read: near-fp32 accuracy for one reading of a. What
// is stored is scaled by a power of two that brings ‖a‖_F to [1, 2), so no intermediate leaves its type's range.
//
// Orthogonalization is CholeskyQR: `gram_kernel` forms xᵀx in fp64 (tensor cores), and its last block factorizes it, in
// shared memory, so that nothing waits for the host; `apply_kernel` multiplies by R⁻¹. A dependent column becomes a
// random one, and further rounds make it orthogonal. What a round finds decides, on the device, whether the next one has
// anything to do (`State`): where not, its kernels return at once. The problems of a batch are the y dimension of every grid.

#pragma once

#include <type_traits>

#include "cuda_portable.h"
#include "dense.h"
#include "philox.h"
#include "rsvd_small.cuh"

namespace pkt {

constexpr int kBatch = 16;          // problems a launch: their description travels as a kernel argument
constexpr int kGramBlocks = 44;     // at most, a problem, and three times as many a launch: one wave on a large GPU
constexpr int kEnergyBlocks = 528;  // at most, a problem
constexpr int kApplyRows = 32;
constexpr int kCached = 64;         // columns whose factor [l, l] apply_kernel keeps in shared memory
constexpr double kDependent = 1e-7;  // a column that keeps less than this of its reference is rounding noise

constexpr double kUneven = 16;       // Σ_k |x_k| |R⁻¹_kj| above which x R⁻¹ in fp32 is not orthogonal enough
constexpr double kSteep = 0x1p-9;    // R_min / R_max (σ_l / σ_1, or up to its square) below which aᵀa q loses directions
constexpr double kNothing = 1e-60;  // the square of a column too short for fp32 to normalize

// What the kernels of a problem tell the later ones.
struct State {
  int counter;    // of blocks that have finished; zero between kernels
  int unsettled;  // the next round of orthogonalization that is needed
  int steep;      // whether y, too, must be made orthogonal
};

struct Problem {
  const void* a;
  int64_t row_stride, col_stride;
  int before, after;  // entries beside each contiguous row (column) of a, which the products take along
  int n, m, l, rank;
  int64_t seed;
  float* product;               // of the last big product: [n or m, parts · l]
  void *operand_m, *operand_n;  // [m, parts · l] and [n, parts · l] in a's type
  float *q, *y;                 // [m, l], [n, l]
  double* partial;              // max(kGramBlocks · l8², kEnergyBlocks), l8 = l rounded up to 8
  double* small;                // `small_doubles(l)`, where it is not in shared memory
  double* total;                // [2, l, l]: the R of y's rounds so far, and room for the next
  float *apply, *apply_v;       // [l, l]: what rows are multiplied by next
  State* state;                 // zeros at first
  float* scale;                 // {the power of two, 1 if a is finite else 0}
  double* energy;               // ‖a‖²_F
  float *u, *s, *v, *stats;
};

struct Batch {
  Problem problem[kBatch];
};

static_assert(sizeof(Batch) <= 4000, "with the other arguments, it must fit into the 4 KiB of a launch");

enum class Side { m, n };              // the rows of q, or of y
enum class Source { product, basis };  // what is orthogonalized: the last big product, or q or y itself
// Of a round: a step of the iteration (`round` counts steps), q made orthogonal once more, or y's last with its SVD.
enum class Stage { power, settle, last };

template <class T>
struct Type;  // parts: columns of an operand for one of the factor; unit: what its columns' norms are multiplied by
template <>
struct Type<float> {
  static constexpr int parts = 1;
  static constexpr float unit = 1;
  PKT_DEVICE_MEMBER static float narrowed(float x) { return x; }
};
template <>
struct Type<Bf16> {
  static constexpr int parts = 2;
  static constexpr float unit = 1;
  PKT_DEVICE_MEMBER static Bf16 narrowed(float x) {
    const uint32_t bits = bits_of(x);
    return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
  }
};
template <>
struct Type<Fp16> {
  static constexpr int parts = 2;
  static constexpr float unit = 64;  // keeps the low parts above fp16's smallest numbers
  PKT_DEVICE_MEMBER static Fp16 narrowed(float x) { return {narrowed_fp16(x)}; }
};

// Writes x, scaled, as entry j of an operand's row.
template <class T>
PKT_DEVICE void store_operand(T* row, int l, int j, float x) {
  x *= Type<T>::unit;
  const T high = Type<T>::narrowed(x);
  row[j] = high;
  if (Type<T>::parts == 2) row[l + j] = Type<T>::narrowed(x - widened(high));
}

// Entry j of a row of a big product, scaled.
template <class T>
PKT_DEVICE float load_product(const float* row, int l, int j, float scale) {
  const float x = Type<T>::parts == 2 ? row[j] + row[l + j] : row[j];
  return x * (scale / Type<T>::unit);
}

// True in every thread of the last of this problem's blocks to come here; it sees what the others wrote before.
PKT_DEVICE bool last_block(int* counter) {
  PKT_STATIC_SHARED(bool, last);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T entry[size];
};

// The sum of squares of x's entries from `begin` on and before `stop`: in fp32 where all is well within its range.
template <class T>
PKT_DEVICE double energy(const Pack<T>& x, int64_t begin, int64_t stop) {
  if (begin <= 0 && stop >= Pack<T>::size) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) sum += widened(x.entry[i]) * widened(x.entry[i]);
    if (sum >= 0x1p-80f && sum <= 0x1p100f) return sum;
  }
  double sum = 0;
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) {
    const double entry = begin <= i && i < stop ? widened(x.entry[i]) : 0.0f;
    sum += entry * entry;
  }
  return sum;
}

// energy, and scale = {2^-⌊log₂ ‖a‖_F⌋, finite}: one reading of a. 256 threads.
template <class T>
__global__ void __launch_bounds__(256) energy_kernel(const PKT_GRID_CONSTANT Batch batch) {
  const Problem& p = batch.problem[blockIdx.y];
  const Block team;
  const T* a = static_cast<const T*>(p.a);
  const bool by_rows = p.col_stride == 1 || p.row_stride != 1;
  const int64_t rows = by_rows ? p.n : p.m, cols = by_rows ? p.m : p.n;
  const int64_t row_stride = by_rows ? p.row_stride : p.col_stride, col_stride = by_rows ? p.col_stride : p.row_stride;
  constexpr int pack = Pack<T>::size;
  constexpr int64_t segment = 4096;  // columns of a work item
  const int64_t begin = p.before, stop = begin + cols, length = stop + p.after;  // a's entries of a row that begins earlier
  a -= begin;
  const bool packed = col_stride == 1 && row_stride % pack == 0 && reinterpret_cast<uintptr_t>(a) % 16 == 0;
  const int64_t segments = (length + segment - 1) / segment;
  double sum = 0;
  for (int64_t item = blockIdx.x * team.workers() + team.worker(); item < rows * segments;
       item += static_cast<int64_t>(gridDim.x) * team.workers()) {
    const int64_t first = item % segments * segment, end = first + segment < length ? first + segment : length;
    const T* row = a + item / segments * row_stride;
    int64_t c = first;
    if (packed) {
      const auto add = [&](auto count) {
        constexpr int packs = decltype(count)::value;
        constexpr int64_t width = 32 * pack * packs;
        for (; c + width <= end; c += width) {
          Pack<T> x[packs];  // all on their way before the first is used
          const int64_t at = c + team.lane() * pack;
#pragma unroll
          for (int k = 0; k < packs; ++k) x[k] = *reinterpret_cast<const Pack<T>*>(row + at + k * 32 * pack);
#pragma unroll
          for (int k = 0; k < packs; ++k) sum += energy(x[k], begin - at - k * 32 * pack, stop - at - k * 32 * pack);
        }
      };
      add(std::integral_constant<int, 4>{});
      add(std::integral_constant<int, 1>{});
    }
#pragma unroll 8
    for (int64_t i = c + team.lane(); i < end; i += 32) {
      const double entry = begin <= i && i < stop ? widened(row[i * col_stride]) : 0.0f;
      sum += entry * entry;
    }
  }
  PKT_STATIC_SHARED_ARRAY(double, warp_sum, 8);
  sum = team.sum(sum);
  if (team.lane() == 0) warp_sum[team.worker()] = sum;
  team.sync();
  if (team.thread() == 0) {
    double total = 0;
    for (int i = 0; i < team.workers(); ++i) total += warp_sum[i];
    p.partial[blockIdx.x] = total;
  }
  if (!last_block(&p.state->counter) || team.worker() != 0) return;
  double total = 0;
  for (int i = team.lane(); i < static_cast<int>(gridDim.x); i += 32) total += p.partial[i];
  total = team.sum(total);
  if (team.lane() != 0) return;
  const bool finite = total - total == 0;
  int exponent = 0;
  if (finite && total > 0) {
    exponent = ilogb(total) / 2;
    exponent = exponent > 120 ? 120 : exponent < -120 ? -120 : exponent;
  }
  *p.energy = total;
  p.scale[0] = ldexpf(1.0f, -exponent);
  p.scale[1] = finite ? 1.0f : 0.0f;
}

// Whether neighbours of a's rows met the operand's zeros in the last product, whose rows are `side`'s.
PKT_HOST_DEVICE bool met_neighbours(const Problem& p, Side side) {
  return p.before + p.after > 0 && side == (p.col_stride == 1 ? Side::n : Side::m);
}

// Rows of the last product that are NaN though a is finite, made again without a's neighbours: one of them is not finite,
// and zero did not silence it. 256 threads; a warp a row.
template <class T>
__global__ void __launch_bounds__(256) mend_kernel(const PKT_GRID_CONSTANT Batch batch, Side side) {
  const Problem& p = batch.problem[blockIdx.y];
  if (!met_neighbours(p, side) || p.scale[1] == 0) return;
  const Block team;
  const bool by_rows = side == Side::n;
  const int rows = by_rows ? p.n : p.m, depth = by_rows ? p.m : p.n, columns = p.l * Type<T>::parts;
  const T* operand = static_cast<const T*>(by_rows ? p.operand_m : p.operand_n);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * team.workers() + team.worker(); row < rows;
       row += static_cast<int64_t>(gridDim.x) * team.workers()) {
    float* product = p.product + row * columns;
    const float first = product[0];
    team.sync_worker();
    if (first == first) continue;
    const T* a = static_cast<const T*>(p.a) + row * (by_rows ? p.row_stride : p.col_stride);
    for (int j = team.lane(); j < columns; j += 32) {
      float sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += widened(a[k]) * widened(operand[k * columns + j]);
      product[j] = sum;
    }
  }
}

// q and its operand ← random signs of unit norm.
template <class T>
__global__ void __launch_bounds__(256) sketch_kernel(const PKT_GRID_CONSTANT Batch batch) {
  const Problem& p = batch.problem[blockIdx.y];
  const float size = 1 / sqrtf(static_cast<float>(p.m));
  const int64_t count = static_cast<int64_t>(p.m) * p.l;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < count;
       e += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t i = e / p.l;
    const int j = static_cast<int>(e % p.l);
    const float x = philox_sign(p.seed, i, 0, j) * size;
    p.q[e] = x;
    store_operand(static_cast<T*>(p.operand_m) + i * p.l * Type<T>::parts, p.l, j, x);
  }
}

PKT_HOST_DEVICE constexpr int rounded_up(int n, int to) { return (n + to - 1) / to * to; }

// The rows of R and x = R⁻ᵀ are this far apart.
PKT_HOST_DEVICE constexpr int small_pitch(int l) { return l <= kNarrow ? kNarrowPitch : l; }
// Doubles that gram_kernel's last block works in, which grow with l: g and x, floor, s, overlap, order, rotated and norm; of
// narrow matrices also two rotations in fp32 and what their SVD needs.
PKT_HOST_DEVICE constexpr int64_t small_doubles(int64_t l) {
  constexpr int64_t narrow =
      2 * kNarrow * kNarrowPitch + 4 * kNarrow + kMaxSweeps + kNarrow * kNarrow + narrow_svd_doubles();
  const int64_t doubles = 2 * l * l + 4 * l + kMaxSweeps;
  return doubles > narrow ? doubles : narrow;
}
// Shared doubles of its other blocks: a tile of rows, its pitch free of bank conflicts.
PKT_HOST_DEVICE constexpr int gram_rows(int l) { return l <= kNarrow ? 128 : 64; }
PKT_HOST_DEVICE constexpr int gram_pitch(int l) { return rounded_up(l, 16) + 8; }
PKT_HOST_DEVICE constexpr int64_t tile_doubles(int l) { return int64_t{gram_rows(l)} * gram_pitch(l); }

// This block's share of xᵀx [l8, l8] (l8 = l rounded up to 8), its upper 8×8 tiles, into `out`.
template <class T>
PKT_DEVICE void partial_gram(const Block& team, const Problem& p, Side side, Source source, double* tile, double* out) {
  const int rows = side == Side::m ? p.m : p.n, l = p.l, l8 = rounded_up(l, 8), pitch = gram_pitch(l), tiles = l8 / 8;
  const float* basis = side == Side::m ? p.q : p.y;
  const float scale = p.scale[0];
  const int blocks = gridDim.x, height = gram_rows(l), share = rounded_up((rows + blocks - 1) / blocks, height);
  const int begin = static_cast<int>(blockIdx.x) * share, end = begin + share < rows ? begin + share : rows;
  int row = begin;
  do {  // once at least: where there are no rows, zeros
    team.sync();
    for (int j = team.lane(); j < l8; j += 32) {
#pragma unroll 4
      for (int i = team.worker(); i < height; i += team.workers()) {
        const int64_t at = row + i;
        float x = 0;
        if (at < end && j < l) {
          x = source == Source::basis ? basis[at * l + j]
                                      : load_product<T>(p.product + at * l * Type<T>::parts, l, j, scale);
        }
        tile[i * pitch + j] = x;
      }
    }
    team.sync();
    for (int t = team.worker(); t < tiles * tiles; t += team.workers()) {
      const int i0 = t / tiles * 8, j0 = t % tiles * 8;
      if (i0 > j0) continue;
      double sum[2] = {0, 0}, more[2] = {0, 0};  // two chains
      const double* from = tile + team.lane() % 4 * pitch + team.lane() / 4;
#pragma unroll 4
      for (int k = 0; k < height; k += 8) {
        multiply_8x8x4(sum, from[k * pitch + i0], from[k * pitch + j0]);
        multiply_8x8x4(more, from[(k + 4) * pitch + i0], from[(k + 4) * pitch + j0]);
      }
      double* to = out + (i0 + team.lane() / 4) * l8 + j0 + team.lane() % 4 * 2;
      to[0] = (row == begin ? 0 : to[0]) + (sum[0] + more[0]);
      to[1] = (row == begin ? 0 : to[1]) + (sum[1] + more[1]);
    }
    row += height;
  } while (row < end);
}

// total ← g · total for upper [l, l] matrices, g's rows `pitch` apart; the first time g itself.
template <class Team>
PKT_DEVICE void accumulate_total(const Team& team, const double* g, int pitch, double* total, int l, bool first) {
  double* next = first ? total : total + static_cast<int64_t>(l) * l;
  for (int e = team.thread(); e < l * l; e += team.threads()) {
    const int i = e / l, j = e % l;
    double sum = first && i <= j ? g[i * pitch + j] : 0;
    for (int k = first ? l : i; k <= j; ++k) sum += g[i * pitch + k] * total[k * l + j];
    next[e] = sum;
  }
  team.sync();
  if (first) return;
  for (int e = team.thread(); e < l * l; e += team.threads()) total[e] = next[e];
  team.sync();
}

// s, stats, and the two rotations: apply = R⁻¹ · left (x holds R⁻ᵀ), apply_v = right.
PKT_DEVICE void finish(const Block& team, const Problem& p, const double* x, float* left, float* s, double* work) {
  const int l = p.l, pitch = small_pitch(l);
  float *right = left + static_cast<int64_t>(l) * l, *overlap = s + l;
  int *order = reinterpret_cast<int*>(s + 2 * l), *rotated = order + l;
  if (l > kNarrow || !narrow_svd(team, p.total, l, left, right, s, order, rotated, work)) {
    float* scratch = reinterpret_cast<float*>(p.partial);  // its sums are used up
    small_svd(team, p.total, l, left, right, s, overlap, order, rotated, scratch, 6e-8f, p.seed);
  }
  for (int e = team.thread(); e < l * l; e += team.threads()) {
    const int i = e / l, j = e % l;
    double sum = 0;
    for (int k = i; k < l; ++k) sum += x[k * pitch + i] * left[order[j] * l + k];
    p.apply[e] = static_cast<float>(sum);
    p.apply_v[e] = right[order[j] * l + i];
  }
  const bool finite = p.scale[1] != 0;
  for (int j = team.thread(); j < p.rank; j += team.threads()) p.s[j] = finite ? s[order[j]] / p.scale[0] : 0;
  if (team.thread() != 0) return;
  double captured = 0;
  for (int j = 0; j < p.rank; ++j) captured += static_cast<double>(s[order[j]]) * s[order[j]];
  const double total = *p.energy;
  captured /= static_cast<double>(p.scale[0]) * p.scale[0];
  const double missed = total > captured ? 1 - captured / total : 0;
  p.stats[0] = finite ? static_cast<float>(total) : 0;
  p.stats[1] = finite ? static_cast<float>(captured) : 0;
  p.stats[2] = finite ? static_cast<float>(sqrt(missed)) : 0;
  p.stats[3] = finite ? 1 : 0;
}

// Whether this round has nothing to orthogonalize.
PKT_DEVICE bool idle(const Problem& p, Side side, Stage stage, int round) {
  if (round == 0) return false;
  return stage == Stage::power ? side == Side::n && p.state->steep == 0 : p.state->unsettled != round;
}

// What the factors of this round say about the next.
PKT_DEVICE void judge(const Block& team, const Problem& p, const double* g, const double* x, const double* norm, Side side,
                      Stage stage, int round) {
  PKT_STATIC_SHARED(int, uneven);
  const int l = p.l, pitch = small_pitch(l);
  if (team.thread() == 0) uneven = 0;
  team.sync();
  for (int j = team.thread(); j < l; j += team.threads()) {
    double sum = 0;
    for (int k = 0; k <= j; ++k) sum += fabs(x[j * pitch + k]) * norm[k];
    if (x[j * pitch + j] == 0 || !(sum <= kUneven)) team.raise(&uneven);
  }
  double least = g[0], most = g[0];
  if (team.thread() == team.threads() - 1) {
    for (int j = 1; j < l; ++j) {
      const double pivot = g[j * pitch + j];
      least = pivot < least ? pivot : least;
      most = pivot > most ? pivot : most;
    }
  }
  team.sync();
  if (team.thread() != team.threads() - 1) return;
  if (stage == Stage::power && side == Side::m) p.state->steep = !(least >= kSteep * most);
  if (stage != Stage::power || side == Side::m) p.state->unsettled = (stage == Stage::power ? 0 : round) + uneven;
}

// apply ← R⁻¹ for the R of x = Q R; 512 threads. In y's last rounds R is accumulated, and after the last one comes its SVD.
template <class T>
__global__ void __launch_bounds__(512) gram_kernel(const PKT_GRID_CONSTANT Batch batch, Side side, Source source,
                                                   Stage stage, int round, bool small_is_shared) {
  PKT_SHARED(double, shared);
  const Problem& p = batch.problem[blockIdx.y];
  if (idle(p, side, stage, round)) return;
  const Block team;
  const int l = p.l, l8 = rounded_up(l, 8), pitch = small_pitch(l);
  partial_gram<T>(team, p, side, source, shared, p.partial + static_cast<int64_t>(blockIdx.x) * l8 * l8);
  if (!last_block(&p.state->counter)) return;

  double* g = small_is_shared ? shared : p.small;
  double* x = g + static_cast<int64_t>(l) * pitch;
  double* floor = x + static_cast<int64_t>(l) * pitch;
  double* norm = floor + 3 * l + kMaxSweeps;
  for (int e = team.thread(); e < l8 * l8 / 2; e += team.threads()) {
    const int i = 2 * e / l8, j = 2 * e % l8;
    if (i / 8 > j / 8) continue;
    double sum[2] = {0, 0};
    const double* from = p.partial + 2 * e;
#pragma unroll 11
    for (int b = 0; b < static_cast<int>(gridDim.x); ++b) {
      const Pack<double> two = *reinterpret_cast<const Pack<double>*>(from + static_cast<int64_t>(b) * l8 * l8);
      sum[0] += two.entry[0], sum[1] += two.entry[1];
    }
    for (int k = 0; k < 2; ++k) {
      if (i < l && j + k < l) g[i * pitch + j + k] = sum[k];
    }
  }
  team.sync();
  // The block's columns first come as a power of aᵀa made them, and are measured by the largest; later, each by itself.
  const bool by_largest = source == Source::product && side == Side::m;
  double largest = 0;
  if (by_largest) {
    for (int j = 0; j < l; ++j) largest = g[j * pitch + j] > largest ? g[j * pitch + j] : largest;
  }
  for (int j = team.thread(); j < l; j += team.threads()) {
    const double square = g[j * pitch + j], reference = kDependent * kDependent * (by_largest ? largest : square);
    floor[j] = reference > kNothing ? reference : kNothing;
    norm[j] = sqrt(square);
  }
  if (l <= kNarrow) {
    narrow_cholesky(team, g, x, l, floor);
  } else {
    team.sync();
    cholesky(team, g, x, l, floor);
  }
  judge(team, p, g, x, norm, side, stage, round);
  if (stage == Stage::last) {
    accumulate_total(team, g, pitch, p.total, l, round == 0);
    if (round == 2 || p.state->unsettled == round) {
      // R is in `total`, and g's room free, but a narrow matrix has its own.
      double* free = l <= kNarrow ? norm + l : g;
      finish(team, p, x, reinterpret_cast<float*>(free), reinterpret_cast<float*>(floor), free + kNarrow * kNarrow);
      return;
    }
  }
  for (int e = team.thread(); e < l * l; e += team.threads()) p.apply[e] = static_cast<float>(x[e % l * pitch + e / l]);
}

// Floats of shared memory that `multiply_rows` takes.
PKT_HOST_DEVICE constexpr int64_t rows_floats(int64_t l) { return kApplyRows * l + (l <= kCached ? l * l : 0); }

// store(i, j, Σ_k load(i, k) by[k, j]) for all rows and j < columns, by [l, l]; 256 threads.
template <class Load, class Store>
PKT_DEVICE void multiply_rows(const Block& team, int rows, int l, int columns, const float* by, float* shared,
                              const Load& load, const Store& store) {
  constexpr int height = kApplyRows / 8;  // rows of a warp
  float* cached = shared + kApplyRows * l;
  if (l <= kCached) {
    for (int e = team.thread(); e < l * l; e += team.threads()) cached[e] = by[e];
  }
  const auto multiply = [&](const float* factor, int64_t first, int j) {
    const float* row = shared + team.worker() * height * l;
    float sum[height] = {};
#pragma unroll 8
    for (int k = 0; k < l; ++k) {
      const float x = factor[k * l + j];
#pragma unroll
      for (int i = 0; i < height; ++i) sum[i] += row[i * l + k] * x;
    }
#pragma unroll
    for (int i = 0; i < height; ++i) {
      const int64_t at = first + team.worker() * height + i;
      if (at < rows) store(at, j, sum[i]);
    }
  };
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kApplyRows; first < rows;
       first += static_cast<int64_t>(gridDim.x) * kApplyRows) {
    team.sync();
    for (int k = team.lane(); k < l; k += 32) {
#pragma unroll
      for (int i = 0; i < height; ++i) {
        const int row = team.worker() * height + i;
        if (first + row < rows) shared[row * l + k] = load(first + row, k);
      }
    }
    team.sync();
    for (int j = team.lane(); j < columns; j += 32) {
      if (l <= kCached) {
        multiply(cached, first, j);
      } else {
        multiply(by, first, j);
      }
    }
  }
}

// q or y, if they are kept, and the operand, before the last product ← rows · apply; columns without a pivot become random
// ones. Where y was not made orthogonal, its columns are scaled to about 1 by what aᵀa made of the last ones, for fp16. 256
// threads.
template <class T>
__global__ void __launch_bounds__(256, 4) apply_kernel(const PKT_GRID_CONSTANT Batch batch, Side side, Source source,
                                                       Stage stage, int round, bool keep, uint32_t stream) {
  PKT_SHARED(float, shared);
  const Problem& p = batch.problem[blockIdx.y];
  const int unsettled = p.state->unsettled;
  if (stage == Stage::settle && unsettled < round) return;
  if (stage == Stage::last && unsettled <= round) return;
  const Block team;
  const int rows = side == Side::m ? p.m : p.n, l = p.l;
  float* basis = side == Side::m ? p.q : p.y;
  T* operand = static_cast<T*>(side == Side::m ? p.operand_m : p.operand_n);
  const float scale = p.scale[0], random_size = sqrtf(3.0f / rows);
  const auto load = [&](int64_t i, int k) {
    return source == Source::basis ? basis[i * l + k]
                                   : load_product<T>(p.product + i * l * Type<T>::parts, l, k, scale);
  };
  const auto store = [&](int64_t i, int j, float x) {
    if (keep) basis[i * l + j] = x;
    if (stage != Stage::last) store_operand(operand + i * l * Type<T>::parts, l, j, x);
  };
  if (stage == Stage::power && idle(p, side, stage, round)) {
    for (int j = team.lane(); j < l; j += 32) {
      const float square = p.apply[j * l + j];
      const int half = square > 0 ? ilogbf(square) / 2 : 0;
      const float by = square > 0 ? ldexpf(1.0f, half < 8 ? half : 8) : 1.0f;
#pragma unroll 4
      for (int64_t i = blockIdx.x * 8 + team.worker(); i < rows; i += gridDim.x * 8) store(i, j, load(i, j) * by);
    }
    return;
  }
  multiply_rows(team, rows, l, l, p.apply, shared, load, [&](int64_t i, int j, float x) {
    const bool dependent = p.apply[j * l + j] == 0;
    store(i, j, dependent ? random_size * philox_uniform(p.seed, i, stream, j) : x);
  });
}

// v = q · apply_v and u = y · apply, their first `rank` columns; zero where a is not finite. y is the last product where that
// needed no round. 256 threads.
template <class T>
__global__ void __launch_bounds__(256) write_kernel(const PKT_GRID_CONSTANT Batch batch, Side side) {
  PKT_SHARED(float, shared);
  const Problem& p = batch.problem[blockIdx.y];
  const Block team;
  const int l = p.l, rank = p.rank;
  const float* basis = side == Side::m ? p.q : p.y;
  float* to = side == Side::m ? p.v : p.u;
  const bool finite = p.scale[1] != 0, from_product = side == Side::n && p.state->unsettled == 0;
  const float scale = p.scale[0];
  multiply_rows(
      team, side == Side::m ? p.m : p.n, l, rank, side == Side::m ? p.apply_v : p.apply, shared,
      [&](int64_t i, int k) {
        return from_product ? load_product<T>(p.product + i * l * Type<T>::parts, l, k, scale) : basis[i * l + k];
      },
      [&](int64_t i, int j, float x) { to[i * rank + j] = finite ? x : 0; });
}

}  // namespace pkt
