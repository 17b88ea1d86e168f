// The order in which the kernels of rsvd_kernels.cuh run, and the memory that they run in.
//
// Where memory comes from and who multiplies is a `Device`'s business: rsvd_cuda.cu has torch's, the tests have one that
// emulates a GPU. It has
//   Given                                a matrix as the caller has it, and stored<T>(given), where that is
//   Buffer                               memory, kept until the kernels that use it are launched
//   allocate<T>(rows, columns)           an uninitialised Buffer; data<T>(buffer) is where; zero(buffer)
//   multiply<T>(given, a, right, out)    out = a · right in fp32, for a view `a` of the given matrix's memory
//
// cuBLAS multiplies fast what begins on 16 bytes and has rows of a multiple of them; seven of eight windows of a bf16
// matrix do not. So a window's view is widened to such bounds where the memory it lies in goes on: the operand has zeros
// where the window's neighbours are, or the product has rows there that nobody reads. A neighbour that is not finite
// spoils a row of the product all the same, and mend_kernel makes it again.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "rsvd_kernels.cuh"
#include "rsvd_types.h"

namespace pkt {

// Whether the small matrices of up to `columns` columns may need global memory. The widest problem of a batch decides
// for all of it.
inline bool small_may_be_global(int64_t columns, size_t shared_limit) {
  return small_doubles(columns) * sizeof(double) > shared_limit;
}

struct Launches {
  Batch batch;
  int count;  // of its problems
  cudaStream_t stream;
  size_t shared_limit;  // bytes of shared memory a block may ask for
  cudaError_t error = cudaSuccess;
  uint32_t random_stream = 0;  // of the columns that replace dependent ones

  int largest(int Problem::* field) const {
    int result = 0;
    for (int i = 0; i < count; ++i) result = std::max(result, batch.problem[i].*field);
    return result;
  }
  bool small_is_shared() const { return !small_may_be_global(largest(&Problem::l), shared_limit); }

  template <class Kernel, class... Arguments>
  void run(Kernel kernel, int64_t blocks, int64_t most, int threads, size_t shared, const Arguments&... arguments) {
    const dim3 grid(static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, most)), static_cast<unsigned>(count));
    const cudaError_t result = launch(kernel, grid, threads, shared, stream, batch, arguments...);
    if (error == cudaSuccess) error = result;
  }

  int rows(Side side) const { return largest(side == Side::m ? &Problem::m : &Problem::n); }

  template <class T>
  void mend(Side side) {
    bool needed = false;
    for (int i = 0; i < count; ++i) needed |= met_neighbours(batch.problem[i], side);
    if (needed) run(mend_kernel<T>, rows(side) / 8, 2048, 256, 0, side);
  }
  template <class T>
  void gram(Side side, Source source, Stage stage, int64_t round) {
    const bool small = small_is_shared();
    int64_t doubles = small ? small_doubles(largest(&Problem::l)) : 0;
    int height = 1 << 30;
    for (int i = 0; i < count; ++i) {
      doubles = std::max(doubles, tile_doubles(batch.problem[i].l));
      height = std::min(height, gram_rows(batch.problem[i].l));
    }
    const int most = std::clamp(3 * kGramBlocks / count, 8, kGramBlocks);
    run(gram_kernel<T>, rows(side) / height, most, 512, doubles * sizeof(double), side, source, stage,
        static_cast<int>(round), small);
  }
  // `keep`: the rows themselves are wanted, not their operand alone.
  template <class T>
  void apply(Side side, Source source, Stage stage, int64_t round, bool keep) {
    run(apply_kernel<T>, (rows(side) + kApplyRows - 1) / kApplyRows, 1024, 256, tile_bytes(), side, source, stage,
        static_cast<int>(round), keep, ++random_stream);
  }
  template <class T>
  void write(Side side) {
    run(write_kernel<T>, (rows(side) + kApplyRows - 1) / kApplyRows, 1024, 256, tile_bytes(), side);
  }
  size_t tile_bytes() const {
    int64_t floats = 0;
    for (int i = 0; i < count; ++i) floats = std::max(floats, rows_floats(batch.problem[i].l));
    return floats * sizeof(float);
  }
};

