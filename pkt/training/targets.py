"""Learning from a teacher's distributions: (1 − mix) · CE − mix · Σ_t (c_t / N) log p_t for each answer token (docs/method.md §9).

The logits of a batch are never there at once: the model below its head runs once, and the head, with whatever a family does to its
logits, on a block of answer tokens at a time, whose logits are computed again in the backward pass.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pkt.errors import PktError
from pkt.models import ModelSpec, unwrap, vocabulary_digest
from pkt.scoring.losses import output_field
from pkt.seeds import IGNORE, Example, Seeds, collate
from pkt.targets import Targets

# Elements of one block of logits.
BLOCK = {"cpu": 1 << 22}
BLOCK_DEFAULT = 1 << 26
KEYS = ("teacher_ids", "teacher_weights", "teacher_rest")


@dataclass(frozen=True)
class Distillation:
    """A teacher's targets for the rows of a training, and their share of the loss. places: the targets' row of each row."""

    targets: Targets
    mix: float
    places: list[int]

    @property
    def fingerprint(self) -> str:
        """Of the targets' content."""
        return str(self.targets.told["sha256"])

    def collate(self, rows: Sequence[tuple[Example, int | None]], pad_id: int) -> dict[str, Tensor]:
        """A batch of (row, its number), with the targets of all its answer tokens, row after row: [A, m] and, if known, [A].

        A row without a number has no answer token.
        """
        batch = collate([row for row, _ in rows], pad_id)
        found = [self.targets.row(self.places[number]) for _, number in rows if number is not None]
        if not found:
            return batch
        width = max(each.ids.shape[1] for each in found)

        def joined(tensors: list[Tensor]) -> Tensor:
            return torch.cat([nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors])

        batch |= {"teacher_ids": joined([r.ids for r in found]), "teacher_weights": joined([r.weights for r in found])}
        rest = [r.rest for r in found if r.rest is not None]
        return {**batch, "teacher_rest": torch.cat(rest)} if rest else batch

    def loss(self, model: Any, inputs: dict[str, Any], count: Any) -> Tensor:
        """Summed over the batch's answer tokens, divided by `count` of them."""
        found: Tensor = mixed_loss(model, inputs, self.mix) / count
        return found


def distillation(
    given: str | Path | Targets | None, mix: float | None, rows: Seeds, tokenizer: Any, spec: ModelSpec
) -> Distillation | None:
    """Targets and their share, checked against the rows and the student. Raises `PktError` for what does not belong together."""
    check_mix(given, mix)
    if given is None or mix is None:
        return None
    targets = given if isinstance(given, Targets) else Targets.load(given)
    where = targets.source or "the targets"
    if vocabulary_digest(tokenizer) != targets.tokenizer:
        raise PktError(
            f"{where} are over another tokenizer's tokens than {spec.name}'s, and a distribution over tokens says nothing of "
            "others; the teacher's answers work across tokenizers: pkt teach --generate, then train on those rows"
        )
    places = targets.places(rows)
    if spec.vocab_size is not None and targets.top_id >= spec.vocab_size:
        raise PktError(
            f"{where} name token {targets.top_id}, which {spec.name} does not have ({spec.vocab_size} tokens); they are of a "
            "teacher with a larger table"
        )
    return Distillation(targets, mix, places)


def check_mix(targets: Any, mix: float | None) -> None:
    """Refuse a share without targets, targets without a share, and one that is none."""
    if targets is None and mix is not None:
        raise PktError("mix is the share of a teacher's targets in the loss; name them too (--teacher-targets DIR)")
    if targets is not None and mix is None:
        raise PktError("a teacher's targets need their share of the loss, from 0 to 1: --mix 0.5 is usual")
    if mix is not None and not (math.isfinite(mix) and 0 <= mix <= 1):
        raise PktError(f"mix={mix} must be from 0 (the rows alone) to 1 (the teacher alone)")


