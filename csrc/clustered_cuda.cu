// pkt::linear_sensitivity_clustered_ for CUDA tensors on sm_90a: what clustered.h asks of a Hopper. A translation unit of its own,
// because its instructions exist for that target alone; compiled for others the kernel stops at once.

#include <algorithm>
#include <type_traits>

#include <cuda.h>
#include <cuda_runtime.h>

#include "clustered.h"

namespace pkt::clustered {

// Shared memory begins on 1024 bytes, as the swizzle counts.
constexpr int shared_bytes = stages * stage_bytes + 1024;

// One wgmma of 64 × 192 × 16: d = a b (+ d if `add`), both operands transposed in shared memory.
#define PKT_WGMMA(type) \
  asm volatile( \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
      "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
      "}, %96, %97, p, 1, 1, 1, 1;\n}" \
      : \
      "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
      "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
      "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
      "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
      "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
      "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
      "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
      "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
      "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
      "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]) \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

template <class Element>
struct Hopper {
  const CUtensorMap *x, *dy;
  uint32_t base, barriers, block;

  static __device__ uint32_t shared(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
  __device__ uint32_t fetched(int stage) const { return barriers + 8 * stage; }
  __device__ uint32_t released(int stage) const { return barriers + 8 * (stages + stage); }
  __device__ uint32_t dy_panel(int stage, int p) const { return base + stage * stage_bytes + p * panel_bytes; }
  __device__ uint32_t x_panel(int stage, int p) const { return dy_panel(stage, dy_panels + p); }
  __device__ int thread() const { return threadIdx.x; }
  __device__ int rank() const { return static_cast<int>(block); }
  __device__ int first_tile() const { return blockIdx.x / cluster; }
  __device__ int tiles_apart() const { return gridDim.x / cluster; }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __device__ void begin() {
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
    if (threadIdx.x == 0) {
      for (int i = 0; i < stages; ++i) {
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(fetched(i)));
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(released(i)), "n"(releases));
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
  __device__ void end() { asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory"); }
  __device__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }
  __device__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }

  static __device__ void wait(uint32_t barrier, uint32_t phase) {
    asm volatile(
        "{\n.reg .pred p;\nagain: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(barrier),
        "r"(phase)
        : "memory");
  }
  __device__ void wait_fetched(int stage, uint32_t phase) { wait(fetched(stage), phase); }
  __device__ void wait_released(int stage, uint32_t phase) { wait(released(stage), phase); }
  __device__ void expect(int stage) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(fetched(stage)), "n"(stage_bytes) : "memory");
  }
  // Tells the block of that rank. Not as `.release.cluster`, a fence of the whole GPU at every step (MEMBAR.ALL.GPU), longer
  // than the step's products: what was read, by products that are done, need not be ordered.
  __device__ void release(int stage, int to) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(released(stage)),
        "r"(to)
        : "memory");
  }
  __device__ void load_dy(int stage, int p, int column, int row, int end) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
            dy_panel(stage, p)),
        "l"(dy), "r"(fetched(stage)), "r"(column), "r"(row), "r"(end), "n"(bound)
        : "memory");
  }
  // This block's half of the step's rows, into both blocks' memory; each block's barrier counts what arrives there.
  __device__ void load_x_for_both(int stage, int p, int column, int row, int end) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(x_panel(stage, p) + block * (panel_bytes / cluster)),
        "l"(x), "r"(fetched(stage)), "r"(column), "r"(row), "r"(end), "n"(bound), "h"(static_cast<uint16_t>(3))
        : "memory");
  }

  __device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  __device__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  template <int left>
  __device__ void wait_products(float (&d)[values]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
    if constexpr (left == 0) {
#pragma unroll
      for (int i = 0; i < values; ++i) asm volatile("" : "+f"(d[i])::"memory");
    }
  }
  // A matrix of panels, columns contiguous, swizzled over 128 bytes: 8 rows are 1024 bytes on, a panel `apart`.
  static __device__ uint64_t matrix(uint32_t at, uint64_t apart) {
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | (apart >> 4) << 16 | (at & 0x3FFFF) >> 4;
  }
  __device__ void product(float (&d)[values], int stage, int which, int k, bool add) {
    constexpr int sixteen_rows = 16 * panel * 2;
    const uint64_t a = matrix(dy_panel(stage, which) + k * sixteen_rows, 0);
    const uint64_t b = matrix(x_panel(stage, 0) + k * sixteen_rows, panel_bytes);
    if constexpr (std::is_same_v<Element, Bf16>) {
      PKT_WGMMA("bf16");
    } else {
      PKT_WGMMA("f16");
    }
  }
#endif
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define PKT_CLUSTER
#else
#define PKT_CLUSTER __cluster_dims__(cluster, 1, 1)
#endif

template <int power, class Element>
__global__ void PKT_CLUSTER __launch_bounds__(threads, 1)
    kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap dy, Batch batch, Scores scores,
           const Element* w) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char memory[];
  __shared__ __align__(8) uint64_t barriers[2 * stages];
  const uint32_t base = (Hopper<Element>::shared(memory) + 1023) & ~1023u;
  Hopper<Element> gpu{&x, &dy, base, Hopper<Element>::shared(barriers), 0};
  run<power>(gpu, batch, scores, w);