// All problems' `a` are of type T. multiply(i, false) sets problem i's product to a · operand_m, multiply(i, true) to
// aᵀ · operand_n; it stays there until the next.
template <class T, class Multiply>
cudaError_t subspace_iteration(Launches& launches, int64_t iters, const Multiply& multiply) {
  const int64_t n = launches.rows(Side::n), m = launches.rows(Side::m), l = launches.largest(&Problem::l);
  const auto product = [&](Side side) {
    for (int i = 0; i < launches.count; ++i) multiply(i, side == Side::m);
    launches.mend<T>(side);
  };
  launches.run(energy_kernel<T>, std::max(n / 8, m / 8), kEnergyBlocks, 256, 0);
  launches.run(sketch_kernel<T>, (m * l + 255) / 256, 2048, 256, 0);
  for (int64_t step = 0; step < iters; ++step) {
    // Orthogonal on both sides where a's directions differ much: a alone, never aᵀa, meets fp32 then, so that those far
    // below the first survive. Elsewhere y's kernels do nothing but write the operand.
    for (const Side side : {Side::n, Side::m}) {
      product(side);
      launches.gram<T>(side, Source::product, Stage::power, step);
      launches.apply<T>(side, Source::product, Stage::power, step, side == Side::m && step + 1 == iters);
    }
  }
  // One round leaves an error of κ · eps and, where columns were dependent, random ones: two more mend both.
  for (int64_t round = iters > 0 ? 1 : 0; round < 3; ++round) {
    launches.gram<T>(Side::m, Source::basis, Stage::settle, round);
    launches.apply<T>(Side::m, Source::basis, Stage::settle, round, true);
  }
  product(Side::n);
  for (int64_t round = 0; round < 3; ++round) {
    const Source source = round == 0 ? Source::product : Source::basis;
    launches.gram<T>(Side::n, source, Stage::last, round);
    if (round < 2) launches.apply<T>(Side::n, source, Stage::last, round, true);
  }
  launches.write<T>(Side::n);
  launches.write<T>(Side::m);
  return launches.error;
}

// A matrix [n, m], and how many entries of the memory it is a view of lie in front of its first, and behind its last.
struct Stored {
  Matrix matrix;
  int64_t before, after;
};

// How many entries each contiguous row (or column) is widened by.
struct Margin {
  int64_t before = 0, after = 0;
  int64_t both() const { return before + after; }
};

template <class T>
Margin margin(const Stored& s) {
  constexpr int64_t pack = Pack<T>::size;
  const Matrix& a = s.matrix;
  const bool by_rows = a.col_stride == 1;
  if (!by_rows && a.row_stride != 1) return {};
  const int64_t length = by_rows ? a.m : a.n, pitch = by_rows ? a.row_stride : a.col_stride;
  const int64_t before = static_cast<int64_t>(reinterpret_cast<uintptr_t>(a.a) / sizeof(T) % pack), end = before + length;
  if (pitch % pack != 0 || before > s.before || end > pitch) return {};
  const int64_t after = (end + pack - 1) / pack * pack - end;
  return {before, after <= s.after && end + after <= pitch ? after : 0};
}

// What one problem's pointers point to; `a` is widened by its margin.
template <class Device>
struct Workspace {
  typename Device::Given given;
  Matrix a;
  typename Device::Buffer operand_m, operand_n, product;
  float *product_m = nullptr, *product_n = nullptr;  // behind the margin's rows
  std::vector<typename Device::Buffer> others{};
};

template <class X, class Device>
X* take(const Device& device, Workspace<Device>& work, int64_t count) {
  return Device::template data<X>(work.others.emplace_back(device.template allocate<X>(count, 1)));
}

// Columns of the basis for a matrix of `m`. At least 8/5 of the rank, as far as shared memory holds them: a step of subspace
// iteration gains (σ_l / σ_rank)², which a fixed oversample leaves near 1 for a large rank. Throws where this GPU's shared
// memory does not hold a tile of rank + oversample.
inline int64_t basis_columns(const Options& options, int64_t m, size_t shared_limit) {
  const auto fits = [&](int64_t l) { return tile_doubles(static_cast<int>(l)) * sizeof(double) <= shared_limit; };
  const int64_t asked = (options.rank + options.oversample + 15) / 16 * 16;
  int64_t good = std::min<int64_t>((options.rank * 8 / 5 + 8) / 16 * 16, INT16_MAX / 16 * 16);
  while (good > asked && !fits(good)) good -= 16;
  const int64_t l = std::min({std::max(asked, good), int64_t{INT16_MAX}, m});
  if (!fits(l)) {
    throw std::runtime_error("pkt::rsvd: rank " + std::to_string(options.rank) + " with oversample " +
                             std::to_string(options.oversample) + " takes " + std::to_string(l) +
                             " columns, more than this GPU's shared memory holds; use a smaller rank, or the CPU");
  }
  return l;
}

