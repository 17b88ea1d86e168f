"""How much of a start is kept: α by the loss on the seeds, forward passes only."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkt.adapters import Pair
from pkt.errors import PktError
from pkt.models import is_tied, rows_apart, tables_of
from pkt.progress import bar
from pkt.scoring import default_loss
from pkt.seeds import Seeds

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
# Tried one by one while the loss still falls.
BEYOND = (2.0, 3.0, 4.0)


@contextlib.contextmanager
def added(
    model: nn.Module, pairs: Mapping[str, Pair], scale: float, vectors: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Inside, the modules' outputs are those of W + scale · ΔW. A tied head is changed with its table.

    No matrix is touched but those of experts, which lie in one parameter. vectors: changes of norms, biases and the like, by the
    parameter's name. Both are exchanged meanwhile.
    """
    handles = []
    changes = {name: pair.delta() for name, pair in pairs.items() if pair.experts} | dict(vectors or {})
    before = {name: model.get_parameter(name).data for name in changes}
    embedding, head = tables_of(model)

    def linear(a: Tensor, b: Tensor) -> Any:
        return lambda module, args, out: out + scale * F.linear(F.linear(args[0], a.to(args[0])), b.to(args[0]))

    def lookup(a: Tensor, b: Tensor) -> Any:
        return lambda module, args, out: out + scale * F.linear(F.embedding(args[0], a.t().to(out)), b.to(out))

    try:
        for name, change in changes.items():
            model.get_parameter(name).data = before[name] + scale * change.to(before[name])
        for name, pair in pairs.items():
            if pair.experts:
                continue
            module = model.get_submodule(name)
            if pair.kind == "embedding":
                handles.append(module.register_forward_hook(lookup(pair.A, pair.B)))
                if module is embedding and is_tied(model):
                    handles.append(head.register_forward_hook(linear(pair.B.t(), pair.A.t())))
            else:
                handles.append(module.register_forward_hook(linear(pair.A, pair.B)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, kept in before.items():
            model.get_parameter(name).data = kept


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], device: torch.device) -> float:
    """Mean over the samples of each sample's loss, in nats a token."""
    found = [default_loss(model, {k: v.to(device) for k, v in batch.items()}).double() for batch in batches]
    return float(torch.cat([f.reshape(-1) for f in found]).mean())


def best_scale(
    model: nn.Module,
    pairs: Mapping[str, Pair],
    seeds: Seeds,
    *,
    alphas: Sequence[float] = ALPHAS,
    beyond: Sequence[float] = BEYOND,
    also: float | None = None,
    vectors: Mapping[str, Tensor] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> tuple[float, dict[str, float]]:
    """The α with the smallest mean loss of the seeds, and the loss at each that was tried; a tie goes to the smaller α.

    alphas: all are tried, and then those `beyond` them, larger each, while the last one tried is the best; also: one more.
    vectors: changes of norms and biases, by name, that are scaled alike.
    Raises `PktError` when no loss is finite.
    """
    device = next(model.parameters()).device
    batches = seeds.batches(batch_size)
    losses: dict[float, float] = {}
    with bar("choosing the scale", len(alphas), unit="scales", shown=progress) as advance:
        for alpha in (*alphas, *beyond):
            if len(losses) >= len(alphas) and _best(losses) != list(losses)[-1]:
                break
            with added(model, pairs, alpha, vectors), rows_apart(model):
                losses[alpha] = mean_loss(model, batches, device)
            advance(min(len(losses), len(alphas)))
        if also is not None and also not in losses:
            with added(model, pairs, also, vectors), rows_apart(model):
                losses[also] = mean_loss(model, batches, device)
    best = _best(losses)
    if best is None:
        raise PktError(
            "the student's loss on the seeds is not finite at any scale; its weights or the change are damaged"
        )
    return best, {f"{a:g}": losses[a] for a in sorted(losses)}


def _best(losses: Mapping[float, float]) -> float | None:
    finite = [a for a, loss in losses.items() if math.isfinite(loss)]
    return min(finite, key=lambda a: (losses[a], a), default=None)


def tried(losses: Mapping[str, float]) -> str:
    """The scales that were tried, in words, and whether the search ended at an end."""
    best = min(losses, key=lambda a: losses[a] if math.isfinite(losses[a]) else math.inf)
    more = "; the largest is the best, so more may do more" if best == list(losses)[-1] else ""
    return f"tried {', '.join(losses)}{more}"
