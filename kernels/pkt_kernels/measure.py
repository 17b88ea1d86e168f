"""What a measure does to one sample's gradient, shared by the kernels: |θ^WEIGHTED · g|^POWER, POWER 1 or 2."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def raised(x, POWER: tl.constexpr):
    """|x|^POWER."""
    if POWER == 1:
        value = tl.abs(x)
    else:
        value = x * x
    return value


@triton.jit
def contribution(theta_ptrs, grad_ptrs, mask, POWER: tl.constexpr, WEIGHTED: tl.constexpr):
    """|θ^WEIGHTED · g|^POWER in fp32 of what the pointers show; θ is read only where it is asked for."""
    value = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
    if WEIGHTED:
        value *= tl.load(theta_ptrs, mask=mask, other=0.0).to(tl.float32)
    return raised(value, POWER)
