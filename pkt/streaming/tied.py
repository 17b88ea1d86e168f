"""A table that the first part of a model and the last one share: two sinks, one for each of its uses.

The head's use is scored first. What the embedding adds to a sample's gradient changes only the rows of the tokens that the
sample holds, by |θ(H + E)| − |θH|, so of the head's gradients H those rows are kept until the embedding's are there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pkt import ops
from pkt.ops import Measure
from pkt.scoring import EmbeddingUse, FullSink, HeadUse, RowsUse, Use, measured, real_lengths
from pkt.streaming.loader import NotLayeredError


class _SampleIds:
    """The token ids of the samples being scored, without their padding, and the number of the first."""

    def __init__(self, batch: dict[str, Tensor], first: int, device: torch.device) -> None:
        lengths = real_lengths(batch)
        assert lengths is not None
        self.first = first
        self.ids = [row[:n] for row, n in zip(batch["input_ids"].to(device), lengths, strict=True)]


class HeadRowsSink:
    """S of the head's use, and of each sample's gradient the rows that its tokens will touch: (ids, rows) by sample."""

    def __init__(self, weight: Tensor, measure: Measure) -> None:
        self.inner = FullSink(weight, measure)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._samples: _SampleIds | None = None

    def begin_batch(self, batch: dict[str, Tensor], first: int) -> None:
        self._samples = _SampleIds(batch, first, self.inner.weight.device)

    def add(self, use: Use) -> None:
        self.inner.add(use)
        if isinstance(use, HeadUse) and use.first > 0:
            return  # another block of what gave all the rows already
        assert self._samples is not None
        assert isinstance(use, RowsUse)
        for j in use.samples:
            ids = self._samples.ids[j].unique()
            rows = use.gradient_rows(j, ids, self.inner.weight) / self.inner.scale
            self.kept[self._samples.first + j] = ids, rows

    def end_batch(self) -> None:
        self.inner.end_batch()

    def rescale(self, scale: float) -> None:
        self.inner.rescale(scale)

    def result(self) -> Tensor:
        return self.inner.result()

    def carried(self) -> dict[str, Tensor]:
        """What was kept, samples in order: their ids and rows one after another, and how many each has."""
        kept = [self.kept[sample] for sample in sorted(self.kept)]
        if not kept:  # of a rank without samples
            none = torch.zeros(0, dtype=torch.int64)
            return {"ids": none, "rows": torch.zeros(0, *self.inner.weight.shape[1:]), "counts": none}
        return {
            "ids": torch.cat([ids for ids, _ in kept]).cpu(),
            "rows": torch.cat([rows for _, rows in kept]).cpu(),
            "counts": torch.tensor([len(ids) for ids, _ in kept]),
        }


class JoinedSink:
    """How the embedding's use changes S of the table, for the rows `touched` by any sample, whose table it needs no copy of.

    carried: what `HeadRowsSink.carried` gave.
    """

    def __init__(self, weight: Tensor, measure: Measure, carried: dict[str, Tensor]) -> None:
        self.weight, self.measure, self.scale = weight.detach(), measure, 1.0
        counts = carried["counts"].tolist()
        self._head = list(zip(carried["ids"].split(counts), carried["rows"].split(counts), strict=True))
        self.touched = carried["ids"].unique().to(weight.device)
        self._change = torch.zeros(len(self.touched), *weight.shape[1:], dtype=torch.float32, device=weight.device)
        self._samples: _SampleIds | None = None

    def begin_batch(self, batch: dict[str, Tensor], first: int) -> None:
        self._samples = _SampleIds(batch, first, self.weight.device)

    def add(self, use: Use) -> None:
        assert self._samples is not None
        for j in use.samples:
            own = self._samples.ids[j]
            if isinstance(use, EmbeddingUse):
                ids, embedding = use.touched(j, self.weight.shape[0], len(own))
            else:
                assert isinstance(use, RowsUse)
                ids = own.unique()
                embedding = use.gradient_rows(j, ids, self.weight)
            self._join(self._samples.first + j, ids, embedding)

    def _join(self, sample: int, ids: Tensor, embedding: Tensor) -> None:
        kept, head = (t.to(self.weight.device) for t in self._head[sample])
        if not torch.equal(kept, ids):
            raise NotLayeredError("its tied table is read at other rows than its tokens'")
        weight = self.weight[ids].to(embedding.dtype)
        head = head.to(embedding.dtype) * self.scale
        change = measured(weight, head + embedding, self.measure) - measured(weight, head, self.measure)
        ops.add_rows_(self._change, torch.searchsorted(self.touched, ids), change.to(self._change.dtype))

    def end_batch(self) -> None: ...

    def rescale(self, scale: float) -> None:
        self._change *= (scale / self.scale) ** self.measure.power
        self.scale = scale

    def result(self) -> Tensor:
        if self.scale != 1.0:
            self._change /= self.scale**self.measure.power
        return self._change


@contextlib.contextmanager
def changed(table: Tensor, changes: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Inside, a table's scores with what was added to some of its rows: (rows, values) of every rank. Afterwards as before."""
    before = []
    for touched, added in ((ids.to(table.device), rows.to(table.device)) for ids, rows in changes):
        before.append((touched, table[touched]))
        table[touched] = before[-1][1] + added
    try:
        yield table
    finally:
        for touched, rows in reversed(before):
            table[touched] = rows
