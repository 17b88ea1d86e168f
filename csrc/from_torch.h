// What code that does not know torch gets from it: types, threads, and memory.
#pragma once

#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "shares.h"
#include "widen.h"

namespace pkt {

inline Dtype dtype_of(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::fp16;
    case ScalarType::Float: return Dtype::fp32;
    case ScalarType::Double: return Dtype::fp64;
    default: throw std::runtime_error("pkt: bf16, fp16, fp32 and fp64 only");
  }
}

inline Threads torch_threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t count, const std::function<void(int64_t)>& f) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) f(i);
            });
          }};
}

// The stable ABI tells that an allocation failed, but not in which words; pkt.ops.out_of_memory knows these.
template <class Allocate>
torch::stable::Tensor allocated(std::initializer_list<int64_t> size, const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::exception&) {
    int64_t entries = 1;
    for (const int64_t n : size) entries *= n;
    throw std::runtime_error("pkt: out of memory: no tensor of " + std::to_string(entries) + " entries");
  }
}

// Uninitialised, on the CPU.
inline torch::stable::Tensor empty(std::initializer_list<int64_t> size,
                                   torch::headeronly::ScalarType type = torch::headeronly::ScalarType::Float) {
  return allocated(size, [&] { return torch::stable::empty({size.begin(), size.size()}, type); });
}

// Uninitialised, on `like`'s device.
inline torch::stable::Tensor empty(const torch::stable::Tensor& like, std::initializer_list<int64_t> size,
                                   torch::headeronly::ScalarType type = torch::headeronly::ScalarType::Float) {
  return allocated(size, [&] { return torch::stable::new_empty(like, {size.begin(), size.size()}, type); });
}

}  // namespace pkt
