// pkt::rsvd and pkt::rsvd_batch for CUDA tensors: memory and products are torch's (so cuBLAS's), the pipeline's launches
// go to the current stream. Nothing here waits for the device.

#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include "from_torch.h"
#include "rsvd_check.h"
#include "rsvd_pipeline.h"

namespace {

using pkt::empty;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType type_of = ScalarType::Float;
template <>
constexpr ScalarType type_of<pkt::Bf16> = ScalarType::BFloat16;
template <>
constexpr ScalarType type_of<pkt::Fp16> = ScalarType::Half;
template <>
constexpr ScalarType type_of<double> = ScalarType::Double;
template <>
constexpr ScalarType type_of<int> = ScalarType::Int;

// A matrix in a tensor's memory, `offset` entries behind its first, however it is shaped; no gradient follows it.
Tensor view(const Tensor& of, int64_t offset, int64_t rows, int64_t columns, int64_t row_stride, int64_t col_stride) {
  const int64_t size[] = {rows, columns}, stride[] = {row_stride, col_stride};
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(of.get(), 2, size, stride, offset, &result));
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
  empty(out, {workspace_bytes}, ScalarType::Byte);
  STD_TORCH_CHECK(false, "pkt::rsvd: torch's product with a ", a.size(0), " by ", a.size(1), " matrix failed");
}

// rsvd_pipeline.h's Device. The allocator is ordered by the stream, so a buffer is free for others once its kernels are
// launched.
struct Cuda {
  using Given = Tensor;
  using Buffer = Tensor;
  Tensor like;

  template <class T>
  static pkt::Stored stored(const Tensor& a) {
    int64_t bytes = 0, before = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(a.get(), &bytes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(a.get(), &before));
    const int64_t extent = 1 + (a.size(0) - 1) * a.stride(0) + (a.size(1) - 1) * a.stride(1);
    return {{a.const_data_ptr(), pkt::dtype_of(a), a.size(0), a.size(1), a.stride(0), a.stride(1)},
            before,
            bytes / static_cast<int64_t>(sizeof(T)) - before - extent};
  }
  template <class T>
  Tensor allocate(int64_t rows, int64_t columns) const {
    return empty(like, {rows, columns}, type_of<T>);
  }
  template <class T>
  static T* data(const Tensor& buffer) {
    return static_cast<T*>(buffer.mutable_data_ptr());
  }
  static void zero(Tensor& buffer) { torch::stable::zero_(buffer); }
  template <class T>
  static void multiply(const Tensor& given, const pkt::Matrix& a, const Tensor& right, const Tensor& out) {
    const int64_t offset = static_cast<const T*>(a.a) - static_cast<const T*>(given.const_data_ptr());
    const int64_t width = right.size(1);
    ::multiply(view(given, offset, a.n, a.m, a.row_stride, a.col_stride), view(right, 0, a.m, width, width, 1),
               view(out, 0, a.n, width, width, 1));
  }
};

void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "pkt::rsvd: CUDA says: ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The matrices of type T, whatever their shapes.
template <class T>
void factorize(const std::vector<Tensor>& a, const pkt::Options& options, const std::vector<pkt::Factors>& out) {
  std::vector<Tensor> matrices;
  std::vector<pkt::Factors> factors;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].scalar_type() != type_of<T>) continue;
    matrices.push_back(a[i]);
    factors.push_back(out[i]);
  }
  int device = 0, shared_limit = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const size_t limit = static_cast<size_t>(shared_limit) - 1024;  // without the kernels' static share
  check_cuda(pkt::factorize<T>(Cuda{a[0]}, matrices, options, factors, limit, current_stream(device)));
}

struct Result {
  Tensor u, s, v;
};

std::vector<Result> factorize_all(const std::vector<Tensor>& a, const pkt::Options& options, const Tensor& stats) {
  std::vector<Result> results;
  std::vector<pkt::Factors> factors;
  for (const Tensor& x : a) {
    pkt::check(x, options.rank, options.oversample, options.iters);
    STD_TORCH_CHECK(x.get_device_index() == a[0].get_device_index(), "pkt::rsvd_batch: matrices on several devices");
    const Result& result = results.emplace_back(
        Result{empty(x, {x.size(0), options.rank}), empty(x, {options.rank}), empty(x, {x.size(1), options.rank})});
    factors.push_back({Cuda::data<float>(result.u), Cuda::data<float>(result.s), Cuda::data<float>(result.v),
                       Cuda::data<float>(stats) + 4 * factors.size()});
  }
  factorize<pkt::Bf16>(a, options, factors);
  factorize<pkt::Fp16>(a, options, factors);
  factorize<float>(a, options, factors);
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