#else
  __trap();
#endif
}

}  // namespace pkt::clustered

#if !defined(PKT_KERNEL_ALONE)  // the tests compile it without torch's headers

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include "from_torch.h"

namespace {

using pkt::clustered::Batch;
using pkt::clustered::Scores;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // or the next check of torch's would find it
  STD_TORCH_CHECK(error == cudaSuccess, "pkt::linear_sensitivity_clustered_: CUDA says: ", cudaGetErrorString(error));
}

// The driver's function, without linking with the driver.
auto encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
#else
  check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status));
#endif
  STD_TORCH_CHECK(found != nullptr, "pkt::linear_sensitivity_clustered_: the driver has no tensor maps");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// Boxes of box_rows × 64 of a matrix of rows, whose bound moves with the sample (linear_sensitivity.py: ragged).
CUtensorMap map_of(const Tensor& rows, uint32_t box_rows) {
  CUtensorMap map;
  const uint64_t stride = 2 * static_cast<uint64_t>(rows.stride(0));
  const cuuint64_t sizes[] = {static_cast<uint64_t>(rows.size(1)), 1ull << 30, 0x7FFF0000, 0x7FFF0000};
  const cuuint64_t strides[] = {stride, stride, (1ull << 35) - stride};
  const cuuint32_t box[] = {pkt::clustered::panel, box_rows, 1, 1}, steps[] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      rows.scalar_type() == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encoder()(&map, type, 4, const_cast<void*>(rows.const_data_ptr()), sizes, strides, box, steps,
                                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "pkt::linear_sensitivity_clustered_: the driver refuses a tensor map");
  return map;
}

template <int power, class Element>
void launch(const Tensor& x, const Tensor& dy, const Batch& batch, const Scores& scores, const void* w, int blocks,
            cudaStream_t stream) {
  using namespace pkt::clustered;
  const auto f = kernel<power, Element>;
  check_cuda(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  f<<<blocks, threads, shared_bytes, stream>>>(map_of(x, step / cluster), map_of(dy, step), batch, scores,
                                               static_cast<const Element*>(w));
  check_cuda(cudaGetLastError());
}

// x and dy of one 16-bit type, w too, all with contiguous rows; x and dy on 16 bytes, for which zeros may pad their rows.
// pkt.ops.clustered sees to that.
void clustered(Tensor acc, const Tensor& w, const Tensor& x, const Tensor& dy, const Tensor& seq_starts,
               const Tensor& seq_lens, int64_t power, bool weighted) {
  using pkt::Bf16, pkt::Fp16;
  const ScalarType type = x.scalar_type();
  const bool good = (type == ScalarType::BFloat16 || type == ScalarType::Half) && dy.scalar_type() == type &&
                    w.scalar_type() == type && acc.scalar_type() == ScalarType::Float && x.dim() == 2 && dy.dim() == 2 &&
                    acc.dim() == 2 && w.dim() == 2 && x.size(0) == dy.size(0) && x.size(0) <= pkt::clustered::bound &&
                    acc.size(0) <= dy.size(1) && acc.size(1) <= x.size(1) && w.size(0) == acc.size(0) &&
                    w.size(1) == acc.size(1) && acc.stride(1) == 1 && w.stride(1) == 1 && x.stride(1) == 1 &&
                    dy.stride(1) == 1 && seq_starts.is_contiguous() && seq_lens.is_contiguous() &&
                    seq_starts.size(0) == seq_lens.size(0) && (power == 1 || power == 2);
  STD_TORCH_CHECK(good, "pkt::linear_sensitivity_clustered_: the tensors are not what it takes");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  int device = 0, multiprocessors = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const Batch batch{static_cast<const int64_t*>(seq_starts.const_data_ptr()),
                    static_cast<const int64_t*>(seq_lens.const_data_ptr()), static_cast<int>(seq_starts.size(0)),
                    static_cast<int>(x.size(0))};
  const Scores scores{static_cast<float*>(acc.mutable_data_ptr()), acc.stride(0), w.stride(0),
                      static_cast<int>(acc.size(0)), static_cast<int>(acc.size(1))};
  const int64_t down = (acc.size(0) + 255) / 256, across = (acc.size(1) + pkt::clustered::width - 1) / pkt::clustered::width;
  const int blocks = 2 * static_cast<int>(std::min<int64_t>(down * across, multiprocessors / 2));
  const auto run = type == ScalarType::Half ? (power == 2 ? launch<2, Fp16> : launch<1, Fp16>)
                                            : (power == 2 ? launch<2, Bf16> : launch<1, Bf16>);
  run(x, dy, batch, scores, weighted ? w.const_data_ptr() : nullptr, blocks, static_cast<cudaStream_t>(stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pkt, CUDA, m) { m.impl("linear_sensitivity_clustered_", TORCH_BOX(&clustered)); }

#endif
