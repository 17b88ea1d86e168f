"""The clustered CUDA kernel of pkt._C (csrc/clustered.h) as a candidate: for large 16-bit matrices on Hopper."""

from __future__ import annotations

import torch
from torch import Tensor

_OP = "pkt::linear_sensitivity_clustered_"


def obstacle(device: torch.device) -> str | None:
    """Why it cannot run there, or None."""
    from pkt_kernels import launch

    major, minor = launch.capability(device)
    if (major, minor) != (9, 0):
        return f"the GPU's compute capability is {major}.{minor}, not 9.0"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_OP, "CUDA"):
        return "pkt._C is not built with its CUDA part"
    return None


def serves(dtype: torch.dtype, tile: int) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and tile == 0


def linear_sensitivity(
    acc: Tensor, w: Tensor, x: Tensor, dy: Tensor, starts: Tensor, lens: Tensor, power: int = 1, weighted: bool = True
) -> None:
    """acc += |w|^power ⊙ Σ_j |dy_jᵀ x_j|^power; NoFormError where w is of another type, or neighbours are not on 8 bytes."""
    from pkt_kernels.launch import NoFormError
    from pkt_kernels.linear_sensitivity import Problem

    problem = Problem.of(acc, w, x, dy, starts, lens)
    if problem is None:
        return
    dtype = problem.x.dtype
    pairs = all(
        t.stride(1) == 1 and t.stride(0) % 2 == 0 and t.data_ptr() % (2 * t.element_size()) == 0
        for t in (problem.out, problem.w)
    )
    if not serves(dtype, 0) or problem.w.dtype != dtype or not pairs or w.shape[0] % 2 or w.shape[1] % 2:
        raise NoFormError("the kernel takes 16-bit rows, weights of their type, even shapes, and scores on 8 bytes")
    torch.ops.pkt.linear_sensitivity_clustered_(*problem, power, weighted)


def linear_sensitivity_tiles(*_: object) -> None:
    from pkt_kernels.launch import NoFormError

    raise NoFormError("the kernel has no tile sums")
