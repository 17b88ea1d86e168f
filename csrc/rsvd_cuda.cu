// pkt::rsvd and pkt::rsvd_batch for CUDA tensors: workspaces, the products (torch's, so cuBLAS's), and the pipeline's
// launches on the current stream. Nothing here waits for the device.

#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include "rsvd_check.h"
#include "rsvd_pipeline.h"
#include "torch_memory.h"

namespace {

using pkt::empty;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Options {
  int64_t rank, oversample, iters, seed;
};

// What one problem's pointers point to, kept until its kernels are launched: the allocator is ordered by the stream.
struct Workspace {
  Tensor a, transposed, operand_m, operand_n, product_n, product_m;  // a has at least as many rows as columns
  std::vector<Tensor> others;
};

template <class T>
struct TypeOf;
template <>
struct TypeOf<pkt::Bf16> {
  static constexpr ScalarType value = ScalarType::BFloat16;
};
template <>
struct TypeOf<pkt::Fp16> {
  static constexpr ScalarType value = ScalarType::Half;
};
template <>
struct TypeOf<float> {
  static constexpr ScalarType value = ScalarType::Float;
};

// Rows and columns of a matrix's memory, however it is shaped, and apart from any gradient it wants.
Tensor view(const Tensor& a, int64_t rows, int64_t columns, int64_t row_stride, int64_t col_stride) {
  const int64_t size[] = {rows, columns}, stride[] = {row_stride, col_stride};
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(a.get(), 2, size, stride, 0, &result));
  return Tensor(result);
}

// out = a b, in fp32: for the half types by aten::mm.dtype, for without it mm would round to a's type.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  const bool half = a.scalar_type() != ScalarType::Float;
  std::vector<StableIValue> stack{from(a), from(b)};
  if (half) stack.push_back(from(ScalarType::Float));
  stack.push_back(from(out));
  const AOTITorchError error = half ? torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION)
                                    : torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION);
  if (error == TORCH_SUCCESS) {
    torch::stable::detail::to<Tensor>(stack[0]);  // out once more, which is ours to let go
    return;
  }
  // All that a product allocates here is cuBLAS's workspace: where as much cannot be had, that was the reason.
  constexpr int64_t workspace_bytes = 32 << 20;
  pkt::empty(out, {workspace_bytes}, ScalarType::Byte);
  STD_TORCH_CHECK(false, "pkt::rsvd: torch's product with a ", a.size(0), " by ", a.size(1), " matrix failed");
}

void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "pkt::rsvd: CUDA says: ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

struct Result {
  Tensor u, s, v;
};

template <class T>
Workspace prepare(const Tensor& matrix, const Options& options, const Result& result, float* stats, size_t shared_limit,
                  pkt::Problem& p) {
  constexpr int64_t parts = pkt::Type<T>::parts;
  constexpr ScalarType type = TypeOf<T>::value;
  const bool wide = matrix.size(0) < matrix.size(1);
  const Tensor by_rows = view(matrix, matrix.size(0), matrix.size(1), matrix.stride(0), matrix.stride(1));
  const Tensor by_columns = view(matrix, matrix.size(1), matrix.size(0), matrix.stride(1), matrix.stride(0));
  Workspace work;
  work.a = wide ? by_columns : by_rows;
  work.transposed = wide ? by_rows : by_columns;
  const Tensor& a = work.a;
  const int64_t columns = std::min<int64_t>((options.rank + options.oversample + 15) / 16 * 16, INT16_MAX);
  const int64_t n = a.size(0), m = a.size(1), l = std::min(columns, m);
  STD_TORCH_CHECK(n <= INT32_MAX / 2, "pkt::rsvd: a ", n, " by ", m, " matrix is too tall");
  STD_TORCH_CHECK(pkt::tile_doubles(static_cast<int>(l)) * sizeof(double) <= shared_limit,
                  "pkt::rsvd: rank ", options.rank, " with oversample ", options.oversample, " takes ", l,
                  " columns, more than this GPU's shared memory holds; use a smaller rank, or the CPU");
  const int64_t l8 = pkt::rounded_up(static_cast<int>(l), 8);
  const auto floats = [&](int64_t count) {
    return static_cast<float*>(work.others.emplace_back(empty(a, {count})).mutable_data_ptr());
  };
  const auto doubles = [&](int64_t count) {
    return static_cast<double*>(work.others.emplace_back(empty(a, {count}, ScalarType::Double)).mutable_data_ptr());
  };
  work.operand_m = empty(a, {m, parts * l}, type);
  work.operand_n = empty(a, {n, parts * l}, type);
  work.product_n = empty(a, {n, parts * l});
  work.product_m = view(work.product_n, m, parts * l, parts * l, 1);  // one is read before the other is made
  p.a = a.const_data_ptr(), p.row_stride = a.stride(0), p.col_stride = a.stride(1);
  p.n = static_cast<int>(n), p.m = static_cast<int>(m), p.l = static_cast<int>(l);
  p.rank = static_cast<int>(options.rank), p.seed = options.seed;
  p.operand_m = work.operand_m.mutable_data_ptr(), p.operand_n = work.operand_n.mutable_data_ptr();
  p.product = static_cast<float*>(work.product_n.mutable_data_ptr());
  p.q = floats(m * l), p.y = floats(n * l);
  p.partial = doubles(std::max<int64_t>(pkt::kGramBlocks * l8 * l8, pkt::kEnergyBlocks));
  p.small = pkt::small_may_be_global(columns, shared_limit) ? doubles(pkt::small_doubles(l)) : nullptr;
  p.total = doubles(2 * l * l);
  p.apply = floats(l * l), p.apply_v = floats(l * l), p.scale = floats(2), p.energy = doubles(1);
  Tensor& counter = work.others.emplace_back(empty(a, {1}, ScalarType::Int));
  torch::stable::zero_(counter);
  p.counter = static_cast<int*>(counter.mutable_data_ptr());
  p.u = static_cast<float*>(result.u.mutable_data_ptr()), p.s = static_cast<float*>(result.s.mutable_data_ptr());
  p.v = static_cast<float*>(result.v.mutable_data_ptr()), p.stats = stats;
  if (wide) std::swap(p.u, p.v);
  return work;
}

