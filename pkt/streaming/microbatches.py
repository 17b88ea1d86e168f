"""Micro-batches: which samples run together, how wide they are padded, and how they are made smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pkt.errors import PktError
from pkt.scoring import Layout, real_lengths
from pkt.seeds import IGNORE


@dataclass
class Chunk:
    """A micro-batch of one task: samples `first` onwards of its order, and every layer's recorded arguments.

    layout: where its samples lie, on the device, once for all parts that are scored.
    """

    task: int
    first: int
    batch: dict[str, Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    layout: Layout | None = None

    @property
    def size(self) -> int:
        return len(self.batch["input_ids"])

    def sample(self, index: int) -> dict[str, Tensor]:
        """One sample without its right padding."""
        length = int(self.batch["attention_mask"][index].sum())
        return {k: v[index : index + 1, :length] for k, v in self.batch.items()}


def chunks_of(
    tasks: Sequence[Sequence[dict[str, Tensor]]], sizes: list[list[int]], device: torch.device, itemsize: int
) -> list[Chunk]:
    """Each task's samples (batches of one, unpadded, in order) as micro-batches of the given sizes."""
    chunks = []
    step = width_step(device, itemsize, max((s["input_ids"].shape[1] for task in tasks for s in task), default=1))
    for task, samples in enumerate(tasks):
        first = 0
        for size in sizes[task]:
            part = samples[first : first + size]
            width = rounded_up(max(s["input_ids"].shape[1] for s in part), step)
            batch = _padded(part, width)
            chunks.append(Chunk(task, first, batch, layout=Layout.of(batch, device)))
            first += size
    return chunks


def width_step(device: torch.device, itemsize: int, longest: int) -> int:
    """What the width of a micro-batch is a multiple of.

    On a CPU the half types' matrix library keeps megabytes of code and buffers for every shape it has met, so widths are
    rounded up to one of eight; it costs a few percent of padding.
    """
    return max(1, -(-longest // 8)) if device.type == "cpu" and itemsize == 2 else 1


def rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _padded(samples: Sequence[dict[str, Tensor]], longest: int) -> dict[str, Tensor]:
    """Samples [1, T] of one task as one batch, padded on the right to `longest`."""
    fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    return {
        key: torch.cat([nn.functional.pad(s[key], (0, longest - s[key].shape[1]), value=fill) for s in samples])
        for key, fill in fills.items()
    }


def samples_of(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The samples of right-padded batches, each [1, T] without its padding."""
    found = []
    for batch in batches:
        lengths = real_lengths(batch)
        if lengths is None:
            raise PktError("streaming needs batches of input_ids, attention_mask and labels, padded on the right")
        found += [{k: v[j : j + 1, :n] for k, v in batch.items()} for j, n in enumerate(lengths)]
    return found


def halved(sizes: list[int]) -> list[int]:
    return [part for size in sizes for part in ((size + 1) // 2, size // 2) if part]


def rechunk(grads: list[Tensor], sizes: list[list[int]], chunks: list[Chunk]) -> list[Tensor]:
    """Gradients of micro-batches of `sizes` as those of `chunks`, sample by sample."""
    if [c.size for c in chunks] == [s for task in sizes for s in task]:
        return grads
    rows = [grad[j : j + 1] for grad in grads for j in range(len(grad))]
    found = []
    for chunk in chunks:
        mine, rows = rows[: chunk.size], rows[chunk.size :]
        width = chunk.batch["input_ids"].shape[1]
        padded = [nn.functional.pad(row, (0, 0, 0, max(0, width - row.shape[1]))) for row in mine]
        found.append(torch.cat([row[:, :width] for row in padded]))
    return found
