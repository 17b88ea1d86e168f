"""Uses: one appearance of a parameter in a batch, what its forward pass saved and the gradient at its output.

All of what a sample gave to a parameter follows from a use, so that S can be added up without a stored gradient; of a
parameter that is used more than once, a sample's gradients are summed over the uses first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pkt import ops
from pkt.ops import Measure
from pkt.scoring.batches import Rows


def accumulated_in(dtype: torch.dtype) -> torch.dtype:
    """The type in which gradients of a type are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def measured(weight: Tensor, grad: Tensor, measure: Measure) -> Tensor:
    """|weight ⊙ grad|^power, or |grad|^power where the measure is not weighted, in the gradient's type."""
    values = grad * weight.to(grad.dtype) if measure.weighted else grad
    return values.abs() if measure.power == 1 else values.square()


class Use(Protocol):
    @property
    def samples(self) -> Sequence[int]:
        """The samples of the batch that it belongs to."""
        ...

    def add(self, acc: Tensor, weight: Tensor, measure: Measure, tile: int | None) -> None:
        """acc += Σ_j |weight ⊙ g_j|, or another measure, or the sums of its tile x tile blocks."""
        ...

    def add_gradient(self, grad: Tensor, sample: int) -> None:
        """grad += one sample's gradient."""
        ...


@runtime_checkable
class RowsUse(Use, Protocol):
    """A use of a table whose gradient can be had for some of its rows."""

    def gradient_rows(self, sample: int, ids: Tensor, weight: Tensor) -> Tensor:
        """Rows `ids` of one sample's gradient [len(ids), d], in the type they are accumulated in."""
        ...


@dataclass(frozen=True, eq=False)
class LinearUse:
    """y = x Wᵀ: g_j = dY_jᵀ X_j. A weight that is stored [in, out] has x and dy change places."""

    x: Tensor  # [rows, in]
    dy: Tensor  # [rows, out]
    rows: Rows

    @property
    def samples(self) -> Sequence[int]:
        return self.rows.samples

    def add(self, acc: Tensor, weight: Tensor, measure: Measure, tile: int | None) -> None:
        add_linear(acc, weight, self.x, self.dy, self.rows, measure, tile)

    def add_gradient(self, grad: Tensor, sample: int) -> None:
        part = self.rows.part(sample)
        grad.addmm_(self.dy[part].to(grad.dtype).t(), self.x[part].to(grad.dtype))

    def gradient_rows(self, sample: int, ids: Tensor, weight: Tensor) -> Tensor:
        part, work = self.rows.part(sample), accumulated_in(self.dy.dtype)
        return self.dy[part, ids].to(work).t() @ self.x[part].to(work)


def add_linear(
    acc: Tensor, weight: Tensor, x: Tensor, dy: Tensor, rows: Rows, measure: Measure, tile: int | None
) -> None:
    """acc += S of y = x weightᵀ, whole or in tiles."""
    if tile is None:
        ops.linear_sensitivity_(acc, weight, x, dy, rows.starts, rows.lens, *measure)
    else:
        ops.linear_sensitivity_tiles_(acc, weight, x, dy, rows.starts, rows.lens, tile, *measure)


@dataclass(frozen=True, eq=False)
class ExpertsUse:
    """One linear layer an expert, [experts, ...]: (its number, its use) of every one that has rows."""

    uses: Sequence[tuple[int, LinearUse]]

    @property
    def samples(self) -> Sequence[int]:
        return self.uses[0][1].samples

    def add(self, acc: Tensor, weight: Tensor, measure: Measure, tile: int | None) -> None:
        for expert, use in self.uses:
            use.add(acc[expert], weight[expert], measure, tile)

    def add_gradient(self, grad: Tensor, sample: int) -> None:
        for expert, use in self.uses:
            use.add_gradient(grad[expert], sample)


@dataclass(frozen=True, eq=False)
class EmbeddingUse:
    """y = E[ids]: g_j sums the dY of each id's positions in sample j."""

    ids: Tensor  # [rows]
    dy: Tensor  # [rows, d]
    rows: Rows

    @property
    def samples(self) -> Sequence[int]:
        return self.rows.samples

    def add(self, acc: Tensor, weight: Tensor, measure: Measure, tile: int | None) -> None:
        if tile is None:
            ops.embedding_sensitivity_(acc, weight, self.ids, self.dy, self.rows.starts, self.rows.lens, *measure)
            return
        touched, grads = ops.embedding_rows(self.ids, self.dy, self.rows.starts, self.rows.lens, weight.shape[0])
        add_rows(acc, touched, measured(weight[touched], grads, measure), tile)

    def add_gradient(self, grad: Tensor, sample: int) -> None:
        part = self.rows.part(sample)
        ops.add_rows_(grad, self.ids[part], self.dy[part].to(grad.dtype))

    def touched(self, sample: int, vocabulary: int, length: int | None = None) -> tuple[Tensor, Tensor]:
        """One sample's ids (of its first `length` positions), each once and in order, and their rows of its gradient."""
        one = slice(sample, sample + 1)
        lens = self.rows.lens[one] if length is None else self.rows.lens[one].clamp(max=length)
        return ops.embedding_rows(self.ids, self.dy, self.rows.starts[one], lens, vocabulary)


def add_rows(acc: Tensor, rows: Tensor, values: Tensor, tile: int | None) -> None:
    """acc[rows] += values [len(rows), d], or what they add to the tile sums of those rows."""
    if tile is None:
        ops.add_rows_(acc, rows, values.to(acc.dtype))
    elif len(rows):
        ops.add_rows_(acc, rows // tile, torch.stack([ops.tile_sums(row, tile) for row in values]))


@dataclass(frozen=True, eq=False)
class VectorUse:
    """A norm's or a bias's gradients, sample by sample."""

    grads: Tensor  # [B, *shape of the parameter]

    @property
    def samples(self) -> Sequence[int]:
        return range(len(self.grads))

    def terms(self, weight: Tensor, measure: Measure) -> tuple[Tensor, Tensor]:
        """What |θ| and |g| are in its sum over samples: θ^power (if it takes part) times the sum of |g|^power."""
        if measure.power == 1:
            return weight, self.grads.abs().sum(0)
        return weight.to(accumulated_in(weight.dtype)).square(), self.grads.square().sum(0)

    def add(self, acc: Tensor, weight: Tensor, measure: Measure, tile: int | None) -> None:
        _add_whole(acc, *self.terms(weight, measure), Measure(1, measure.weighted), tile)

    def add_gradient(self, grad: Tensor, sample: int) -> None:
        grad += self.grads[sample]


@dataclass(frozen=True, eq=False)
class WholeUse:
    """The gradient of a single sample as autograd, or a sum over uses, gives it."""

    grad: Tensor
    sample: int = 0

    @property
    def samples(self) -> Sequence[int]:
        return (self.sample,)

    def add(self, acc: Tensor, weight: Tensor, measure: Measure, tile: int | None) -> None:
        _add_whole(acc, weight, self.grad, measure, tile)

    def add_gradient(self, grad: Tensor, sample: int) -> None:
        if sample == self.sample:
            grad += self.grad

    def gradient_rows(self, sample: int, ids: Tensor, weight: Tensor) -> Tensor:
        return self.grad[ids].float()


def _add_whole(acc: Tensor, weight: Tensor, grad: Tensor, measure: Measure, tile: int | None) -> None:
    if acc.shape == weight.shape:
        ops.abs_accumulate_(acc, weight, grad, *measure)
        return
    assert tile is not None
    whole = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    ops.abs_accumulate_(whole, weight, grad, *measure)
    acc += ops.tile_sums(whole, tile)
