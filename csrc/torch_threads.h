// torch's own threads, for code that does not know torch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "shares.h"

namespace pkt {

inline Threads torch_threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t count, const std::function<void(int64_t)>& f) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) f(i);
            });
          }};
}

}  // namespace pkt
