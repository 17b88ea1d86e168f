// The ops that accumulate sensitivities, for CPU tensors. The schemas and their checks are pkt.ops's.

#include <deque>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "abs_accumulate.h"
#include "abs_products.h"
#include "embedding_sums.h"
#include "from_torch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

pkt::Strided strided(const Tensor& t) {
  return {t.const_data_ptr(), pkt::dtype_of(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

pkt::Dtype scores_dtype(const Tensor& acc) {
  const pkt::Dtype dtype = pkt::dtype_of(acc);
  STD_TORCH_CHECK(dtype == pkt::Dtype::fp32 || dtype == pkt::Dtype::fp64, "pkt: the scores must be fp32 or fp64");
  return dtype;
}

pkt::Measure measure_of(int64_t power, bool weighted) {
  STD_TORCH_CHECK(power == 1 || power == 2, "pkt: a power of ", power, "; it must be 1 or 2");
  return {power, weighted};
}

// The samples of a batch of `rows`.
struct Samples {
  const int64_t *starts, *lens;
  int64_t count;
  Samples(const Tensor& seq_starts, const Tensor& seq_lens, int64_t rows) : count(seq_starts.size(0)) {
    for (const Tensor* t : {&seq_starts, &seq_lens})
      STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->dim() == 1 && t->is_contiguous() && t->size(0) == count,
                      "pkt: seq_starts and seq_lens must be int64 vectors of one length");
    starts = static_cast<const int64_t*>(seq_starts.const_data_ptr());
    lens = static_cast<const int64_t*>(seq_lens.const_data_ptr());
    for (int64_t j = 0; j < count; ++j)
      STD_TORCH_CHECK(starts[j] >= 0 && lens[j] >= 0 && starts[j] + lens[j] <= rows, "pkt: a sample runs past the rows");
  }
};

// Of elements where `tile` is 0.
void add_linear(const Tensor& acc, const Tensor& w, const Tensor& x, const Tensor& dy, const Tensor& seq_starts,
                const Tensor& seq_lens, int64_t tile, const pkt::Measure& measure) {
  const auto scores = [&](int64_t size) { return tile > 0 ? (size + tile - 1) / tile : size; };
  STD_TORCH_CHECK(acc.dim() == 2 && w.dim() == 2 && x.dim() == 2 && dy.dim() == 2 && x.size(0) == dy.size(0) &&
                      w.size(0) == dy.size(1) && w.size(1) == x.size(1) && acc.size(0) == scores(w.size(0)) &&
                      acc.size(1) == scores(w.size(1)),
                  "pkt::linear_sensitivity_: the shapes do not fit together");
  const Samples samples(seq_starts, seq_lens, x.size(0));
  const bool wide = scores_dtype(acc) == pkt::Dtype::fp64;
  pkt::add_abs_products({acc.mutable_data_ptr(), wide, acc.stride(0), acc.stride(1), strided(w), strided(x), strided(dy),
                         samples.starts, samples.lens, samples.count, tile, measure},
                        pkt::torch_threads());
}

void linear_sensitivity(Tensor acc, const Tensor& w, const Tensor& x, const Tensor& dy, const Tensor& seq_starts,
                        const Tensor& seq_lens, int64_t power, bool weighted) {
  add_linear(acc, w, x, dy, seq_starts, seq_lens, 0, measure_of(power, weighted));
}

void linear_sensitivity_tiles(Tensor tiles, const Tensor& w, const Tensor& x, const Tensor& dy, const Tensor& seq_starts,
                              const Tensor& seq_lens, int64_t tile, int64_t power, bool weighted) {
  STD_TORCH_CHECK(tile >= 1, "pkt::linear_sensitivity_tiles_: a tile of ", tile);
  add_linear(tiles, w, x, dy, seq_starts, seq_lens, tile, measure_of(power, weighted));
}

void embedding_sensitivity(Tensor acc, const Tensor& w, const Tensor& ids, const Tensor& dy, const Tensor& seq_starts,
                           const Tensor& seq_lens, int64_t power, bool weighted) {
  STD_TORCH_CHECK(acc.dim() == 2 && w.dim() == 2 && dy.dim() == 2 && ids.dim() == 1 && acc.size(0) == w.size(0) &&
                      acc.size(1) == w.size(1) && dy.size(1) == w.size(1) && ids.size(0) == dy.size(0) &&
                      ids.scalar_type() == ScalarType::Long,
                  "pkt::embedding_sensitivity_: the shapes do not fit together");
  const Samples samples(seq_starts, seq_lens, dy.size(0));
  std::vector<int64_t> tokens(ids.size(0));
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<const int64_t*>(ids.const_data_ptr())[i * ids.stride(0)];
  for (int64_t j = 0; j < samples.count; ++j) {
    for (int64_t i = samples.starts[j]; i < samples.starts[j] + samples.lens[j]; ++i)
      STD_TORCH_CHECK(tokens[i] >= 0 && tokens[i] < w.size(0), "pkt::embedding_sensitivity_: id ", tokens[i], " of ",
                      w.size(0), " rows");
  }
  const bool wide = scores_dtype(acc) == pkt::Dtype::fp64;
  pkt::add_abs_embedding({acc.mutable_data_ptr(), wide, acc.stride(0), acc.stride(1), strided(w), strided(dy),
                          tokens.data(), samples.starts, samples.lens, samples.count, measure_of(power, weighted)},
                         pkt::torch_threads());
}

void abs_accumulate_many(const std::vector<Tensor>& acc, const std::vector<Tensor>& theta,
                         const std::vector<Tensor>& grad, int64_t power, bool weighted) {
  STD_TORCH_CHECK(acc.size() == theta.size() && acc.size() == grad.size(), "pkt::abs_accumulate_: lists that differ");
  std::vector<pkt::Accumulation> all;
  std::deque<std::vector<int64_t>> shapes;
  const auto shape = [&](const Tensor& t, bool strides) {
    std::vector<int64_t>& to = shapes.emplace_back(t.dim());
    for (int64_t i = 0; i < t.dim(); ++i) to[i] = strides ? t.stride(i) : t.size(i);
    return to.data();
  };
  for (size_t i = 0; i < acc.size(); ++i) {
    const Tensor &a = acc[i], &t = theta[i], &g = grad[i];
    bool same = a.dim() == t.dim() && a.dim() == g.dim();
    for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == t.size(d) && a.size(d) == g.size(d);
    STD_TORCH_CHECK(same, "pkt::abs_accumulate_: shapes that differ");
    all.push_back({a.mutable_data_ptr(), t.const_data_ptr(), g.const_data_ptr(), scores_dtype(a), pkt::dtype_of(t),
                   pkt::dtype_of(g), a.dim(), shape(a, false), shape(a, true), shape(t, true), shape(g, true)});
  }
  pkt::accumulate_abs(measure_of(power, weighted), all.data(), static_cast<int64_t>(all.size()), pkt::torch_threads());
}

void abs_accumulate(Tensor acc, const Tensor& theta, const Tensor& grad, int64_t power, bool weighted) {
  abs_accumulate_many({acc}, {theta}, {grad}, power, weighted);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pkt, CPU, m) {
  m.impl("abs_accumulate_", TORCH_BOX(&abs_accumulate));
  m.impl("abs_accumulate_many_", TORCH_BOX(&abs_accumulate_many));
  m.impl("linear_sensitivity_", TORCH_BOX(&linear_sensitivity));
  m.impl("linear_sensitivity_tiles_", TORCH_BOX(&linear_sensitivity_tiles));
  m.impl("embedding_sensitivity_", TORCH_BOX(&embedding_sensitivity));
}