// Memory for a [n, m] = stored.matrix, n ≥ m, and its l columns; `p` says where, but for the results.
template <class T, class Device>
Workspace<Device> allocate(const Device& device, const typename Device::Given& given, const Stored& stored, int64_t l,
                           bool small_is_global, Problem& p) {
  const Matrix& a = stored.matrix;
  const Margin beside = margin<T>(stored);
  const bool by_rows = a.col_stride == 1;
  const Margin of_m = by_rows ? beside : Margin{}, of_n = by_rows ? Margin{} : beside;
  const int64_t rows_m = a.m + of_m.both(), rows_n = a.n + of_n.both(), columns = Type<T>::parts * l;
  Workspace<Device> work{given,
                         {static_cast<const T*>(a.a) - beside.before, a.dtype, rows_n, rows_m, a.row_stride, a.col_stride},
                         device.template allocate<T>(rows_m, columns),
                         device.template allocate<T>(rows_n, columns),
                         device.template allocate<float>(std::max(rows_m, rows_n), columns)};
  if (beside.both() > 0) device.zero(by_rows ? work.operand_m : work.operand_n);
  work.product_m = Device::template data<float>(work.product) + of_m.before * columns;
  work.product_n = Device::template data<float>(work.product) + of_n.before * columns;
  p.before = static_cast<int>(beside.before), p.after = static_cast<int>(beside.after);
  p.operand_m = Device::template data<T>(work.operand_m) + of_m.before * columns;
  p.operand_n = Device::template data<T>(work.operand_n) + of_n.before * columns;
  const int64_t l8 = rounded_up(static_cast<int>(l), 8);
  p.q = take<float>(device, work, a.m * l), p.y = take<float>(device, work, a.n * l);
  p.partial = take<double>(device, work, std::max<int64_t>(kGramBlocks * l8 * l8, kEnergyBlocks));
  p.small = small_is_global ? take<double>(device, work, small_doubles(l)) : nullptr;
  p.total = take<double>(device, work, 2 * l * l), p.energy = take<double>(device, work, 1);
  p.apply = take<float>(device, work, l * l), p.apply_v = take<float>(device, work, l * l);
  p.scale = take<float>(device, work, 2);
  p.state = reinterpret_cast<State*>(take<int>(device, work, sizeof(State) / sizeof(int)));
  device.zero(work.others.back());
  return work;
}

// Fills `p`, but for what the kernels compute. Throws where the device cannot hold the problem.
template <class T, class Device>
Workspace<Device> prepare(const Device& device, const typename Device::Given& given, const Options& options,
                          const Factors& out, size_t shared_limit, Problem& p) {
  Stored stored = device.template stored<T>(given);
  const Matrix& a = stored.matrix;
  const bool wide = a.n < a.m;
  if (wide) stored.matrix = transposed(a);
  if (a.n > INT32_MAX / 2) throw std::runtime_error("pkt::rsvd: a side of " + std::to_string(a.n) + " is too long");
  const int64_t l = basis_columns(options, a.m, shared_limit);
  p.a = a.a, p.row_stride = a.row_stride, p.col_stride = a.col_stride;
  p.n = static_cast<int>(a.n), p.m = static_cast<int>(a.m), p.l = static_cast<int>(l);
  p.rank = static_cast<int>(options.rank), p.seed = options.seed;
  p.u = wide ? out.v : out.u, p.s = out.s, p.v = wide ? out.u : out.v, p.stats = out.stats;
  // The widest problem of a batch decides where its small matrices are, and none is wider than this.
  const bool small_is_global = small_may_be_global(basis_columns(options, INT16_MAX, SIZE_MAX), shared_limit);
  return allocate<T>(device, given, stored, l, small_is_global, p);
}

// The factors of each matrix, all of type T, on the stream.
template <class T, class Device>
cudaError_t factorize(const Device& device, const std::vector<typename Device::Given>& given, const Options& options,
                      const std::vector<Factors>& out, size_t shared_limit, cudaStream_t stream) {
  for (size_t first = 0; first < given.size(); first += kBatch) {
    const size_t count = std::min<size_t>(given.size() - first, kBatch);
    Launches launches{{}, static_cast<int>(count), stream, shared_limit};
    std::vector<Workspace<Device>> work;
    for (size_t i = 0; i < count; ++i) {
      Problem& problem = launches.batch.problem[i];
      work.push_back(prepare<T>(device, given[first + i], options, out[first + i], shared_limit, problem));
    }
    const cudaError_t error = subspace_iteration<T>(launches, options.iters, [&](int i, bool transpose) {
      const Workspace<Device>& w = work[i];
      device.template multiply<T>(w.given, transpose ? transposed(w.a) : w.a, transpose ? w.operand_n : w.operand_m,
                                  w.product);
      launches.batch.problem[i].product = transpose ? w.product_m : w.product_n;
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace pkt
