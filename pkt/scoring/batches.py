"""Batches of samples: how many, which rows are whose, parts of them, and in which order they are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pkt.errors import PktError
from pkt.seeds import IGNORE, Seeds


def longest_first(seeds: Seeds) -> list[int]:
    """The order in which seeds are scored: those of like length share a batch, so that little is padding."""
    return sorted(range(len(seeds)), key=lambda i: -len(seeds[i].input_ids))


def in_order_of(values: Sequence[float], order: Sequence[int]) -> list[float]:
    """Values of samples scored in `order`, back in the order of the file."""
    placed = [0.0] * len(order)
    for place, value in zip(order, values, strict=True):
        placed[place] = value
    return placed


def tensors_of(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return [v for v in values if isinstance(v, Tensor)]


def batch_size(batch: Any) -> int:
    """Samples in a batch: the first dimension its tensors share."""
    sizes = {t.shape[0] for t in tensors_of(batch) if t.ndim}
    if len(sizes) != 1:
        raise PktError(f"cannot tell the samples of a batch: its tensors' first dimensions are {sorted(sizes)}")
    return sizes.pop()


def sliced(batch: Any, part: slice, tokens: int | None = None) -> Any:
    """Some samples of a batch, and the first `tokens` positions of a batch of token matrices."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        return value[part] if tokens is None else value[part, :tokens]

    if isinstance(batch, Tensor):
        return cut(batch)
    if isinstance(batch, Mapping):
        return {k: cut(v) for k, v in batch.items()}
    return type(batch)(cut(v) for v in batch)


def real_lengths(batch: Any) -> list[int] | None:
    """Tokens of each sample before its right padding, when the batch is of that form."""
    if not isinstance(batch, Mapping):
        return None
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if not isinstance(mask, Tensor) or not isinstance(ids, Tensor) or mask.shape != ids.shape or ids.ndim != 2:
        return None
    if any(t.shape != ids.shape for t in tensors_of(batch)):
        return None
    used = mask != 0
    if isinstance(batch.get("labels"), Tensor):
        used = used | (batch["labels"] != IGNORE)
    lengths = used.sum(1)
    if bool((used != (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None])).any()):
        return None
    found: list[int] = lengths.tolist()
    return found


def one_sample(batch: Any, index: int) -> Any:
    """One sample of a batch without its right padding."""
    sample = sliced(batch, slice(index, index + 1))
    lengths = real_lengths(sample)
    return sample if lengths is None else sliced(sample, slice(0, 1), max(1, lengths[0]))


def probe_of(batch: Any, *, tokens: int | None) -> Any:
    """Two samples of a batch that are all targets; of token matrices, their first `tokens` positions."""
    try:
        small = sliced(batch, slice(0, 2), tokens)
    except (TypeError, IndexError):
        return batch
    if tokens is not None:
        small["labels"] = small["input_ids"]
        small["attention_mask"] = torch.ones_like(small["attention_mask"])
    return small


def on_device(batch: Any, device: torch.device) -> Any:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Tensor):
        return move(batch)
    if isinstance(batch, Mapping):
        return {k: move(v) for k, v in batch.items()}
    return type(batch)(move(v) for v in batch)


class Rows(NamedTuple):
    """Where samples lie in a matrix of rows: sample j is rows starts[j] .. + lens[j], both int64 [B] on the device."""

    starts: Tensor
    lens: Tensor

    @property
    def samples(self) -> range:
        return range(self.starts.shape[0])

    def part(self, sample: int) -> slice:
        start = int(self.starts[sample])
        return slice(start, start + int(self.lens[sample]))


class Layout:
    """How the samples of a batch lie in the gradients of what is computed from it.

    size: samples; width: positions of each; lens [size]: how many of them come before a sample's right padding, if known.
    """

    def __init__(self, size: int = 1, width: int = 1, lens: Tensor | None = None) -> None:
        self.size, self.width, self.lens = size, width, lens
        self._known: dict[tuple[int, bool], Rows] = {}

    @classmethod
    def of(cls, batch: Any, device: torch.device) -> Layout:
        lengths = real_lengths(batch)
        first = next((t for t in tensors_of(batch) if t.ndim > 1), None)
        return cls(
            batch_size(batch),
            first.shape[1] if first is not None else 1,
            None if lengths is None else torch.tensor(lengths, device=device),
        )

    def rows(self, dy: Tensor) -> Rows | None:
        """The samples in dy flattened to rows of its last dimension; None when its layout is not known."""
        count = dy.numel() // max(1, dy.shape[-1])
        if self.size == 1:
            each, lens = count, None
        elif dy.shape[0] == self.size:
            each = count // self.size
            lens = self.lens if dy.ndim == 3 and each == self.width else None
        elif dy.ndim == 2 and count == self.size * self.width:
            each, lens = self.width, self.lens
        else:
            return None
        # The same tensors for every gradient of a kind: what reads them on a device is checked once.
        key = (each, lens is None)
        if key not in self._known:
            starts = torch.arange(self.size, device=dy.device) * each
            if lens is None:
                lens = torch.full((self.size,), each, device=dy.device)
            self._known[key] = Rows(starts, lens.to(dy.device))
        return self._known[key]
