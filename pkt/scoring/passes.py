"""What a backward pass is for: to see whether samples share a batch, to see how large gradients are, or to add up S.

Each kind of pass is told of every use of a parameter that a tap sees, and of every gradient that autograd delivers because a
use went past the taps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pkt.errors import SampleError
from pkt.scoring.batches import Layout
from pkt.scoring.findings import Findings, LearntError
from pkt.scoring.head import HeadUse
from pkt.scoring.sinks import SharedSink, Sinks, TiedSink
from pkt.scoring.uses import EmbeddingUse, Use, WholeUse, accumulated_in


class Pass(Protocol):
    def use(self, name: str, dy: Tensor, use: Use) -> None:
        """A tap saw dy [B, ..., out] at a use of the parameter."""
        ...

    def gradient(self, name: str, grad: Tensor) -> None:
        """Autograd delivered the parameter's gradient."""
        ...


class Probing:
    """The loss is sample 0's alone: it must reach only sample 0's rows."""

    def __init__(self, findings: Findings, layout: Layout) -> None:
        self.findings, self.layout = findings, layout

    def use(self, name: str, dy: Tensor, use: Use) -> None:
        if isinstance(use, HeadUse):  # of target positions, whose samples are known
            return
        rows = self.layout.rows(dy)
        if rows is None or bool(dy.reshape(-1, dy.shape[-1])[int(rows.starts[1]) :].count_nonzero()):
            raise LearntError(self.findings.alone())

    def gradient(self, name: str, grad: Tensor) -> None:
        raise LearntError(self.findings.alone())


class Measuring:
    """The largest gradient seen, for fp16's scale."""

    def __init__(self) -> None:
        self._peak: Tensor | None = None

    @property
    def peak(self) -> float:
        return 0.0 if self._peak is None else float(self._peak)

    def use(self, name: str, dy: Tensor, use: Use) -> None:
        peak = dy.detach().abs().amax().float()
        self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)

    def gradient(self, name: str, grad: Tensor) -> None:
        self.use(name, grad, WholeUse(grad))


class Adding:
    """S of one batch: uses go to the parameters' sinks, and what is needed to find a gradient that is not finite is noted.

    first: the number of its first sample.
    """

    def __init__(self, findings: Findings, size: int, sinks: Sinks, first: int) -> None:
        self.findings, self.size, self.sinks, self.first = findings, size, sinks, first
        self.uses: Counter[str] = Counter()
        self.delivered: set[str] = set()
        self.sums: list[tuple[str, Tensor]] = []

    def use(self, name: str, dy: Tensor, use: Use) -> None:
        self._watch(name, dy)
        if not isinstance(use, HeadUse) or use.first == 0:
            self.uses[name] += 1
        if name in self.delivered:
            raise LearntError(self.findings.untapping(name))
        sink = self.sinks[name]
        if isinstance(sink, TiedSink) and not isinstance(use, (HeadUse, EmbeddingUse)):
            raise LearntError(self.findings.sharing(name))
        # A tied table's head and embedding are two; of any parameter that is not known to have more uses, one.
        if self.uses[name] > (2 if isinstance(sink, TiedSink) else 1) and not isinstance(sink, SharedSink):
            raise LearntError(self.findings.sharing(name))
        sink.add(use)

    def gradient(self, name: str, grad: Tensor) -> None:
        if self.size > 1 and not self.findings.one_by_one:
            raise LearntError(self.findings.alone())
        if self.uses[name]:
            raise LearntError(self.findings.untapping(name))
        self.delivered.add(name)
        self.sums.append((name, grad.sum(dtype=torch.float32).view(1)))
        self.sinks[name].add(WholeUse(grad))

    def _watch(self, name: str, dy: Tensor) -> None:
        """A sum is finite only if all its terms are (or it overflowed): one read of dy, no wait for the device."""
        by_sample = self.size > 1 and dy.shape[0] == self.size
        work = accumulated_in(dy.dtype)
        total = dy.reshape(self.size, -1).sum(1, dtype=work) if by_sample else dy.sum(dtype=work).view(1)
        self.sums.append((name, total))

    def end_batch(self) -> None:
        self.sinks.end_batch({*self.uses, *self.delivered})

    def blamed(self) -> tuple[str, list[int]] | None:
        """The first parameter (in backward order) whose gradient is not finite, and for which samples."""
        for name, total in self.sums:
            bad = (~total.isfinite()).nonzero()
            if len(bad):
                one = len(total) == self.size
                return name, [self.first + int(bad[0, 0])] if one else [*range(self.first, self.first + self.size)]
        return None


def check_finite(batches: Sequence[Adding], device: torch.device, advice: Callable[[], str]) -> None:
    """One read of the device for all. Raises `SampleError` naming the first parameter gone wrong; advice: what to do about it."""
    sums = [total.to(device) for batch in batches for _, total in batch.sums]
    # All at once: one by one they would be five launches a use.
    if not sums or bool(torch.cat(sums).isfinite().all()):
        return
    name, samples = next(found for batch in batches if (found := batch.blamed()))
    raise SampleError(
        f"the gradient of {name} is not finite for {{samples}} (the first seen, from the output down); {advice()}",
        samples,
    )
