// The order in which the kernels of rsvd_kernels.cuh run. The products with the big matrices are the caller's.
#pragma once

#include <algorithm>

#include "rsvd_kernels.cuh"

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
  void gram(Side side, Source source, Last last) {
    const int l = largest(&Problem::l);
    const bool small = small_is_shared();
    const int64_t doubles = std::max(tile_doubles(l), small ? small_doubles(l) : 0);
    run(gram_kernel<T>, rows(side) / kGramRows, kGramBlocks, 512, doubles * sizeof(double), side, source, last, small);
  }
  template <class T>
  void apply(Side side, Source source, bool with_operand) {
    run(apply_kernel<T>, (rows(side) + kApplyRows - 1) / kApplyRows, 1024, 256, tile_bytes(), side, source,
        with_operand, ++random_stream);
  }
  void write(Side side) {
    run(write_kernel, (rows(side) + kApplyRows - 1) / kApplyRows, 1024, 256, tile_bytes(), side);
  }
  size_t tile_bytes() const { return sizeof(float) * kApplyRows * largest(&Problem::l); }
};

// All problems' `a` are of type T. multiply(i, false) sets problem i's product to a · operand_m, multiply(i, true) to
// aᵀ · operand_n; it stays there until the next.
template <class T, class Multiply>
cudaError_t subspace_iteration(Launches& launches, int64_t iters, const Multiply& multiply) {
  const int64_t n = launches.rows(Side::n), m = launches.rows(Side::m), l = launches.largest(&Problem::l);
  launches.run(energy_kernel<T>, std::max(n / 8, m / 8), kEnergyBlocks, 256, 0);
  launches.run(sketch_kernel<T>, (m * l + 255) / 256, 2048, 256, 0);
  for (int64_t step = 0; step < iters; ++step) {
    for (int i = 0; i < launches.count; ++i) multiply(i, false);
    // Orthogonal on both sides: a alone, never aᵀa, meets fp32, so directions far below the first survive.
    launches.gram<T>(Side::n, Source::product, Last::round);
    launches.apply<T>(Side::n, Source::product, true);
    for (int i = 0; i < launches.count; ++i) multiply(i, true);
    launches.gram<T>(Side::m, Source::product, Last::round);
    launches.apply<T>(Side::m, Source::product, true);
  }
  // One round leaves an error of κ² · eps and, where columns were dependent, random ones: two more mend both.
  for (int round = iters > 0 ? 1 : 0; round < 3; ++round) {
    launches.gram<T>(Side::m, Source::basis, Last::round);
    launches.apply<T>(Side::m, Source::basis, true);
  }
  for (int i = 0; i < launches.count; ++i) multiply(i, false);
  launches.gram<T>(Side::n, Source::product, Last::round);
  launches.apply<T>(Side::n, Source::product, false);
  launches.gram<T>(Side::n, Source::basis, Last::round);
  launches.apply<T>(Side::n, Source::basis, false);
  launches.gram<T>(Side::n, Source::basis, Last::svd);
  launches.write(Side::n);
  launches.write(Side::m);
  return launches.error;
}

}  // namespace pkt
