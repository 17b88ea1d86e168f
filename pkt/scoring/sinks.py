"""Sinks: where S of one parameter accrues, as elements or as sums of tiles, one use at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from pkt import ops
from pkt.ops import Measure
from pkt.scoring.findings import Findings
from pkt.scoring.head import HeadUse
from pkt.scoring.uses import EmbeddingUse, Use, VectorUse, WholeUse, accumulated_in, add_rows


class Sink(Protocol):
    def add(self, use: Use) -> None:
        """Take one use of the batch; it is not kept after `end_batch`."""
        ...

    def end_batch(self) -> None: ...

    def rescale(self, scale: float) -> None:
        """From here on gradients come multiplied by `scale`, a power of two."""
        ...

    def result(self) -> Tensor:
        """S, fp32; zeros when no sample reached the parameter. The sink is used up."""
        ...


class Vectors:
    """What waits for the end of a batch: small parameters are added up in one launch."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def flush(self) -> None:
        if self.waiting:
            accs, weights, grads = zip(*self.waiting, strict=True)
            ops.abs_accumulate_many_(accs, weights, grads, 1, self.measure.weighted)
            self.waiting.clear()


class FullSink:
    """The elements of S, in the parameter's shape. vectors: where small parameters wait for the end of a batch."""

    tile: int | None = None

    def __init__(self, weight: Tensor, measure: Measure, vectors: Vectors | None = None) -> None:
        self.weight, self.measure, self.vectors, self.scale = weight.detach(), measure, vectors, 1.0
        self._acc: Tensor | None = None

    @property
    def acc(self) -> Tensor:
        """Made when it is first needed."""
        if self._acc is None:
            self._acc = torch.zeros(self._shape(), dtype=torch.float32, device=self.weight.device)
        return self._acc

    def _shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def add(self, use: Use) -> None:
        if isinstance(use, VectorUse) and self.vectors is not None and self.acc.shape == self.weight.shape:
            self.vectors.waiting.append((self.acc, *use.terms(self.weight, self.measure)))
        else:
            use.add(self.acc, self.weight, self.measure, self.tile)

    def end_batch(self) -> None:
        pass

    def rescale(self, scale: float) -> None:
        if scale != self.scale and self._acc is not None:
            self._acc *= (scale / self.scale) ** self.measure.power
        self.scale = scale

    def result(self) -> Tensor:
        acc = self.acc
        if self.scale != 1.0:
            acc /= self.scale**self.measure.power
        return acc


class TileSink(FullSink):
    """The sums of S over tile x tile blocks; a vector's elements are kept until the end, for they are few."""

    def __init__(self, weight: Tensor, measure: Measure, vectors: Vectors, tile: int) -> None:
        super().__init__(weight, measure, vectors)
        self.tile = tile

    def _shape(self) -> tuple[int, ...]:
        assert self.tile is not None
        *lead, last = self.weight.shape
        if not lead:
            return (last,)
        return (*lead[:-1], -(-lead[-1] // self.tile), -(-last // self.tile))

    def result(self) -> Tensor:
        assert self.tile is not None
        acc = super().result()
        return ops.tile_sums(acc, self.tile) if self.weight.ndim == 1 else acc


class SharedSink:
    """A parameter that is used more than once: the sum of a sample's uses comes before the absolute value."""

    def __init__(self, weight: Tensor, inner: Sink) -> None:
        self.weight, self.inner = weight.detach(), inner
        self.waiting: list[Use] = []

    def add(self, use: Use) -> None:
        self.waiting.append(use)

    def end_batch(self) -> None:
        for sample in sorted({sample for use in self.waiting for sample in use.samples}):
            work = accumulated_in(self.weight.dtype)
            grad = torch.zeros(self.weight.shape, dtype=work, device=self.weight.device)
            for use in self.waiting:
                use.add_gradient(grad, sample)
            self.inner.add(WholeUse(grad, sample))
        self.waiting.clear()
        self.inner.end_batch()

    def rescale(self, scale: float) -> None:
        self.inner.rescale(scale)

    def result(self) -> Tensor:
        return self.inner.result()


class TiedSink:
    """A table that is a fused head and an embedding: of the head's gradients H only the rows that a sample's tokens touch
    change, by |H + E| − |H|, and those are computed again (docs/design.md §5).
    """

    def __init__(self, inner: FullSink) -> None:
        self.inner = inner
        self.head: HeadUse | None = None

    def add(self, use: Use) -> None:
        if isinstance(use, HeadUse):
            self.head = use
            self.inner.add(use)
            return
        assert isinstance(use, EmbeddingUse)
        assert self.head is not None
        weight = self.inner.weight
        for sample in use.samples:
            touched, embedding = use.touched(sample, weight.shape[0])
            head = self.head.gradient_rows(sample, touched, weight)
            power, weighted = self.inner.measure
            change = _power(head + embedding, power) - _power(head, power)
            if weighted:
                change *= _power(weight[touched].to(embedding.dtype), power)
            add_rows(self.inner.acc, touched, change, self.inner.tile)

    def end_batch(self) -> None:
        self.head = None

    def rescale(self, scale: float) -> None:
        self.inner.rescale(scale)

    def result(self) -> Tensor:
        return self.inner.result()


def _power(values: Tensor, power: int) -> Tensor:
    return values.abs() if power == 1 else values.square()


class Sinks:
    """The sinks of a model's parameters, each made when it is first asked for.

    given: those of parameters whose S accrues in a way of the caller's.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        findings: Findings,
        measure: Measure,
        tile: int | None,
        given: Mapping[str, Sink],
    ) -> None:
        self.parameters, self.findings, self.measure, self.tile, self.given = parameters, findings, measure, tile, given
        self.vectors, self.scale = Vectors(measure), 1.0
        self.made: dict[str, Sink] = {}

    def __getitem__(self, name: str) -> Sink:
        if name not in self.made:
            self.made[name] = self._make(name)
            self.made[name].rescale(self.scale)
        return self.made[name]

    def _make(self, name: str) -> Sink:
        weight, shared = self.parameters[name], name in self.findings.shared
        if name in self.given:
            return SharedSink(weight, self.given[name]) if shared else self.given[name]
        full = FullSink(weight, self.measure, self.vectors)
        if self.tile is not None:
            full = TileSink(weight, self.measure, self.vectors, self.tile)
        if not shared:
            return full
        return TiedSink(full) if name == self.findings.fused else SharedSink(weight, full)

    def end_batch(self, names: Iterable[str]) -> None:
        self.vectors.flush()
        for name in names:
            self[name].end_batch()

    def rescale(self, scale: float) -> None:
        if scale != self.scale:
            self.scale = scale
            for sink in self.made.values():
                sink.rescale(scale)
