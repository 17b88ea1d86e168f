#include "abs_accumulate.h"

#include <algorithm>
#include <cmath>
#include <vector>

#ifndef PKT_LEAST_SHARE  // the tests share out less
#define PKT_LEAST_SHARE (1 << 18)
#endif

namespace pkt {
namespace {

// Fewer entries than these take longer to share out than to add: to wake a thread may take milliseconds.
constexpr int64_t kLeastShare = PKT_LEAST_SHARE;
constexpr int64_t kCut = 256;  // shares end at multiples of it, so that vectors stay whole

constexpr int kTensors = 3;  // acc, theta, grad

struct Dimension {
  int64_t size, stride[kTensors];
};

// A shape as few dimensions, the one nearest in the scores' memory last.
class Layout {
 public:
  explicit Layout(const Accumulation& a) : a_(a) {
    std::vector<Dimension> given;
    for (int64_t i = 0; i < a.dims; ++i) {
      total_ *= a.size[i];
      if (a.size[i] != 1) given.push_back({a.size[i], {a.acc_stride[i], a.theta_stride[i], a.grad_stride[i]}});
    }
    std::stable_sort(given.begin(), given.end(),
                     [](const Dimension& x, const Dimension& y) { return x.stride[0] > y.stride[0]; });
    for (const Dimension& next : given) {
      if (!dimensions_.empty() && continues(dimensions_.back(), next)) {
        Dimension& last = dimensions_.back();
        last.size *= next.size;
        std::copy_n(next.stride, kTensors, last.stride);
      } else {
        dimensions_.push_back(next);
      }
    }
    if (dimensions_.empty()) dimensions_.push_back({1, {1, 1, 1}});
  }

  int64_t total() const { return total_; }

  // Entries [begin, end) in the order of the dimensions.
  void add(const Measure& measure, int64_t begin, int64_t end, const CpuKernels& kernels) const {
    const Dimension& inner = dimensions_.back();
    while (begin < end) {
      const int64_t count = std::min(inner.size - begin % inner.size, end - begin);
      int64_t offset[kTensors] = {}, rest = begin;
      for (auto d = dimensions_.rbegin(); d != dimensions_.rend(); ++d) {
        for (int t = 0; t < kTensors; ++t) offset[t] += rest % d->size * d->stride[t];
        rest /= d->size;
      }
      add_abs(measure, count, {further(a_.acc, a_.acc_dtype, offset[0]), a_.acc_dtype, inner.stride[0]},
              {further(a_.theta, a_.theta_dtype, offset[1]), a_.theta_dtype, inner.stride[1]},
              {further(a_.grad, a_.grad_dtype, offset[2]), a_.grad_dtype, inner.stride[2]}, kernels);
      begin += count;
    }
  }

 private:
  static bool continues(const Dimension& outer, const Dimension& inner) {
    for (int t = 0; t < kTensors; ++t) {
      if (outer.stride[t] != inner.stride[t] * inner.size) return false;
    }
    return true;
  }

  const Accumulation& a_;
  int64_t total_ = 1;
  std::vector<Dimension> dimensions_;
};

template <class A, class T, class G>
void add_strided(const Measure& measure, int64_t count, A* acc, int64_t acc_stride, const T* theta,
                 int64_t theta_stride, const G* grad, int64_t grad_stride) {
  using W = decltype(widened(*theta) * widened(*grad));
  for (int64_t i = 0; i < count; ++i) {
    W x = widened(grad[i * grad_stride]);
    if (measure.weighted) x *= widened(theta[i * theta_stride]);
    acc[i * acc_stride] = static_cast<A>(acc[i * acc_stride] + (measure.power == 1 ? std::fabs(x) : x * x));
  }
}

}  // namespace

void add_abs(const Measure& measure, int64_t count, const Scores& acc, const Entries& theta, const Entries& grad,
             const CpuKernels& kernels) {
  const bool direct = !measure.weighted || (theta.dtype != Dtype::fp64 && theta.stride == 1);
  if (direct && acc.dtype == Dtype::fp32 && acc.stride == 1 && grad.dtype != Dtype::fp64 && grad.stride == 1) {
    return kernels.abs_accumulate(measure, count, static_cast<float*>(acc.data), theta.data, theta.dtype, grad.data,
                                  grad.dtype);
  }
  typed(theta.data, theta.dtype, [&](const auto* t) {
    typed(grad.data, grad.dtype, [&](const auto* g) {
      if (acc.dtype == Dtype::fp64) {
        add_strided(measure, count, static_cast<double*>(acc.data), acc.stride, t, theta.stride, g, grad.stride);
      } else {
        add_strided(measure, count, static_cast<float*>(acc.data), acc.stride, t, theta.stride, g, grad.stride);
      }
    });
  });
}

void accumulate_abs(const Measure& measure, const Accumulation* all, int64_t count, const Threads& threads, const CpuKernels& kernels) {
  std::vector<Layout> layouts(all, all + count);
  std::vector<int64_t> begins{0};
  for (const Layout& layout : layouts) begins.push_back(begins.back() + layout.total());
  const int64_t total = begins.back(), shares = std::clamp<int64_t>(total / kLeastShare, 1, threads.count);
  const auto begin_of = [&](int64_t share) { return share == shares ? total : total * share / shares / kCut * kCut; };
  const auto add = [&](int64_t share) {
    const int64_t first = begin_of(share), last = begin_of(share + 1);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = std::max(first, begins[i]), end = std::min(last, begins[i + 1]);
      layouts[i].add(measure, begin - begins[i], end - begins[i], kernels);
    }
  };
  shares == 1 ? add(0) : threads.run(shares, add);
}

}  // namespace pkt
