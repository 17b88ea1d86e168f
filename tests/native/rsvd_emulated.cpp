// The CUDA implementation on an emulated GPU, and the CPU implementations without torch: for the tests, by ctypes.

#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "abs_products.h"
#include "block_krylov.h"
#include "rsvd_pipeline.h"

namespace {

// rsvd_pipeline.h's Device: fresh memory is NaN, products are sums in fp32.
struct Emulated {
  using Given = pkt::Matrix;
  using Buffer = std::shared_ptr<std::vector<unsigned char>>;

  pkt::Matrix matrix(const Given& given) const { return given; }
  template <class T>
  Buffer allocate(int64_t rows, int64_t columns) const {
    return std::make_shared<std::vector<unsigned char>>(rows * columns * sizeof(T), 0xFF);
  }
  template <class T>
  static T* data(const Buffer& buffer) {
    return reinterpret_cast<T*>(buffer->data());
  }
  void zero(const Buffer& buffer) const { buffer->assign(buffer->size(), 0); }
  template <class T>
  void multiply(const Given&, const pkt::Matrix& a, const Buffer& right, const Buffer& out) const {
    const T *left = static_cast<const T*>(a.a), *factor = data<T>(right);
    const int64_t width = static_cast<int64_t>(right->size() / sizeof(T)) / a.m;
    for (int64_t row = 0; row < a.n; ++row) {
      for (int64_t j = 0; j < width; ++j) {
        float sum = 0;
        for (int64_t k = 0; k < a.m; ++k) {
          sum += pkt::widened(left[row * a.row_stride + k * a.col_stride]) * pkt::widened(factor[k * width + j]);
        }
        data<float>(out)[row * width + j] = sum;
      }
    }
  }
};

template <class T>
cudaError_t emulated(const pkt::Matrix* a, const pkt::Factors* out, int count, const pkt::Options& options,
                     int64_t shared_limit) {
  return pkt::factorize<T>(Emulated{}, {a, a + count}, options, {out, out + count}, static_cast<size_t>(shared_limit),
                           nullptr);
}

void run_threads(int64_t count, const std::function<void(int64_t)>& f) {
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < count; ++i) pool.emplace_back(f, i);
  for (std::thread& thread : pool) thread.join();
}

}  // namespace

#define PKT_EXPORT extern "C" __attribute__((visibility("default")))

// `reversed` lets the threads of a block take turns backwards: a missing barrier then shows as another result. Returns
// why it was refused, or nothing.
PKT_EXPORT const char* pkt_emulated_cuda(const pkt::Matrix* a, const pkt::Factors* out, int count,
                                         const pkt::Options* options, int64_t shared_limit, int reversed) {
  static std::string refusal;
  pkt::emulation::reversed = reversed != 0;
  const pkt::Dtype dtype = a[0].dtype;
  try {
    const auto run = dtype == pkt::Dtype::bf16   ? emulated<pkt::Bf16>
                     : dtype == pkt::Dtype::fp16 ? emulated<pkt::Fp16>
                                                 : emulated<float>;
    run(a, out, count, *options, shared_limit);
  } catch (const std::exception& error) {
    refusal = error.what();
    return refusal.c_str();
  }
  return nullptr;
}

// `level` as for cpu_kernels; returns the kernels' name.
PKT_EXPORT const char* pkt_cpu(const pkt::Matrix* a, const pkt::Factors* out, const pkt::Options* options,
                               int64_t threads, int level) {
  const pkt::CpuKernels& kernels = pkt::cpu_kernels(level);
  pkt::block_krylov_svd(*a, *options, *out, {threads, run_threads}, kernels);
  return kernels.name;
}

PKT_EXPORT void pkt_abs_products(const pkt::Scored* scored, int64_t threads, int level) {
  pkt::add_abs_products(*scored, {threads, run_threads}, pkt::cpu_kernels(level));
}
