"""Scoring one part of a model at a time, and a table that the first part and the last one share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pkt import ops
from pkt.scoring import RestartError, Scorer


class PartScorer(Scorer):
    """A `Scorer` of some parameters of a model, driven one forward and backward at a time by the engine."""

    blame: Callable[[], str | None]

    def __init__(self, model: nn.Module, names: Sequence[str], *, tied: str | None = None) -> None:
        super().__init__(model, names)
        self.tied = tied
        if tied is not None:
            # Only one of its two uses runs in this part; the other's share is joined in the front (`FrontScorer`).
            self.shared.discard(tied)

    @contextlib.contextmanager
    def samples(self, batch: dict[str, Tensor], first: int) -> Iterator[None]:
        """What backward passes inside deliver belongs to these samples, number `first` onwards of their task."""
        self._set_layout(batch, len(batch["input_ids"]))
        self._begin_batch()
        self.tokens.clear()
        self.first = first
        with torch.enable_grad():
            yield
        self._check_finite(first)
        self._flush()

    def backward(self, losses: Tensor, leaf: Tensor | None) -> Tensor | None:
        """Backward from [B] losses, scaled where fp16 needs it; the gradient of `leaf`, its scale divided out."""
        scale = self._choose_scale(losses) if self.half else 1.0
        self._set_scale(scale)
        if leaf is not None:
            leaf.grad = None
        (losses * scale).sum().backward()
        if leaf is None or leaf.grad is None:
            return None
        return leaf.grad.float() / scale if self.half else leaf.grad

    def backward_from(self, out: Tensor, grad: Tensor, leaf: Tensor | None) -> Tensor | None:
        """Backward from the gradient at a part's output."""
        if self.half:
            return self.backward((out.float() * grad).flatten(1).sum(1), leaf)
        torch.autograd.backward(out, grad.to(out.dtype))
        return None if leaf is None else leaf.grad

    def _blame(self) -> str:
        name = self.blame()
        if name is not None:
            return f"parameter {name} itself holds NaN or Inf: the checkpoint is damaged, copy it again"
        return "every parameter is finite, so look at that sample, or load the model in fp32 or bf16"

    def spans(self, dy: Tensor) -> list[tuple[int, int]]:
        layout = self._rows(dy)
        if layout is None:
            raise RestartError
        return [(s, s + n) for s, n in zip(layout[1].tolist(), layout[2].tolist(), strict=True)]


class HeadScorer(PartScorer):
    """Keeps, for a tied table, the rows of each sample's gradient that the embedding will touch: (ids, rows) by sample."""

    ids: Tensor  # of the samples being scored

    def __init__(self, model: nn.Module, names: Sequence[str], *, tied: str | None = None) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        super().__init__(model, names, tied=tied)

    def _accumulate(self, kind: str, name: str, saved: Tensor, dy: Tensor) -> None:
        super()._accumulate(kind, name, saved, dy)
        if name != self.tied:
            return
        rows, x = dy.reshape(-1, dy.shape[-1]), saved.reshape(-1, saved.shape[-1])
        work = torch.float64 if dy.dtype == torch.float64 else torch.float32
        for j, (a, b) in enumerate(self.spans(dy)):
            ids = self.ids[j, : b - a].unique()
            kept = rows[a:b, ids].to(work).t() @ x[a:b].to(work) / self.scale
            self.kept[self.first + j] = (ids, kept)

    def _add_abs(self, acc: Tensor, parameter: Tensor, grad: Tensor) -> None:
        super()._add_abs(acc, parameter, grad)
        if self.tied is not None and acc is self.acc.get(self.tied):
            ids = self.ids[0].unique()
            self.kept[self.first] = (ids, grad[ids].float() / self.scale)

    def keep_fused(self) -> None:
        """The same for the fused head, which shows no gradient of the whole table."""
        if self.tied is None or self.fused is None:
            return
        assert self.lens is not None
        for j, length in enumerate(self.lens.tolist()):
            ids = self.ids[j, :length].unique()
            self.kept[self.first + j] = (ids, self._head_rows(self.tied, j, ids) / self.scale)


class FrontScorer(PartScorer):
    """Joins the two uses of a tied table: |θ(H+E)| − |θH| for the rows that sample j's tokens touched.

    Only the change of the rows `touched` by any sample is accumulated; the table's scores themselves need no second copy.
    """

    ids: Tensor
    head: dict[int, tuple[Tensor, Tensor]]
    touched: Tensor

    def _accumulator(self, name: str, *, full: bool = False) -> Tensor:
        if name == self.tied and name not in self.acc:
            shape = len(self.touched), *self.shapes[name][1:]
            self.acc[name] = torch.zeros(shape, dtype=torch.float32, device=self.touched.device)
        return super()._accumulator(name, full=full)

    def _accumulate(self, kind: str, name: str, saved: Tensor, dy: Tensor) -> None:
        if name != self.tied:
            super()._accumulate(kind, name, saved, dy)
            return
        ids, rows = saved.reshape(-1), dy.reshape(-1, dy.shape[-1])
        for j, (a, b) in enumerate(self.spans(dy)):
            whole = torch.tensor([0], device=dy.device), torch.tensor([b - a], device=dy.device)
            touched, grads = ops.embedding_rows(ids[a:b], rows[a:b], *whole, self.shapes[name][0])
            self._join(self.first + j, touched, grads)

    def _add_abs(self, acc: Tensor, parameter: Tensor, grad: Tensor) -> None:
        if self.tied is None or acc is not self.acc.get(self.tied):
            super()._add_abs(acc, parameter, grad)
            return
        touched = self.ids[0].unique()
        self._join(self.first, touched, grad[touched].float())

    def _join(self, sample: int, touched: Tensor, embedding: Tensor) -> None:
        assert self.tied is not None
        acc, table = self._accumulator(self.tied), self.parameters[self.tied].detach()
        ids, head = (t.to(acc.device) for t in self.head[sample])
        if not torch.equal(ids, touched):
            raise RestartError
        weight = table[ids].to(embedding.dtype)
        head = head.to(embedding.dtype) * self.scale
        change = (weight * (head + embedding)).abs_() - (weight * head).abs_()
        acc.index_add_(0, torch.searchsorted(self.touched, ids), change.to(acc.dtype))
