"""Attention whose backward pass sums in one order on CUDA, so that the same run gives the same bytes.

The fused backward passes of torch's `scaled_dot_product_attention` add parts of dQ with atomics, in another order every time,
unless deterministic algorithms are asked for. Asked for at large, that would refuse operations that have no such form, and
every matrix product of a process that did not set CUBLAS_WORKSPACE_CONFIG before its first one (torch looks once; its products
need no such setting, for torch gives cuBLAS a workspace for each stream). So it is asked for while those backward passes run,
and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# The fused backward passes that have a form without atomics; the CPU's needs none.
FUSED = ("ScaledDotProductFlashAttentionBackward0", "ScaledDotProductEfficientAttentionBackward0")


# A module whose properties are made at run time.
_memory: Any = torch.utils.deterministic


@contextlib.contextmanager
def one_order(device: torch.device) -> Iterator[None]:
    """Inside, backward passes through attention on a CUDA device are deterministic; elsewhere they are so anyway."""
    if device.type != "cuda":
        yield
        return
    # cuDNN's has no such form.
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with OneOrder(FUSED):
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


class OneOrder(TorchFunctionMode):
    """While active, the named backward passes of attention that is called run with deterministic algorithms.

    A backward pass that fails does not come to its end: torch's settings are put back when this is left, at the latest.
    """

    def __init__(self, fused: tuple[str, ...]) -> None:
        super().__init__()
        self.fused = fused

    def __enter__(self) -> Any:
        self.before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            _memory.fill_uninitialized_memory,
        )
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self._end()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(out, Tensor):
            node: Any = out.grad_fn
            if node is not None and node.name() not in self.fused and node.next_functions:
                # Heads whose width is no multiple of 8 are padded, and the result is a slice.
                node = node.next_functions[0][0]
            if node is not None and node.name() in self.fused:
                node.register_prehook(self._begin)
                node.register_hook(self._end)
        return out

    def _begin(self, *gradients: Any) -> None:
        torch.use_deterministic_algorithms(True)
        # Else torch fills what it allocates with NaN first.
        _memory.fill_uninitialized_memory = False

    def _end(self, *gradients: Any) -> None:
        enabled, warn_only, fill = self.before
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        _memory.fill_uninitialized_memory = fill
