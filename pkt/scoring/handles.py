"""Handles: what stands in a parameter's place while a module of no known kind runs its own forward, and sees how it is used.

A product that `USES` lists passes through a tap (`taps`), whatever the module does around it: a router's F.linear, Falcon's
`x @ weight.T`, Gemma's scaled table. For anything else a handle is the parameter itself: autograd delivers a gradient,
and the scorer learns that this use cannot be followed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pkt.scoring.taps import (
    Forward,
    Operand,
    Site,
    batched_linear,
    embedding,
    linear,
    per_sample_copy,
    tap,
    vector_use,
)
from pkt.scoring.uses import VectorUse, accumulated_in


class Handle(Tensor):
    """A parameter as one of its modules sees it: cast, transposed, or, of a vector, reshaped."""

    site: Site
    scored_as: str
    transposed: bool
    whole: torch.Size  # of the parameter

    @classmethod
    def of(cls, parameter: Tensor, name: str, site: Site) -> Handle:
        # Part of the graph, so that no use goes unseen.
        handle = parameter.as_subclass(cls)
        handle.site, handle.scored_as, handle.transposed, handle.whole = site, name, False, parameter.shape
        return handle

    def seen_as(self, value: Tensor, *, transposed: bool = False) -> Handle:
        handle = value.as_subclass(Handle)
        handle.site, handle.scored_as, handle.whole = self.site, self.scored_as, self.whole
        handle.transposed = self.transposed != transposed
        return handle

    @property
    def operand(self) -> Operand:
        return Operand(self.detach(), self.scored_as, self.transposed)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            out = USES[func](*args, **kwargs) if func in USES else NotImplemented
            if out is NotImplemented:
                out = func(*args, **kwargs)
                if func in VIEWS and isinstance(args[0], Handle):
                    out = VIEWS[func](args[0], out)
            return out


def _operand(site: Site, value: Tensor | None) -> Operand | None:
    if value is None:
        return None
    return value.operand if isinstance(value, Handle) else Operand(value, None)


# --- uses: like the functions they stand for; NotImplemented where the use is another one -----------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    held = next((p for p in (weight, bias) if isinstance(p, Handle)), None)
    if held is None or isinstance(x, Handle) or weight.ndim != 2:
        return NotImplemented
    operand = _operand(held.site, weight)
    assert operand is not None
    return linear(held.site, x, operand, _operand(held.site, bias))


def _matmul(x: Tensor, weight: Any) -> Any:
    if isinstance(x, Handle) or not isinstance(weight, Handle):
        return NotImplemented
    if weight.ndim == 3 == x.ndim and weight.shape[0] == x.shape[0]:
        return batched_linear(weight.site, x, weight.operand.turned)
    return linear(weight.site, x, weight.operand.turned, None) if weight.ndim == 2 else NotImplemented


def _embedding(
    ids: Tensor,
    table: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not isinstance(table, Handle) or table.transposed or max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    return embedding(table.site, ids, table.operand, padding_idx)


def _getitem(table: Any, ids: Any) -> Any:
    if not isinstance(ids, Tensor) or isinstance(ids, Handle) or ids.dtype != torch.int64 or not ids.ndim:
        return NotImplemented
    return _embedding(ids, table) if table.ndim == 2 else NotImplemented


def _add(a: Any, b: Any, *, alpha: float = 1) -> Any:
    """A bias: y [..., d] + vector [d]."""
    y, vector = (b, a) if isinstance(a, Handle) else (a, b)
    if isinstance(y, Handle) or not isinstance(y, Tensor) or alpha != 1:
        return NotImplemented
    if vector.ndim != 1 or y.ndim < 2 or y.shape[-1] != vector.shape[0]:
        return NotImplemented
    out, shape = torch.add(y, vector.detach()), tuple(vector.shape)
    if not torch.is_grad_enabled():
        return out
    site, name = vector.site, vector.scored_as
    return tap(site.anchor, out, site.anchor.detach(), lambda saved, dy: vector_use(site, name, dy, shape))


def _expand(vector: Handle, *sizes: Any) -> Any:
    """A vector, reshaped to [1, ...], as one copy for each sample (GPT-OSS's attention sinks)."""
    shape = vector.detach().expand(*sizes).shape
    site, name, whole = vector.site, vector.scored_as, vector.whole
    alike = len(whole) == 1 and vector.ndim == len(shape) > 1 and vector.shape[0] == 1
    if not alike or shape[0] != site.layout.size or not torch.is_grad_enabled():
        return NotImplemented
    reduced = (shape[0], *vector.shape[1:])

    def record(dy: Tensor) -> None:
        by_sample = dy.to(accumulated_in(dy.dtype)).sum_to_size(reduced).reshape(shape[0], *whole)
        site.use(name, dy, VectorUse(by_sample))

    return per_sample_copy(site.anchor, vector.detach(), shape, record)


USES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    Tensor.__getitem__: _getitem,
    Tensor.expand: _expand,
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _matmul
    ),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
}


# --- views: what a handle becomes, and is still a handle ---------------------------------------------------------------


def _cast(handle: Handle, out: Any) -> Any:
    return handle.seen_as(out) if isinstance(out, Tensor) and out.is_floating_point() else out


def _turned(handle: Handle, out: Tensor) -> Tensor:
    """A transpose, if it is of the last two dimensions."""
    if handle.ndim < 2:
        return out
    turned = handle.detach().mT
    same = (out.shape, out.stride()) == (turned.shape, turned.stride())
    return handle.seen_as(out, transposed=True) if same else out


def _reshaped(handle: Handle, out: Tensor) -> Tensor:
    return handle.seen_as(out) if len(handle.whole) == 1 and out.dtype == handle.dtype else out


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


VIEWS: dict[Any, Callable[[Handle, Any], Any]] = {
    **dict.fromkeys((Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16), _cast),
    **dict.fromkeys((_getter("T"), _getter("mT"), torch.t, Tensor.t, torch.transpose, Tensor.transpose), _turned),
    **dict.fromkeys((torch.reshape, Tensor.reshape, Tensor.view), _reshaped),
}


# --- the rule ---------------------------------------------------------------------------------------------------------


def handled(module: Any, site: Site) -> Forward:
    """The module's own forward, with handles in its parameters' places."""
    plain: Forward = module.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        own = [(key, p, site.tapped(p)) for key, p in module._parameters.items()]
        held = {key: Handle.of(p, name, site) for key, p, name in own if name is not None}
        # An instance attribute is found before the registered parameter, which stays where it is.
        module.__dict__.update(held)
        try:
            return plain(*args, **kwargs)
        finally:
            for key in held:
                del module.__dict__[key]

    return forward