def mixed_loss(model: Any, inputs: dict[str, Any], mix: float) -> Tensor:
    """The loss summed over all answer tokens of a batch as `Distillation.collate` makes it; fp32, or fp64 for fp64."""
    given = dict(inputs)
    labels = given.pop("labels")
    ids, weights, rest = (given.pop(key, None) for key in KEYS)
    head = SplitModel(unwrap(model))
    hidden = head.hidden(given)
    mask = labels[:, 1:] != IGNORE
    rows, wanted = hidden[:, :-1][mask], labels[:, 1:][mask]
    height = max(1, BLOCK.get(rows.device.type, BLOCK_DEFAULT) // head.vocabulary)
    total = rows.new_zeros((), dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32)
    if not len(rows):
        # Nothing counts, and yet every weight has a gradient.
        return total + 0.0 * hidden.sum()

    def block(rows: Tensor, part: slice) -> Tensor:
        left = None if rest is None else rest[part]
        return token_losses(head.logits(rows), wanted[part], ids[part], weights[part], left, mix).sum()

    for first in range(0, len(rows), height):
        part = slice(first, first + height)
        total = total + checkpoint(block, rows[part], part, use_reentrant=False)
    return total


def token_losses(
    logits: Tensor, wanted: Tensor, ids: Tensor, weights: Tensor, rest: Tensor | None, mix: float
) -> Tensor:
    """logits [C, V], the rows' own next tokens [C], the teacher's ids and weights [C, m] -> losses [C].

    rest [C]: the mass of all ids that are not named, held against the student's mass there in one piece.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weights = weights.to(logits.dtype)
    lse = logits.logsumexp(1)
    answer = lse - logits.gather(1, wanted[:, None])[:, 0]
    taught = weights.sum(1) * lse - (weights * logits.gather(1, ids)).sum(1)
    if rest is not None:
        others = logits.scatter(1, ids, -torch.inf).logsumexp(1)
        taught = taught + rest.to(logits.dtype) * (lse - others)
    return (1 - mix) * answer + mix * taught


class SplitModel:
    """A causal language model as what lies below its head, which runs once, and the rest, which runs on any tokens' states.

    Raises `PktError` for a model that cannot be parted so.
    """

    def __init__(self, model: Any) -> None:
        below = getattr(model, "base_model", None)
        if below is None or below is model or not hasattr(model, "get_output_embeddings"):
            raise _not_parted(model)
        self.model, self.below = model, below
        self._output: Any = None
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])

    def hidden(self, inputs: dict[str, Any]) -> Tensor:
        """[B, T, d], with their graph."""
        self._output = self.below(**inputs, use_cache=False)
        found = self._output[0]
        assert isinstance(found, Tensor)
        return found

    def logits(self, rows: Tensor) -> Tensor:
        """Hidden states [C, d] -> logits [C, V]."""
        with self._answering(rows[None]):
            found = output_field(self.model(inputs_embeds=rows[None], use_cache=False), "logits")
        if found is None:
            raise PktError(f"{type(self.model).__name__} gives no logits")
        return found[0]

    @contextlib.contextmanager
    def _answering(self, hidden: Tensor) -> Iterator[None]:
        """Inside, what lies below the head returns these states instead of computing any."""
        kind, fields = type(self._output), dict(self._output)
        answer = kind(**{**dict.fromkeys(fields), next(iter(fields)): hidden})
        called: list[bool] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            called.append(True)
            return answer

        # OPT's head calls the decoder of the model below it.
        modules = [m for m in (self.below, getattr(self.below, "decoder", None)) if isinstance(m, nn.Module)]
        before = [module.__dict__.get("forward") for module in modules]
        try:
            for module in modules:
                module.__dict__["forward"] = forward
            yield
        finally:
            for module, old in zip(modules, before, strict=True):
                del module.__dict__["forward"]
                if old is not None:
                    module.__dict__["forward"] = old
        if not called:
            raise _not_parted(self.model)


def _not_parted(model: Any) -> PktError:
    return PktError(
        f"{type(model).__name__} cannot be parted into its head and what lies below it, which learning from a teacher's targets "
        "needs; train it on the teacher's answers (pkt teach --generate)"
    )
