"""The language-model head's loss and its gradient without its logits.

losses[j] = mean over sample j's target tokens of  logsumexp(h Wᵀ) − (h Wᵀ)[target]

A head of 128k tokens over 16k positions would need 8 GB of logits and as much again for their gradient. Here the forward
pass keeps one number a token (the logsumexp), a block of tokens at a time; the backward pass forms the gradient of a block of
vocabulary, P = (softmax − one-hot) · dloss / targets, for all tokens at once: a row of W gets its whole gradient from its own
column of P, so S of those rows follows from (h, P) and is handed to `record` before the next block. Only target positions take
part at all. What it costs: one more product h Wᵀ. Semantics are those of `pkt.scoring.per_sample_loss` (per-sample means, which
fused losses elsewhere do not give).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pkt import ops
from pkt.models import plain_head
from pkt.ops import Measure
from pkt.scoring.batches import Rows
from pkt.scoring.losses import check_targets, output_field
from pkt.scoring.uses import add_linear
from pkt.seeds import IGNORE

# Elements of one block of logits: 256 MiB of fp32 on a GPU; on a CPU what its caches can use.
BLOCK = {"cpu": 1 << 21}
BLOCK_DEFAULT = 1 << 26
# Tokens of one product of the backward pass; elsewhere all at once.
TOKENS = {"cpu": 256}


@dataclass
class Tokens:
    """The target positions of a batch as rows, sample after sample."""

    hidden: Tensor  # [N, d]
    targets: Tensor  # [N] token ids
    sample: Tensor  # [N]
    counts: Tensor  # [B] targets of each sample
    lse: Tensor  # [N], filled by the forward pass
    scale: Tensor  # [N] dloss / targets, filled by the backward pass

    def rows(self) -> Rows:
        return Rows(self.counts.cumsum(0) - self.counts, self.counts)


@dataclass(frozen=True, eq=False)
class HeadUse:
    """The head's use of its weight, of which `p` shows the rows `first` .. at a time."""

    tokens: Tokens
    first: int
    p: Tensor  # [N, rows of the block]
    rows: Rows

    @property
    def samples(self) -> Sequence[int]:
        return self.rows.samples

    def add(self, acc: Tensor, weight: Tensor, measure: Measure, tile: int | None) -> None:
        stop = self.first + self.p.shape[1]
        part = slice(self.first, stop) if tile is None else slice(self.first // tile, -(-stop // tile))
        add_linear(acc[part], weight[self.first : stop], self.tokens.hidden, self.p, self.rows, measure, tile)

    def add_gradient(self, grad: Tensor, sample: int) -> None:
        part = self.rows.part(sample)
        grad[self.first : self.first + self.p.shape[1]].addmm_(
            self.p[part].to(grad.dtype).t(), self.tokens.hidden[part].to(grad.dtype)
        )

    def gradient_rows(self, sample: int, ids: Tensor, weight: Tensor) -> Tensor:
        """Computed again, for any rows, from what the forward pass kept."""
        part, table, work = self.rows.part(sample), weight[ids], self.tokens.lse.dtype
        p = probabilities(self.tokens, part, table, None, ids).to(table.dtype).to(work)
        return p.t() @ self.tokens.hidden[part].to(work)


Record = Callable[[HeadUse], None]


def block_rows(other: int, device: torch.device) -> int:
    return max(1, BLOCK.get(device.type, BLOCK_DEFAULT) // max(1, other))


def head_losses(
    anchor: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    record: Record,
    multiple: int = 1,
) -> Tensor:
    """hidden [B, T, d], weight [V, d], labels [B, T] (shifted here) -> losses [B], fp32 (fp64 for fp64).

    `record` is called during the backward pass, for blocks of vocabulary that start at multiples of `multiple`.
    """
    mask = labels[:, 1:] != IGNORE
    # Row-major order keeps each sample's tokens together.
    rows = hidden[:, :-1][mask]
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    tokens = Tokens(
        hidden=rows.detach(),
        targets=labels[:, 1:][mask],
        sample=mask.nonzero()[:, 0],
        counts=mask.sum(1),
        lse=torch.empty(len(rows), dtype=work, device=rows.device),
        scale=torch.empty(len(rows), dtype=work, device=rows.device),
    )
    return _head_loss(anchor, rows, weight, tokens, record, multiple)


def probabilities(tokens: Tokens, part: slice, columns: Tensor, first: int | None, ids: Tensor | None) -> Tensor:
    """P of some tokens for some vocabulary rows, in the working type.

    columns: those rows of W [k, d]; they are the ids first .. first + k, or `ids` [k].
    """
    h = tokens.hidden[part]
    p = (h @ columns.t()).to(tokens.lse.dtype)
    p.sub_(tokens.lse[part, None]).exp_()
    targets = tokens.targets[part]
    if ids is None:
        assert first is not None
        inside = (targets >= first) & (targets < first + len(columns))
        index = (targets - first).clamp(0, len(columns) - 1)[:, None]
        p.scatter_add_(1, index, -inside[:, None].to(p.dtype))
    else:
        p -= (targets[:, None] == ids[None]).to(p.dtype)
    return p.mul_(tokens.scale[part, None])


def _equal_parts(count: int, size: int) -> Iterator[tuple[slice, int]]:
    """Slices of `size` that cover `count`, and where each one's new rows begin: the last overlaps the one before it.

    The CPU's matrix library keeps code and buffers for every shape it has met, so a last part of its own shape, another one
    for every batch, would cost more memory than the rows that are computed twice cost time.
    """
    for fresh in range(0, count, max(1, size)):
        stop = min(fresh + size, count)
        yield slice(max(0, stop - size), stop), fresh


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, rows: Tensor, weight: Tensor, tokens: Tokens, record: Record, multiple: int
    ) -> Tensor:
        ctx.tokens, ctx.record, ctx.weight, ctx.multiple = tokens, record, weight, multiple
        height = block_rows(weight.shape[0], rows.device)
        work = tokens.lse.dtype
        picked = torch.empty_like(tokens.lse)
        for part, _ in _equal_parts(len(rows), height):
            logits = (rows[part] @ weight.t()).to(work)
            picked[part] = logits.gather(1, tokens.targets[part, None])[:, 0]
            top = logits.amax(1, keepdim=True)
            tokens.lse[part] = logits.sub_(top).exp_().sum(1).log_().add_(top[:, 0])
        losses = torch.zeros(len(tokens.counts), dtype=work, device=rows.device)
        ops.add_rows_(losses, tokens.sample, (tokens.lse - picked) / tokens.counts[tokens.sample])
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tokens, weight = ctx.tokens, ctx.weight
        tokens.scale.copy_((grads[0] / tokens.counts)[tokens.sample])
        count, device = len(tokens.hidden), weight.device
        dh = torch.zeros(tokens.hidden.shape, dtype=tokens.lse.dtype, device=device)
        # A power of two, so that batches of other sizes need no products of other shapes.
        height = 1 << (block_rows(count, device).bit_length() - 1)
        height = -(-height // ctx.multiple) * ctx.multiple
        rows = tokens.rows()
        for first in range(0, weight.shape[0], height):
            columns = weight[first : first + height]
            p = torch.empty(count, len(columns), dtype=weight.dtype, device=device)
            for part, fresh in _equal_parts(count, TOKENS.get(device.type, count)):
                p[part] = probabilities(tokens, part, columns, first, None)
                dh[fresh : part.stop] += (p[part] @ columns)[fresh - part.start :]
            ctx.record(HeadUse(tokens, first, p, rows))
        return None, dh.to(tokens.hidden.dtype), None, None, None, None


# autograd.Function.apply has no types.
_head_loss: Callable[..., Tensor] = _HeadLoss.apply


class FusedHead:
    """`default_loss` without logits: the same checks, the same numbers."""

    def __init__(self, model: nn.Module, name: str, anchor: Tensor, multiple: int) -> None:
        found = plain_head(model)
        assert found is not None
        self.name, self.anchor, self.multiple = name, anchor, multiple
        self.head, self.below = found

    def losses(self, batch: Any, record: Record) -> Tensor:
        labels = batch["labels"]
        check_targets(labels[:, 1:])
        hidden = self.below(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)[0]
        return head_losses(self.anchor, hidden, self.head.weight.detach(), labels, record, self.multiple)


def find_fused_head(model: nn.Module, names: Collection[str], batch: Any) -> str | None:
    """The head's weight, when it is one of `names` and the loss can be had without logits.

    That is so when logits are nothing but the head's product with the model below it, which is tried on a small batch. A tied
    table may be one embedding's besides.
    """
    found = plain_head(model)
    if found is None:
        return None
    head, below = found
    name = next((n for n, p in model.named_parameters() if p is head.weight and n in names), None)
    uses = sum(m._parameters.get("weight") is head.weight for m in model.modules())
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is head.weight]
    if name is None or uses != 1 + len(tables) or len(tables) > 1:
        return None
    return name if _is_product(model, head, below, batch) else None


def _is_product(model: nn.Module, head: nn.Module, below: nn.Module, batch: Any) -> bool:
    """Whether the model's logits are those of its head on what the model below it returns, and its loss nothing else's."""
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda m, args, out: seen.extend((args[0].clone(), out.clone())))
    try:
        with torch.no_grad():
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            logits = output_field(model(**inputs, use_cache=False), "logits")
            hidden = below(**inputs, use_cache=False)[0]
    except (TypeError, IndexError, KeyError, RuntimeError):
        return False
    finally:
        handle.remove()
    if len(seen) != 2 or logits is None:
        return False
    return torch.equal(hidden, seen[0]) and torch.equal(logits, seen[1].to(logits))
