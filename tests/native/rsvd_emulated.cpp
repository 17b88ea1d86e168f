// The CUDA implementation on an emulated GPU: for the tests, by ctypes.

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "export.h"
#include "rsvd_pipeline.h"

namespace {

int unaligned = 0;  // products of the last call whose matrix does not begin on 16 bytes

// rsvd_pipeline.h's Device: fresh memory is NaN, products are sums in fp32.
struct Emulated {
  using Given = pkt::Stored;
  using Buffer = std::shared_ptr<std::vector<unsigned char>>;

  template <class T>
  pkt::Stored stored(const Given& given) const {
    return given;
  }
  template <class T>
  Buffer allocate(int64_t rows, int64_t columns) const {
    return std::make_shared<std::vector<unsigned char>>(rows * columns * sizeof(T), 0xFF);
  }
  template <class T>
  static T* data(const Buffer& buffer) {
    return reinterpret_cast<T*>(buffer->data());
  }
  template <class T>
  static const T* end(const pkt::Matrix& a) {
    return static_cast<const T*>(a.a) + (a.n - 1) * a.row_stride + (a.m - 1) * a.col_stride + 1;
  }
  void zero(const Buffer& buffer) const { buffer->assign(buffer->size(), 0); }
  template <class T>
  void multiply(const Given& given, const pkt::Matrix& a, const Buffer& right, const Buffer& out) const {
    const T *left = static_cast<const T*>(a.a), *factor = data<T>(right), *first = static_cast<const T*>(given.matrix.a);
    if (left < first - given.before || end<T>(a) > end<T>(given.matrix) + given.after) {
      throw std::runtime_error("a product reads outside the memory that its matrix lies in");
    }
    unaligned += reinterpret_cast<uintptr_t>(left) % 16 != 0;
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
cudaError_t emulated(const pkt::Stored* a, const pkt::Factors* out, int count, const pkt::Options& options,
                     int64_t shared_limit) {
  return pkt::factorize<T>(Emulated{}, {a, a + count}, options, {out, out + count}, static_cast<size_t>(shared_limit),
                           nullptr);
}

}  // namespace

// `reversed` lets the threads of a block take turns backwards: a missing barrier then shows as another result. Returns
// why it was refused, or nothing.
PKT_EXPORT const char* pkt_emulated_cuda(const pkt::Stored* a, const pkt::Factors* out, int count,
                                         const pkt::Options* options, int64_t shared_limit, int reversed) {
  static std::string refusal;
  pkt::emulation::reversed = reversed != 0;
  unaligned = 0;
  const pkt::Dtype dtype = a[0].matrix.dtype;
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

PKT_EXPORT int pkt_unaligned_products() { return unaligned; }
