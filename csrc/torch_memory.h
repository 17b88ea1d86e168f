// Memory from torch. The stable ABI tells that an allocation failed, but not in which words; pkt.ops.out_of_memory knows
// these.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace pkt {

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
