// pkt::rsvd and pkt::rsvd_batch for CPU tensors. The schemas are in pkt/ops.

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "block_krylov.h"
#include "from_torch.h"
#include "rsvd_check.h"

namespace {

using torch::stable::Tensor;

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Fills `stats` [4]; returns U, S and V.
std::tuple<Tensor, Tensor, Tensor> factorize(const Tensor& a, const pkt::Options& options, float* stats) {
  pkt::check(a, options.rank, options.oversample, options.iters);
  const int64_t n = a.size(0), m = a.size(1), rank = options.rank;
  // Entries of the basis' eigenproblem are counted in ints.
  const int64_t basis = std::min({n, m, (rank + options.oversample + 15) * (options.iters + 1)});
  STD_TORCH_CHECK(basis <= 46340, "pkt::rsvd: a basis of ", basis,
                  " columns is too wide; use a smaller rank, oversample or iters");
  Tensor u = pkt::empty({n, rank});
  Tensor s = pkt::empty({rank});
  Tensor v = pkt::empty({m, rank});
  pkt::Matrix x{a.const_data_ptr(), pkt::dtype_of(a), n, m, a.stride(0), a.stride(1)};
  pkt::Factors out{floats(u), floats(s), floats(v), stats};
  if (n < m) {
    x = pkt::transposed(x);
    std::swap(out.u, out.v);
  }
  pkt::block_krylov_svd(x, options, out, pkt::torch_threads());
  return {u, s, v};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rsvd(const Tensor& a, int64_t rank, int64_t oversample, int64_t iters,
                                                int64_t seed) {
  Tensor stats = pkt::empty({4});
  auto [u, s, v] = factorize(a, {rank, oversample, iters, seed}, floats(stats));
  return {u, s, v, stats};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor> rsvd_batch(
    const std::vector<Tensor>& a, int64_t rank, int64_t oversample, int64_t iters, int64_t seed) {
  const auto count = static_cast<int64_t>(a.size());
  Tensor stats = pkt::empty({count, 4});
  std::vector<Tensor> us, ss, vs;
  for (int64_t i = 0; i < count; ++i) {
    auto [u, s, v] = factorize(a[i], {rank, oversample, iters, seed}, floats(stats) + 4 * i);
    us.push_back(u), ss.push_back(s), vs.push_back(v);
  }
  return {us, ss, vs, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pkt, CPU, m) {
  m.impl("rsvd", TORCH_BOX(&rsvd));
  m.impl("rsvd_batch", TORCH_BOX(&rsvd_batch));
}
