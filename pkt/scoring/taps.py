"""Taps: products computed with detached parameters, whose outputs pass through an identity that sees dY in the backward pass.

Each records one kind of use. What a module runs instead of its own forward is made of them (`rules`, `handles`, `experts`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pkt.scoring.batches import Layout, Rows
from pkt.scoring.findings import Findings, LearntError
from pkt.scoring.uses import EmbeddingUse, ExpertsUse, LinearUse, Use, VectorUse, accumulated_in

Forward: TypeAlias = Callable[..., Any]


class Site(Protocol):
    """What a rule knows of the scoring it serves. Names are those of parameters that taps score."""

    findings: Findings
    layout: Layout
    anchor: Tensor  # a leaf that requires a gradient, so that the outputs of taps do

    @property
    def probing(self) -> bool: ...

    def tapped(self, parameter: Tensor | None) -> str | None: ...

    def use(self, name: str, dy: Tensor, use: Use) -> None: ...


class Operand(NamedTuple):
    """What a product is computed with: the value, and the name of the parameter where a tap scores it."""

    value: Tensor
    name: str | None
    transposed: bool = False  # of its last two dimensions, against the parameter

    @classmethod
    def of(cls, site: Site, parameter: Tensor) -> Operand:
        name = site.tapped(parameter)
        return cls(parameter if name is None else parameter.detach(), name)

    @property
    def turned(self) -> Operand:
        return Operand(self.value.mT, self.name, not self.transposed)


class _Tap(torch.autograd.Function):
    """The identity on y, whose backward hands (what was saved for it, dY) to `record`."""

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
    """A vector as one copy per sample; backward hands their gradients to `record`."""

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


def rows_of(site: Site, dy: Tensor) -> Rows:
    rows = site.layout.rows(dy)
    if rows is None:
        raise LearntError(site.findings.alone())
    return rows


def flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def vector_use(site: Site, name: str, dy: Tensor, shape: tuple[int, ...]) -> None:
    """dy [B, ..., *shape]: a vector's gradient before the sum over a sample's positions."""
    rows = site.layout.rows(dy)
    # Of a norm over several dimensions the last one's rows say nothing; the samples must come first.
    if rows is None or (len(shape) > 1 and site.layout.size > 1 and dy.shape[0] != site.layout.size):
        raise LearntError(site.findings.alone())
    by_sample = dy.reshape(site.layout.size, -1, *shape).sum(1, dtype=accumulated_in(dy.dtype))
    site.use(name, dy, VectorUse(by_sample))


def scored(*operands: Operand | None) -> bool:
    """Whether a tap is needed: an operand is scored, and the graph that would show its use is recorded."""
    return torch.is_grad_enabled() and any(o is not None and o.name is not None for o in operands)


def linear(site: Site, x: Tensor, weight: Operand, bias: Operand | None) -> Tensor:
    """x [..., in], weight [out, in] and bias [out] -> [..., out]."""
    y = F.linear(x, weight.value, None if bias is None else bias.value)
    if not scored(weight, bias):
        return y

    def record(saved: Tensor, dy: Tensor) -> None:
        if bias is not None and bias.name is not None:
            vector_use(site, bias.name, dy, tuple(bias.value.shape))
        if weight.name is None:
            return
        if dy.dtype == torch.float16:
            saved = saved.to(dy.dtype)
        rows, x, d = rows_of(site, dy), flat(saved), flat(dy)
        site.use(weight.name, dy, LinearUse(d, x, rows) if weight.transposed else LinearUse(x, d, rows))

    return tap(site.anchor, y, x.detach().to(y.dtype), record)


def batched_linear(site: Site, x: Tensor, weight: Operand) -> Tensor:
    """Every token through every expert: x [experts, tokens, in] and weight [experts, out, in] -> [experts, tokens, out]."""
    y = torch.bmm(x, weight.value.mT)
    if not scored(weight):
        return y

    def record(saved: Tensor, dy: Tensor) -> None:
        assert weight.name is not None
        tokens, size = dy.shape[1], site.layout.size
        rows, x, d = rows_of(site, dy[0]), flat(saved).to(dy.dtype), flat(dy)
        uses = [
            (e, LinearUse(*((d, x) if weight.transposed else (x, d)), Rows(rows.starts + e * tokens, rows.lens)))
            for e in range(dy.shape[0])
        ]
        peaks = dy.abs().amax(2).view(-1, size, tokens // size).amax((0, 2))
        site.use(weight.name, peaks[:, None], ExpertsUse(uses))

    return tap(site.anchor, y, x.detach().to(y.dtype), record)


def embedding(site: Site, ids: Tensor, table: Operand, padding_idx: int | None) -> Tensor:
    """ids [...] and table [vocabulary, d] -> [..., d]; the row at `padding_idx` gets no gradient."""
    if not scored(table):
        return F.embedding(ids, table.value, padding_idx)
    if site.layout.size > 1 and ids.ndim > 1 and ids.shape[0] == 1:
        # Positions looked up once for all samples: one row of them each, so that gradients stay apart.
        ids = ids.expand(site.layout.size, *ids.shape[1:])
    y = F.embedding(ids, table.value)

    def record(saved: Tensor, dy: Tensor) -> None:
        assert table.name is not None
        if padding_idx is not None:
            dy = dy.masked_fill((saved == padding_idx).unsqueeze(-1), 0.0)
        site.use(table.name, dy, EmbeddingUse(saved.reshape(-1), flat(dy), rows_of(site, dy)))

    return tap(site.anchor, y, ids, record)
