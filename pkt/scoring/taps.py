"""Identities put into a forward pass whose backward sees the gradient there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Tap(torch.autograd.Function):
    """The identity on y, whose backward hands (inputs saved for it, dY) to `record`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, y: Tensor, saved: Tensor, record: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.record = record
        ctx.save_for_backward(saved)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        ctx.record(ctx.saved_tensors[0], dy)
        return None, dy, None, None


class _PerSampleCopy(torch.autograd.Function):
    """A vector as one copy per sample, [B, 1, ..., d]; backward hands their gradients to `record`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, vector: Tensor, shape: tuple[int, ...], record: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.record = record
        return vector.expand(shape).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.record(grads[0])
        return None, None, None, None


# autograd.Function.apply has no types.
tap: Callable[..., Tensor] = _Tap.apply
per_sample_copy: Callable[..., Tensor] = _PerSampleCopy.apply
