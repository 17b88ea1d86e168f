// What both implementations of pkt::rsvd demand of their arguments; pkt.ops says it in words first.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace pkt {

inline void check(const torch::stable::Tensor& a, int64_t rank, int64_t oversample, int64_t iters) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(a.dim() == 2, "pkt::rsvd needs a matrix, not ", a.dim(), " dimensions");
  const ScalarType type = a.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float,
                  "pkt::rsvd needs a bf16, fp16 or fp32 matrix");
  STD_TORCH_CHECK(rank >= 1 && rank <= std::min(a.size(0), a.size(1)), "pkt::rsvd: rank ", rank, " of a ", a.size(0),
                  " by ", a.size(1), " matrix");
  STD_TORCH_CHECK(0 <= oversample && oversample <= INT32_MAX && 0 <= iters && iters <= INT32_MAX,
                  "pkt::rsvd: oversample ", oversample, " and iters ", iters, " must be between 0 and 2^31 - 1");
}

}  // namespace pkt