template <class T>
void factorize(const std::vector<Tensor>& matrices, const Options& options, const std::vector<Result>& results,
               const std::vector<float*>& stats) {
  int device = 0, shared_limit = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const auto limit = static_cast<size_t>(shared_limit) - 1024;  // the kernels' static share
  for (size_t first = 0; first < matrices.size(); first += pkt::kBatch) {
    const size_t count = std::min<size_t>(matrices.size() - first, pkt::kBatch);
    pkt::Launches launches{{}, static_cast<int>(count), current_stream(device), limit};
    std::vector<Workspace> work;
    for (size_t i = 0; i < count; ++i) {
      work.push_back(prepare<T>(matrices[first + i], options, results[first + i], stats[first + i], limit,
                                launches.batch.problem[i]));
    }
    check_cuda(pkt::subspace_iteration<T>(launches, options.iters, [&](int i, bool transposed) {
      const Workspace& w = work[i];
      transposed ? multiply(w.transposed, w.operand_n, w.product_m) : multiply(w.a, w.operand_m, w.product_n);
    }));
  }
}

// Matrices of one type go together, whatever their shapes.
std::vector<Result> factorize_all(const std::vector<Tensor>& a, const Options& options, const Tensor& stats) {
  std::vector<Result> results;
  for (const Tensor& x : a) {
    pkt::check(x, options.rank, options.oversample, options.iters);
    STD_TORCH_CHECK(x.get_device_index() == a[0].get_device_index(), "pkt::rsvd_batch: matrices on several devices");
    results.push_back(
        {empty(x, {x.size(0), options.rank}), empty(x, {options.rank}), empty(x, {x.size(1), options.rank})});
  }
  for (const ScalarType type : {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float}) {
    std::vector<Tensor> matrices;
    std::vector<Result> theirs;
    std::vector<float*> their_stats;
    for (size_t i = 0; i < a.size(); ++i) {
      if (a[i].scalar_type() != type) continue;
      matrices.push_back(a[i]);
      theirs.push_back(results[i]);
      their_stats.push_back(static_cast<float*>(stats.mutable_data_ptr()) + 4 * i);
    }
    if (matrices.empty()) continue;
    if (type == ScalarType::BFloat16) {
      factorize<pkt::Bf16>(matrices, options, theirs, their_stats);
    } else if (type == ScalarType::Half) {
      factorize<pkt::Fp16>(matrices, options, theirs, their_stats);
    } else {
      factorize<float>(matrices, options, theirs, their_stats);
    }
  }
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rsvd(const Tensor& a, int64_t rank, int64_t oversample, int64_t iters,
                                                int64_t seed) {
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  Tensor stats = empty(a, {4});
  const std::vector<Result> results = factorize_all({a}, {rank, oversample, iters, seed}, stats);
  return {results[0].u, results[0].s, results[0].v, stats};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor> rsvd_batch(
    const std::vector<Tensor>& a, int64_t rank, int64_t oversample, int64_t iters, int64_t seed) {
  STD_TORCH_CHECK(!a.empty(), "pkt::rsvd_batch: no matrices");
  const torch::stable::accelerator::DeviceGuard guard(a[0].get_device_index());
  Tensor stats = empty(a[0], {static_cast<int64_t>(a.size()), 4});
  std::vector<Tensor> us, ss, vs;
  for (const Result& result : factorize_all(a, {rank, oversample, iters, seed}, stats)) {
    us.push_back(result.u), ss.push_back(result.s), vs.push_back(result.v);
  }
  return {us, ss, vs, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pkt, CUDA, m) {
  m.impl("rsvd", TORCH_BOX(&rsvd));
  m.impl("rsvd_batch", TORCH_BOX(&rsvd_batch));
}
