// pkt::linear_sensitivity_ for CPU tensors. The schema and its checks are in pkt/ops.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "abs_products.h"
#include "from_torch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "pkt::linear_sensitivity_: ";

pkt::Strided strided(const Tensor& t) {
  return {t.const_data_ptr(), pkt::dtype_of(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

void linear_sensitivity(Tensor acc, const Tensor& w, const Tensor& x, const Tensor& dy, const Tensor& seq_starts,
                        const Tensor& seq_lens, int64_t power, bool weighted) {
  STD_TORCH_CHECK(power == 1 && weighted, kOp, "this is compiled for power 1, weighted, only");
  STD_TORCH_CHECK(acc.dim() == 2 && w.dim() == 2 && x.dim() == 2 && dy.dim() == 2 && x.size(0) == dy.size(0) &&
                      w.size(0) == dy.size(1) && w.size(1) == x.size(1) && acc.size(0) == w.size(0) &&
                      acc.size(1) == w.size(1),
                  kOp, "the shapes do not fit together");
  const pkt::Dtype scores = pkt::dtype_of(acc);
  STD_TORCH_CHECK(scores == pkt::Dtype::fp32 || scores == pkt::Dtype::fp64, kOp, "the scores must be fp32 or fp64");
  for (const Tensor* t : {&seq_starts, &seq_lens})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->dim() == 1 && t->is_contiguous() &&
                        t->size(0) == seq_starts.size(0),
                    kOp, "seq_starts and seq_lens must be int64 vectors of one length");
  const auto* starts = static_cast<const int64_t*>(seq_starts.const_data_ptr());
  const auto* lens = static_cast<const int64_t*>(seq_lens.const_data_ptr());
  for (int64_t j = 0; j < seq_starts.size(0); ++j)
    STD_TORCH_CHECK(starts[j] >= 0 && lens[j] >= 0 && starts[j] + lens[j] <= x.size(0), kOp,
                    "a sample runs past the rows");
  pkt::add_abs_products({acc.mutable_data_ptr(), scores == pkt::Dtype::fp64, acc.stride(0), acc.stride(1), strided(w),
                         strided(x), strided(dy), starts, lens, seq_starts.size(0)},
                        pkt::torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pkt, CPU, m) { m.impl("linear_sensitivity_", TORCH_BOX(&linear_sensitivity)); }
